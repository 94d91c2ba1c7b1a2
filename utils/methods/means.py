"""The story of a release of means: sum, add noise, publish; then draw images that match them.

DP-MERF (Harder et al. 2021) and DP-MEPF (Harder et al. 2023): the mean over the private images of
features x one-hot class is released once, by the Gaussian mechanism. DP-FETA (Gong et al. 2025):
so are the means of a few Poisson batches, of the pixels at a low resolution. Moments: so are means
and second moments, in a few rounds. Everything after that sees what was released only, and costs
nothing.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from utils.arguments.means import CENTRAL, MOMENTS, MeansArguments
from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.data.images import scale_to_unit_range
from utils.data.latent_files import discard_copies
from utils.data.private_set import PrivateSet
from utils.errors import UsageError, on_main_process
from utils.files import MEANS
from utils.ledger.reservations import handing_back
from utils.ledger.runs import Run
from utils.ledger.statement import Circumstances, describe_cost
from utils.methods.classes import (
    Classes,
    build_nearest,
    find_classes,
    number_rows,
    read_units,
)
from utils.methods.mean_features import SIDE
from utils.methods.planning import (
    load_private_rows,
    preview,
    print_plan,
    reserve,
)
from utils.methods.publishing import report_set
from utils.methods.releases import Drawn, Release, build_release
from utils.methods.stages import collect_settings, start
from utils.models.drawing import adopt_template
from utils.privacy.dp_sgd import add_noise_once, sample_poisson_batch
from utils.privacy.plan import PrivacyPlan, make_plan
from utils.privacy.randomness import SecretRandomness, make_randomness
from utils.sampling.generation import encode_png
from utils.sampling.shards import SET
from utils.sampling.synthetic_sets import write_set


def run_release(
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    args: MeansArguments,
    check_later: Callable[[PrivacyPlan, Circumstances], None] | None = None,
) -> PrivacyPlan:
    """Release noisy means of the private images into `training.output_dir`, and draw a synthetic
    set to match them, into its folder `set`; returns what that costs, or would in a dry run.

    Args:
        model: whose text encoder compares captions with `--class_prompts`, if there are any.
        check_later: if training follows within the same `--target_epsilon`: refuses a plan that
            leaves no room for it.

    Raises:
        UsageError: bad input of any kind, before an image is read where that is possible.
    """
    accelerator, _lock = start(training, data.train_data_dir, data.dataset_name)
    randomness = make_randomness(privacy.secure_noise, privacy.debug_noise_seed)
    kind, seed = build_release(args, training.seed or 0), training.seed or 0
    about = Circumstances(randomness.is_private, randomness.source)
    data = adopt_template(data, model)
    found, unit_column = load_private_rows(accelerator, data, training), data.privacy_unit_column
    plan = plan_release(found.num_units, privacy, args, unit_column, bool(check_later))
    if check_later is not None:
        check_later(plan, about)
    if found.rows is None:
        return print_plan(accelerator, plan)
    classes = find_classes(found.rows, found.data, args.class_names, args.class_prompts)
    nearest = None if args.class_prompts is None else build_nearest(model, classes.prompts)
    if training.dry_run:
        preview(found, privacy, training, SIDE, about, plan)
        return print_plan(accelerator, plan)
    told = {"settings": asdict(args), "seed": seed, **asdict(classes)}
    agreed = collect_settings("means", args, found.data, training) | {"told": told}
    private_set, run = reserve(found, privacy, training, SIDE, agreed, about, plan)
    accelerator.print(announce(plan, run, classes))

    # Sum over the units of each batch, and release the sums with noise.
    with handing_back(run):
        numbers = number_rows(private_set, found.data, classes, nearest)

    def release_sum(before: list[torch.Tensor]) -> torch.Tensor:
        def sum_units(batch: torch.Tensor | None) -> torch.Tensor:
            images = read_images(private_set, numbers, accelerator, batch)
            return kind.sum(images, classes.count, before, find_noise(plan), plan.sensitivity)

        return release(sum_units, plan, randomness, accelerator)

    means = torch.stack(run.repeat("means", plan.steps, release_sum))

    # Everything from here on sees the noisy means only.
    on_main_process(lambda: run.publish(lambda folder: export(means, told, folder), plan))
    on_main_process(lambda: draw_set(run, plan, args, kind))
    if training.discard_latents:
        discard_copies(run.output_dir, None)
    return plan


def release(
    sum_units: Callable[[torch.Tensor | None], torch.Tensor],
    plan: PrivacyPlan,
    randomness: SecretRandomness,
    accelerator: Accelerator,
) -> torch.Tensor:
    """The noisy mean over all units, or over a Poisson batch of them, in the shape of its sum."""
    is_sampled = plan.sampling_rate < 1
    total = sum_units(sample_poisson_batch(plan, randomness, accelerator) if is_sampled else None)
    flat = total.flatten().to(accelerator.device)
    return add_noise_once(flat, plan, randomness, accelerator).view(total.shape).cpu()


def read_images(
    private_set: PrivateSet,
    numbers: list[int],
    accelerator: Accelerator,
    batch: torch.Tensor | None,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """`read_units`, the images in [-1, 1]."""
    for unit, number, pixels in read_units(private_set, numbers, SIDE, accelerator, batch):
        yield unit, number, scale_to_unit_range(pixels)


def plan_release(
    num_units: int,
    privacy: PrivacyArguments,
    args: MeansArguments,
    unit_column: str | None,
    is_first: bool,
) -> PrivacyPlan:
    """One noisy sum over all units: one step of the Gaussian mechanism, with every unit in it. For
    central images, one step a Poisson batch; for moments, a few such steps.

    Raises:
        UsageError: see `make_plan`; or no budget was named.
    """
    epsilon = args.release_epsilon
    sigma = privacy.noise_multiplier if epsilon is None and not is_first else None
    if epsilon is None and privacy.target_epsilon is not None:
        share = args.choose_share(privacy.target_epsilon) if is_first else 1
        epsilon = share * privacy.target_epsilon
    if epsilon is None and sigma is None:
        raise UsageError("give --target_epsilon, or --release_epsilon")
    rate, steps = 1.0, 1
    if args.release == CENTRAL:
        rate, steps = args.central_rate, args.central_batches
    if args.release == MOMENTS:
        steps = args.moment_rounds
    return make_plan(
        target_epsilon=epsilon,
        noise_multiplier=sigma,
        num_units=num_units,
        expected_batch_size=num_units * rate,
        steps=steps,
        max_grad_norm=1.0,
        delta=privacy.target_delta,
        unit_column=unit_column,
        purpose="means",
    )


def find_noise(plan: PrivacyPlan) -> float:
    """The deviation of every number that is released."""
    return plan.noise_std / plan.expected_batch_size


def announce(plan: PrivacyPlan, run: Run, classes: Classes) -> str:
    """Before the release: of what, and what it will cost."""
    return (
        f"releasing the noisy means of {classes.count} classes over {plan.num_units} private "
        f"units: {describe_cost(plan, None, run.recharged)} (noise multiplier "
        f"{plan.noise_multiplier:.3f})\n{classes.describe()}"
    )


def export(noisy: torch.Tensor, told: dict, folder: Path) -> None:
    """Write means.safetensors: the noisy means, and how they came about."""
    save_file({"means": noisy.float().contiguous()}, folder / MEANS, {"about": json.dumps(told)})


def read_means(path: Path) -> tuple[torch.Tensor, dict]:
    """What `export` wrote."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("means"), json.loads(file.metadata()["about"])


def draw_set(run: Run, plan: PrivacyPlan, args: MeansArguments, kind: Release) -> None:
    """Draw a set that matches the published means. The ledger notes what it holds.

    Raises:
        UsageError: the disk does not take it.
    """
    released, told = read_means(run.output_dir / MEANS)
    count, num_classes = args.num_synthetic_images, released.shape[1]
    entries = [
        {"text": told["prompts"][i % num_classes]}
        | ({"label": told["names"][i % num_classes]} if told["names"] else {})
        for i in range(count)
    ]
    columns = num_classes if 1 < num_classes <= 10 else 8
    images = encode(kind.draw(released, find_noise(plan)))
    write_set(run, plan.steps, entries, images, {"means": told}, columns)
    report_set(run.output_dir)
    print(f"{count} images, grid.png, report.html in {run.output_dir / SET}")


def encode(drawn: Drawn) -> Iterator[tuple[int, bytes]]:
    """(number, PNG) of every image."""
    for numbers, images in drawn:
        for index, image in zip(numbers.tolist(), images, strict=True):
            yield index, encode_png(Image.fromarray(image.permute(1, 2, 0).numpy()))
