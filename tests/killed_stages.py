"""Kill every stage with SIGKILL, go on, and look at the books.

    python -m tests.killed_stages BASE IMAGES FOLDER STAGES

One command releases means, selects and trains (STAGES first); curate.py or relabel.py does the last
stage (STAGES last), in the same ledger.
After each kill the same command is run again. Then all must verify, no stage may be charged twice
or with other noise. The last line is a summary in JSON.
"""

import argparse
import json
import os
import shutil
import signal
from pathlib import Path

import curate
import relabel
from tests.conftest import ROOT, train_arguments
from tests.killed_runs import die_on_call, in_a_child
from utils.ledger import runs
from utils.ledger.charges import list_charged_events
from utils.ledger.ledger import Ledger
from utils.ledger.verification import find_problems, read_source
from utils.methods import curation, fine_tuning, first_stages, means, selection
from utils.privacy import training
from utils.privacy.accounting import account, calibrate_noise_multiplier, membership_power
from utils.sampling import generation, synthetic_sets

SIGMA = {"--release_epsilon": 2, "--selection_noise_multiplier": 4, "--noise_multiplier": 0.9}
SMALL = ["--generator_steps", 1, "--num_synthetic_images", 8, "--num_frequencies", 10]
ROUNDS, STEPS, DELTA = 2, 4, 1e-3

# The stage, and what is fatal there: the owner, the name and the number of a call, before or after.
POINTS = {
    "before the means are released": (means, "add_noise_once", 1, False),
    "after the means, before their checkpoint": (runs, "save_checkpoint", 1, False),
    "after their checkpoint": (runs, "save_checkpoint", 1, True),
    "before the statement of the means": (runs, "write_statement", 1, False),
    "after the means are published": (means, "draw_set", 1, False),
    "while the set is drawn": (synthetic_sets, "write_metadata", 1, True),
    "after the set, before it is noted": (synthetic_sets, "hash_set", 1, False),
    "between means and selection": (first_stages, "select_first", 1, False),
    "before the scores are released": (selection, "release_scores", 1, False),
    "after the scores, before their checkpoint": (runs, "save_checkpoint", 2, False),
    "after the checkpoint of the scores": (runs, "save_checkpoint", 2, True),
    "before saliency.json": (selection, "export", 1, False),
    "during the warm start": (fine_tuning, "warm_up", 1, True),
    "after the first checkpoint of training": (runs, "save_checkpoint", 3, True),
    "after the last checkpoint of training": (runs, "save_checkpoint", 5, True),
    "before the weights": (runs, "write_statement", 3, True),
}
VOTING = {
    "before the first votes are released": (curation, "add_noise_once", 1, False),
    "after the first votes, before their checkpoint": (runs, "save_checkpoint", 1, False),
    "after the first votes": (runs, "save_checkpoint", 1, True),
    "between the rounds": (curation, "evolve", 1, True),
    "after the last votes": (runs, "save_checkpoint", 2, True),
    "before the statement of the votes": (runs, "write_statement", 1, False),
    "while the winners are written": (synthetic_sets, "write_piece", 2, True),
    "before the winners are noted": (synthetic_sets, "hash_set", 1, False),
}
NAMING = {
    "before the first step of the classifier": (training, "add_noise_once", 1, False),
    "after its second checkpoint": (runs, "save_checkpoint", 2, True),
    "before its statement": (runs, "write_statement", 1, False),
    "while the images are written under their names": (synthetic_sets, "write_piece", 2, True),
}


def read_charges(ledger: Path) -> list[dict]:
    return list_charged_events(Ledger(ledger).records())


def go_on(arguments: list, output: Path, script, point=None) -> int:
    """Run a stage of `output` until it is done, killed at `point` first; returns the kills."""
    kills, command = 0, [*arguments, "--output_dir", output]
    for attempt in (point, None) if point else (None,):
        prepare = None if attempt is None else lambda at=attempt: die_on_call(*at)
        resume = ["--resume_from_checkpoint", "latest"]
        paid = any((output / "private" / "checkpoints").glob("checkpoint-*"))
        status = in_a_child([*command, *(resume if paid else [])], prepare, script=script)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, f"it ended with wait status {status}"
        kills += killed
    assert kills == (point is not None), "it never got to the point"
    problems = find_problems(read_source(str(output), None))
    assert not problems, problems
    return kills


def kill_first_stages(command: list, folder: Path, expected: list[dict]) -> int:
    """Returns the kills, of as many POINTS."""
    import train_dp_lora

    kills = 0
    for number, (where, point) in enumerate(POINTS.items()):
        print(where, flush=True)
        output = folder / f"run-{number}"
        kills += go_on(command, output, train_dp_lora, point)
        charged = read_charges(output / "private" / "ledger.jsonl")
        assert charged == expected, f"{where}: charged {charged}"
    return kills


def kill_last_stages(base: Path, images: Path, folder: Path, expected: list[dict]) -> int:
    """Returns the kills, of as many points of VOTING and NAMING. `folder` has the run `whole`."""
    import sample

    whole, candidates, kills = folder / "whole", folder / "candidates", 0
    draw = ["--pretrained_model_name_or_path", base, "--adapter", whole, "--num_images", 8]
    draw += ["--class_names", *"0123", "--caption_template", "the digit {label}"]
    assert in_a_child([*draw, "--output_dir", candidates], script=sample) == 0
    assert generation.SET_DIGEST in json.loads((candidates / "sampling.json").read_text())
    weights = ROOT / "examples" / "digits" / "extractor.safetensors"
    last = ["--synthetic", candidates, "--train_data_dir", images, "--target_delta", DELTA]
    last += ["--label_column", "label", "--caption_template", "the digit {label}"]
    last += ["--extractor", "classifier", "--classifier_weights", weights]
    vote = [*last, "--rounds", ROUNDS, "--curation_epsilon", 2]
    name = [*last, "--relabel_steps", STEPS, "--relabel_epsilon", 2, "--checkpointing_steps", 2]
    stages = [(curate, vote, VOTING, ROUNDS), (relabel, name, NAMING, STEPS)]
    for script, options, points, steps in stages:
        for number, (where, point) in enumerate({"undisturbed": None, **points}.items()):
            print(where, flush=True)
            output = folder / f"{script.__name__}-{number}"
            ledger = output.with_suffix(".jsonl")
            shutil.copy(whole / "private" / "ledger.jsonl", ledger)
            kills += go_on([*options, "--privacy_ledger", ledger], output, script, point)
            *before, event = read_charges(ledger)
            assert before == expected and event["steps"] == steps, f"{where}: charged {event}"
    return kills


def main():
    parser = argparse.ArgumentParser()
    for name in ("base", "images", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("stages", choices=["first", "last"])
    args = parser.parse_args()
    import train_dp_lora

    command = train_arguments(args.base, args.images, "unused", *SMALL)
    at = command.index("--target_epsilon")
    command[at : at + 2] = [text for pair in SIGMA.items() for text in pair]
    at = command.index("--output_dir")
    del command[at : at + 2]
    command += ["--rank", 2, "--checkpointing_steps", 2, "--noise_multiplicity", 1]
    command += ["--num_validation_images", 1, "--warm_start_steps", 1]
    command += ["--release_means", "--select_saliency"]
    whole = args.folder / "whole"
    go_on(command, whole, train_dp_lora)
    expected = read_charges(whole / "private" / "ledger.jsonl")
    assert [e["purpose"] for e in expected] == ["means", "selection", "training"], expected
    for number in range(3):  # what the forks would compute again, each for seconds
        spent = account(expected[: number + 1], DELTA)
        membership_power(expected[: number + 1])
    *prior, trained = expected
    everyone = (1.0, trained["steps"], tuple(prior))  # in every step: what a verdict asks
    calibrate_noise_multiplier(spent.add_or_remove_one, DELTA, *everyone)
    command += ["--total_epsilon", 1e-6 + spent.add_or_remove_one]  # nothing is counted twice
    if args.stages == "first":
        points, kills = len(POINTS), kill_first_stages(command, args.folder, expected)
    else:
        points = len(VOTING) + len(NAMING)
        kills = kill_last_stages(args.base, args.images, args.folder, expected)
    print(json.dumps({"points": points, "killed": kills}))


if __name__ == "__main__":
    main()
