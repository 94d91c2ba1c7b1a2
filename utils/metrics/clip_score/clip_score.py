"""How well images fit their prompts (Hessel et al. 2021, section 3, with w = 100, as is usual).

It depends on the CLIP model whose embeddings are compared, which must be named with it.
"""

import datasets
import evaluate
import numpy as np

CITATION = """@inproceedings{hessel2021clipscore,
  title={{CLIPScore}: A Reference-free Evaluation Metric for Image Captioning},
  author={Hessel, Jack and Holtzman, Ari and Forbes, Maxwell and Le Bras, Ronan and Choi, Yejin},
  booktitle={Empirical Methods in Natural Language Processing},
  year={2021}
}"""


def clip_score(images: np.ndarray, texts: np.ndarray) -> tuple[float, float]:
    """The mean of max(100 cos, 0) over pairs, and its standard error.

    Args:
        images, texts: embeddings of each image and of its prompt, [N, d].

    Raises:
        ValueError: their shapes differ, or there is none.
    """
    if images.shape != texts.shape or not len(images):
        raise ValueError(
            f"{images.shape} image and {texts.shape} text embeddings: give one of each"
        )
    images, texts = (np.asarray(rows, np.float64) for rows in (images, texts))
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    scores = np.maximum(100 * (images * texts).sum(1) / lengths, 0)
    return float(scores.mean()), float(scores.std() / len(scores) ** 0.5)


class ClipScore(evaluate.Metric):
    def _info(self):
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="How well images fit their prompts, by the embeddings of a CLIP model.",
            citation=CITATION,
            inputs_description="predictions, references: embeddings of images and prompts, [N, d].",
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def compute(self, *, predictions, references):
        """Unlike in `evaluate`, nothing is cached on disk: the rows may describe private images."""
        return self._compute(np.asarray(predictions), np.asarray(references))

    def _compute(self, predictions, references):
        score, error = clip_score(predictions, references)
        return {"clip_score": score, "standard_error": error}
