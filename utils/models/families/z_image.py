"""Z-Image: one stream of text and image tokens, of lists of unequal length. Z-Image team 2025."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from utils.models.families.family import Family, average_words

MULTIPLE = 32  # captions end with tokens that stand for nothing, up to such a number


class ZImage(Family):
    """Its time runs the other way, from noise to image, and so does what it predicts."""

    title = "Z-Image"
    pipelines = ("ZImagePipeline",)
    default_targets = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"]
    all_targets = [*default_targets, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]

    @property
    def smallest_side(self) -> int:
        return 2

    @property
    def largest_side(self) -> float:
        return 2 * min(self.denoiser.config.axes_lens[1:])

    def encode_text(self, captions: list[str], resolution: int) -> dict[str, torch.Tensor]:
        """`hidden` [n, T, W], zero beyond the end of a caption; `mask` [n, T]: one up to there."""
        found, _ = self.pipeline.encode_prompt(
            list(captions),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        hidden = found[0].new_zeros(len(found), self.text_length, found[0].shape[-1])
        mask = hidden.new_zeros(hidden.shape[:2])
        for row, words in enumerate(found):
            hidden[row, : len(words)], mask[row, : len(words)] = words, 1
        return {"hidden": hidden, "mask": mask}

    def summarise(self, caption: str) -> torch.Tensor:
        return average_words(*self.encode_text([caption], 0).values())

    @staticmethod
    def predict(denoiser, noisy, time, text) -> torch.Tensor:
        words = [h[m > 0] for h, m in zip(text["hidden"], text["mask"], strict=True)]
        images = list(noisy.unsqueeze(2).unbind())
        with _equal_lengths(denoiser, text["mask"].shape[1]):
            predicted = denoiser(images, (1000 - time) / 1000, words).sample
        return -torch.stack(predicted).squeeze(2)

    @staticmethod
    def packs_rows(name: str) -> bool:
        return "_embedder." in name and not name.startswith("t_embedder")

    @staticmethod
    def is_attention(name: str) -> bool:
        return ".attention." in name


class _Turns(torch.Tensor):
    """Complex numbers that multiply others as pairs of real ones, which a CPU rounds alike wherever
    they lie (see `elementwise`)."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.mul:
            return super().__torch_function__(func, types, args, kwargs)
        x, y = (part.as_subclass(torch.Tensor) for part in args)
        real = x.real * y.real - x.imag * y.imag
        return torch.complex(real, x.real * y.imag + x.imag * y.real)


@contextmanager
def _equal_lengths(denoiser: nn.Module, longest: int) -> Iterator[None]:
    """Within this context captions fill up to `longest` tokens, which nothing attends to.

    The model itself fills up to the longest caption of the batch, so that one unit's caption would
    change the shape of everyone's products, and with it their rounding.
    """
    longest += -longest % MULTIPLE
    patchify, prepare = denoiser.patchify_and_embed, denoiser._prepare_sequence
    unify, masks = denoiser._build_unified_sequence, []

    def fill(rows: torch.Tensor, value: float = 0) -> torch.Tensor:
        more = longest - len(rows)
        return F.pad(rows, (0, 0, 0, more) if rows.ndim > 1 else (0, more), value=value)

    def patchify_filled(*arguments):
        x, words, sizes, x_ids, ids, x_pad, pad = patchify(*arguments)
        ends = torch.tensor([len(rows) for rows in words], device=x[0].device)
        masks.append(torch.arange(longest, device=x[0].device) < ends[:, None])
        filled = ([fill(rows) for rows in part] for part in (words, ids, pad))
        words, ids, pad = filled
        return x, words, sizes, x_ids, ids, x_pad, pad

    def prepare_masked(feats, ids, pad, token, *more):
        feats, freqs, mask, lengths, noise = prepare(feats, ids, pad, token, *more)
        freqs = freqs.as_subclass(_Turns) if freqs.device.type == "cpu" else freqs
        return feats, freqs, masks[0] if token is denoiser.cap_pad_token else mask, lengths, noise

    def unify_masked(x, *more):
        unified, freqs, _, noise = unify(x, *more)
        return unified, freqs, torch.cat([masks[0].new_ones(x.shape[:2]), masks[0]], 1), noise

    denoiser.patchify_and_embed, denoiser._prepare_sequence = patchify_filled, prepare_masked
    denoiser._build_unified_sequence = unify_masked
    try:
        yield
    finally:
        del denoiser.patchify_and_embed, denoiser._prepare_sequence
        del denoiser._build_unified_sequence
