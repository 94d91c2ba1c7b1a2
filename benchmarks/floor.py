"""How near is a private step to what the arithmetic allows, and where does the rest go?

    python benchmarks/floor.py                      # tiny: the digits model
    python benchmarks/floor.py --shape sd15 --mixed_precision bf16

Counts the floating-point operations of one private LoRA step (forward, backward through the frozen
weights, the adapter's per-unit gradients, clipping), and measures this machine's best matrix
product and 3 x 3 convolution. The floor is the time that the operations would take at the speed of
the best product; the profile says which operators take how much of the step.
"""

import argparse
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from operations import COUNTED
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent))

from utils.gradients.fast_linear import linear

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}


def throughput_module():
    """benchmarks/throughput.py, found by its path: Opacus has a package of that name."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("throughput.py"))))


def measure_seconds(work: Callable[[], object], rounds: int = 7) -> float:
    """Median, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times[1:])


@torch.no_grad()
def peaks(dtype: torch.dtype) -> dict[str, float]:
    """Operations per second of the best of some matrix products and 3 x 3 convolutions."""
    products, convolutions = [], []
    for size in (512, 1024, 2048):
        a, b = torch.randn(2, size, size, dtype=dtype)
        for product in (torch.matmul, linear):  # MKL's, and where fp32 linear layers go
            products.append(2 * size**3 / measure_seconds(lambda f=product, a=a, b=b: f(a, b)))
    for channels, side, images in ((64, 32, 16), (128, 16, 32), (320, 32, 2)):
        x = torch.randn(images, channels, side, side, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, dtype=dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        operations = 2 * 9 * channels**2 * side**2 * images
        elapsed = measure_seconds(lambda x=x, w=weight: F.conv2d(x, w, padding=1))
        convolutions.append(operations / elapsed)
    return {"matmul": max(products), "convolution": max(convolutions)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    throughput = throughput_module()
    parser.add_argument("--shape", choices=list(throughput.SHAPES), default="tiny")
    parser.add_argument("--mixed_precision", choices=list(PRECISIONS), default="no")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.set_defaults(without=[])
    args = parser.parse_args()
    for name, value in throughput.SHAPES[args.shape].items():
        setattr(args, name, value)
    bench = throughput.Throughput(args, "ours")
    steps = bench.ours()
    next(steps)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        next(steps)
    operations = counter.get_total_flops()
    seconds = measure_seconds(lambda: next(steps), 3 if args.shape == "sd15" else 9)
    best = {name: peaks(dtype) for name, dtype in PRECISIONS.items()}
    floor = operations / best[args.mixed_precision]["matmul"]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        next(steps)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = {event.key: event.self_cpu_time_total / total for event in events[:15]}

    for name, peak in best.items():
        shown = ", ".join(f"{what} {rate / 1e9:.0f}" for what, rate in peak.items())
        print(f"peak, {'fp32' if name == 'no' else name}: {shown} GFLOP/s")
    print(
        f"{args.shape}, {args.micro_batch} images: {operations / 1e9:.1f} GFLOP, "
        f"{seconds:.3f} s, {operations / seconds / 1e9:.0f} GFLOP/s; floor {floor:.3f} s, "
        f"{floor / seconds:.0%} of it reached"
    )
    print("\n| operator | share of the step |\n| --- | --- |")
    for name, share in shares.items():
        print(f"| `{name}` | {share:.1%} |")
    if args.json:
        result = {
            "shape": args.shape,
            "mixed_precision": args.mixed_precision,
            "operations": operations,
            "seconds": seconds,
            "peaks": best,
            "fraction_of_floor": floor / seconds,
            "profile": shares,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
