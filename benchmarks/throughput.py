"""Images per second of training, set-up aside: ours, an ordinary LoRA script, and Opacus.

    python benchmarks/throughput.py                     # tiny: the digits model, a minute
    python benchmarks/throughput.py --shape sd15        # Stable Diffusion 1.5, random weights
    python benchmarks/throughput.py --without fused_lora    # what each of our gains is worth
    python benchmarks/throughput.py --json

The same base, images, captions, micro-batch, precision and LoRA for all three:

- ours: what train_dp_lora.py does in a step, on latents and text that were encoded once.
- nonprivate_example: what the text-to-image LoRA example of diffusers does in a step
  (the loss of benchmarks/nonprivate_lora.py): load, resize, encode image and caption, denoise,
  AdamW; on a pipeline as diffusers loads it. `--without channels_last fast_linear` says how much of
  our lead is in how we load it.
- opacus: the same loop, with the per-sample gradients of Opacus' hooks, under its memory manager.

Interleaved, medians of the rounds, after one that does not count; peak memory of each is that of a
process of its own. First, ours and an ordinary loop take the same steps from the same draws,
without noise and with a bound that clips nothing: their losses must be the same.
"""

import argparse
import json
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from common import build_pipeline, load_plainly, make_rows, plan_one_step
from diffusers.training_utils import cast_training_params
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader

from utils.data.images import ImageRows, find_readable_rows
from utils.data.latents import Objective, encode_units, unit_losses
from utils.data.private_set import PrivateSet
from utils.gradients import fast_linear, per_unit_gradients
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.memory import peak_of_process
from utils.models.denoising import denoising_loss
from utils.models.families import find_family
from utils.models.pipelines import load_pipeline
from utils.models.processes import read_process
from utils.privacy.dp_sgd import add_noise_once
from utils.privacy.plan import PrivacyPlan
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import clipped_gradient_sum

ROOT = Path(__file__).resolve().parent.parent

SHAPES = {
    "tiny": {"resolution": 32, "micro_batch": 64, "steps": 4, "rounds": 9},
    "sd15": {"resolution": 256, "micro_batch": 4, "steps": 1, "rounds": 3},
}
KINDS = ["ours", "nonprivate_example", "opacus"]
GAINS = ["channels_last", "fast_linear", "fused_lora"]


def ordinary_script():
    """benchmarks/nonprivate_lora.py as a module, found by its path: Opacus has a package of that
    name."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("nonprivate_lora.py"))))


class Throughput:
    """A shape's model and images, and a training step of each kind on as many images."""

    def __init__(self, args, kind: str):
        self.args, self.size = args, args.micro_batch
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        self.rows = make_rows(8 * self.size, args.resolution)
        self.device = self.accelerator.device
        load = load_pipeline if kind == "ours" else load_plainly
        self.pipeline = build_pipeline(args.shape, load).to(self.device)
        if kind != "ours" and args.mixed_precision == "bf16":  # the example halves what is frozen
            self.pipeline.to(torch.bfloat16)
            cast_training_params(self.pipeline.unet)
        self.trained = [p for p in self.pipeline.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6)
        self.plan = plan_one_step(len(self.rows), self.size)
        self.randomness = SecretRandomness()
        if "channels_last" in args.without:
            self.pipeline.unet.to(memory_format=torch.contiguous_format)
        if "fast_linear" in args.without:
            fast_linear.ONEDNN = False
        if "fused_lora" in args.without:
            per_unit_gradients.find_lora_layers = lambda model: {}
        self.engine = PerUnitGradients(self.pipeline.unet)

    def batches(self) -> DataLoader:
        """The ordinary script's loader."""
        script, pipeline = ordinary_script(), self.pipeline
        captions = list(self.rows["text"])
        images = script.Images(
            self.rows, "image", captions, pipeline.tokenizer, self.args.resolution
        )
        return DataLoader(images, self.size, shuffle=True, drop_last=True)

    def ours(self) -> Iterator[None]:
        """Endless steps; what comes before the first is set-up."""
        everyone = torch.arange(len(self.rows))
        digests = find_readable_rows(ImageRows(self.rows)).digests
        captions = list(self.rows["text"])
        private_set = PrivateSet(self.rows, "image", captions, everyone, {}, digests)
        with TemporaryDirectory() as folder:
            where = (self.args.resolution, Path(folder))
            units, _ = encode_units(self.pipeline, private_set, *where)
        self.pipeline.unet.eval()

        def losses(indices: torch.Tensor) -> torch.Tensor:
            return unit_losses(self.pipeline, units, indices, Objective(1), self.randomness)

        while True:
            batch = everyone[torch.randperm(len(everyone))[: self.size]]
            self.private_step(losses, batch, self.plan)
            yield

    def private_step(self, losses: Callable, batch: torch.Tensor, plan: PrivacyPlan) -> None:
        total = clipped_gradient_sum(self.accelerator, self.engine, losses, batch, plan, self.size)
        self.engine.assign(add_noise_once(total, plan, self.randomness, self.accelerator))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def nonprivate_example(self) -> Iterator[None]:
        loader, script = self.batches(), ordinary_script()
        while True:
            for pixels, ids in loader:
                with self.accelerator.autocast():
                    loss = script.compute_loss(
                        self.pipeline, pixels.to(self.device), ids.to(self.device)
                    )
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                yield

    def opacus(self) -> Iterator[None]:
        script = ordinary_script()
        self.pipeline.unet.train()  # Opacus passes over layers in eval mode
        hooks, optimizer, loader = PrivacyEngine().make_private(
            module=self.pipeline.unet,
            optimizer=torch.optim.AdamW(self.trained, lr=1e-6),
            data_loader=self.batches(),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            wrap_model=False,
        )
        try:
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=self.size, optimizer=optimizer
            ) as batches:
                while True:
                    for pixels, ids in batches:
                        with self.accelerator.autocast():
                            loss = script.compute_loss(
                                self.pipeline, pixels.to(self.device), ids.to(self.device)
                            )
                        loss.backward()
                        optimizer.step()
                        optimizer.zero_grad()
                        yield
        finally:
            hooks.cleanup()

    def loss_after(self, private: bool, steps: int = 5) -> float:
        """The loss after `steps` steps on the same draws: an ordinary loop's, or ours without
        noise or clipping."""
        generator = torch.Generator().manual_seed(0)
        family, process = find_family(self.pipeline), read_process(self.pipeline.scheduler)
        side = self.args.resolution // family.pixels_per_side
        width = family.denoiser.config.cross_attention_dim
        latents, noise = torch.randn(2, self.size, 4, side, side, generator=generator)
        words = torch.randn(self.size, 8, width, generator=generator)
        quantiles = torch.rand(self.size, generator=generator)
        plan = replace(self.plan, noise_multiplier=0.0, max_grad_norm=1e9)

        def losses(units: torch.Tensor) -> torch.Tensor:
            parts = (x[units].to(self.device) for x in (latents, words, noise, quantiles))
            clean, hidden, more, levels = parts
            text = {"encoder_hidden_states": hidden}
            return denoising_loss(family.predictor, process, clean, text, more, levels)

        def ordinary() -> None:
            with self.accelerator.autocast():
                loss = losses(everyone).mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        everyone = torch.arange(self.size)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)
        for _ in range(steps):
            self.private_step(losses, everyone, plan) if private else ordinary()
        with torch.no_grad(), self.accelerator.autocast():
            return losses(everyone).mean().item()


def timed(args) -> dict[str, float]:
    """Images per second of each kind."""
    seconds = {}
    running = {kind: getattr(Throughput(args, kind), kind)() for kind in KINDS}
    for turn in range(args.rounds + 1):
        order = KINDS[turn % 3 :] + KINDS[: turn % 3]
        for kind in order:
            start = time.perf_counter()
            for _ in range(args.steps):
                next(running[kind])
            if turn > 0:
                seconds.setdefault(kind, []).append(time.perf_counter() - start)
    images = args.steps * args.micro_batch
    return {kind: images / median(seconds[kind]) for kind in KINDS}


def peak_bytes(kind: str) -> int:
    """Of a fresh process that does two steps of one kind."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak_of", kind]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(run.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--resolution", type=int, help="of the images, in pixels")
    parser.add_argument("--micro_batch", type=int, help="images per forward pass")
    parser.add_argument("--steps", type=int, help="per round")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument(
        "--without", nargs="+", choices=GAINS, default=[], help="leave these out of ours"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--peak_of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, value in SHAPES[args.shape].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    warnings.filterwarnings("ignore")  # of Opacus
    if args.peak_of:
        steps = getattr(Throughput(args, args.peak_of), args.peak_of)()
        for _ in range(2):
            next(steps)
        print(peak_of_process())
        return
    peaks = {kind: peak_bytes(kind) for kind in KINDS}  # while this process is small
    ordinary, ours = (Throughput(args, kind).loss_after(kind == "ours") for kind in KINDS[1::-1])
    rates = timed(args)
    result = {
        "shape": args.shape,
        "mixed_precision": args.mixed_precision,
        "without": args.without,
        "images_per_second": rates,
        "ratio": {
            "ours_over_nonprivate": rates["ours"] / rates["nonprivate_example"],
            "ours_over_opacus": rates["ours"] / rates["opacus"],
        },
        "peak_bytes": peaks,
        "loss_after_the_same_draws": {"ordinary": ordinary, "ours": ours},
    }
    for kind in KINDS:
        ratio = rates[kind] / rates["nonprivate_example"]
        shown = f"{rates[kind]:9.2f} images/s {ratio:6.2f} x {peaks[kind] / 2**20:8.0f} MiB"
        print(f"{kind:20} {shown}")
    print(f"loss after the same draws: ordinary {ordinary:.6f}, ours {ours:.6f}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
