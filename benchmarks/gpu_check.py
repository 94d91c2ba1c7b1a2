"""Is it right, fast and small on this GPU? One command, some minutes.

    python benchmarks/gpu_check.py                    # exit code 1 if anything is wrong
    python benchmarks/gpu_check.py --json > gpu.json
    python benchmarks/gpu_check.py --device cpu --shapes tiny    # the same checks without a GPU

- right: the clipped sum of some units, for every method, against that of the CPU in fp32, from the
  same draws; in fp32, and under bf16; no contribution above the bound; one more unit in front of
  the others changes nothing of theirs; noise of the right size.
- fast, small: a private step beside an ordinary one and one with Opacus' hooks
  (benchmarks/step_time.py), on the shapes of Stable Diffusion 1.5 and XL, with the memory of each.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import plan_one_step

from utils.arguments.methods import LdmArguments, LoDAArguments, LoraArguments
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.methods.trial import adapt
from utils.models.denoising import denoising_loss
from utils.models.families import find_family
from utils.models.families.stable_diffusion import ALL_TARGETS
from utils.models.pipelines import collect_trained_modules, load_pipeline
from utils.models.processes import read_process
from utils.models.text import embed_captions
from utils.privacy.dp_sgd import add_noise_once
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import clipped_gradient_sum

ROOT = Path(__file__).resolve().parent.parent
UNITS, DRAWS, SIDE = 12, 3, 8
METHODS = {
    "dp-lora": LoraArguments(rank=4, target_modules=ALL_TARGETS),
    "dp-loda": LoDAArguments(rank=4),
    "dp-ldm": LdmArguments(),
    "dp-diffusion": LdmArguments(trainable="all"),
}
TOLERANCE = {"no": 1e-3, "bf16": 0.1}  # of the sum's length
# What is timed: a shape, and how it would be trained on.
SHAPES = {
    "tiny": ["--rounds", "5"],
    "sd15": ["--side", "64", "--units", "8", "--mixed_precision", "bf16", "--rounds", "7"],
    "sdxl": ["--mixed_precision", "bf16", "--gradient_checkpointing", "--rounds", "5"],
}


def start(device: str, precision: str = "no") -> Accelerator:
    """A fresh one: it remembers its device and precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", mixed_precision=precision)


def sum_clipped(settings, device: str, precision: str) -> tuple[torch.Tensor, float, float]:
    """The clipped sum over units [P] on a device; and in units of C the largest contribution of one
    unit, and how far the others' move if one is in front of them. Of the digits model, whose
    adapter is moved off its start, so that all train."""
    accelerator = start(device, precision)
    pipeline = load_pipeline(str(ROOT / "examples" / "digits" / "base"))
    torch.manual_seed(0)
    adapt(pipeline, settings)
    for parameter in collect_trained_modules(pipeline).parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape)
    pipeline.to(accelerator.device)
    engine = PerUnitGradients(collect_trained_modules(pipeline), DRAWS)
    latents, noise = torch.randn(2, UNITS, DRAWS, 4, SIDE, SIDE)
    quantiles = torch.rand(UNITS, DRAWS)
    captions = [f"the digit {u % 10}" for u in range(UNITS)]
    text = embed_captions(pipeline, captions, 32)
    family, process = find_family(pipeline), read_process(pipeline.scheduler)

    def losses(indices: torch.Tensor) -> torch.Tensor:
        inputs = [t[indices].flatten(0, 1).to(accelerator.device) for t in (latents, noise)]
        words = {k: v[indices].repeat_interleave(DRAWS, 0) for k, v in text.items()}
        times = quantiles[indices].flatten().to(accelerator.device)
        each = denoising_loss(family.predictor, process, inputs[0], words, inputs[1], times)
        return each.view(len(indices), DRAWS).mean(1)

    plan = plan_one_step(UNITS, UNITS, noise_multiplicity=DRAWS, clipping="automatic")

    def total(units) -> torch.Tensor:
        units = torch.as_tensor(units)
        return clipped_gradient_sum(accelerator, engine, losses, units, plan, 4).cpu()

    whole, alone = total(range(UNITS)), [total([unit]) for unit in range(UNITS)]
    moved = (whole - total(range(1, UNITS)) - alone[0]).norm().item()
    return whole, max(one.norm().item() for one in alone), moved


def check_correctness(device: str) -> list[dict]:
    """A row a method and precision."""
    rows = []
    for name, settings in METHODS.items():
        truth, *_ = sum_clipped(settings, "cpu", "no")
        for precision, tolerance in TOLERANCE.items():
            found, largest, moved = sum_clipped(settings, device, precision)
            error = ((found - truth).norm() / truth.norm()).item()
            right = error < tolerance and largest <= 1 + 1e-5 and moved <= 1e-5
            rows.append(
                {"method": name, "precision": precision, "error": error, "largest": largest}
                | {"moved": moved, "right": right}
            )
            print(
                f"{name:13} {precision:5} off by {error:.1e}, at most {largest:.6f} C a unit, "
                f"moved by {moved:.1e} C by one in front: {'right' if right else 'WRONG'}",
                flush=True,
            )
    return rows


def check_noise(device: str) -> dict:
    """The standard deviation of the noise, over what it should be, to five of its own."""
    accelerator, plan = start(device), plan_one_step(100, 10)
    zeros = torch.zeros(10**6, dtype=torch.float64, device=accelerator.device)
    noise = add_noise_once(zeros, plan, SecretRandomness(), accelerator)
    ratio = (noise.std() * plan.expected_batch_size / plan.noise_std).item()
    right = abs(ratio - 1) < 5 / (2 * len(zeros)) ** 0.5
    print(f"noise: {ratio:.4f} of what it should be: {'right' if right else 'WRONG'}")
    return {"ratio": ratio, "right": right}


def time_shape(shape: str, device: str) -> dict:
    """What step_time.py says of a shape."""
    command = [sys.executable, str(ROOT / "benchmarks" / "step_time.py"), "--shape", shape]
    command += [*SHAPES[shape], "--device", device, "--json"]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"\n{shape}, {' '.join(SHAPES[shape])}\n" + "\n".join(run.stdout.splitlines()[:-1]))
    return json.loads(run.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["sd15", "sdxl"])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: PyTorch sees no CUDA GPU here; --device cpu runs the checks without one")
    where = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU"
    print(f"{where}, PyTorch {torch.__version__}")
    rows, noise = check_correctness(args.device), check_noise(args.device)
    timed = [time_shape(shape, args.device) for shape in args.shapes]
    if args.json:
        print(json.dumps({"device": where, "correct": rows, "noise": noise, "timed": timed}))
    if not noise["right"] or not all(row["right"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
