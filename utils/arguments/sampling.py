"""The options of image generation."""

from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.arguments.values import check_between, check_seed, choose_precision
from utils.errors import UsageError

USUAL_TEMPLATE = "a photo of a {label}"


@dataclass
class DrawingArguments:
    """How images are drawn; what is not given is what sampling.json beside the model says."""

    num_inference_steps: int | None = option(
        "steps of the scheduler; default: the model's, or else 25 (Stable Diffusion 1, 2, XL) or "
        "the pipeline's",
        None,
    )
    guidance_scale: float | None = option(
        "classifier-free guidance, 1 is none (of Z-Image, 0); of FLUX.1 [dev] an input, in "
        "training, too; default: the model's, or else the pipeline's",
        None,
    )
    negative_prompt: str | None = option("what the images should not show", None)
    max_sequence_length: int | None = option(
        "tokens of a prompt, or a caption, that are read, where a model leaves the choice; "
        "default: the model's, or else the pipeline's",
        None,
    )

    def __post_init__(self):
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise UsageError(f"--num_inference_steps {self.num_inference_steps} must be at least 1")
        if self.max_sequence_length is not None and self.max_sequence_length < 1:
            raise UsageError(f"--max_sequence_length {self.max_sequence_length} must be at least 1")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < 1000:
            raise UsageError(f"--guidance_scale {self.guidance_scale} must be at least 0")


@dataclass
class SamplingArguments(DrawingArguments):
    """What to generate, and how."""

    adapter: str | None = option(
        "what a training script published: folder or Hub id; or a LoRA's .safetensors file", None
    )
    adapter_revision: str | None = option("revision of an adapter on the Hub", None)
    prompts: list[str] | None = option("prompts, one or more; '' is one", None)
    prompts_file: str | None = option("text file with a prompt a line", None)
    class_names: list[str] | None = option("class names that fill --caption_template", None)
    caption_template: str | None = option(
        "prompt for a class name; default: as the adapter or the model was trained, if its "
        f"sampling.json says so, or '{USUAL_TEMPLATE}'",
        None,
    )
    num_images: int = option("how many images in all", 100)
    resolution: int | None = option("side in pixels; default: that of the model", None)
    batch_size: int | None = option(
        "images per batch; default: 64 small ones, 4 of 512 pixels, 1 of 1024", None
    )
    mixed_precision: str | None = option(
        "precision of the whole model, no or bf16; default: that of accelerate launch, or no", None
    )
    output_format: str = option(
        "png: a file an image; parquet: shards in data/, for large sets", "png", ["png", "parquet"]
    )
    reject: float = option(
        "share of the images drawn that is left out, those least typical of their prompt by "
        "classifiers that saw synthetic images alone: it costs time, and no privacy",
        0.0,
    )
    reject_by: str | None = option(
        "synthetic set with the same prompts to train that classifier on: that of "
        "release_means.py which the adapter started from; default: the images themselves, each "
        "half judged by the other",
        None,
    )
    seed: int = option("image i starts from noise that depends on the seed and i alone", 0)

    def __post_init__(self):
        super().__post_init__()
        check_seed(self.seed)
        self.mixed_precision = choose_precision(self.mixed_precision)
        check_between("reject", self.reject, 0, 1)
        if self.reject_by is not None and not self.reject:
            raise UsageError("--reject_by needs --reject, the share to leave out")
        if len(set(self.class_names or [])) < len(self.class_names or []):
            raise UsageError("--class_names names a class twice")
        if min(self.num_images, 1 if self.batch_size is None else self.batch_size) < 1:
            raise UsageError("--num_images and --batch_size must be at least 1")
