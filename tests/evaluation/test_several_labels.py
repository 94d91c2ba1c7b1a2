"""Images with any number of labels; prompts; and distances class by class."""

import json

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Features, LargeList, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.metrics import roc_auc_score
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from tests.conftest import read_json
from utils.arguments.evaluation import EvaluateArguments, ExtractorArguments
from utils.data.images import ImageRows
from utils.data.rows import read_label_sets
from utils.errors import UsageError
from utils.evaluation.downstream import (
    Classifiers,
    LabelledImages,
    measure_downstream_auroc,
)
from utils.evaluation.measuring import LabelledRows, choose_separator, extract_sets, load_sets
from utils.metrics.clip_score.clip_score import clip_score
from utils.metrics.frechet_distance.frechet_distance import (
    frechet_distance,
    frechet_distance_by_class,
)
from utils.models.public_models import build_tokenizer

FINDINGS = ["effusion", "mass"]  # a bright left half, a bright upper half


def draw_findings(count: int, seed: int) -> tuple[np.ndarray, list[list[str]]]:
    """Noise of 16 pixels [count, 16, 16, 3], in which each finding is bright, and their names."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 90, (count, 16, 16, 3)).astype(np.uint8)
    present = generator.integers(0, 2, (count, 2)).astype(bool)
    pixels[present[:, 0], :, :8] += 80
    pixels[present[:, 1], :8] += 80
    return pixels, [[n for n, p in zip(FINDINGS, row, strict=True) if p] for row in present]


def as_images(pixels: np.ndarray, names: list[list[str]]) -> LabelledImages:
    return LabelledImages(
        torch.from_numpy(pixels).permute(0, 3, 1, 2), [frozenset(own) for own in names]
    )


def save_synthetic(folder, separator: str) -> None:
    folder.mkdir()
    lines = []
    for index, (image, names) in enumerate(zip(*draw_findings(120, 0), strict=True)):
        Image.fromarray(image).save(folder / f"{index:06}.png")
        label = separator.join(names)
        line = {"file_name": f"{index:06}.png", "text": f"an x-ray of {label}", "label": label}
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def save_real(folder, as_lists: bool) -> None:
    pixels, names = draw_findings(80, 1)
    rows = {"image": [Image.fromarray(image) for image in pixels]}
    features = {"image": ImageFeature()}
    if as_lists:
        rows["label"] = names
        features["label"] = List(ClassLabel(names=[*FINDINGS, "never"]))
    else:
        rows["label"], features["label"] = ["|".join(own) for own in names], Value("string")
    Dataset.from_dict(rows, Features(features)).save_to_disk(folder)


def test_the_area_is_that_of_each_label():
    """Against scikit-learn, with the scores of a model of our own; and for what cannot be told."""
    pixels, names = draw_findings(200, 0)
    more = [[*own, *(["chance"] if i % 2 else [])] for i, own in enumerate(names)]
    trained = as_images(pixels, [[*own, "everywhere"] for own in more])
    pixels, names = draw_findings(100, 1)
    tested = as_images(
        pixels, [[*own, *(["chance"] if i % 2 else [])] for i, own in enumerate(names)]
    )
    classifiers = Classifiers({"cnn": 60}, 1)
    found = measure_downstream_auroc(trained, tested, classifiers, PartialState())
    assert list(found["per_class"]) == ["chance", *FINDINGS]
    assert found["not_measured"] == ["everywhere"]
    assert min(found["per_class"][name] for name in FINDINGS) > 0.95
    assert 0.3 < found["per_class"]["chance"] < 0.7
    assert found["value"] == pytest.approx(np.mean(list(found["per_class"].values())))
    with pytest.raises(UsageError, match="no label of the synthetic images is on some test images"):
        other = as_images(pixels, [["other"]] * len(pixels))
        measure_downstream_auroc(other, tested, classifiers, PartialState())


def test_areas_are_those_of_scikit_learn(monkeypatch):
    from utils.evaluation import downstream

    pixels, names = draw_findings(60, 2)
    images = as_images(pixels, names)
    logits = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    monkeypatch.setattr(downstream, "compute_logits", lambda *_: logits)  # with ties
    found = measure_downstream_auroc(images, images, Classifiers({"cnn": 1}, 1), PartialState())
    wanted = np.array([[name in own for name in FINDINGS] for own in names])
    expected = roc_auc_score(wanted, logits, average=None)
    np.testing.assert_allclose(list(found["per_class"].values()), expected, atol=1e-6)


@pytest.mark.parametrize("as_lists", [True, False])
def test_sets_with_several_labels_are_measured_label_by_label(run_script, tmp_path, as_lists):
    """Lists are known by their kind; texts by --label_separator."""
    separator = ", " if as_lists else "|"
    save_synthetic(tmp_path / "synthetic", separator)
    save_real(tmp_path / "real", as_lists)
    arguments = ["--synthetic", tmp_path / "synthetic", "--test_dataset_name", tmp_path / "real"]
    arguments += ["--metrics", "utility", "--classifier_steps", 60, "--classifier_seeds", 1]
    arguments += ["--test_is_public", *([] if as_lists else ["--label_separator", "|"])]
    run = run_script("evaluate.py", *arguments, "--evaluation_resolution", 16)
    assert run.returncode == 0, run.stderr
    found = read_json(tmp_path / "synthetic" / "metrics.json")
    assert found["auroc"]["value"] > 0.9 and "accuracy" not in found
    assert found["auroc"]["covered_by_epsilon"] is False  # nobody knows where the images come from
    assert set(found["auroc"]["per_class"]) == set(FINDINGS)
    report = (tmp_path / "synthetic" / "report.html").read_text()
    assert "ROC area of each label" in report and "effusion" in report


@pytest.mark.parametrize("kind", [List, LargeList])
def test_labels_in_lists_and_in_texts(kind):
    names = ClassLabel(names=["a, b", "c"])
    lists = Dataset.from_dict({"label": [[0, 1], [], [1]]}, Features({"label": kind(names)}))
    assert read_label_sets(lists, "label", ",") == [{"a, b", "c"}, set(), {"c"}]
    asked = EvaluateArguments(synthetic="-", test_dataset_name="-")
    real = LabelledRows(ImageRows(lists), "label")
    assert choose_separator(asked, {"real": real}) == ","  # so each is a label of several
    texts = Dataset.from_dict({"label": ["a|b", "", None, " c | a"]})
    assert read_label_sets(texts, "label", "|") == [{"a", "b"}, set(), set(), {"a", "c"}]
    with pytest.raises(UsageError, match="no such column"):
        read_label_sets(texts, "finding", "|")


def test_distances_class_by_class():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 60, 4))
    labels = (["a", "b", "c"] * 20, ["a"] * 30 + ["b"] * 29 + ["c"])
    found = frechet_distance_by_class(first, second, *labels)
    assert set(found) == {"a", "b"}  # of c there is one real image
    assert found["b"] == pytest.approx(frechet_distance(first[1::3], second[30:59]))


def test_clip_scores():
    images = np.array([[2.0, 0], [0, 3], [1, 0]])
    texts = np.array([[1.0, 0], [0, -1], [1, 1]])
    score, error = clip_score(images, texts)
    each = np.array([100, 0, 100 / 2**0.5])  # none is below zero
    assert score == pytest.approx(each.mean()) and error == pytest.approx(each.std() / 3**0.5)
    with pytest.raises(ValueError, match="one of each"):
        clip_score(images, texts[:2])


def test_prompts_are_compared_with_their_images(run_script, tmp_path):
    """By the embeddings that `transformers` makes of both."""
    torch.manual_seed(0)
    save_synthetic(tmp_path / "synthetic", "|")
    save_real(tmp_path / "real", False)
    tokenizer = build_tokenizer(["an x-ray of effusion|mass"], 300, 12)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    size["num_attention_heads"] = 2
    size["projection_dim"] = 12
    text = size | {"vocab_size": len(tokenizer), "max_position_embeddings": 12}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = size | {"patch_size": 8, "image_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = CLIPModel(config).eval()
    for part in (model, tokenizer, CLIPImageProcessorPil()):
        part.save_pretrained(tmp_path / "clip")
    arguments = ["--synthetic", tmp_path / "synthetic", "--test_dataset_name", tmp_path / "real"]
    arguments += ["--metrics", "fidelity", "--extractor", "clip", "--clip_model", tmp_path / "clip"]
    run = run_script("evaluate.py", *arguments, "--frechet_by_class")
    assert run.returncode == 0, run.stderr
    found = read_json(tmp_path / "synthetic" / "metrics.json")
    pixels, names = draw_findings(120, 0)
    images = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)(
        list(pixels), return_tensors="pt"
    )
    texts = tokenizer(
        [f"an x-ray of {'|'.join(own)}" for own in names],
        padding="max_length", max_length=12, truncation=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        seen = model(**images, **texts)
    cosines = (seen.image_embeds * seen.text_embeds).sum(1)
    assert found["clip_score"]["value"] == pytest.approx(
        100 * cosines.clamp_min(0).mean().item(), rel=1e-3
    )
    assert "num_real" not in found["clip_score"]
    assert not any(entry["covered_by_epsilon"] for entry in found.values())
    report = (tmp_path / "synthetic" / "report.html").read_text()
    assert "Fréchet distance, class by class" in report and "CLIP score" in report
    assert set(found["frechet_distance"]["per_class"]) == {"effusion", "effusion|mass", "mass", ""}


@pytest.mark.parametrize("asked, side, expected", [(None, 16, 16), (None, 80, 64), (24, 80, 24)])
def test_classifiers_see_images_of_the_side_of_the_synthetic_ones(tmp_path, asked, side, expected):
    save_real(tmp_path / "real", False)
    save_synthetic(tmp_path / "synthetic", "|")
    for path in (tmp_path / "synthetic").glob("*.png"):
        Image.open(path).resize((side, side + 3)).save(path)
    args = EvaluateArguments(
        synthetic=str(tmp_path / "synthetic"), test_dataset_name=str(tmp_path / "real"),
        evaluation_resolution=asked,
    )  # fmt: skip
    sets = load_sets(args, str(tmp_path / "cache"))
    _, pixels = extract_sets(sets, ["utility"], args, ExtractorArguments(), PartialState())
    assert {images.shape[2:] for images in pixels.values()} == {(expected, expected)}
