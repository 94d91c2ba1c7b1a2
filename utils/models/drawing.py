"""How images are drawn from a model: sampling.json, beside its weights.

The settings belong to the model: an adapter that was trained at 256 pixels draws at 256, whatever
its base does. What the command line says wins; then come the adapter, its base, and the defaults.
"""

import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import diffusers
from accelerate import PartialState
from diffusers import DiffusionPipeline

from utils.arguments.sampling import USUAL_TEMPLATE, DrawingArguments
from utils.arguments.training import DataArguments, ModelArguments
from utils.errors import UsageError, on_main_process
from utils.fetching import fetch_file
from utils.files import SAMPLING_SETTINGS, read_text, write_durably
from utils.models.families import FAMILIES, find_family
from utils.models.families.family import list_call_arguments
from utils.models.pipelines import choose_resolution
from utils.models.processes import FLOW_SAMPLERS, SAMPLERS, read_process


@dataclass(frozen=True)
class DrawingSettings:
    """How images are drawn.

    Attributes:
        resolution: side in pixels. scheduler: the name of a diffusers class, `_class_name`, and
            what differs from the model's own scheduler config.
        num_inference_steps: of the scheduler. guidance_scale: classifier-free; 1 is none.
        negative_prompt: None is the pipeline's own way of having none.
        caption_template: what makes a prompt of a class name; None if there are no classes.
        max_sequence_length: tokens that are read; None where the model leaves no choice.
    """

    resolution: int
    scheduler: dict[str, object]
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str | None
    caption_template: str | None = None
    max_sequence_length: int | None = None

    def use_scheduler(self, pipeline: DiffusionPipeline) -> None:
        """Give `pipeline` the scheduler, on the noise schedule that it has.

        Raises:
            UsageError: it would draw as if the model had been trained otherwise.
        """
        changes = dict(self.scheduler)
        kind = getattr(diffusers, changes.pop("_class_name"))
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
        drawn_as = type(read_process(pipeline.scheduler)).__name__
        if drawn_as != find_family(pipeline).process:
            raise UsageError(
                f"{SAMPLING_SETTINGS}: {kind.__name__} would draw from this model as if it were a "
                f"{drawn_as}: remove 'scheduler' there"
            )

    def describe_call(self, pipeline: str) -> dict[str, object]:
        """Arguments of a pipeline of this class, beside the prompt."""
        negative = {} if self.negative_prompt is None else {"negative_prompt": self.negative_prompt}
        length = self.max_sequence_length
        tokens = {} if length is None else {"max_sequence_length": length}
        call = negative | {
            "height": self.resolution,
            "width": self.resolution,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            **tokens,
            **FAMILIES[pipeline].call,
        }
        taken = list_call_arguments(getattr(diffusers, pipeline))
        return {name: value for name, value in call.items() if name in taken}


def choose_settings(
    pipeline: DiffusionPipeline,
    asked: DrawingArguments,
    resolution: int | None,
    *recorded: dict,
) -> DrawingSettings:
    """What was asked for; else the first record that says it; else what suits the pipeline.

    Args:
        recorded: what `read_settings` found, the adapter's first.

    Raises:
        UsageError: the model cannot draw at that resolution, or has no use for what was asked.
    """
    family = find_family(pipeline)
    choices = [
        {name: value for name, value in vars(asked).items() if value is not None},
        {} if resolution is None else {"resolution": resolution},
        *recorded,
        {
            "num_inference_steps": family.num_inference_steps,
            "guidance_scale": family.read_default("guidance_scale"),
            "scheduler": family.scheduler,
        },
    ]

    def find(name: str):
        return next((choice[name] for choice in choices if choice.get(name) is not None), None)

    for name in ("negative_prompt", "max_sequence_length"):
        if find(name) is not None and not family.takes(name):
            raise UsageError(f"--{name} is nothing that {family.title} takes")
    if (find("max_sequence_length") or 0) > family.longest_text:
        raise UsageError(
            f"--max_sequence_length {find('max_sequence_length')}: {family.title} reads at most "
            f"{family.longest_text} tokens"
        )
    return DrawingSettings(
        resolution=choose_resolution(pipeline, find("resolution")),
        scheduler=find("scheduler"),
        num_inference_steps=find("num_inference_steps"),
        guidance_scale=find("guidance_scale"),
        negative_prompt=find("negative_prompt"),
        caption_template=find("caption_template"),
        max_sequence_length=find("max_sequence_length"),
    )


def adopt_reading(pipeline: DiffusionPipeline, asked: DrawingArguments, base: dict) -> None:
    """Have captions read as far as prompts are when images are drawn, and the model told of the
    same guidance.

    Args:
        base: what sampling.json of the base model says.
    """
    family = find_family(pipeline)
    family.text_length = asked.max_sequence_length or base.get("max_sequence_length")
    scale = asked.guidance_scale
    family.guidance = base.get("guidance_scale") if scale is None else scale


def write_settings(settings: DrawingSettings, folder: Path) -> None:
    write_durably(folder / SAMPLING_SETTINGS, json.dumps(asdict(settings), indent=2) + "\n")


def adopt_template(data: DataArguments, model: ModelArguments) -> DataArguments:
    """`data` with the caption template of the base model, unless it has one itself, or needs none;
    says so. On every process."""
    is_told = data.caption is not None or data.caption_column is not None
    needs_one = data.label_column is not None and data.caption_template is None and not is_told
    if not needs_one or model.pretrained_model_name_or_path is None:
        return data
    found = on_main_process(lambda: read_base_settings(model)).get("caption_template")
    if found is None:
        return data
    if PartialState().is_main_process:
        print(f"captions as the base model was trained: '{found}'", file=sys.stderr)
    return replace(data, caption_template=found)


def read_base_settings(model: ModelArguments) -> dict:
    """`read_settings` of a base model, a folder or Hub id."""
    path, _ = fetch_file(model.pretrained_model_name_or_path, SAMPLING_SETTINGS, model.revision)
    return {} if path is None else read_settings(path.parent)


def read_settings(folder: Path) -> dict:
    """What sampling.json in the folder of a model says; nothing if there is none.

    Raises:
        UsageError: it is not valid.
    """
    path = folder / SAMPLING_SETTINGS
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path))
        steps, guidance = found.get("num_inference_steps", 1), found.get("guidance_scale", 1)
        side, usual = found.get("resolution", 1), {"_class_name": SAMPLERS[0]}
        negative, length = found.get("negative_prompt") or "", found.get("max_sequence_length")
        valid = length is None or (type(length) is int and length > 0)
        valid &= type(steps) is int and type(side) is int and min(steps, side) > 0
        valid &= isinstance(guidance, int | float) and isinstance(negative, str)
        valid &= "{label}" in (found.get("caption_template") or USUAL_TEMPLATE)
        scheduler = found.get("scheduler", usual)["_class_name"]
        valid &= scheduler in (*SAMPLERS, *FLOW_SAMPLERS)
        valid &= set(found) <= {field.name for field in fields(DrawingSettings)}
    except (ValueError, AttributeError, TypeError, KeyError):
        valid = False
    if not valid:
        raise UsageError(
            f"{path} does not say how to draw images: it is not a model's, or was changed"
        )
    return found
