"""Stable Diffusion 1, 2 and XL: a U-Net with cross-attention, trained by DDPM."""

import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL

from utils.errors import UsageError
from utils.models.families.family import Family

# peft matches by suffix: "to_out.0" is the Linear inside the ModuleList `to_out`.
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]
ALL_TARGETS = [*DEFAULT_TARGETS, "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


class StableDiffusion(Family):
    """Versions 1 and 2. Rombach et al. 2022."""

    title = "Stable Diffusion"
    pipelines = ("StableDiffusionPipeline",)
    part = "unet"
    # All of it looks at finished images only.
    unused = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    about_unused = (
        "The samples were drawn without a safety checker. A base may have one, which turns images "
        "black that it finds indecent: `safety_checker=None`, when it is loaded, leaves it out."
    )
    autoencoders = (AutoencoderKL, AsymmetricAutoencoderKL)
    text_dtype = torch.float32
    process = "Ddpm"
    has_shift = False
    can_train_text = has_loda_pipeline = True
    default_targets, all_targets = DEFAULT_TARGETS, ALL_TARGETS

    @property
    def smallest_side(self) -> int:
        return 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    def check_parts(self) -> None:
        super().check_parts()
        unet, vae = self.denoiser.config, self.pipeline.vae.config
        if unet.in_channels != vae.latent_channels:
            raise UsageError(
                f"its U-Net reads {unet.in_channels} channels, and its autoencoder makes "
                f"{vae.latent_channels}: it was made for another task, such as inpainting"
            )
        if unet.class_embed_type is not None or unet.num_class_embeds is not None:
            raise UsageError("its U-Net wants class embeddings: it was made for another task")

    @property
    def longest_caption(self) -> int:
        return self.tokenizers[0].model_max_length

    def tokenize(self, captions: list[str]) -> list[torch.Tensor]:
        """Token ids for each text encoder: [n, T], padded and cut as the pipeline does."""
        return [tokenize_captions(tokenizer, captions) for tokenizer in self.tokenizers]

    def encode_text(self, captions: list[str], resolution: int) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` [n, T, W]."""
        ids = self.tokenize(captions)[0].to(self.device)
        return {"encoder_hidden_states": self.pipeline.text_encoder(ids)[0]}

    def summarise(self, caption: str) -> torch.Tensor:
        ids = self.tokenize([caption])[0].to(self.device)
        return self.pipeline.text_encoder(ids).pooler_output

    @staticmethod
    def predict(denoiser, noisy, time, text) -> torch.Tensor:
        added = dict(text)
        hidden = added.pop("encoder_hidden_states")
        return denoiser(noisy, time, hidden, added_cond_kwargs=added or None).sample

    @property
    def scheduler(self) -> dict[str, object]:
        """DPM-Solver++ (Lu et al. 2022), on the model's own noise schedule."""
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver++",
            "final_sigmas_type": "zero",
        }

    @property
    def num_inference_steps(self) -> int:
        return 25  # at 8, images of 512 pixels lack detail; small ones do not

    @staticmethod
    def is_attention(name: str) -> bool:
        return ".attentions." in name

    def find_distillation(self) -> str | None:
        reads_guidance = self.denoiser.config.time_cond_proj_dim is not None
        return "its U-Net reads the guidance scale" if reads_guidance else None


class StableDiffusionXL(StableDiffusion):
    """Podell et al. 2023, sections 2.1 and 2.2."""

    title = "Stable Diffusion XL"
    pipelines = ("StableDiffusionXLPipeline",)
    encoder_parts = ("text_encoder", "text_encoder_2")
    tokenizer_parts = ("tokenizer", "tokenizer_2")
    unused, about_unused = {}, ""
    can_train_text = can_loda = has_loda_pipeline = False

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        latents, config = vae.encode(images).latent_dist.mode(), vae.config
        moments = config.get("latents_mean"), config.get("latents_std")  # of each channel
        if None not in moments:
            mean, std = (torch.tensor(v, device=latents.device).view(1, -1, 1, 1) for v in moments)
            latents = (latents - mean) / std
        return latents * config.scaling_factor

    def encode_text(self, captions: list[str], resolution: int) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` [n, T, W], W both encoders' widths together; the pooled
        `text_embeds` [n, P]; and the sizes `time_ids` [n, 6]: every image counts as uncropped and
        of the training resolution, so they depend on no private image."""
        outputs = [
            encoder(ids.to(self.device), output_hidden_states=True)
            for encoder, ids in zip(self.encoders, self.tokenize(captions), strict=True)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution])
        return {
            "encoder_hidden_states": hidden,
            "text_embeds": outputs[1][0],
            "time_ids": sizes.to(hidden).expand(len(captions), 6),
        }


def tokenize_captions(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids [len(captions), max_length], padded and cut as the pipeline does."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
