"""Pictures of what privacy costs."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FormatStrFormatter
from tqdm import tqdm

from utils.privacy.accounting import (
    ADD_OR_REMOVE_ONE,
    REPLACE_ONE,
    SMALLEST_DELTA,
    pld_epsilon,
    quote,
    split_budget,
)
from utils.privacy.plan import PrivacyPlan


def plot_spent(events: list[dict], delta: float, path: str) -> None:
    """What each stage adds to the budget, epsilon over the steps, both in the order of the ledger,
    and (epsilon, delta), as one picture."""
    figure, axes = plt.subplot_mosaic(
        [["stages", "stages"], ["left", "right"]],
        figsize=(10, 5),
        height_ratios=[1, 5],
        layout="constrained",
    )
    _draw_stages(axes["stages"], events, delta)
    left, right = axes["left"], axes["right"]
    before, steps, values = 0, [0], [0.0]
    for number, event in enumerate(events):
        for done in np.unique(np.linspace(1, event["steps"], 12).astype(int)).tolist():
            steps.append(before + done)
            values.append(pld_epsilon([*events[:number], {**event, "steps": done}], delta))
        before += event["steps"]
        left.axvline(before, color="0.85", zorder=0)
    left.plot(steps, values, color="C0")
    left.set(xlabel="steps", ylabel="epsilon", title=f"spent, at delta {delta:g}", ylim=(0, None))
    deltas = np.geomspace(max(delta * 1e-4, SMALLEST_DELTA), 1e-2, 60)
    for relation, label in ((ADD_OR_REMOVE_ONE, "add or remove one"), (REPLACE_ONE, "replace one")):
        epsilons = [pld_epsilon(events, at, relation) for at in deltas]
        right.semilogy(epsilons, deltas, label=label)
    right.axhline(delta, color="0.7", linestyle=":", zorder=0)
    right.set(xlabel="epsilon", ylabel="delta", title="everything together")
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_stages(axes, events: list[dict], delta: float) -> None:
    """A bar of epsilon, cut into what each event adds."""
    start, parts = 0.0, split_budget(events, delta)
    for number, (event, added) in enumerate(zip(events, parts, strict=True)):
        axes.barh(0, added, left=start, color=f"C{number % 10}", edgecolor="white")
        label = f"{event['purpose']}\n{added:.2f}"
        if added > 0.06 * sum(parts):
            axes.text(start + added / 2, 0, label, ha="center", va="center", color="white")
        start += added
    axes.set(yticks=[], xlim=(0, start), title=f"epsilon {quote(start)}: what each stage adds")
    axes.spines[:].set_visible(False)


def plot_noise_trade_off(chosen: PrivacyPlan, path: str) -> None:
    """Epsilon against the noise multiplier, for the planned batch and smaller and larger ones."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    sigmas = np.geomspace(max(0.3, chosen.noise_multiplier / 3), chosen.noise_multiplier * 3, 14)
    for factor in tqdm((0.25, 0.5, 1, 2), "plotting", leave=False):
        batch = min(factor * chosen.expected_batch_size, chosen.num_units)
        event = {**chosen.event(), "sampling_rate": batch / chosen.num_units}
        values = [
            pld_epsilon([*chosen.prior, {**event, "noise_multiplier": sigma}], chosen.delta)
            for sigma in sigmas
        ]
        axes.loglog(sigmas, values, label=f"B = {batch:g}", linewidth=2 if factor == 1 else 1)
    spent = pld_epsilon(chosen.events(), chosen.delta)
    axes.plot(chosen.noise_multiplier, spent, "o", color="black", label="the plan")
    axes.set(
        xlabel="noise multiplier",
        ylabel=f"epsilon at delta {chosen.delta:g}",
        title=f"{chosen.num_units} units, {chosen.steps} steps",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(FormatStrFormatter(""))
    axes.set_xticks([s for s in (0.3, 0.5, 1, 2, 4, 8, 16, 32) if sigmas[0] <= s <= sigmas[-1]])
    axes.legend(frameon=False)
    axes.grid(which="both", color="0.92")
    figure.savefig(path, dpi=120)
    plt.close(figure)
