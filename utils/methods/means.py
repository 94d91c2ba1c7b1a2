"""The story of a release of means: sum, add noise, publish; then draw images that match them.

DP-MERF (Harder et al. 2021) and DP-MEPF (Harder et al. 2023): the mean over the private images of
features x one-hot class is released once, by the Gaussian mechanism; everything after that sees the
noisy means only, and costs nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from utils.arguments.means import MeansArguments
from utils.arguments.training import DataArguments, PrivacyArguments, TrainingArguments
from utils.data.images import read_pixel_batches, scale_to_unit_range
from utils.data.latent_files import discard_copies
from utils.data.private_set import PrivateSet
from utils.data.rows import fill_template, load_rows, read_labels
from utils.errors import UsageError, on_main_process
from utils.files import (
    CACHE,
    MEANS,
    SAMPLING_SETTINGS,
    STATEMENT,
    explain_disk_errors,
    private_folder,
    write_durably,
)
from utils.ledger.runs import Run
from utils.ledger.statement import Circumstances
from utils.methods.mean_features import SIDE, build_features, sum_units
from utils.methods.mean_generator import draw, fit_generator, read_target
from utils.methods.planning import plan_later_training, preview, reserve
from utils.methods.stages import collect_settings, start
from utils.privacy.accounting import account
from utils.privacy.dp_sgd import add_noise_once
from utils.privacy.plan import PrivacyPlan, make_plan, summarise_plan
from utils.privacy.randomness import make_randomness
from utils.sampling.generation import encode_png, save_grid, write_metadata
from utils.sampling.shards import plan_image_files, write_piece
from utils.sampling.synthetic_sets import SET, hash_set


@dataclass(frozen=True)
class Classes:
    """The public classes of a release.

    Attributes:
        names: of the classes; none where one mean of all images is released.
        prompts: one a class, or the only one.
    """

    names: list[str]
    prompts: list[str]

    @property
    def count(self) -> int:
        return len(self.prompts)


def run_release(
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    args: MeansArguments,
    is_first: bool = False,
) -> None:
    """Release noisy means of the private images into `training.output_dir`, and draw a synthetic
    set to match them, into its folder `set`.

    Args:
        is_first: training follows within the same `--target_epsilon`.

    Raises:
        UsageError: bad input of any kind, before an image is read where that is possible.
    """
    accelerator, _lock = start(training)
    randomness = make_randomness(privacy.secure_noise, privacy.debug_noise_seed)
    features, seed = build_features(args, training.seed or 0), training.seed or 0

    def plan_for(num_units: int) -> PrivacyPlan:
        plan = plan_release(num_units, privacy, args, data.privacy_unit_column, is_first)
        if is_first:  # refuse now what could not be trained afterwards
            plan_later_training(privacy, training.max_train_steps, plan)
        return plan

    classes = find_classes(load_rows(data, private_folder(training.output_dir) / CACHE), data, args)
    if training.dry_run:
        _, plan = preview(accelerator, data, privacy, training, SIDE, plan_for)
        spent = account(plan.events(), plan.delta)
        accelerator.print(json.dumps(summarise_plan(plan, spent), indent=2))
        return
    settings = collect_settings("means", args, data, training) | {"classes": asdict(classes)}
    private_set, plan, run = reserve(accelerator, data, privacy, training, SIDE, settings, plan_for)
    accelerator.print(announce(plan, classes.count))

    # Sum over every unit, and release the sum with noise.
    if run.checkpoint is None:
        rows = read_rows(private_set, data, classes, accelerator)
        total = sum_units(rows, features, classes.count, plan.sensitivity)
        total = total.to(accelerator.device)
        shape = total.shape
        noisy = add_noise_once(total.flatten(), plan, randomness, accelerator).view(shape).cpu()
        run.save(1, lambda: {"means": noisy}, 1)  # paid for: never lose it
    else:
        noisy = run.saved_state()["means"]

    # Everything from here on sees the noisy means only.
    about = Circumstances(is_private=randomness.is_private, randomness=randomness.source)
    told = {"settings": asdict(args), "seed": seed, **asdict(classes)}
    on_main_process(lambda: run.publish(lambda folder: export(noisy, told, folder), plan, about))
    on_main_process(lambda: draw_set(run, args, features))
    if training.discard_latents:
        discard_copies(run.output_dir, None)
    accelerator.print(f"{args.num_synthetic_images} images and grid.png in {run.output_dir / SET}")


def find_classes(rows: Dataset, data: DataArguments, args: MeansArguments) -> Classes:
    """The public classes, and the prompt of each.

    Raises:
        UsageError: the label column does not name its classes, and nobody else does; or not all.
    """
    if data.label_column is None or data.caption is not None:
        if args.class_names is not None:
            raise UsageError("--class_names needs --label_column, whose classes they are")
        return Classes([], [data.caption or ""])
    labels = read_labels(rows, data.label_column)
    names, feature = args.class_names, rows.features[data.label_column]
    if names is None and isinstance(feature, ClassLabel):
        names = feature.names
    if names is None:
        raise UsageError(
            f"--label_column {data.label_column} does not name its classes: give --class_names, "
            "all there may be; the list is public"
        )
    if args.class_names is not None and not set(labels) <= set(names):
        raise UsageError("a row has a class that --class_names does not name: add it")
    return Classes(names, [fill_template(data.caption_template, name) for name in names])


def plan_release(
    num_units: int,
    privacy: PrivacyArguments,
    args: MeansArguments,
    unit_column: str | None,
    is_first: bool,
) -> PrivacyPlan:
    """One noisy sum over all units: one step of the Gaussian mechanism, with every unit in it.

    Raises:
        UsageError: see `make_plan`; or no budget was named.
    """
    epsilon, sigma = args.release_epsilon, None
    if epsilon is None and privacy.target_epsilon is not None:
        epsilon = privacy.target_epsilon * (args.release_share if is_first else 1)
    if epsilon is None:
        sigma = privacy.noise_multiplier
    if epsilon is None and (sigma is None or is_first):
        raise UsageError("give --target_epsilon, or --release_epsilon")
    return make_plan(
        target_epsilon=epsilon,
        noise_multiplier=sigma,
        num_units=num_units,
        expected_batch_size=num_units,
        steps=1,
        max_grad_norm=1.0,
        delta=privacy.target_delta,
        unit_column=unit_column,
        purpose="means",
    )


def announce(plan: PrivacyPlan, num_classes: int) -> str:
    """One sentence before the release: of what, and what it will cost."""
    spent = account(plan.events(), plan.delta)
    return (
        f"releasing the noisy means of {num_classes} classes over {plan.num_units} private units: "
        f"epsilon {spent.add_or_remove_one:.3f} at delta {plan.delta:g} (noise multiplier "
        f"{plan.noise_multiplier:.3f})"
    )


def read_rows(
    private_set: PrivateSet, data: DataArguments, classes: Classes, accelerator
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(unit, class, image) of this process's share of the units, one unit after the other."""
    units = private_set.unit_of_row
    mine = (units % accelerator.num_processes == accelerator.process_index).nonzero().flatten()
    order = mine[units[mine].argsort(stable=True)].tolist()
    if not order:
        return
    numbers = {name: number for number, name in enumerate(classes.names)}
    labels = read_labels(private_set.rows, data.label_column) if numbers else None
    images = private_set.images.select(order)
    row = iter(order)
    for pixels in read_pixel_batches(images, SIDE, 256, private_set.digests[order]):
        for image in scale_to_unit_range(pixels):
            place = next(row)
            number = 0 if labels is None else numbers[labels[place]]
            yield int(units[place]), number, image


def export(noisy: torch.Tensor, told: dict, folder: Path) -> None:
    """Write means.safetensors: the noisy means, and how they came about."""
    save_file({"means": noisy.float().contiguous()}, folder / MEANS, {"about": json.dumps(told)})


def read_means(path: Path) -> tuple[torch.Tensor, dict]:
    """What `export` wrote."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("means"), json.loads(file.metadata()["about"])


def draw_set(run: Run, args: MeansArguments, features) -> None:
    """Fit generators to the published means, and draw the set; the ledger notes what it holds.

    Raises:
        UsageError: the disk does not take it.
    """
    released, told = read_means(run.output_dir / MEANS)
    target, count = read_target(released), args.num_synthetic_images
    entries = [
        {"text": told["prompts"][i % len(target.means)]}
        | ({"label": told["names"][i % len(target.means)]} if told["names"] else {})
        for i in range(count)
    ]
    folder, pieces = run.output_dir / SET, plan_image_files(count)
    run.branch.release(1, SET)
    with explain_disk_errors(run.output_dir):
        folder.mkdir(exist_ok=True)
        (folder / STATEMENT).write_bytes((run.output_dir / STATEMENT).read_bytes())
        for number in range(args.num_generators):
            title = f"generator {number + 1} of {args.num_generators}"
            seed = told["seed"] + 1000 * number
            generator = fit_generator(target, features, args, seed, title)
            indices = torch.arange(count)
            mine = indices[indices // len(target.means) % args.num_generators == number]
            for part in mine.split(500):
                images = draw(generator, part % len(target.means), seed)
                for index, image in zip(part.tolist(), images, strict=True):
                    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                    write_piece(folder, pieces[index], [encode_png(picture)], entries)
        write_metadata(folder, entries)
        write_durably(folder / SAMPLING_SETTINGS, json.dumps({"means": told}, indent=2) + "\n")
        columns = len(target.means) if 1 < len(target.means) <= 10 else 8
        save_grid(folder, pieces, columns)
    run.branch.wrote(1, SET, {SET: hash_set(folder)})
