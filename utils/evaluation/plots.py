"""The pictures of report.html: plots, as SVG that takes the page's colour of text, and sheets."""

import io
import re
from html import escape

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Image as ImageFeature
from PIL import Image

from utils.data.images import ImageRows, read_pixel_batches, tile_images
from utils.data.rows import read_labels
from utils.evaluation.memorisation import Neighbours
from utils.privacy.accounting import quote

matplotlib.use("Agg")
TEXT = "#010203"  # becomes the page's own colour, light or dark
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "axes.titlecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}
BLUE, ORANGE = "#3987e5", "#d97706"


def plot_quality_trade_off(runs: list[tuple[str, dict]], metric: str, label: str) -> str:
    """One metric against epsilon, a point a run."""
    points = [(results["epsilon"]["value"], name, results[metric]) for name, results in runs]
    points.sort(key=lambda point: point[0])
    levels = sorted({epsilon for epsilon, _, _ in points})
    with plt.rc_context(STYLE | {"svg.hashsalt": metric}):
        figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
        for index, (epsilon, name, entry) in enumerate(points):
            place = levels.index(epsilon)
            axis.errorbar(place, entry["value"], entry["std"] or 0, marker="o", color=BLUE)
            offset = (8, 6 if index % 2 else -12)
            axis.annotate(
                name, (place, entry["value"]), xytext=offset, textcoords="offset points", fontsize=9
            )
        axis.set_xticks(range(len(levels)), [quote(level) for level in levels])
        axis.set(xlabel="epsilon", ylabel=label)
        axis.set_xlim(-0.4, len(levels) + 0.1)
        values = [
            f"{name}: {entry['value']:.4g} at epsilon {quote(epsilon)}"
            for epsilon, name, entry in points
        ]
        return _svg(figure, f"{label} against epsilon. {'; '.join(values)}.")


def plot_classes_of_runs(runs: list[tuple[str, dict]], metric: str, label: str) -> str:
    """Accuracy or ROC area by class, a small panel a run, all on one scale."""
    classes = list(runs[0][1][metric]["per_class"])
    columns = 2  # to be read on a phone, too
    lines, places = -(-len(runs) // columns), range(len(classes))
    with plt.rc_context(STYLE | {"svg.hashsalt": "classes", "font.size": 8}):
        figure, axes = plt.subplots(
            lines,
            columns,
            figsize=(2.6 * columns, lines * (0.7 + 0.16 * len(classes))),
            layout="constrained",
            squeeze=False,
            sharey=True,
        )
        values = []
        for axis, (run, results) in zip(axes.flat, runs, strict=False):
            found = results[metric]["per_class"]
            shares = [100 * found.get(name, 0) for name in classes]
            axis.barh(places, shares, color=BLUE)
            axis.set_title(f"{run}\nepsilon {quote(results['epsilon']['value'])}", fontsize=8)
            axis.set(xlim=(0, 100), yticks=places, yticklabels=classes)
            worst = int(np.argmin(shares))
            values.append(f"{run}: worst {classes[worst]}, {shares[worst]:.1f} %")
        axes[0][0].invert_yaxis()
        for axis in axes.flat[len(runs) :]:
            axis.set_axis_off()
        figure.supxlabel(f"{label}, %", fontsize=8, color=TEXT)
        return _svg(figure, f"{label} by class, a panel a run. {'; '.join(values)}.")


def plot_neighbour_distances(spaces: list[Neighbours]) -> str:
    """How far synthetic images are from their nearest private and nearest held-out image."""
    with plt.rc_context(STYLE | {"svg.hashsalt": "neighbours"}):
        figure, axes = plt.subplots(
            1, len(spaces), figsize=(4.2 * len(spaces), 3.2), layout="constrained", squeeze=False
        )
        values = []
        for axis, found in zip(axes.flat, spaces, strict=True):
            both = np.concatenate([found.to_private, found.to_others])
            bins = np.linspace(0, both.max() or 1.0, 40)
            axis.hist(found.to_private, bins, color=BLUE, alpha=0.6, label="private")
            axis.hist(
                found.to_others, bins, color=ORANGE, histtype="step", lw=1.8, label="held out"
            )
            axis.set(title=found.space, xlabel="distance to the nearest", ylabel="synthetic images")
            axis.legend(frameon=False)
            medians = (np.median(found.to_private), np.median(found.to_others))
            values.append("{}: median {:.3g} to private, {:.3g} to held-out".format(
                found.space, *medians
            ))  # fmt: skip
        return _svg(figure, f"Histograms of nearest-neighbour distances. {'; '.join(values)}.")


def _svg(figure, alternative: str) -> str:
    """The figure as an inline element, with a text alternative."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(TEXT, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)  # as wide as the page allows
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', text).group(1))
    attributes = (
        f'role="img" style="max-width:{width * 4 / 3:.0f}px" aria-label="{escape(alternative)}"'
    )
    return text.replace("<svg", f"<svg {attributes}", 1)


def measure_first(images: ImageRows) -> tuple[int, int]:
    """Width and height of the first image."""
    rows = images.rows.select([0]).cast_column(images.column, ImageFeature())
    return rows[0][images.column].size


def tile_sample(
    images: ImageRows,
    label_column: str,
    count: int = 60,
    largest: int = 128,
    in_columns: bool = True,
) -> Image.Image:
    """Some images of a set as a sheet, none larger than `largest` pixels: a column a class, if
    asked for and there are at most ten, or else ten wide."""
    rows, chosen = images.rows, np.arange(min(count, len(images)))
    columns = min(10, len(chosen))
    if in_columns and label_column in rows.column_names:
        labels = np.array(list(read_labels(rows, label_column, may_be_blank=True)))
        classes = [np.flatnonzero(labels == name) for name in np.unique(labels)[:11]]
        if len(classes) <= 10:
            height = min(6, *map(len, classes))
            chosen = np.stack([rows_of_class[:height] for rows_of_class in classes], 1).flatten()
            columns = len(classes)
    few = images.select(chosen)
    side = min(largest, *measure_first(few))
    pixels = torch.cat(list(read_pixel_batches(few, side, count)))
    tiles = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    return tile_images(tiles, columns)
