"""FLUX.1 and FLUX.2 [klein]: transformers over packed tokens of text and image; flows."""

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, FluxPipeline

from utils.models.families.family import Family

ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
OF_TEXT = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]


class Flux(Family):
    """FLUX.1: T5 and a pooled CLIP vector; 2 x 2 latents make a token. The scale of guidance is an
    input of some of its models: in training it is that with which images are drawn."""

    title = "FLUX.1"
    pipelines = ("FluxPipeline",)
    encoder_parts = ("text_encoder", "text_encoder_2")
    tokenizer_parts = ("tokenizer", "tokenizer_2")
    unused = {"image_encoder": None, "feature_extractor": None}
    longest_text = 512
    default_targets = ATTENTION + OF_TEXT
    all_targets = [
        *default_targets,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("proj_mlp", "proj_out"),
    ]

    @property
    def smallest_side(self) -> int:
        return 2

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return FluxPipeline._pack_latents(latents, *latents.shape)

    def encode_text(self, captions: list[str], resolution: int) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` [n, T, W], `pooled_projections` [n, P]; `guidance` [n] if any."""
        hidden, pooled, _ = self.pipeline.encode_prompt(
            list(captions), None, device=self.device, max_sequence_length=self.text_length
        )
        text = {"encoder_hidden_states": hidden, "pooled_projections": pooled}
        if self.is_told_guidance:
            scale = float(self.guidance)
            text["guidance"] = torch.full([len(captions)], scale, device=self.device)
        return text

    @property
    def is_told_guidance(self) -> bool:
        return self.denoiser.config.guidance_embeds

    def takes(self, name: str) -> bool:
        """A negative prompt is read only with true guidance, which nothing here asks for."""
        return name != "negative_prompt" and super().takes(name)

    def summarise(self, caption: str) -> torch.Tensor:
        return self.encode_text([caption], 0)["pooled_projections"]

    @staticmethod
    def predict(denoiser, noisy, time, text) -> torch.Tensor:
        side, hidden = noisy.shape[-1], text["encoder_hidden_states"]
        ids = FluxPipeline._prepare_latent_image_ids(
            len(noisy), side // 2, side // 2, noisy.device, noisy.dtype
        )
        tokens = denoiser(
            FluxPipeline._pack_latents(noisy, *noisy.shape),
            timestep=time / 1000,
            txt_ids=torch.zeros(hidden.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=ids,
            **text,
        ).sample
        return FluxPipeline._unpack_latents(tokens, side, side, 1)

    @staticmethod
    def is_attention(name: str) -> bool:
        return ".attn." in name

    def find_distillation(self) -> str | None:
        """FLUX.1 [schnell] takes no guidance, and its noise is not shifted by the resolution."""
        shifted = self.pipeline.scheduler.config.get("use_dynamic_shifting")
        if self.denoiser.config.guidance_embeds or shifted:
            return None
        return "it takes no guidance, and its noise levels are not shifted, as FLUX.1 [schnell]'s"


class Flux2Klein(Family):
    """FLUX.2 [klein]: Qwen3 reads the text; latents of 2 x 2 pixels are channels, normalised by the
    running moments of the autoencoder."""

    title = "FLUX.2 [klein]"
    pipelines = ("Flux2KleinPipeline",)
    autoencoders = (AutoencoderKLFlux2,)
    default_targets = [*ATTENTION, *OF_TEXT, "attn.to_qkv_mlp_proj"]
    all_targets = [
        *default_targets,
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        "attn.to_out",
    ]

    @property
    def smallest_side(self) -> int:
        return 2

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        channels, side, _ = super().latent_shape(resolution)
        return (4 * channels, side // 2, side // 2)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        latents = Flux2KleinPipeline._patchify_latents(vae.encode(images).latent_dist.mode())
        mean, variance = (v.view(1, -1, 1, 1) for v in (vae.bn.running_mean, vae.bn.running_var))
        return (latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)

    def encode_text(self, captions: list[str], resolution: int) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` [n, T, W]."""
        hidden, _ = self.pipeline.encode_prompt(
            list(captions), self.device, max_sequence_length=self.text_length
        )
        return {"encoder_hidden_states": hidden}

    def summarise(self, caption: str) -> torch.Tensor:
        return self.encode_text([caption], 0)["encoder_hidden_states"].mean(1)

    @staticmethod
    def predict(denoiser, noisy, time, text) -> torch.Tensor:
        hidden, text_ids = text["encoder_hidden_states"], Flux2KleinPipeline._prepare_text_ids
        tokens = denoiser(
            Flux2KleinPipeline._pack_latents(noisy),
            timestep=time / 1000,
            encoder_hidden_states=hidden,
            txt_ids=text_ids(hidden).to(noisy.device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(noisy).to(noisy.device),
        ).sample
        return tokens.transpose(1, 2).reshape(noisy.shape)

    @staticmethod
    def is_attention(name: str) -> bool:
        return ".attn." in name

    def find_distillation(self) -> str | None:
        return "its configuration says so" if self.pipeline.config.is_distilled else None
