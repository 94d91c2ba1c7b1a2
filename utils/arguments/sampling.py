"""The options of image generation."""

from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.errors import UsageError

DEFAULT_STEPS = 8  # of DPM-Solver++; benchmarks/RESULTS.md has what 50 of DDIM would gain


@dataclass
class SamplingArguments:
    """What to generate, and how."""

    adapter: str | None = option("folder or Hub id of what a training script published", None)
    adapter_revision: str | None = option("revision of an adapter on the Hub", None)
    prompts: list[str] | None = option("prompts, one or more", None)
    prompts_file: str | None = option("text file with a prompt a line", None)
    class_names: list[str] | None = option("class names that fill --caption_template", None)
    caption_template: str = option("prompt for a class name", "a photo of a {label}")
    num_images: int = option("how many images in all", 100)
    resolution: int | None = option("side in pixels; default: that of the model", None)
    num_inference_steps: int = option("steps of DPM-Solver++", DEFAULT_STEPS)
    guidance_scale: float = option("classifier-free guidance; 1 is none", 2.0)
    batch_size: int = option("images per batch", 32)
    mixed_precision: str = option("precision of the whole model", "no", ["no", "bf16"])
    output_format: str = option(
        "png: a file an image; parquet: shards in data/, for large sets", "png", ["png", "parquet"]
    )
    seed: int = option("image i starts from noise that depends on the seed and i alone", 0)

    def __post_init__(self):
        if min(self.num_images, self.batch_size, self.num_inference_steps) < 1:
            raise UsageError(
                "--num_images, --batch_size and --num_inference_steps must be at least 1"
            )
