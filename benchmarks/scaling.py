"""What one private step costs, against everything that can grow.

    python benchmarks/scaling.py                # 15 minutes on two cores
    python benchmarks/scaling.py --axes N B     # some of it

Seconds of a whole step of the digits model (Poisson batch, losses, per-unit gradients, clipping,
noise, AdamW) against N private units, B expected units a batch, K draws a unit, the rank of the
LoRA, and the width of the U-Net; and with two processes of one thread against one. Values of an
axis are interleaved, medians of the rounds; exponents are slopes of the log-log lines. Memory is
the peak of a process of its own; the latents are a file. Also how long a script takes to start.

Leaves benchmarks/results/scaling.json and scaling.png.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).resolve().parent.parent))

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator
from common import plan_one_step
from diffusers import UNet2DConditionModel

from utils.arguments.methods import LoraArguments
from utils.data.latents import EncodedUnits, Objective, group_rows_by_unit, unit_losses
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.models.lora import add_lora
from utils.models.pipelines import load_pipeline
from utils.privacy.dp_sgd import add_noise_once, sample_poisson_batch
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import clipped_gradient_sum

ROOT = Path(__file__).resolve().parent.parent

BASE = ROOT / "examples" / "digits" / "base"
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
ROWS = 64  # of a forward pass
DEFAULTS = {"N": 10_000, "B": 64, "K": 1, "rank": 4, "width": 64}
AXES = {
    "N": [1_000, 10_000, 100_000, 1_000_000],
    "B": [128, 256, 512, 1024, 2048],
    "K": [1, 2, 4, 8, 16],
    "rank": [1, 4, 16, 64],
    "width": [32, 64, 128, 256],
}
LABELS = {
    "N": "private units, N",
    "B": "expected units in a batch, B",
    "K": "draws of a unit, K",
    "rank": "rank of the LoRA",
    "width": "trained and frozen weights",
}


class Case:
    """A model and a private set of some size, and one whole private step on it."""

    def __init__(self, N: int, B: int, K: int, rank: int, width: int):
        torch.manual_seed(0)
        self.accelerator, self.randomness = Accelerator(), SecretRandomness()
        with TemporaryDirectory() as folder:
            self.pipeline = load_pipeline(resized(width, folder))
        self.num_weights = sum(p.numel() for p in self.pipeline.unet.parameters())
        add_lora(self.pipeline, LoraArguments(rank=rank))
        self.engine = PerUnitGradients(self.pipeline.unet, K)
        self.num_weights += self.engine.num_parameters
        self.plan = plan_one_step(N, B, noise_multiplicity=K)
        self.micro = max(1, ROWS // K)
        self.optimizer = torch.optim.AdamW(self.engine.parameters, lr=1e-6)
        self.units = mapped_units(N, self.pipeline.unet.config)

    def step(self) -> int:
        """How many units were drawn."""
        batch = sample_poisson_batch(self.plan, self.randomness, self.accelerator)
        own = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        where = (self.engine, self.losses, own, self.plan, self.micro)
        total = clipped_gradient_sum(self.accelerator, *where)
        noisy = add_noise_once(total, self.plan, self.randomness, self.accelerator)
        self.engine.assign(noisy)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return len(batch)

    def losses(self, indices: torch.Tensor) -> torch.Tensor:
        objective = Objective(self.plan.noise_multiplicity)
        return unit_losses(self.pipeline, self.units, indices, objective, self.randomness)

    def seconds(self, least: int = 128) -> float:
        """Of a step of exactly B units, from as many steps as draw `least` units."""
        drawn, start = 0, time.perf_counter()
        while drawn < least:
            drawn += self.step()
        return (time.perf_counter() - start) / drawn * self.plan.expected_batch_size


def resized(width: int, folder: str) -> str:
    """The digits model with another number of channels: its folder."""
    if width == DEFAULTS["width"]:
        return str(BASE)
    pipeline = load_pipeline(str(BASE))
    config = dict(pipeline.unet.config) | {"block_out_channels": (width, 2 * width)}
    pipeline.unet = UNet2DConditionModel.from_config(config)
    pipeline.save_pretrained(folder)
    return folder


def mapped_units(count: int, config) -> EncodedUnits:
    """`count` units of one image and ten captions; the latents are a file of zeros, mapped."""
    shape = (count, 1, config.in_channels, config.sample_size, config.sample_size)
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "latents.f32")
        latents = torch.from_file(path, shared=True, size=int(np.prod(shape))).view(shape)
    text = {"encoder_hidden_states": torch.randn(10, 16, config.cross_attention_dim)}
    captions = torch.arange(count, dtype=torch.int32) % 10
    units = group_rows_by_unit(torch.arange(count))
    return EncodedUnits(32, latents, [], text, captions, *units)


def collect_settings(axis: str) -> list[dict]:
    return [DEFAULTS | {axis: value} for value in AXES[axis]]


def measure(axis: str, rounds: int, peaks: list[int]) -> dict:
    """Seconds for each value of one axis, and the exponents of these and of `peaks`."""
    cases = [Case(**setting) for setting in collect_settings(axis)]
    seconds = [[] for _ in cases]
    for turn in range(rounds + 1):
        for case, own in zip(cases, seconds, strict=True):
            own.append(case.seconds() if turn else case.step())
    seconds = [median(own[1:]) for own in seconds]
    values = [case.num_weights for case in cases] if axis == "width" else AXES[axis]
    return {
        "values": values,
        "seconds": seconds,
        "peak_bytes": peaks,
        "exponent": exponent(values, seconds),
        "memory_exponent": exponent(values, peaks),
    }


def exponent(x: list[float], y: list[float]) -> float:
    """The slope of the line through (log x, log y)."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def of_another_process(*arguments: str, world: int = 0) -> float:
    """What this script prints when run with `arguments`; perhaps as processes of one thread."""
    start = [sys.executable]
    if world:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    one_thread = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment = os.environ | (one_thread if world else {})
    command = [*start, __file__, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(run.stdout.strip().splitlines()[-1])


def peak_bytes(setting: dict) -> int:
    return int(of_another_process("--peak_of", json.dumps(setting)))


def processes() -> dict:
    """Steps of 256 units by one and by two processes of one thread each, three times in turn."""
    setting = json.dumps(DEFAULTS | {"B": 256})
    seconds = {1: [], 2: []}
    for _ in range(3):
        for count, own in seconds.items():
            own.append(of_another_process("--measure_seconds", setting, world=count))
    one, two = (median(own) for own in seconds.values())
    return {"seconds": {"1": one, "2": two}, "efficiency": one / two / 2}


def start_up() -> dict[str, float]:
    """Seconds until a script has taught (`--help`), and until it has planned (`--dry_run`)."""
    images = ROOT / "runs" / "scaling" / "images"
    recipe = ["--config", "examples/digits/dp_lora.yaml", "--train_data_dir", str(images)]
    draw = ["sample.py", "--pretrained_model_name_or_path", str(BASE), "--num_images", "20"]
    draw += ["--class_names", *"0123456789", "--caption_template", "the digit {label}"]
    plan = ["--dry_run", "--expected_batch_size", "10", "--target_delta", "0.01"]
    commands = {
        "help": ["train_dp_lora.py", "--help"],
        "dry_run": ["train_dp_lora.py", *recipe, *plan, "--output_dir", f"{images.parent}/run"],
    }
    subprocess.run([sys.executable, *draw, "--output_dir", images], cwd=ROOT, check=True)
    seconds = {}
    for name, command in commands.items():
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds[name] = time.perf_counter() - start
    return seconds


def short(value: int) -> str:
    """1000000 as 1M."""
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return str(value)


def draw_lines(results: dict, path: Path) -> None:
    """A log-log line for each axis, with its exponent."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [axis for axis in AXES if axis in results]
    shape = {"figsize": (3 * len(shown), 3.2), "squeeze": False, "sharey": True}
    figure, panels = plt.subplots(1, len(shown), **shape)
    for axis, panel in zip(shown, panels[0], strict=True):
        row = results[axis]
        panel.loglog(row["values"], row["seconds"], "o-", color="#2a6f97")
        panel.set_xlabel(LABELS[axis])
        panel.set_title(f"time exponent {row['exponent']:.2f}")
        panel.set_xticks(row["values"], [short(value) for value in row["values"]])
        panel.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("seconds of a private step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def print_tables(results: dict) -> None:
    print("| against | values | seconds of a step | exponent | peak memory, GiB | exponent |")
    print("| --- | --- | --- | --- | --- | --- |")
    for axis in AXES:
        if axis in results:
            row = results[axis]
            values = ", ".join(f"{value:,}" for value in row["values"])
            seconds = ", ".join(f"{value:.3g}" for value in row["seconds"])
            peaks = ", ".join(f"{value / 2**30:.2f}" for value in row["peak_bytes"])
            cells = [LABELS[axis], values, seconds, f"**{row['exponent']:.3f}**", peaks]
            print(f"| {' | '.join(cells)} | {row['memory_exponent']:.3f} |")
    if "processes" in results:
        row = results["processes"]
        print(
            f"\ntwo processes of one thread: {row['seconds']['2']:.2f} s a step of 256 units, "
            f"one: {row['seconds']['1']:.2f} s; efficiency {row['efficiency']:.0%}"
        )
    if "start_up" in results:
        row = results["start_up"]
        print(f"train_dp_lora.py: --help {row['help']:.1f} s, --dry_run {row['dry_run']:.1f} s")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = [*AXES, "processes", "start_up"]
    parser.add_argument(
        "--axes", nargs="*", choices=everything, default=everything, help="none: draw what is known"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    parser.add_argument("--measure_seconds", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        case = Case(**json.loads(args.peak_of))
        for _ in range(2):
            case.step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    if args.measure_seconds:
        case = Case(**json.loads(args.measure_seconds))
        case.step()
        case.accelerator.print(case.seconds(least=1000))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    whole = {"processes": processes, "start_up": start_up}
    peaks = {  # while this process is small: a child's peak counts what its parent held
        axis: [peak_bytes(setting) for setting in collect_settings(axis)]
        for axis in args.axes
        if axis in AXES
    }
    for axis in args.axes:
        results[axis] = whole[axis]() if axis in whole else measure(axis, args.rounds, peaks[axis])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw_lines(results, RESULTS.with_suffix(".png"))
    print_tables(results)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
