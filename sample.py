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
command again to resume after an interruption, or to publish the images. It reads no private data:
sampling from an adapter costs no further privacy.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.arguments.parsing import option, parse
from utils.arguments.publishing import MetricsArguments, PublishSetArguments
from utils.arguments.sampling import SamplingArguments
from utils.arguments.training import ModelArguments
from utils.errors import on_main_process, run_script


@dataclass
class OutputArguments:
    """The output folder."""

    output_dir: str = option("folder of the images")


def main():
    output, model, sampling, hub, metrics = parse(
        *(OutputArguments, ModelArguments, SamplingArguments),
        *(PublishSetArguments, MetricsArguments),
        description=__doc__,
    )
    # Imported now, since it takes seconds: a mistake on the command line should not wait for it.
    from accelerate import PartialState

    from utils.hub.cards import Maker
    from utils.hub.evaluation_card import build_evaluation_section
    from utils.hub.upload import make_repo
    from utils.sampling.generation import prepare_generation
    from utils.sampling.paid_sets import check_judge
    from utils.sampling.rejection import generate_set
    from utils.sampling.sources import find_source, require_statement
    from utils.sampling.synthetic_sets import publish_images

    state, folder, section = PartialState(), Path(output.output_dir), None
    source = check_judge(sampling.reject_by, find_source(model, sampling))
    if hub.push_to_hub:  # refuse before anything is generated
        require_statement(source)
        section = on_main_process(lambda: build_evaluation_section(metrics, source.statement))
    prepared = prepare_generation(model, sampling, source, folder, state)
    if hub.push_to_hub:
        on_main_process(lambda: make_repo(hub.hub_dataset_id, hub, "dataset"))
    generate_set(prepared, sampling, folder, state)
    state.print(f"{sampling.num_images} images and grid.png in {folder}")
    if hub.push_to_hub and state.is_main_process:
        maker = Maker(model.pretrained_model_name_or_path, sampling.adapter, source.statement)
        print(f"published {publish_images(folder, maker, hub.hub_dataset_id, hub, section)}")


if __name__ == "__main__":
    run_script(main)
