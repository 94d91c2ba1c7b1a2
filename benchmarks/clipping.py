"""Does clipping need tuning? What units contribute; flat clipping at several C, and automatic.

    python benchmarks/clipping.py contribute --train_data_dir runs/digits/private
    python benchmarks/clipping.py contribute --dataset_name FOLDER_OF_MNIST
    python benchmarks/clipping.py contribute --shape sd15          # random weights and images
    python benchmarks/clipping.py compare --stand_in runs/stand_in --output_dir runs/clipping

`contribute` gives the lengths of some units' gradients, and of what automatic clipping makes of
them, in units of C; of images that are public to whoever runs it, since it shows both. `compare`
trains on public images as noisily as a private run on 1,437 at epsilon 10 would
(`rehearse.py`), and judges by the denoising loss of images held out.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from common import build_pipeline, make_rows

from utils.arguments.methods import LoraArguments
from utils.arguments.rehearsal import RehearsalArguments
from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.data.latents import Objective, PrivateLosses, encode_units
from utils.data.private_set import load_private_set
from utils.data.rows import load_rows
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.methods.rehearsal import prepare_trials
from utils.methods.stand_in import load_stand_in
from utils.methods.trial import advance
from utils.methods.workers import open_pool
from utils.models.pipelines import load_pipeline
from utils.privacy.dp_sgd import clip_scales
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import reduce_micro_batches

BASE = "examples/digits/base"
LABELS = {"label_column": "label", "caption_template": "the digit {label}"}
KINDS = [("automatic", 1.0), ("flat", 0.01), ("flat", 0.1), ("flat", 1.0), ("flat", 10.0)]


def contribute(args) -> dict:
    """Quantiles of the lengths of units' gradients, and of their contributions over C."""
    accelerator, side = Accelerator(), 32 if args.shape == "tiny" else 256
    pipeline = build_pipeline(args.shape, load_pipeline)
    if args.shape == "tiny":
        data = DataArguments(
            dataset_name=args.dataset_name, train_data_dir=args.train_data_dir, **LABELS
        )
        rows = load_rows(data).shuffle(seed=0).select(range(args.units))
    else:
        data, rows = DataArguments(caption_column="text"), make_rows(args.units, side)
    with TemporaryDirectory() as folder:
        units, _ = encode_units(pipeline, load_private_set(rows, data), side, Path(folder))
    losses = PrivateLosses(pipeline, units, Objective(args.draws), SecretRandomness(0))
    engine = PerUnitGradients(pipeline.unet, args.draws)
    plan = argparse.Namespace(clipping="automatic", max_grad_norm=1.0)
    lengths, parts = [], torch.arange(args.units).split(8)

    def note(record) -> torch.Tensor:
        lengths.append(record.rows().norm(dim=1).double())
        scales = clip_scales(record.squared_norms(), plan)
        return torch.stack([lengths[-1], lengths[-1] * scales[:, 0]], 1)

    found = reduce_micro_batches(accelerator, engine.recording, losses, parts, note)
    lengths, contributions = torch.cat(list(found)).T
    at = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    return {
        "units": args.units,
        "lengths": lengths.quantile(at).tolist(),
        "contributions": contributions.quantile(at).tolist(),
    }


def compare(args) -> list[dict]:
    """A row a kind of clipping and C: the least loss over a few rates, and which rate it was."""
    model = ModelArguments(pretrained_model_name_or_path=BASE)
    data = DataArguments(**LABELS)
    rehearsal = RehearsalArguments(tried_rates=args.rates, tried_steps=[args.steps])
    privacy = PrivacyArguments(target_epsilon=args.epsilon, target_delta=1e-4)
    training = TrainingArguments(output_dir=args.output_dir)
    stand_in = load_stand_in(
        model, data, replace(rehearsal, stand_in=args.stand_in), Path(args.output_dir), None, 1437
    )
    setting = (privacy, training, LoraArguments(rank=4), rehearsal)
    trials, base = prepare_trials(stand_in, 1437, *setting)
    trials = [trial for trial in trials if trial.settings.freeze_lora_a]
    rows = [{"clipping": "the base model", "loss": base["loss"]}]
    with open_pool(args.workers) as pool:
        jobs = {}
        for number, (clipping, bound) in enumerate(KINDS):
            for trial in trials:
                plan = replace(trial.plan, clipping=clipping, max_grad_norm=bound)
                folder = trial.folder.parent / f"{number}-{trial.folder.name}"
                tried = replace(trial, plan=plan, folder=folder)
                job = pool.submit(advance, stand_in, tried, plan.steps, 0)
                jobs[clipping, bound, trial.training.learning_rate] = job
        for (clipping, bound, rate), job in jobs.items():
            rows.append({"clipping": clipping, "C": bound, "rate": rate, "loss": job.result().loss})
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["contribute", "compare"])
    parser.add_argument("--shape", choices=["tiny", "sd15"], default="tiny")
    parser.add_argument("--dataset_name")
    parser.add_argument("--train_data_dir")
    parser.add_argument("--units", type=int, default=32)
    parser.add_argument("--draws", type=int, default=1, help="K")
    parser.add_argument("--stand_in", help="public images, as benchmarks/stand_in.py makes them")
    parser.add_argument("--output_dir", default="runs/clipping")
    parser.add_argument("--epsilon", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.004, 0.016])
    parser.add_argument("--workers", type=int)
    args = parser.parse_args()
    if args.what == "contribute":
        print(json.dumps(contribute(args), indent=2))
        return
    print("| clipping | C | rate | loss |\n| --- | --- | --- | --- |")
    for row in compare(args):
        cells = [row["clipping"], row.get("C", ""), row.get("rate", ""), f"{row['loss']:.5f}"]
        print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
