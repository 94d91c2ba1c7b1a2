"""Audit: which epsilon does a real training run provably exceed? Less than the reported one?

    python audit_privacy.py                      # the engine, on real handwritten digits
    python audit_privacy.py --mutants            # and broken on purpose, six ways: are they caught?
    python audit_privacy.py --mutant no_noise    # one of them
    python audit_privacy.py --canaries images    # a weaker, more realistic attacker
    python audit_privacy.py --pretrained_model_name_or_path MODEL --train_data_dir scans \\
        --caption_column text --target_epsilon 4 --noise_multiplicity 8    # your own set-up

Canaries are put among the training images, each in or out by a coin; the real training loop runs;
an attacker who sees what it released guesses which were in (Steinke, Nasr and Jagielski 2023). With
`--canaries gradients` each canary's gradient is a direction of its own, as long as clipping allows,
and the attacker sees the noisy sum of every step: the worst case that epsilon must cover. With
`images` the canaries are images of noise, and the attacker sees their loss before and after.

Writes audit.json and audit.png to --output_dir. A bound far below the reported epsilon proves
little by itself; that the mutants are caught proves that the audit can see.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import StableDiffusionPipeline
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from utils.accounting import PrivacyPlan, calibrate_noise_multiplier, make_plan, pld_epsilon
from utils.arguments import CLIPPING_MODES, DataArguments, PrivacyArguments, option, parse
from utils.auditing import draw, measure
from utils.canaries import GradientCanaries, ImageCanaries
from utils.data import PrivateSet, rows_of
from utils.entropy import secret_randomness
from utils.errors import UsageError, run_script
from utils.fine_tuning import training_resolution
from utils.hub import write_durably
from utils.latents import Objective
from utils.lora import LoraArguments, add_lora
from utils.mutants import MUTANTS, broken
from utils.per_unit_gradients import PerUnitGradients
from utils.pipelines import load_pipeline
from utils.planning import private_set_of
from utils.training import TrainingState, private_steps

LOUD = 1000.0  # a canary's gradient before clipping, in units of the clipping bound
DEFAULT_CANARIES = {"gradients": 80_000, "images": 1_000}
CANARIES_PER_GUESS = {"gradients": 250, "images": 10}


@dataclass
class AuditArguments:
    """The audited training, and the audit."""

    pretrained_model_name_or_path: str = option("pipeline to train", "examples/digits/base")
    output_dir: str = option("where audit.json and audit.png go", "runs/audit")
    target_epsilon: float = option("epsilon that the audited run reports", 8.0)
    target_delta: float = option("delta of that epsilon", 1e-6)
    sampling_rate: float = option("q, the probability that a step includes a unit", 0.5)
    max_train_steps: int = option("steps of each run", 2)
    max_grad_norm: float = option("C, the clipping bound", 0.15)
    clipping: str = option("how a unit's gradient is bounded", "flat", choices=CLIPPING_MODES)
    noise_multiplicity: int = option("K, draws averaged per unit before its one clip", 4)
    secure_noise: bool = option("draw from the operating system's cryptographic generator", False)
    learning_rate: float = option("AdamW's learning rate", 1e-3)
    train_batch_size: int = option("units per forward pass", 128)
    num_images: int = option("ordinary training images beside the canaries", 300)
    canaries: str = option("what the canaries are", "gradients", choices=["gradients", "images"])
    num_canaries: int | None = option("default: 80,000 gradients, or 1,000 images", None)
    confidence: float = option("probability that the bound is right", 0.95)
    mutant: str | None = option("break the loop this way", None, choices=list(MUTANTS))
    mutants: bool = option("run the real loop, then every mutant, and print a table", False)
    mutant_epsilon: float = option("epsilon that the mutants report, with --mutants", 2.0)
    seed: int = option("seed of the coins and of the adapter; never of the noise", 0)
    json: bool = option("print one JSON object as the last line", False)


def canaries_of(args: AuditArguments, data: DataArguments, device: torch.device):
    """A fresh adapter, ordinary units, and the canaries whose coins came up heads."""
    pipeline = adapted_pipeline(args, device)
    resolution, folder = training_resolution(pipeline, data), Path(args.output_dir) / "private"
    ordinary = ordinary_set(data, args.num_images, folder)
    coins = torch.Generator().manual_seed(args.seed)
    included = torch.rand(args.num_canaries, generator=coins) < 0.5
    if args.canaries == "images":
        return ImageCanaries(pipeline, ordinary, resolution, included, folder / "latents")
    loudness = LOUD * args.max_grad_norm
    return GradientCanaries(pipeline, ordinary, resolution, included, folder / "latents", loudness)


def adapted_pipeline(args: AuditArguments, device: torch.device) -> StableDiffusionPipeline:
    """The pipeline with a fresh LoRA, as `train_dp_lora.py` makes it, but with B not zero, so that
    every weight has a gradient from the first step even where the noise is gone."""
    torch.manual_seed(args.seed)
    pipeline = load_pipeline(args.pretrained_model_name_or_path)
    pipeline.to(device)
    add_lora(pipeline, LoraArguments(rank=4))
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return pipeline


def ordinary_set(data: DataArguments, count: int, cache: Path) -> PrivateSet:
    """The images that the canaries hide among: the user's, or scikit-learn's digits.

    What `datasets` copies of the user's images goes to `cache`.
    """
    if data.dataset_name is None and data.train_data_dir is None:
        digits = load_digits()
        scans = (digits.images[:count] / 16 * 255).astype(np.uint8)
        columns = {"image": [Image.fromarray(s) for s in scans], "label": digits.target[:count]}
        rows, data = Dataset.from_dict(columns), replace(data, label_column="label")
    else:
        rows = rows_of(data, cache)
        rows = rows.select(range(min(count, len(rows))))
    return private_set_of(rows, data)


@functools.cache
def noise_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    return calibrate_noise_multiplier(epsilon, delta, sampling_rate, steps)


def plan_for(args: AuditArguments, epsilon: float, num_units: int) -> PrivacyPlan:
    """The plan that training claims to follow."""
    sigma = noise_for(epsilon, args.target_delta, args.sampling_rate, args.max_train_steps)
    privacy = PrivacyArguments(
        noise_multiplier=sigma,
        target_delta=args.target_delta,
        max_grad_norm=args.max_grad_norm,
        clipping=args.clipping,
        expected_batch_size=args.sampling_rate * num_units,
        noise_multiplicity=args.noise_multiplicity,
    )
    return make_plan(num_units, privacy, args.max_train_steps)


def audit(args: AuditArguments, data: DataArguments, epsilon: float, mutant: str | None) -> dict:
    """Train once, through the real loop, and measure. Returns the finding, and the scores."""
    accelerator = Accelerator()
    world = canaries_of(args, data, accelerator.device)
    plan = plan_for(args, epsilon, world.num_units)
    randomness = secret_randomness(PrivacyArguments(secure_noise=args.secure_noise))
    engine = PerUnitGradients(world.trained)
    optimizer = torch.optim.AdamW(engine.parameters, lr=args.learning_rate)
    optimizer.register_step_pre_hook(lambda *_: world.watch(plan))
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    def losses_of(indices: torch.Tensor) -> torch.Tensor:
        return world.losses(indices, Objective(plan.noise_multiplicity), randomness)

    with broken(mutant):
        state = TrainingState(engine, optimizer, constant)
        for _ in private_steps(
            accelerator, state, losses_of, plan, randomness, args.train_batch_size
        ):
            pass
    guesses = args.num_canaries // CANARIES_PER_GUESS[args.canaries]
    finding = measure(
        world.scores(plan), world.included.numpy(), guesses, plan.delta, args.confidence
    )
    reported = pld_epsilon([plan.event()], plan.delta)
    caught = finding["lower_bound"] > reported
    return finding | {"mutant": mutant, "reported_epsilon": reported, "caught": caught}


def print_table(findings: list[dict]) -> None:
    print(f"\n{'training loop':28} reported   proven  right guesses")
    for f in findings:
        verdict = "CAUGHT" if f["caught"] else "not caught" if f["mutant"] else "as it should be"
        print(
            f"{f['mutant'] or 'as it is':28} {f['reported_epsilon']:8.2f} {f['lower_bound']:8.2f}"
            f"  {f['right']:4} of {f['guesses']}  {verdict}"
        )


def check(args: AuditArguments) -> None:
    if args.num_canaries is None:
        args.num_canaries = DEFAULT_CANARIES[args.canaries]
    fewest = 10 * CANARIES_PER_GUESS[args.canaries]  # fewer than ten guesses prove nothing
    if args.num_canaries < fewest or args.num_images < 1:
        raise UsageError(f"--num_canaries must be at least {fewest}, --num_images at least 1")
    if not 0 < args.sampling_rate <= 1 or not 0.5 < args.confidence < 1:
        raise UsageError("--sampling_rate must be in (0, 1], --confidence in (0.5, 1)")
    if args.mutant and args.mutants:
        raise UsageError("give --mutant NAME or --mutants, not both")


def main():
    args, data = parse(AuditArguments, DataArguments, description=__doc__)
    check(args)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "private").mkdir(mode=0o700, exist_ok=True)

    runs = [(args.target_epsilon, args.mutant)]
    if args.mutants:
        runs += [(args.mutant_epsilon, name) for name in (None, *MUTANTS)]
    findings = []
    for epsilon, mutant in runs:
        print(f"auditing the loop {mutant or 'as it is'}, at epsilon {epsilon:g}", flush=True)
        findings.append(audit(args, data, epsilon, mutant))

    draw(findings, output_dir / "audit.png")
    shown = ("reported_epsilon", "lower_bound", "caught", "right", "guesses", "score")
    rows = [{key: f[key] for key in ("mutant", *shown)} for f in findings]
    report = rows[0] | {
        "confidence": args.confidence,
        "delta": args.target_delta,
        "canaries": args.canaries,
        "num_canaries": args.num_canaries,
        "mutants": {row["mutant"]: row for row in rows[1:] if row["mutant"]},
    }
    write_durably(output_dir / "audit.json", json.dumps(report, indent=2) + "\n")
    print_table(findings)
    print(f"see {output_dir / 'audit.png'}")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    run_script(main)
