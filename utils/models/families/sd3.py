"""Stable Diffusion 3 and 3.5: a transformer over text and image patches, trained as a flow.

Esser et al. 2024.
"""

import re

import torch

from utils.models.families.family import Family

ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
OF_TEXT = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


class StableDiffusion3(Family):
    """Two CLIP encoders and T5, which may be missing."""

    title = "Stable Diffusion 3"
    pipelines = ("StableDiffusion3Pipeline",)
    encoder_parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizer_parts = ("tokenizer", "tokenizer_2", "tokenizer_3")
    unused = {"image_encoder": None, "feature_extractor": None}
    default_targets = ATTENTION + OF_TEXT
    all_targets = ATTENTION + OF_TEXT + FEED_FORWARD
    weighting_scheme = "logit_normal"
    longest_text = 512

    @property
    def smallest_side(self) -> int:
        return self.denoiser.config.patch_size

    @property
    def largest_side(self) -> float:
        return self.denoiser.config.pos_embed_max_size * self.denoiser.config.patch_size

    def encode_text(self, captions: list[str], resolution: int) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` [n, T, W], CLIP's and then T5's; `pooled_projections` [n, P]."""
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def summarise(self, caption: str) -> torch.Tensor:
        return self.encode_text([caption], 0)["pooled_projections"]

    @staticmethod
    def predict(denoiser, noisy, time, text) -> torch.Tensor:
        return denoiser(noisy, timestep=time, **text).sample

    @property
    def longest_caption(self) -> int:
        if self.pipeline.text_encoder_3 is None:
            return self.tokenizers[0].model_max_length
        return self.text_length

    @staticmethod
    def is_attention(name: str) -> bool:
        return re.search(r"\.attn2?\.", name) is not None
