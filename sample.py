"""Prompts or class names -> a folder of synthetic images, from a public model or a private adapter.

    python sample.py --pretrained_model_name_or_path examples/digits/base \\
        --adapter runs/digits/adapter --class_names 0 1 2 3 4 5 6 7 8 9 \\
        --caption_template "the digit {label}" \\
        --num_images 1000 --output_dir runs/digits/private_images

    python sample.py --pretrained_model_name_or_path examples/digits/base \\
        --prompts "the digit 7" --num_images 16 --output_dir /tmp/sevens

    # from the Hub, and to the Hub, as a dataset
    python sample.py --pretrained_model_name_or_path user/base --adapter user/scans \\
        --prompts_file prompts.txt --num_images 10000 --output_dir runs/synthetic \\
        --push_to_hub --hub_dataset_id user/synthetic-scans

Images are balanced over the prompts. The folder holds metadata.jsonl (columns file_name, text, and
label for class names), which `datasets.load_dataset(FOLDER)` reads, and grid.png; with
`--output_format parquet`, which suits large sets, shards instead of single images. Run the same
command again to go on after an interruption, or to publish the images. It never reads private data:
sampling from an adapter costs no further privacy.
"""

from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from utils.arguments import ModelArguments, option, parse
from utils.errors import UsageError, on_main_process, run_script
from utils.evaluation_card import MetricsArguments, evaluation_section
from utils.generation import SamplingArguments, draw_folder, prepare_drawing
from utils.hub import RepositoryArguments, make_repo
from utils.pipelines import adapter_folder
from utils.synthetic_sets import Maker, publish_images, statement_of


@dataclass
class OutputArguments:
    """Where to."""

    output_dir: str = option("folder of the images")


@dataclass
class PublishArguments(RepositoryArguments):
    """Publishing on the Hugging Face Hub, when done."""

    push_to_hub: bool = option("publish the images as a dataset", False)
    hub_dataset_id: str | None = option("dataset repository; needed for --push_to_hub", None)


def main():
    kinds = (OutputArguments, ModelArguments, SamplingArguments, PublishArguments, MetricsArguments)
    output, model, sampling, hub, metrics = parse(*kinds, description=__doc__)
    state, folder = PartialState(), Path(output.output_dir)
    if hub.push_to_hub and hub.hub_dataset_id is None:
        raise UsageError("--push_to_hub needs --hub_dataset_id")
    statement = section = None
    if hub.push_to_hub:  # refused now, if ever
        if sampling.adapter is not None:
            found = adapter_folder(sampling.adapter, sampling.adapter_revision)
            statement = on_main_process(lambda: statement_of(found))
        section = on_main_process(lambda: evaluation_section(metrics, statement))
    drawing = prepare_drawing(model, sampling, folder, state)
    if hub.push_to_hub:
        on_main_process(lambda: make_repo(hub.hub_dataset_id, hub, "dataset"))
    draw_folder(drawing, sampling, folder, state)
    state.print(f"{sampling.num_images} images and grid.png in {folder}")
    if hub.push_to_hub and state.is_main_process:
        base, name = model.pretrained_model_name_or_path, hub.hub_dataset_id
        made_by = Maker(base, sampling.adapter, drawing.adapter and statement_of(drawing.adapter))
        print(f"published {publish_images(folder, made_by, name, hub, section)}")


if __name__ == "__main__":
    run_script(main)
