"""DiT: a transformer that is told a class, not a caption, trained by DDPM. Peebles and Xie 2023."""

from collections.abc import Iterable

import torch

from utils.errors import UsageError
from utils.models.families.family import Family

NO_CLASS = 1000  # in whose place its pipeline draws without guidance


class DiT(Family):
    """A caption is the name of a class, as `pipeline.labels` has it, or its number; the empty one
    is no class. It draws at one size only."""

    title = "DiT"
    pipelines = ("DiTPipeline",)
    encoder_parts = tokenizer_parts = ()
    text_dtype = torch.float32
    process = "Ddpm"
    has_shift = False
    default_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    all_targets = [*default_targets, "ff.net.0.proj", "ff.net.2", "norm1.linear"]
    public_captions = ("", "7", "207")

    @property
    def pixels_per_side(self) -> int:
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    @property
    def smallest_side(self) -> int:
        return self.denoiser.config.sample_size

    @property
    def largest_side(self) -> int:
        return self.denoiser.config.sample_size

    def check_parts(self) -> None:
        super().check_parts()
        count = self.denoiser.config.num_embeds_ada_norm
        if count != NO_CLASS:
            raise UsageError(
                f"it knows {count} classes: its pipeline draws with guidance only from a model of "
                f"{NO_CLASS:,}, since that is its number for no class"
            )

    def find_class(self, caption: str) -> int | None:
        """The number of a class; None if there is no such class."""
        if not caption.strip():
            return NO_CLASS
        if caption.strip().isdecimal():
            number = int(caption)
            return number if number < NO_CLASS else None
        return self.pipeline.labels.get(caption.strip())

    def find_unknown(self, captions: Iterable[str]) -> str | None:
        unknown = sum(self.find_class(caption) is None for caption in captions)
        if not unknown:
            return None
        return (
            f"{unknown} captions or prompts are no class of this model: each must be a name from "
            f"its list of labels, or a number below {NO_CLASS:,}; for the names in a label column, "
            "--caption_template '{label}'"
        )

    def encode_text(self, captions: list[str], resolution: int) -> dict[str, torch.Tensor]:
        """`class_labels` [n]."""
        self.check_captions(captions)
        numbers = [self.find_class(caption) for caption in captions]
        return {"class_labels": torch.tensor(numbers, device=self.device)}

    def summarise(self, caption: str) -> torch.Tensor:
        number = self.encode_text([caption], 0)["class_labels"]
        return torch.nn.functional.one_hot(number, NO_CLASS + 1)

    @staticmethod
    def predict(denoiser, noisy, time, text) -> torch.Tensor:
        classes = text["class_labels"].long()
        predicted = denoiser(noisy, timestep=time, class_labels=classes).sample
        return predicted[:, : noisy.shape[1]]  # it learns a variance, too

    def begin(
        self, prompts: list[str], generators: list[torch.Generator], resolution: int
    ) -> dict[str, object]:
        """Its call draws the noise itself."""
        classes = self.encode_text(prompts, resolution)["class_labels"]
        return {"class_labels": classes.tolist(), "generator": generators}

    def describe_prompt(self, prompt: str) -> str:
        return f"class_labels=[{self.find_class(prompt)}]"

    def describe_reading(self) -> list:
        return [self.pipeline.labels]

    def count_cut(self, captions: list[str]) -> int:
        return 0

    def count_alike(self, captions: list[str]) -> int:
        return 0

    @staticmethod
    def is_attention(name: str) -> bool:
        return ".attn1." in name
