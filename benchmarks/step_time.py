"""What privacy costs: one training step, private and not, side by side in one process.

    python benchmarks/step_time.py --shape tiny --method lora
    python benchmarks/step_time.py --shape sd15 --method lora --rounds 3     # minutes, 10 GB
    python benchmarks/step_time.py --shape tiny --method all --json

Every round times, in turn: an ordinary step; ours (per-unit gradients, clipping, noise), also with
--secure_noise; where the model's own weights train, the scoring of the same units by DP-SAPF;
Opacus' hooks, which clip the mean of each unit's K copies as we do; and Opacus' ghost clipping,
where it runs and K is 1. Same model, micro-batch, K and precision. Medians of the rounds, after one
that does not count; peak memory of each kind is that of a process of its own, or, on a GPU, what
its first timed step allocates at the most.

Shapes: `tiny` is the digits model of examples/digits; with random weights, `sd15` is the U-Net of
Stable Diffusion 1.5, on 32 x 32 latents; `sdxl` that of XL, on 128 x 128 ones, for a GPU; `sd3`
four blocks of the transformer of Stable Diffusion 3.5 medium, on 32 x 32 latents.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from common import plan_one_step
from opacus import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleModuleFastGradientClipping,
)
from peft import LoraConfig
from shapes import SHAPES

from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.memory import measure_memory, peak_of_process
from utils.methods.saliency import Scoring
from utils.models.denoising import denoising_loss
from utils.models.loda.loda import LoDAConfig
from utils.models.targets import resolve_targets
from utils.privacy.dp_sgd import add_noise_once
from utils.privacy.randomness import SecretRandomness, SecureRandomness
from utils.privacy.training import clipped_gradient_sum

ROOT = Path(__file__).resolve().parent.parent

KINDS = ["nonprivate", "private", "private_secure_noise", "scoring", "opacus_hooks", "opacus_ghost"]


class Bench:
    """A model, fixed inputs, and one method that does a whole training step of each kind."""

    def __init__(self, args):
        torch.manual_seed(0)
        self.units, self.draws = args.units, args.draws
        precision = args.mixed_precision
        self.accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=precision)
        device = self.accelerator.device
        shape = SHAPES[args.shape]
        self.family, self.process = shape.family, shape.process
        self.denoiser = shape.build_for_steps()
        self.denoiser.requires_grad_(args.method == "all")
        if args.method == "lora":
            targets = resolve_targets(self.denoiser, shape.family.default_targets)
            self.denoiser.add_adapter(
                LoraConfig(r=4, init_lora_weights=False, target_modules=targets)
            )
        elif args.method == "loda":
            targets = resolve_targets(self.denoiser, shape.family.all_targets)
            self.denoiser.add_adapter(LoDAConfig(r=4, target_modules=targets))
        elif args.method == "attention":
            for name, parameter in self.denoiser.named_parameters():
                parameter.requires_grad_(shape.family.is_attention(name))
        if args.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.denoiser.to(device)
        self.trained = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.engine = PerUnitGradients(self.denoiser, self.draws)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6)
        self.plan = plan_one_step(10**5, self.units, noise_multiplicity=self.draws)
        self.randomness = SecretRandomness()
        rows, side, channels = args.units * args.draws, args.side, self.denoiser.config.in_channels
        self.latents, self.noise = torch.randn(2, rows, channels, side, side).to(device)
        self.text = {
            name: torch.randn(rows, *sizes).to(device) for name, sizes in shape.text.items()
        }
        self.quantiles = torch.rand(rows).to(device)

    def losses(self, model) -> torch.Tensor:
        """[rows]."""
        with self.accelerator.autocast():
            inputs = (self.latents, self.text, self.noise, self.quantiles)
            return denoising_loss(partial(self.family.predict, model), self.process, *inputs)

    def nonprivate(self):
        self.losses(self.denoiser).mean().backward()
        self._update()

    def private(self, randomness: SecretRandomness | None = None):
        def unit_losses(indices):
            return self.losses(self.denoiser).view(self.units, self.draws).mean(1)

        everyone = torch.arange(self.units)
        total = clipped_gradient_sum(
            self.accelerator, self.engine, unit_losses, everyone, self.plan, self.units
        )
        source = randomness or self.randomness
        self.engine.assign(add_noise_once(total, self.plan, source, self.accelerator))
        self._update()

    def private_secure_noise(self):
        self.private(SecureRandomness())

    def scoring(self):
        """The same units' share of a selection (`select_saliency.py`)."""
        names = tuple(self.engine.names)
        with self.engine.recording(self.units, norms_only=True) as record:
            self.losses(self.denoiser).view(self.units, self.draws).mean(1).sum().backward()
        Scoring("squared_norm", names, names, 1, 1.0).scores(record.squared_norms()).sum(0)

    def opacus_hooks(self):
        model = GradSampleModule(self.denoiser, loss_reduction="sum", strict=False)
        try:
            self.losses(model).sum().backward()
        finally:
            model.remove_hooks()
        samples = []
        for parameter in self.trained:
            grads = parameter.grad_sample.view(self.units, self.draws, *parameter.shape)
            samples.append(grads.mean(1).flatten(1) if self.draws > 1 else grads.flatten(1))
            parameter.grad_sample = None
        norms = torch.stack([g.norm(dim=1) for g in samples]).norm(dim=0)
        scales = (self.plan.max_grad_norm / norms).clamp(max=1)
        self._assign([scales @ g for g in samples])
        model.to_standard_module()

    def opacus_ghost(self):
        model = GradSampleModuleFastGradientClipping(
            self.denoiser, loss_reduction="sum", strict=False, max_grad_norm=self.plan.max_grad_norm
        )
        losses = self.losses(model)
        losses.sum().backward(retain_graph=True)
        scales = model.get_clipping_coef()
        self.optimizer.zero_grad()
        model.disable_hooks()
        (scales * losses).sum().backward()
        self._assign([p.grad.flatten() for p in self.trained])
        model.to_standard_module()

    def _assign(self, sums: list[torch.Tensor]) -> None:
        for parameter, total in zip(self.trained, sums, strict=True):
            noisy = total.view_as(parameter) + self.plan.noise_std * torch.randn_like(parameter)
            parameter.grad = noisy / self.units
        self._update()

    def _update(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def kinds_that_run(bench: Bench, args) -> list[str]:
    """All kinds, but for those of Opacus that fail here; one untimed step of each."""
    running = []
    for kind in KINDS:
        if kind == "opacus_ghost" and args.draws > 1:
            continue
        if kind == "scoring" and args.method not in ("attention", "all"):
            continue  # it is the public model's own weights that are ranked
        try:
            getattr(bench, kind)()
            running.append(kind)
        except Exception as error:  # whatever a peer raises is its result
            if not kind.startswith("opacus"):
                raise
            print(f"{kind} does not run here: {type(error).__name__}: {error}", file=sys.stderr)
            bench = Bench(args)
    return running


def timed(args) -> tuple[dict[str, float], dict[str, int]]:
    """Of each kind that runs: seconds of a step, and on a GPU its peak memory."""
    bench = Bench(args)
    kinds = kinds_that_run(bench, args)
    seconds, peaks = {kind: [] for kind in kinds}, {}
    for turn in range(args.rounds):
        for kind in kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]:
            with measure_memory(bench.accelerator.device) as memory:
                start = time.perf_counter()
                getattr(bench, kind)()
                torch.cuda.synchronize() if args.device == "cuda" else None
                seconds[kind].append(time.perf_counter() - start)
            peaks.setdefault(kind, memory.peak)
    return {kind: median(values) for kind, values in seconds.items()}, peaks


def peak_bytes(kind: str) -> int | None:
    """Of a fresh process that does two steps of one kind on the CPU; None if it cannot.

    Ask before this process grows: a child's peak counts from what its parent held at the fork.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--peak_of", kind]
    run = subprocess.run(command, capture_output=True, text=True)
    return int(run.stdout.strip().splitlines()[-1]) if run.returncode == 0 else None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--method", choices=["lora", "loda", "attention", "all"], default="lora")
    parser.add_argument("--units", type=int, help="units in the micro-batch")
    parser.add_argument("--draws", type=int, help="K")
    parser.add_argument("--side", type=int, help="height and width of the latents")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--peak_of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("units", "draws", "side"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(SHAPES[args.shape], name))
    if args.peak_of:
        bench = Bench(args)
        for _ in range(2):
            getattr(bench, args.peak_of)()
        print(peak_of_process())
        return

    peaks = {kind: peak_bytes(kind) for kind in KINDS} if args.device == "cpu" else {}
    seconds, on_gpu = timed(args)
    peaks = peaks or on_gpu
    result = {
        "shape": args.shape,
        "method": args.method,
        "units": args.units,
        "draws": args.draws,
        "seconds": seconds,
        "ratio": {
            "private_over_nonprivate": seconds["private"] / seconds["nonprivate"],
            "opacus_over_private": seconds["opacus_hooks"] / seconds["private"]
            if "opacus_hooks" in seconds
            else None,
        },
        "peak_bytes": peaks,
        "peak_memory_ratio": peaks["private"] / peaks["nonprivate"],
    }
    for kind, value in seconds.items():
        ratio = value / seconds["nonprivate"]
        print(f"{kind:14} {value:8.3f} s {ratio:6.2f} x   {peaks[kind] / 2**20:8.0f} MiB")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
