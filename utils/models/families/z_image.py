"""Z-Image: one stream of text and image tokens, of lists of unequal length. Z-Image team 2025."""

import torch

from utils.models.families.family import Family


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

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        latents = vae.encode(images).latent_dist.mode()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

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
        text = self.encode_text([caption], 0)
        return text["hidden"].sum(1) / text["mask"].sum(1, keepdim=True)

    @staticmethod
    def predict(denoiser, noisy, time, text) -> torch.Tensor:
        words = [h[m > 0] for h, m in zip(text["hidden"], text["mask"], strict=True)]
        images = list(noisy.unsqueeze(2).unbind())
        predicted = denoiser(images, (1000 - time) / 1000, words).sample
        return -torch.stack(predicted).squeeze(2)

    @staticmethod
    def is_attention(name: str) -> bool:
        return ".attention." in name
