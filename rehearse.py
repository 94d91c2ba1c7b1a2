"""Choose on public images, free of charge, what a private run would have to be lucky with.

    # MNIST is private; typographic digits stand for it
    python rehearse.py --config examples/mnist/dp_lora.yaml --num_units 60000 \\
        --stand_in runs/digits/public --output_dir runs/rehearsal
    python train_dp_lora.py --config runs/rehearsal/best.yaml

    # no such images? the base draws them, from public prompts
    python rehearse.py --pretrained_model_name_or_path BASE --train_data_dir scans \\
        --caption_column text --target_epsilon 8 --target_delta 1e-5 \\
        --validation_prompt "no finding" effusion --output_dir runs/rehearsal

Trains on public images as the private run would, as noisily, from the same base: several learning
rates, numbers of steps and draws, and for LoRA with and without its first matrix. The worse half of
the trials ends after a quarter, and after a half of the steps; the rest is judged by the denoising
loss on public images that were held out, and, where there are classes, by how well a classifier
learns from the images that the best of the low, the middle and the high rates draw. Fewer images
suffice, since what they save in noise is added. Nothing private is read, but how many units there
are (or --num_units says it), so losses and gradients are shown, and nothing is spent. Stages before
training are not rehearsed; the rate, which is lower after a warm start, is then left to the
training script. In --output_dir: best.yaml, for --config of that; rehearsal.json, rehearsal.png.
"""

import argparse
import sys
from dataclasses import MISSING, fields
from pathlib import Path

from utils.arguments.means import MeansArguments
from utils.arguments.methods import (
    SHARED,
    BothStagesArguments,
    LdmArguments,
    LoDAArguments,
    LoraArguments,
    SaliencyArguments,
    StageArguments,
)
from utils.arguments.parsing import parse
from utils.arguments.rehearsal import RehearsalArguments
from utils.errors import need_one_process, run_script

# What each training script takes, the arguments of its method first.
TAKES = {
    "dp-lora": (LoraArguments, BothStagesArguments, SaliencyArguments, MeansArguments),
    "dp-loda": (LoDAArguments, StageArguments),
    "dp-ldm": (LdmArguments, StageArguments),
}
SCRIPTS = {name: f"train_{name.replace('-', '_')}.py" for name in TAKES}
LEFT_OUT = {"output_dir", "num_units", "dry_run", "hub_token"}  # not of a run; and a secret
STAGES = ("release_means", "warm_start", "select_saliency", "saliency_file")


def write_config(path: Path, parsed: list, winner: dict) -> None:
    """A YAML file of all arguments that are not the defaults, with those of the winner."""
    import yaml

    from utils.files import write_durably

    values = {}
    for arguments in parsed:
        for field in fields(arguments):
            value, usual = getattr(arguments, field.name), field.default
            if field.default_factory is not MISSING:
                usual = field.default_factory()
            if field.name == "mixed_precision" and value == "no":  # as it is where none was given
                continue
            if value != usual and field.name not in LEFT_OUT:
                values[field.name] = value
    text = yaml.safe_dump(values | winner, sort_keys=False, default_flow_style=None)
    write_durably(path, f"# The best of a rehearsal on public images.\n{text}")


def leave_stages(stages: StageArguments, winner: dict, script: str) -> dict:
    """What the winner changes, but its rate if a warm start comes first: then a lower one fits."""
    given = [name for name in STAGES if getattr(stages, name, None)]
    if not given:
        return winner
    told = f"warning: not rehearsed: --{', --'.join(given)}. The trials spent the whole budget on "
    told += "private steps"
    if {"release_means", "warm_start"} & {*given}:
        winner = {name: value for name, value in winner.items() if name != "learning_rate"}
        told += f", from the base itself, so best.yaml leaves --learning_rate to {script}, which "
        told += "takes a lower one after a warm start"
    print(told, file=sys.stderr)
    return winner


def find_method(words: list[str]) -> str:
    """`--method`, which decides what else can be given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default="dp-lora", choices=list(TAKES))
    return first.parse_known_args(words)[0].method


def main():
    taken = TAKES[find_method(sys.argv[1:])]
    args, *parsed = parse(RehearsalArguments, *SHARED, *taken, description=__doc__)
    need_one_process("a rehearsal, whose trials run side by side (--workers),")
    model, data, privacy, training, _, settings, stages, *more = parsed
    # Imported now, since it takes seconds: a mistake on the command line should not wait for it.
    from utils.methods.rehearsal import run_rehearsal

    names = more[-1].class_names if more else None
    winner = run_rehearsal(model, data, privacy, training, settings, args, names)
    path, script = Path(training.output_dir) / "best.yaml", SCRIPTS[args.method]
    winner = leave_stages(stages, winner, script) | {"output_dir": f"{training.output_dir}/run"}
    write_config(path, parsed, winner)
    print(f"see {path}, for --config of {script}, and rehearsal.png beside it")


if __name__ == "__main__":
    run_script(main)
