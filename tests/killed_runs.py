"""Kill training with SIGKILL, at chosen or at random moments, resume it, and look at the books.

    python -m tests.killed_runs BASE IMAGES FOLDER
    python -m tests.killed_runs BASE IMAGES FOLDER --random 20

After each kill the run is resumed until it is published. Then ledger, checkpoints, privacy.json
and the weights must verify; epsilon must be the planned one; and every step whose checkpoint ever
existed must be on record. The last line is a summary in JSON.

Training runs in forked children of this process, which imports everything once and computes nothing
but the cost of the plan, so that a trial takes seconds.
"""

import argparse
import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import train_dp_lora
import utils.methods.fine_tuning  # so that the forks need not
import utils.models.lora  # noqa: F401
from tests.conftest import train_arguments
from tests.forks import remember_costs
from utils.errors import run_script
from utils.ledger import charges, checkpoints, ledger, reservations, runs, statement
from utils.ledger.verification import find_problems, read_source

STEPS, EVERY, SIGMA = 4, 2, 0.9


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_on_call(owner, name: str, number: int, after: bool = False):
    """Make the `number`-th call of owner.name fatal: before it starts, or after it returned."""
    whole, calls = getattr(owner, name), []

    def fatal(*arguments, **named):
        calls.append(1)
        if len(calls) == number and not after:
            die()
        result = whole(*arguments, **named)
        if len(calls) == number:
            die()
        return result

    setattr(owner, name, fatal)


def half_an_append(number: int):
    """Die with half of the ledger's record `number` on disk."""
    whole = ledger.Ledger._append

    def torn(self, records, **fields):
        if len(records) == number:
            with open(self.path, "ab") as file:
                file.write(b'{"schema_version": 1, "index"')
            die()
        return whole(self, records, **fields)

    ledger.Ledger._append = torn


def half_a_deletion():
    """Die while an old checkpoint is deleted, with one of its files gone."""
    whole = checkpoints.shutil.rmtree

    def torn(path, **named):
        if Path(path).name.startswith("deleting-") and Path(path).exists():
            next(Path(path).iterdir()).unlink()
            die()
        whole(path, **named)

    checkpoints.shutil.rmtree = torn


def twice(prepare):
    """A point for the first attempt, and again for the one that resumes it."""
    return [prepare, prepare]


POINTS = {
    "before anything is reserved": lambda: die_on_call(ledger.Ledger, "reserve", 1),
    "after the reservation": lambda: die_on_call(ledger.Ledger, "reserve", 1, after=True),
    "between the note and the reservation": lambda: die_on_call(
        reservations, "write_durably", 1, True
    ),
    "before the first checkpoint": lambda: die_on_call(runs, "save_checkpoint", 1),
    "after a release, before its checkpoint": lambda: die_on_call(runs, "save_checkpoint", 2),
    "after a checkpoint is announced, before its release": lambda: die_on_call(
        runs, "announce_checkpoint", 2, after=True
    ),
    "in the middle of a checkpoint": lambda: die_on_call(checkpoints, "hash_file", 2),
    "after a checkpoint, before it is noted": lambda: die_on_call(
        runs, "save_checkpoint", 2, after=True
    ),
    "with a torn record of a release": lambda: half_an_append(3),
    "with a torn record of a checkpoint": lambda: half_an_append(4),
    "after the last checkpoint": lambda: die_on_call(runs, "rotate", 3, after=True),
    "while an old checkpoint is deleted": half_a_deletion,
    "while the weights are exported": lambda: die_on_call(runs, "hash_file", 1),
    "again while a release is taken back": [
        lambda: die_on_call(runs, "save_checkpoint", 2),
        lambda: die_on_call(reservations, "empty_unfinished", 1, after=True),
    ],
    "twice while the weights are exported": twice(lambda: die_on_call(runs, "hash_file", 1)),
    "twice after a release, before its checkpoint": twice(
        lambda: die_on_call(runs, "save_checkpoint", 1)
    ),
    "before the statement": lambda: die_on_call(statement, "write_durably", 1),
    "after the statement, before the weights": lambda: die_on_call(
        runs, "write_statement", 1, after=True
    ),
    "after the weights": lambda: die_on_call(runs.Run, "publish", 1, after=True),
}


def release_after_the_checkpoint():
    """The order turned round, as a proof that the trials notice."""

    def save(self, step, state_dict, limit):
        about = {"run": self.branch.run, "agreed": self.agreed}
        checkpoints.announce_checkpoint(self.checkpoints, step)
        checkpoints.save_checkpoint(self.checkpoints, step, state_dict(), about)
        if step == EVERY:
            die()
        self.branch.release(step, charges.CHECKPOINT)
        self.branch.wrote(step, charges.CHECKPOINT)

    runs.Run._save = save


def in_a_child(arguments: list, prepare=None, seconds: float | None = None, script=train_dp_lora):
    """Run a script in a fork, killed after `seconds`; returns its wait status."""
    gc.freeze()  # what was imported is never garbage, and no fork need look through it
    child = os.fork()
    if child == 0:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            sys.argv = [f"{script.__name__}.py", *map(str, arguments)]
            if prepare:
                prepare()
            run_script(script.main)
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def released_steps(output: Path) -> set[int]:
    path = output / "private" / "ledger.jsonl"
    records = ledger.Ledger(path).records() if path.exists() else []
    return {r["step"] for r in records if r["kind"] == "release"}


def trial(arguments: list, output: Path, planned: float, prepare=None, seconds=None) -> dict:
    """Kill, look, resume, verify. Returns what happened."""
    resume = []
    for attempt in prepare if isinstance(prepare, list) else [prepare]:
        status = in_a_child([*arguments, "--output_dir", output, *resume], attempt, seconds)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0), status
        found = checkpoints.list_steps(output / "private" / "checkpoints")
        assert set(found) <= released_steps(output), "a checkpoint that the ledger does not know"
        weights = (output / "pytorch_lora_weights.safetensors").exists()
        assert not weights or STEPS in released_steps(output), "weights that it does not know"
        resume = ["--resume_from_checkpoint", "latest"] if found else []
    if killed:
        status = in_a_child([*arguments, "--output_dir", output, *resume])
        assert status == 0, f"resuming ended with wait status {status}"
    problems = find_problems(read_source(str(output), None))
    assert not problems, problems
    published = json.loads((output / "privacy.json").read_text())
    assert abs(published["epsilon"]["add_or_remove_one"] - planned) < 1e-9
    assert released_steps(output) >= set(range(0, STEPS + 1, EVERY)), "a released step is missing"
    return {"killed": killed, "resumed": bool(killed and resume), "released": len(found) > 1}


def main():
    parser = argparse.ArgumentParser()
    for name in ("base", "images", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--random", type=int, default=0, help="so many kills, instead of chosen")
    parser.add_argument("--late_release", action="store_true", help="the loop, broken on purpose")
    args = parser.parse_args()
    arguments = train_arguments(args.base, args.images, args.folder / "reference")[:-2]
    arguments += ["--max_train_steps", STEPS, "--checkpointing_steps", EVERY, "--rank", 2]
    arguments += ["--num_validation_images", int(args.random > 0), "--noise_multiplicity", 1]
    at = arguments.index("--target_epsilon")
    arguments[at : at + 2] = ["--noise_multiplier", SIGMA]

    remember_costs({"noise_multiplier": SIGMA, "steps": STEPS})
    start = time.time()
    assert in_a_child([*arguments, "--output_dir", args.folder / "reference"]) == 0
    whole = time.time() - start
    published = json.loads((args.folder / "reference" / "privacy.json").read_text())
    planned = published["epsilon"]["add_or_remove_one"]
    reserved = args.folder / "reference" / "private" / "run"
    first = min(reserved.stat().st_mtime - start, whole)

    outcomes = []
    if args.late_release:
        trial(arguments, args.folder / "late", planned, release_after_the_checkpoint)
    chosen = {} if args.random else POINTS
    for number, (where, prepare) in enumerate(chosen.items()):
        print(where, flush=True)
        outcomes.append(trial(arguments, args.folder / f"point-{number}", planned, prepare))
        assert outcomes[-1]["killed"], f"never got to the point: {where}"
    rng, kills = random.Random(), 0
    while kills < args.random:  # a run that ended before its moment is no kill
        seconds = rng.uniform(0.8 * first, whole)
        print(f"after {seconds:.2f} s", flush=True)
        output = args.folder / f"random-{len(outcomes)}"
        outcomes.append(trial(arguments, output, planned, seconds=seconds))
        kills += outcomes[-1]["killed"]
    counts = {key: sum(o[key] for o in outcomes) for key in outcomes[0]}
    print(json.dumps({"trials": len(outcomes), **counts, "epsilon": planned}))


if __name__ == "__main__":
    main()
