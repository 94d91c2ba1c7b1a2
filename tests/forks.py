"""Scripts run as a user runs them, each in a fork of a process that has imported their libraries.

What a script imports takes it some eight seconds, and the tests run scripts by the hundred. The
process that forks starts no thread and computes nothing but what a common plan costs, so that a
fork is as good as a new process.
Code that must do without this repository needs a process of its own.

    python -m tests.forks    # then a line of JSON a script on stdin; its exit code on stdout
"""

import functools
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from utils.privacy.accounting import account, calibrate_noise_multiplier, membership_power
from utils.privacy.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = [
    *("utils.methods.fine_tuning", "utils.models.lora", "utils.models.drawing"),
    *("datasets", "evaluate", "opacus.accountants", "torch.utils.tensorboard"),
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip.modeling_clip",
]


def run_in_fork(
    command: list, cwd: Path, environment: dict, processes: int | None = None
) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, *command], ..., capture_output=True, text=True)`, of a
    script or, after `-m`, a module; on several processes as torchrun would start them, which end
    together only if they notice by themselves."""
    command = list(map(str, command))
    # Libraries read these while they are imported; the token, whenever they need it.
    read = {key: value for key, value in environment.items() if key.startswith("HF_")}
    read.pop("HF_TOKEN", None)
    server = _start(tuple(sorted(read.items())))
    with tempfile.TemporaryDirectory() as folder, socket.socket() as held:
        streams = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        ranks = _list_ranks(held, processes) if processes else [{}]
        work = [command, str(cwd), [environment | rank for rank in ranks], streams]
        print(json.dumps(work), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        shown = [Path(stream).read_text() for stream in streams]
    return subprocess.CompletedProcess(command, code, *shown)


def _list_ranks(held: socket.socket, processes: int) -> list[dict]:
    """What torchrun tells each process of one machine, where `held` keeps their port from others:
    the first process may listen there all the same, nobody else is given it."""
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": held.getsockname()[1]}
    each = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [{name: str(value) for name, value in rank.items()} for rank in each]


@functools.lru_cache(maxsize=2)  # the process ends with its pipes
def _start(variables: tuple[tuple[str, str], ...]) -> subprocess.Popen:
    others = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.forks"],
        cwd=ROOT, env=others | {"OMP_NUM_THREADS": "1"} | dict(variables),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def main():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no reply
    for library in LIBRARIES:
        importlib.import_module(library)
    remember_costs({"target_epsilon": 8.0})
    Image.init()
    gc.freeze()  # what was imported is never garbage, and no fork need look through it
    for line in sys.stdin:
        command, cwd, environments, streams = json.loads(line)
        children = []
        for environment in environments:
            children.append(os.fork())
            if children[-1] == 0:
                return run(command, cwd, environment, streams)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(next(filter(None, codes), 0), file=replies, flush=True)


def remember_costs(changes: dict):
    """Ask the accountants what a run of `tests.conftest.train_arguments` asks, so that no fork must
    work it out again."""
    numbers = {"num_units": 40, "steps": 3, "delta": 1e-3, "max_grad_norm": 1.0}
    numbers |= {"expected_batch_size": 10.0, "noise_multiplicity": 2}
    plan = make_plan(**(numbers | changes))
    epsilon = account(plan.events(), plan.delta).add_or_remove_one
    membership_power(plan.events())
    for target, steps in ((changes.get("target_epsilon"), 1), (epsilon, plan.steps)):
        if target is not None:
            calibrate_noise_multiplier(target, plan.delta, 1.0, steps)


def run(command: list[str], cwd: str, environment: dict, streams: list[str]):
    """Become the process that runs `command`."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    np.random.seed()
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, os.path.dirname(os.path.abspath(command[0]))
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
