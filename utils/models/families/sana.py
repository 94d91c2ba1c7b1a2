"""Sana: linear attention over latents of a deep autoencoder, text from Gemma. Xie et al. 2024."""

import torch
from diffusers import AutoencoderDC

from utils.models.families.family import Family, average_words


class Sana(Family):
    """Its pipelines put an instruction before each prompt; training does so, too."""

    title = "Sana"
    pipelines = ("SanaPipeline",)
    autoencoders = (AutoencoderDC,)
    default_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    all_targets = [*default_targets, "ff.conv_inverted", "ff.conv_point"]
    call = {"use_resolution_binning": False}  # draw at the size that is asked for

    @property
    def smallest_side(self) -> int:
        return max(self.denoiser.config.patch_size, 32 // self.pixels_per_side)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return self.pipeline.vae.encode(images).latent * self.pipeline.vae.config.scaling_factor

    def encode_text(self, captions: list[str], resolution: int) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` [n, T, W] and their `encoder_attention_mask` [n, T]."""
        hidden, mask, *_ = self.pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.text_length,
            complex_human_instruction=self.read_default("complex_human_instruction"),
        )
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def describe_reading(self) -> list:
        return [*super().describe_reading(), self.read_default("complex_human_instruction")]

    def summarise(self, caption: str) -> torch.Tensor:
        return average_words(*self.encode_text([caption], 0).values())

    @staticmethod
    def predict(denoiser, noisy, time, text) -> torch.Tensor:
        predicted = denoiser(noisy, timestep=time * denoiser.config.timestep_scale, **text).sample
        return predicted[:, : noisy.shape[1]]  # some models learn a variance, too

    @staticmethod
    def is_attention(name: str) -> bool:
        return ".attn1." in name or ".attn2." in name
