"""What a run can be expected to do, before it spends anything: its plan, its verdict, its price in
time and memory, and what a replay of it proves."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace

from accelerate import PartialState
from torch import nn

from utils.arguments.training import DataArguments, PrivacyArguments, TrainingArguments
from utils.audit.replay import SetUp, replay
from utils.errors import UsageError
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.methods.forecast import Sizes, foresee
from utils.methods.planning import describe
from utils.methods.stages import Stage
from utils.privacy.accounting import account
from utils.privacy.defaults import PublicFacts, median_width
from utils.privacy.plan import PrivacyPlan
from utils.privacy.verdict import Verdict, judge


def collect_facts(
    modules: nn.Module, num_units: int, rate: float, has_warm_start: bool = False
) -> PublicFacts:
    """What the choice of a plan depends on; all is public.

    Args:
        modules: they hold what trains. rate, has_warm_start: see `PublicFacts`.

    Raises:
        UsageError: nothing trains.
    """
    trained = [p.shape for p in modules.parameters() if p.requires_grad]
    if not trained:
        raise UsageError("no parameter is trainable, so there is nothing to train privately")
    num_parameters = sum(shape.numel() for shape in trained)
    return PublicFacts(num_units, num_parameters, median_width(trained), rate, has_warm_start)


def show_choices(reasons: list[str]) -> None:
    """Say what was chosen and why, on stderr of the main process."""
    if PartialState().is_main_process:
        for reason in reasons:
            print(f"chosen: {reason}", file=sys.stderr)


def judge_plan(plan: PrivacyPlan, facts: PublicFacts) -> Verdict:
    """Say whether the plan can work, on stderr of the main process; returns it."""
    epsilon = account(plan.events(), plan.delta).add_or_remove_one
    verdict = judge(plan, facts.num_parameters, epsilon, facts.has_warm_start)
    if PartialState().is_main_process:
        print(f"verdict: {verdict}", file=sys.stderr)
    return verdict


def show_plan(
    stage: Stage,
    engine: PerUnitGradients,
    training: TrainingArguments,
    plan: PrivacyPlan,
    left_out: Mapping[str, int],
    sizes: Sizes,
    report: dict,
) -> None:
    """What `--dry_run` shows: the plan as JSON on stdout, with `report`; on stderr what it will
    take here."""
    forecast = foresee(stage, engine, plan, training, sizes)
    if stage.accelerator.is_main_process:
        print(forecast, file=sys.stderr)
    about = report | {"audit": stage.audit, "forecast": asdict(forecast)}
    stage.accelerator.print(describe(plan, engine, sizes.unit_bytes, training, left_out, **about))


def replay_if_asked(
    stage: Stage,
    engine: PerUnitGradients,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
) -> Stage:
    """With `--replay_audit`, the stage with what a replay of this very set-up proved.

    Raises:
        UsageError: the replay found something wrong; nothing was read or spent.
    """
    if not privacy.replay_audit:
        return stage
    setup = SetUp(stage.accelerator, stage.pipeline, engine, stage.resolution)
    finding = replay(setup, privacy, data.privacy_unit_column, training)
    if not finding["passed"]:
        raise UsageError(f"the replay audit failed: {'; '.join(finding['problems'])}")
    print(
        f"replay audit passed: over {finding['steps']} steps with and without one unit, nobody "
        f"else's part changed, and the sum moved by {finding['largest_move']:.6f} C",
        file=sys.stderr,
    )
    return replace(stage, audit={"kind": "replay", **finding})
