"""PixArt-Sigma: a transformer with cross-attention to T5's words, trained by DDPM.

Chen et al. 2024.
"""

import torch

from utils.models.families.family import Family, average_words


class PixArtSigma(Family):
    """It learns a variance, too, which no sampler reads."""

    title = "PixArt-Sigma"
    pipelines = ("PixArtSigmaPipeline",)
    process = "Ddpm"
    has_shift = False
    default_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    all_targets = [*default_targets, "ff.net.0.proj", "ff.net.2"]
    # At the size that is asked for; of the captions as they are, not cleaned where two more
    # packages are installed.
    call = {"use_resolution_binning": False, "clean_caption": False}

    @property
    def smallest_side(self) -> int:
        return self.denoiser.config.patch_size

    def encode_text(self, captions: list[str], resolution: int) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` [n, T, W] and their `encoder_attention_mask` [n, T]."""
        hidden, mask, *_ = self.pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            device=self.device,
            clean_caption=self.call["clean_caption"],
            max_sequence_length=self.text_length,
        )
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def summarise(self, caption: str) -> torch.Tensor:
        return average_words(*self.encode_text([caption], 0).values())

    @staticmethod
    def predict(denoiser, noisy, time, text) -> torch.Tensor:
        sizes = {"resolution": None, "aspect_ratio": None}
        predicted = denoiser(noisy, timestep=time, added_cond_kwargs=sizes, **text).sample
        return predicted[:, : noisy.shape[1]]

    @staticmethod
    def is_attention(name: str) -> bool:
        return ".attn1." in name or ".attn2." in name
