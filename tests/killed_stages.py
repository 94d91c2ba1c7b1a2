"""Kill every stage with SIGKILL, go on, and look at the books.

    python -m tests.killed_stages BASE IMAGES FOLDER STAGES

One command releases means, selects and trains (STAGES first); curate.py or relabel.py does the last
stage (STAGES last), in the same ledger.
After each kill the same command is run again, and killed at the next point, until it ends. No stage
may ever be charged twice or with other noise, and at the end all must verify. (That a first attempt
may be killed anywhere is what `tests/killed_runs.py` tries.) The last line is a summary in JSON.
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

# In their order. What is fatal there: the owner, the name and the number of a call of the attempt
# that the kill before made necessary, before or after.
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
    "after the scores, before their checkpoint": (runs, "save_checkpoint", 1, False),
    "after the checkpoint of the scores": (runs, "save_checkpoint", 1, True),
    "before saliency.json": (selection, "export", 1, False),
    "during the warm start": (fine_tuning, "warm_up", 1, True),
    "after the first checkpoint of training": (runs, "save_checkpoint", 1, True),
    "after the last checkpoint of training": (runs, "save_checkpoint", 2, True),
    "before the weights": (runs, "write_statement", 1, True),
}
VOTING = {
    "before the first votes are released": (curation, "add_noise_once", 1, False),
    "after the first votes, before their checkpoint": (runs, "save_checkpoint", 1, False),
    "after the first votes": (runs, "save_checkpoint", 1, True),
    "between the rounds": (curation, "evolve", 1, True),
    "after the last votes": (runs, "save_checkpoint", 1, True),
    "before the statement of the votes": (runs, "write_statement", 1, False),
    "while the winners are written": (synthetic_sets, "write_piece", 2, True),
    "before the winners are noted": (synthetic_sets, "hash_set", 1, False),
}
NAMING = {
    "before the first step of the classifier": (training, "add_noise_once", 1, False),
    "after its second checkpoint": (runs, "save_checkpoint", 1, True),
    "before its statement": (runs, "write_statement", 1, False),
    "while the images are written under their names": (synthetic_sets, "write_piece", 2, True),
}


def read_charges(ledger: Path) -> list[dict]:
    return list_charged_events(Ledger(ledger).records())


def go_on(script, command: list, output: Path, ledger: Path, expected: list[dict], points: dict):
    """Run a stage of `output` until it is done, killed at each of `points`. Whatever is charged
    must be the beginning of what is `expected`, and all of it in the end."""
    command = [*command, "--output_dir", output]
    for where, point in {**points, "to the end": None}.items():
        print(where, flush=True)
        prepare = None if point is None else lambda at=point: die_on_call(*at)
        resume = ["--resume_from_checkpoint", "latest"]
        paid = any((output / "private" / "checkpoints").glob("checkpoint-*"))
        status = in_a_child([*command, *(resume if paid else [])], prepare, script=script)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, f"{where}: it ended with wait status {status}"
        assert killed == (point is not None), f"it never got to the point: {where}"
        charged = read_charges(ledger) if ledger.exists() else []
        assert charged == expected[: len(charged)], f"{where}: charged {charged}"
    assert charged == expected, f"charged {charged}"
    problems = find_problems(read_source(str(output), None))
    assert not problems, problems


def kill_last_stages(base: Path, images: Path, folder: Path, before: list[dict]):
    """`folder` has the run `whole`, whose ledger has the charges `before`."""
    import sample

    whole, candidates = folder / "whole", folder / "candidates"
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
        undisturbed, output = folder / script.__name__, folder / f"{script.__name__}-killed"
        for path in (undisturbed, output):
            shutil.copy(whole / "private" / "ledger.jsonl", path.with_suffix(".jsonl"))
        ledger = undisturbed.with_suffix(".jsonl")
        command = [*options, "--output_dir", undisturbed, "--privacy_ledger", ledger]
        assert in_a_child(command, script=script) == 0
        expected = read_charges(ledger)
        assert expected[:-1] == before and expected[-1]["steps"] == steps, expected
        account(expected, DELTA), membership_power(expected)  # what the forks would compute again
        ledger = output.with_suffix(".jsonl")
        go_on(script, [*options, "--privacy_ledger", ledger], output, ledger, expected, points)


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
    command += ["--num_validation_images", 0, "--warm_start_steps", 1]
    command += ["--release_means", "--select_saliency"]
    whole = args.folder / "whole"
    assert in_a_child([*command, "--output_dir", whole], script=train_dp_lora) == 0
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
        output, points = args.folder / "killed", POINTS
        ledger = output / "private" / "ledger.jsonl"
        go_on(train_dp_lora, command, output, ledger, expected, points)
    else:
        points = {**VOTING, **NAMING}
        kill_last_stages(args.base, args.images, args.folder, expected)
    print(json.dumps({"killed": len(points)}))


if __name__ == "__main__":
    main()
