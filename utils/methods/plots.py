"""Pictures of a selection (where in the denoiser the private gradients are large), and of a
rehearsal."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import SymLogNorm

from utils.methods.saliency_file import Saliency


def locate_matrix(name: str) -> tuple[str, str]:
    """The column (where in the denoiser) and the row (which matrix there) of a matrix."""
    parts = name.split(".")
    for marker in ("attentions", "resnets"):
        if marker in parts:
            at = parts.index(marker) + 2
            kind = ".".join(p for p in parts[at:] if p != "transformer_blocks" and not p.isdigit())
            short = parts[0].replace("_blocks", "").replace("_block", "")
            number = parts[1] if parts[1].isdigit() else ""
            return f"{short}{number} {marker[:3]}{parts[at - 1]}", kind
    column = parts[0] if len(parts) == 1 else ".".join(parts[:2]).replace("_blocks.", "")
    return column.replace("_block", ""), ".".join(parts[2:]) or parts[-1]


def _order_column(column: str) -> int:
    """Where a column stands from input to output; the U-Net itself lists its middle last."""
    order = ("conv_in", "time", "down", "mid", "up", "conv_norm", "conv_out")
    return next((i for i, start in enumerate(order) if column.startswith(start)), len(order))


def plot_saliency(saliency: Saliency, path: Path) -> None:
    """A map of the denoiser from input to output: noisy scores, what is selected (dots), and how
    often it would be again."""
    places = [locate_matrix(name) for name in saliency.candidates]
    columns = sorted(dict.fromkeys(column for column, _ in places), key=_order_column)
    rows = list(dict.fromkeys(row for _, row in places))
    panels = [("noisy score", saliency.noisy_scores), ("selected again", saliency.stability)]
    panels = [(title, values) for title, values in panels if values is not None]
    panels = panels or [("selected at random", dict.fromkeys(saliency.scored, 0.0))]
    size = (3 + 0.32 * len(columns), len(panels) * (1.4 + 0.24 * len(rows)))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, layout="constrained", squeeze=False)
    for axis, (title, values) in zip(axes[:, 0], panels, strict=True):
        grid = np.full((len(rows), len(columns)), np.nan)
        for (column, row), scored in zip(places, saliency.scored, strict=True):
            grid[rows.index(row), columns.index(column)] = values[scored]
        if title == "noisy score":
            top = max(np.nanmax(np.abs(grid)), 1e-12)
            norm = SymLogNorm(min(saliency.noise_std, top), vmin=-top, vmax=top)
            image = axis.imshow(grid, cmap="PuOr_r", norm=norm, aspect="auto")
            title += f" (log beyond the noise, standard deviation {saliency.noise_std:.2g})"
        else:
            image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for name, (column, row) in zip(saliency.candidates, places, strict=True):
            if name in saliency.selected:
                axis.plot(columns.index(column), rows.index(row), "o", color="red", markersize=4)
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        if title == "selected again":
            title += f" under the same noise (pure noise: {saliency.of_pure_noise:.2f})"
        stamp = "" if saliency.private else "NOT PRIVATE: "
        axis.set_title(f"{stamp}{title}; dots: selected", fontsize=9)
        figure.colorbar(image, ax=axis, pad=0.01)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_rehearsal(
    curves: list[tuple[str, list[float], list[float]]], base_loss: float, path: Path
) -> None:
    """The loss of every trial over its passes through the model; the first is the winner.

    Args:
        curves: of each trial, its name, passes and losses.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.axhline(base_loss, color="0.6", linestyle=":", label="the base model")
    for number, (name, passes, losses) in enumerate(curves):
        last = {"color": "C3", "linewidth": 2.5, "label": f"best: {name}", "zorder": 3}
        style = last if number == 0 else {"color": "0.75", "linewidth": 1}
        axes.plot([0, *passes], [base_loss, *losses], marker="o", markersize=3, **style)
    finished = [losses[-1] for _, _, losses in curves]
    low, high = min([*finished, base_loss]), max(finished[0], base_loss)
    room = max(high - low, 0.02 * base_loss)
    axes.set(ylim=(low - 0.3 * room, high + 1.5 * room))  # what went up and away is cut off
    axes.set(xlabel="passes through the model", ylabel="denoising loss, images held out")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
