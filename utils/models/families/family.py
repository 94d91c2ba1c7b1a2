"""What differs between models: the questions that the rest of the house asks of a pipeline."""

import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from utils.errors import UsageError


def list_call_arguments(pipeline: type[DiffusionPipeline]) -> set[str]:
    """What the call of a pipeline takes."""
    return set(inspect.signature(pipeline.__call__).parameters)


def average_words(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the words of a caption: [n, T, W], and [n, T] which of them count -> [n, W]."""
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Family(ABC):
    """A pipeline, seen as one of its family.

    Attributes:
        title: what people call it. pipelines: the names of diffusers' classes.
        part: of the denoiser, and of its folder.
        encoder_parts, tokenizer_parts: of the text encoders, in one order.
        unused: parts that training and drawing do without, with what stands for them.
        about_unused: a paragraph for the card about what they do to images elsewhere.
        autoencoders: those whose latents can be trained on.
        has_shift: are latents shifted before they are scaled?
        text_dtype: that conditioning is kept in; masks are numbers there, too.
        longest_text: tokens, beyond which the pipeline's call refuses to read.
        process: the name of how its models were trained to see noise (`processes`).
        call: what the pipeline's call needs beside the prompt, to draw as it was trained.
        weighting_scheme: that the diffusers example for it trains with, if it is a flow.
        can_train_text: may a LoRA train on its text encoder? can_loda: may a LoDA on its denoiser?
        has_loda_pipeline: does pipeline.py, which goes with a LoDA, load it into this one?
        default_targets, all_targets: layers that an adapter goes beside, by suffix of their name.
        public_captions: to try a model with, the shortest first and the longest last.
    """

    title: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    part: ClassVar[str] = "transformer"
    encoder_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizer_parts: ClassVar[tuple[str, ...]] = ("tokenizer",)
    unused: ClassVar[dict] = {}
    about_unused: ClassVar[str] = ""
    autoencoders: ClassVar[tuple[type, ...]] = (AutoencoderKL,)
    has_shift: ClassVar[bool] = True
    text_dtype: ClassVar[torch.dtype] = torch.bfloat16
    longest_text: ClassVar[float] = math.inf
    process: ClassVar[str] = "Flow"
    call: ClassVar[dict] = {}
    weighting_scheme: ClassVar[str] = "none"
    can_train_text: ClassVar[bool] = False
    can_loda: ClassVar[bool] = True
    has_loda_pipeline: ClassVar[bool] = False
    default_targets: ClassVar[list[str]]
    all_targets: ClassVar[list[str]]
    public_captions: ClassVar[tuple[str, ...]] = (
        "",
        "a photo of a house by the sea, in the evening",
        "a photo of a house by the sea, and of all that can be seen from its roof in the evening",
    )

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipeline, self.part)

    @property
    def encoders(self) -> list[nn.Module]:
        """The text encoders; some pipelines can do without one."""
        parts = [getattr(self.pipeline, name) for name in self.encoder_parts]
        return [part for part in parts if part is not None]

    @property
    def tokenizers(self) -> list:
        parts = [getattr(self.pipeline, name) for name in self.tokenizer_parts]
        return [part for part in parts if part is not None]

    @property
    def device(self) -> torch.device:
        """Without the walk through every module that `pipeline.device` takes."""
        return next(self.denoiser.parameters()).device

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Of one image of `resolution` pixels a side: channels, height, width."""
        side = resolution // self.pixels_per_side
        return (self.pipeline.vae.config.latent_channels, side, side)

    @property
    def native_resolution(self) -> int:
        """In pixels.

        Raises:
            UsageError: the model does not say.
        """
        size = self.denoiser.config.get("sample_size")  # some makers write height and width
        if size is None and self.part != "unet":
            size = getattr(self.pipeline, "default_sample_size", 1024 // self.pixels_per_side)
        sides = {size} if isinstance(size, int) else set(size or ())
        if len(sides) != 1:
            raise UsageError(f"give --resolution: the model's sample_size is {size}")
        return sides.pop() * self.pixels_per_side

    @property
    def pixels_per_side(self) -> int:
        """Of an image, for one of its latents."""
        return self.pipeline.vae_scale_factor

    @property
    @abstractmethod
    def smallest_side(self) -> int:
        """Of a latent that the denoiser takes; every side is a multiple of it."""

    @property
    def largest_side(self) -> float:
        """Of a latent that the denoiser takes."""
        return math.inf

    def check_parts(self) -> None:
        """Raises: UsageError if the pipeline has parts with which training cannot work."""
        vae = self.pipeline.vae
        if not isinstance(vae, self.autoencoders):
            raise UsageError(
                f"its autoencoder is a {type(vae).__name__}, which gives no distribution of "
                f"latents; put the model's own {self.autoencoders[0].__name__} in its place"
            )

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, h, w] in [-1, 1] -> latents as the denoiser wants them: [n, c, r, r]."""
        vae = self.pipeline.vae
        latents = vae.encode(images).latent_dist.mode()
        if self.has_shift:
            latents = latents - vae.config.shift_factor
        return latents * vae.config.scaling_factor

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [n, c, r, r] as the pipeline takes its first noise."""
        return latents

    def begin(
        self, prompts: list[str], generators: list[torch.Generator], resolution: int
    ) -> dict[str, object]:
        """What the pipeline's call takes to draw one image a prompt, each from noise of its own
        generator."""
        shape = self.latent_shape(resolution)
        noise = torch.stack([torch.randn(shape, generator=each) for each in generators])
        latents = self.pack(noise).to(self.device, self.denoiser.dtype)
        # The generators are also for samplers that add noise at each step.
        return {"prompt": list(prompts), "latents": latents, "generator": generators}

    def describe_prompt(self, prompt: str) -> str:
        """The prompt, as Python that calls the pipeline has it."""
        return f"prompt={prompt!r}"

    def find_unknown(self, captions: Iterable[str]) -> str | None:
        """What of these the model cannot be told, in a sentence that shows none; or None."""
        return None

    def check_captions(self, captions: Iterable[str]) -> None:
        """Raises: UsageError if the model cannot be told one of them."""
        problem = self.find_unknown(captions)
        if problem is not None:
            raise UsageError(problem)

    @abstractmethod
    def encode_text(self, captions: list[str], resolution: int) -> dict[str, torch.Tensor]:
        """The conditioning by captions, by name, as `predict` takes it: each [n, ...]. Its shape
        does not depend on the captions."""

    @abstractmethod
    def summarise(self, caption: str) -> torch.Tensor:
        """One vector that says what a caption is about: [1, W]."""

    @staticmethod
    @abstractmethod
    def predict(
        denoiser: nn.Module,
        noisy: torch.Tensor,
        time: torch.Tensor,
        text: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """What the process trains the denoiser to predict, like `noisy` [n, c, r, r].

        Args:
            time: [n], as `Corrupted.time`. text: what `encode_text` returns.
        """

    @property
    def predictor(self) -> Callable[..., torch.Tensor]:
        """`predict` of this pipeline's denoiser."""
        return partial(self.predict, self.denoiser)

    @property
    def text_length(self) -> int:
        """Tokens of a caption that are read, padding included, where a model leaves the choice:
        what was set, or as many as the pipeline's call reads."""
        chosen = getattr(self.pipeline, "text_length", None)
        return chosen or self.read_default("max_sequence_length")

    @text_length.setter
    def text_length(self, value: int | None) -> None:
        self.pipeline.text_length = value

    @property
    def guidance(self) -> float:
        """The scale that images are drawn with, of which some models are told: what was set, or the
        pipeline's own."""
        chosen = getattr(self.pipeline, "told_guidance", None)
        return self.read_default("guidance_scale") if chosen is None else chosen

    @guidance.setter
    def guidance(self, value: float | None) -> None:
        self.pipeline.told_guidance = value

    def describe_reading(self) -> list:
        """All rules by which captions become tokens, and what else `encode_text` depends on."""
        found = []
        for tokenizer in self.tokenizers:
            rules = json.loads(tokenizer.backend_tokenizer.to_str())
            for passing in ("padding", "truncation"):  # as its last caller left them
                rules.pop(passing)
            found.append((rules, tokenizer.pad_token_id, tokenizer.chat_template))
        return found + ([self.guidance] if self.is_told_guidance else [])

    @property
    def is_told_guidance(self) -> bool:
        """Is the scale of guidance an input of the model?"""
        return False

    def count_cut(self, captions: list[str]) -> int:
        """How many captions have more tokens than the (last) text encoder reads."""
        # Not verbose: a warning would give the lengths of private captions away.
        tokens = self.tokenizers[-1](captions, verbose=False).input_ids
        return sum(len(ids) > self.longest_caption for ids in tokens)

    def count_alike(self, captions: list[str]) -> int:
        """How many captions are to all text encoders, which cut long ones, as another is."""
        limits = [part.model_max_length for part in self.tokenizers[:-1]] + [self.longest_caption]
        parts = zip(self.tokenizers, limits, strict=True) if captions else ()
        tokens = [(part(captions, verbose=False).input_ids, limit) for part, limit in parts]
        cut = [[tuple(ids[: limit - 1]) for ids in found] for found, limit in tokens]
        return len(captions) - len(set(zip(*cut, strict=True)))

    @property
    def longest_caption(self) -> int:
        """In tokens."""
        return self.text_length

    def takes(self, name: str) -> bool:
        """Whether this is an argument of the pipeline's call."""
        return name in list_call_arguments(type(self.pipeline))

    def read_default(self, name: str) -> object:
        """What the pipeline's own call does where an argument of it is not given."""
        return inspect.signature(type(self.pipeline).__call__).parameters[name].default

    @property
    def scheduler(self) -> dict[str, object]:
        """How images are drawn, as in sampling.json: the pipeline's own scheduler."""
        return {"_class_name": type(self.pipeline.scheduler).__name__}

    @property
    def num_inference_steps(self) -> int:
        """To draw an image with that scheduler."""
        return self.read_default("num_inference_steps")

    @staticmethod
    @abstractmethod
    def is_attention(name: str) -> bool:
        """Is this layer, or weight, of the denoiser part of an attention block?"""

    @staticmethod
    def packs_rows(name: str) -> bool:
        """Does this layer see the tokens of all rows as one row? Then it cannot train."""
        return False

    def list_blocks(self) -> list[str]:
        """The parts of the denoiser that --trainable_blocks may name."""
        names = (name for name, _ in self.denoiser.named_modules())
        return [n for n in names if n == "mid_block" or (n.count(".") == 1 and "blocks." in n)]

    def find_distillation(self) -> str | None:
        """What of the denoiser's configuration says that it was distilled, or None."""
        return None
