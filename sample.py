"""Prompts or class names -> a folder of synthetic images, from a public model or a private adapter.

    python sample.py --pretrained_model_name_or_path examples/digits/base \\
        --adapter runs/digits/adapter --class_names 0 1 2 3 4 5 6 7 8 9 \\
        --caption_template "the digit {label}" \\
        --num_images 1000 --output_dir runs/digits/private_images

    python sample.py --pretrained_model_name_or_path examples/digits/base \\
        --prompts "the digit 7" --num_images 16 --output_dir /tmp/sevens

Images are balanced over the prompts. The folder holds metadata.jsonl (columns file_name, text, and
label for class names), which `datasets.load_dataset(FOLDER)` reads, and grid.png. Run the same
command again to go on after an interruption. It never reads private data: sampling from an adapter
costs no further privacy.
"""

from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from utils.arguments import ModelArguments, option, parse
from utils.errors import run_script
from utils.generation import SamplingArguments, draw_folder


@dataclass
class OutputArguments:
    """Where to."""

    output_dir: str = option("folder of the images")


def main():
    output, model, sampling = parse(
        OutputArguments, ModelArguments, SamplingArguments, description=__doc__
    )
    state = PartialState()
    draw_folder(model, sampling, Path(output.output_dir), state)
    state.print(f"{sampling.num_images} images, metadata.jsonl and grid.png in {output.output_dir}")


if __name__ == "__main__":
    run_script(main)
