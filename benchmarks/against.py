"""Is a step slower than it was? This version and a checkout of an older one, a step each in turn.

    git worktree add ../older COMMIT
    python benchmarks/against.py ../older --method lora
    python benchmarks/against.py ../older --shape sd15 --method lora --rounds 5

Each is a process of its own that steps when it is told to, so that both meet the same moods of the
machine. Medians of the ratios of the rounds, after one that does not count: that of the ordinary
step, which no change of ours touches, says how much is chance.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).resolve().parent.parent))

from shapes import SHAPES, require_input_gradient

ROOT = Path(__file__).resolve().parent.parent
# An older benchmark may lack the hook without which PyTorch crashes; a second one does nothing.
SERVE = f"""
import json, sys, time
from argparse import Namespace
import torch
from torch import nn

{inspect.getsource(require_input_gradient)}

sys.path.insert(0, sys.argv[1])
from step_time import Bench
bench = Bench(Namespace(**json.loads(sys.argv[2])))
for module in (bench.unet if hasattr(bench, "unet") else bench.denoiser).modules():
    if type(module) is nn.GroupNorm:
        module.register_forward_pre_hook(require_input_gradient)
for kind in sys.stdin:
    start = time.perf_counter()
    getattr(bench, kind.strip())()
    print(time.perf_counter() - start, flush=True)
"""


class Version:
    """A process that does a step of the version in `folder` whenever it is told to."""

    def __init__(self, folder: Path, args: dict):
        command = [sys.executable, "-c", SERVE, str(folder / "benchmarks"), json.dumps(args)]
        variables = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # who waits must not spin
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=variables, **pipes)

    def step(self, kind: str) -> float:
        """Seconds of one step."""
        print(kind, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("older", type=Path, help="folder of a checkout")
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--method", choices=["lora", "loda", "attention", "all"], default="lora")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = vars(parser.parse_args())
    shape = SHAPES[args["shape"]]
    args |= {"units": shape.units, "draws": shape.draws, "side": shape.side, "device": "cpu"}
    folders, rounds = (ROOT, args.pop("older")), args.pop("rounds")
    here, there = versions = [Version(folder, args) for folder in folders]
    for kind in ("nonprivate", "private"):
        ratios = []
        for turn in range(rounds + 1):
            order = versions if turn % 2 else versions[::-1]
            seconds = {version: version.step(kind) for version in order}
            ratios.append(seconds[here] / seconds[there])
        print(f"{kind:10} {median(ratios[1:]):6.3f} x that of {folders[1]}", flush=True)


if __name__ == "__main__":
    main()
