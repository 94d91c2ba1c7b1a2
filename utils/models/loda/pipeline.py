"""Stable Diffusion with a LoDA adapter, for people who have diffusers and peft only:

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(
        BASE_MODEL, custom_pipeline="user/adapter", trust_remote_code=True
    )
    pipeline.load_loda("user/adapter")

A published adapter carries this file as pipeline.py, and loda.py beside it.
"""

from diffusers import StableDiffusionPipeline

from .loda import load_loda


class LoDAPipeline(StableDiffusionPipeline):
    """A StableDiffusionPipeline that can put a LoDA beside its U-Net."""

    def load_loda(self, name_or_path: str, adapter_name: str = "default") -> None:
        """Load a LoDA from a folder or the Hub. Raises ValueError if it does not fit."""
        load_loda(self.unet, name_or_path, adapter_name)
