"""The story of a rehearsal: try plans and rates on public images, at the noise of the private run.

Nothing private is read, so everything may be looked at: losses, gradients, images.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from utils.arguments.methods import LdmArguments, LoraArguments
from utils.arguments.rehearsal import RehearsalArguments
from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.data.folders import refuse_among_images
from utils.data.latents import encode_units
from utils.data.rows import fill_template
from utils.files import (
    make_private,
    private_folder,
    refuse_occupied,
    write_durably,
)
from utils.methods.outlook import collect_facts
from utils.methods.planning import load_private_rows, plan_training
from utils.methods.plots import plot_rehearsal
from utils.methods.public_passes import leave_out_unused
from utils.methods.stand_in import StandIn, list_prompts, load_stand_in
from utils.methods.trial import (
    MethodArguments,
    Outcome,
    Trial,
    adapt,
    advance,
    encode_judges,
    judge,
    measure_accuracy,
    measure_gradients,
)
from utils.methods.workers import open_pool
from utils.models.drawing import adopt_reading, adopt_template, read_base_settings
from utils.models.pipelines import choose_resolution, load_pipeline
from utils.privacy.defaults import (
    ADAPTER_RATE,
    WEIGHTS_RATE,
    PublicFacts,
    choose_missing,
)
from utils.privacy.training import avoid_devices_without_fp64

ROUNDS = (0.25, 0.5, 1.0)  # of its steps, that a trial has taken when the better half is kept
FINALISTS = 2
TOLD_APART = 0.25  # of the way from chance to no error: accuracy means something from there on
THIRD = 3.0  # between one learning rate and the next
MOST_CLASSES = 50
REPORT, PLOT, MARK = "rehearsal.json", "rehearsal.png", ".rehearsal"


@dataclass(frozen=True)
class Tried:
    """A trial, and what came of it after each round that it took part in."""

    trial: Trial
    outcomes: tuple[Outcome, ...] = ()
    accuracy: float | None = None

    @property
    def loss(self) -> float:
        return self.outcomes[-1].loss

    def describe(self) -> dict:
        """What differs between trials."""
        plan, training, settings = self.trial.plan, self.trial.training, self.trial.settings
        about = {
            "learning_rate": training.learning_rate,
            "max_train_steps": plan.steps,
            "noise_multiplicity": plan.noise_multiplicity,
            "expected_batch_size": plan.expected_batch_size,
        }
        if isinstance(settings, LoraArguments):
            about["freeze_lora_a"] = settings.freeze_lora_a
        return about

    def curve(self) -> tuple[str, list[float], list[float]]:
        """Its name; passes through the model, and the loss, after each round."""
        plan = self.trial.plan
        each = plan.expected_batch_size * plan.noise_multiplicity
        name = f"rate {self.trial.training.learning_rate:g}, {plan.steps} steps"
        passes = [outcome.step * each for outcome in self.outcomes]
        return name, passes, [outcome.loss for outcome in self.outcomes]


def run_rehearsal(
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    settings: MethodArguments,
    args: RehearsalArguments,
    class_names: list[str] | None = None,
) -> dict:
    """Rehearse in `training.output_dir`; returns what the winner changes in the arguments.

    Args:
        settings: of the method.
        class_names: if there is no stand-in, the base draws these, or --validation_prompt.

    Raises:
        UsageError: bad input of any kind; nothing private is read or spent.
    """
    refuse_among_images(training.output_dir, data.train_data_dir, data.dataset_name, args.stand_in)
    output_dir = claim_folder(Path(training.output_dir))
    avoid_devices_without_fp64()
    accelerator = Accelerator(mixed_precision=training.mixed_precision)
    data = adopt_template(data, model)
    public = [] if args.stand_in is None else [args.stand_in]
    num_units = load_private_rows(accelerator, data, training, public=public).num_units
    prompts = training.validation_prompt
    if class_names is not None:
        prompts = [fill_template(data.template, name) for name in class_names]
    stand_in = load_stand_in(model, data, args, output_dir, prompts, num_units)
    print(
        f"{num_units} private units, rehearsed on {stand_in.trained_on.num_units} public images; "
        f"{stand_in.judged_on.num_units} more judge"
    )
    trials, base = prepare_trials(stand_in, num_units, privacy, training, settings, args)
    tried, base_accuracy = halve(stand_in, trials, args.workers, training.seed or 0)
    report = {
        "num_units": num_units,
        "base": base | {"accuracy": base_accuracy},
        "tried": [t.describe() | {"outcomes": [asdict(o) for o in t.outcomes]} for t in tried],
        "accuracy": [t.accuracy for t in tried],
    }
    write_durably(output_dir / REPORT, json.dumps(report, indent=2) + "\n")
    plot_rehearsal([t.curve() for t in tried], base["loss"], output_dir / PLOT)
    print_table(tried, report["base"])
    return tried[0].describe()


def claim_folder(output_dir: Path) -> Path:
    """A new folder, or that of an earlier rehearsal, which is done anew. Whatever `datasets` caches
    of the private images while their rows are counted is in its private folder.

    Raises:
        UsageError: it holds something else.
    """
    refuse_occupied(output_dir, MARK)
    make_private(private_folder(output_dir))
    (output_dir / MARK).touch()
    return output_dir


def prepare_trials(
    stand_in: StandIn,
    num_units: int,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    settings: MethodArguments,
    args: RehearsalArguments,
) -> tuple[list[Trial], dict]:
    """All trials; and of the base model `loss`, `norms` and `aligned`. The images are encoded now,
    once for all.

    Raises:
        UsageError: see `choose_missing` and `make_plan`.
    """
    pipeline = load_pipeline(*stand_in.model.source)
    pipeline.to(Accelerator().device)
    adopt_reading(pipeline, training, read_base_settings(stand_in.model))
    side = choose_resolution(pipeline, stand_in.data.resolution)
    encode_units(pipeline, stand_in.trained_on, side, stand_in.folder, training.random_flip)
    base = {"loss": judge(pipeline, encode_judges(pipeline, stand_in), training)}
    adapt(pipeline, settings)
    modules = leave_out_unused(pipeline, side)
    rate = WEIGHTS_RATE if isinstance(settings, LdmArguments) else ADAPTER_RATE
    facts = collect_facts(modules, num_units, rate)
    trials = list_trials(facts, privacy, training, settings, args)
    draws = trials[0].plan.noise_multiplicity
    return trials, base | measure_gradients(pipeline, stand_in, training, draws)


def list_trials(
    facts: PublicFacts,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    settings: MethodArguments,
    args: RehearsalArguments,
) -> list[Trial]:
    """Steps against draws, by rates, by parts that train: all combinations."""
    usual, chosen, _ = choose_missing(privacy, training, facts)
    middle, draws = chosen.max_train_steps, usual.noise_multiplicity
    lengths = args.tried_steps or [middle, max(1, middle // 2), *([2 * middle] * (draws > 1))]
    parts = [settings]
    if isinstance(settings, LoraArguments):
        parts = [replace(settings, freeze_lora_a=frozen) for frozen in (False, True)]
    trials, folder = [], Path(training.output_dir) / "trials"
    for steps in dict.fromkeys(lengths):
        fewer = max(1, round(draws * middle / steps))
        longer = replace(training, max_train_steps=steps)
        asked = replace(usual, noise_multiplicity=fewer)
        asked, longer, _ = choose_missing(asked, longer, facts)
        plan = plan_training(facts.num_units, asked, steps=steps)
        usual_rate = longer.learning_rate
        rates = args.tried_rates or [usual_rate / THIRD, usual_rate, usual_rate * THIRD]
        for pace, rate in enumerate(sorted(rates)):
            for part in parts:
                tried = replace(longer, learning_rate=float(f"{rate:.2g}"))
                trials.append(Trial(plan, part, tried, folder / str(len(trials)), pace))
    shutil.rmtree(folder, ignore_errors=True)
    return trials


def halve(
    stand_in: StandIn, trials: list[Trial], workers: int | None, seed: int
) -> tuple[list[Tried], float | None]:
    """Successive halving (Jamieson and Talwalkar 2016): after a quarter and a half of their steps
    the better half of the trials goes on, and the best of each pace. Where there are classes, these
    are then compared by the images they draw: a rate that is too high to draw well can have the
    least loss. Images whose classes nobody can tell apart do not decide.

    Returns all, the best first, and the accuracy with images of the base model; None without
    classes.
    """
    alive, ended = [Tried(trial) for trial in trials], []
    with open_pool(workers) as pool:
        for share in ROUNDS:
            jobs = [
                pool.submit(advance, stand_in, t.trial, math.ceil(share * t.trial.plan.steps), seed)
                for t in alive
            ]
            bar = tqdm(jobs, f"{len(alive)} trials to {share:.0%} of their steps")
            outcomes = [job.result() for job in bar]
            alive = [
                replace(t, outcomes=(*t.outcomes, o)) for t, o in zip(alive, outcomes, strict=True)
            ]
            alive.sort(key=lambda t: t.loss)
            kept = len(alive) if share == 1 else max(FINALISTS, math.ceil(len(alive) / 2))
            first = _find_best_of_each_pace(alive)
            worse = [t for t in alive[kept:] if t not in first]
            alive, ended = [t for t in alive if t not in worse], [*worse, *ended]
        if not 1 < len(list_prompts(stand_in)) <= MOST_CLASSES:
            return [*alive, *ended], None
        finals = _find_best_of_each_pace(alive)
        finals += [t for t in alive if t not in finals][: max(0, FINALISTS - len(finals))]
        drawn = [None, *(t.trial for t in finals)]
        jobs = [pool.submit(measure_accuracy, stand_in, trial, seed) for trial in drawn]
        base, *accuracies = [job.result() for job in tqdm(jobs, "images of the best")]
    others = [t for t in alive if t not in finals]
    finals = [replace(t, accuracy=a) for t, a in zip(finals, accuracies, strict=True)]
    chance = 1 / len(list_prompts(stand_in))
    if max(accuracies) > chance + TOLD_APART * (1 - chance):
        finals.sort(key=lambda t: -t.accuracy)
    return [*finals, *others, *ended], base


def _find_best_of_each_pace(alive: Sequence[Tried]) -> list[Tried]:
    """`alive` has the best first, and so has what is returned."""
    best: dict[int, Tried] = {}
    for tried in alive:
        best.setdefault(tried.trial.pace, tried)
    return list(best.values())


def print_table(tried: Sequence[Tried], base: dict) -> None:
    """All trials, the best first."""
    print("\n   rate   steps  K       B  A frozen  steps taken  loss     accuracy")
    for t in tried:
        about, last = t.describe(), t.outcomes[-1]
        frozen = {True: "yes", False: "no", None: "-"}[about.get("freeze_lora_a")]
        accuracy = "" if t.accuracy is None else f"{100 * t.accuracy:.1f} %"
        print(
            f"{about['learning_rate']:8.2g} {about['max_train_steps']:6} "
            f"{about['noise_multiplicity']:3} {about['expected_batch_size']:7g}  {frozen:8}  "
            f"{last.step:11}  {last.loss:.5f}  {accuracy}"
        )
    drawn = "" if base["accuracy"] is None else f", accuracy {100 * base['accuracy']:.1f} %"
    print(f"the base model: loss {base['loss']:.5f}{drawn}")
    low, middle, high = base["norms"]
    print(
        f"gradients of public units at the start: norm {middle:.3g} (quartiles {low:.3g} and "
        f"{high:.3g}); what their directions have in common is {base['aligned']:.2f} of the "
        "largest signal"
    )
    best = tried[0]
    if best.loss >= base["loss"] and (best.accuracy or 0) <= (base["accuracy"] or 0):
        print(
            "no trial is better than the base model, which knows such images already, so that the "
            "plan that does the least harm was chosen: take images that it was not trained on; "
            "or, if the private ones are like these, draw from the base, at no cost"
        )
