"""What table.py draws: a plot of its rows, and a strip of each cell's images."""

import json
import random
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from PIL import Image

from utils.data.images import tile_images

CEILINGS = {"real images": "--", "no privacy": ":"}  # methods without an epsilon, and their lines


def draw_strip(images: Path, target: Path) -> None:
    """Two images of each class of a set, at random."""
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    names = list(dict.fromkeys(row["label"] for row in rows))
    random.Random(0).shuffle(rows)
    picked = [[row for row in rows if row["label"] == name][:2] for name in names]
    files = [own[line % len(own)]["file_name"] for line in range(2) for own in picked]
    tile_images([Image.open(images / name) for name in files], len(names)).save(target)


def plot(rows: list[dict], target: Path) -> None:
    """A line of panels a set: accuracy by epsilon and by trained weights, distance by epsilon.

    Args:
        rows: one a cell, as `gather` leaves them; those of `CEILINGS` are level lines.
    """
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    sets = sorted({row["set"] for row in rows})
    methods = sorted({row["method"] for row in rows if row["epsilon"]})
    colours = dict(zip(methods, cycle(plt.get_cmap("tab20").colors), strict=False))
    size = (11, 3 * len(sets) + 0.2 + 0.15 * len(methods))
    figure, axes = plt.subplots(len(sets), 3, figsize=size, squeeze=False, layout="constrained")
    for line, name in zip(axes, sets, strict=True):
        mine = [row for row in rows if row["set"] == name and row["epsilon"]]
        by_method = {method: [r for r in mine if r["method"] == method] for method in methods}
        for method, own in by_method.items():
            draw(line[0], own, "epsilon", "accuracy", "o-", colours[method], method)
            draw(line[1], own, "trained", "accuracy", "o", colours[method], method)
            draw(line[2], own, "epsilon", "frechet_distance", "o-", colours[method], method)
        for row in rows:
            if row["set"] == name and row["method"] in CEILINGS:
                look = {"color": "grey", "linestyle": CEILINGS[row["method"]], "linewidth": 1}
                for axis in line[:2]:
                    axis.axhline(100 * row["accuracy"], label=row["method"], **look)
        labels = (
            ("epsilon", "accuracy, %"),
            ("trained weights; open: epsilon below 10", "accuracy, %"),
            ("epsilon", "Fréchet distance"),
        )
        for axis, (across, up) in zip(line, labels, strict=True):
            axis.set(xscale="log", xlabel=across, ylabel=up, title=name.replace("_", "-"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.spines[["top", "right"]].set_visible(False)
    handles = {h.get_label(): h for axis in axes[:, 0] for h in axis.get_lines()[::-1]}
    handles = {label: handle for label, handle in handles.items() if label in {*colours, *CEILINGS}}
    place = {"loc": "outside lower center", "ncols": 3}
    figure.legend(handles.values(), handles, fontsize=8, frameon=False, **place)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def draw(
    axis: Axes, rows: list[dict], across: str, up: str, style: str, colour, label: str
) -> None:
    """The points of a method, open ones below epsilon 10; accuracies in percent."""
    scale = 100 if up == "accuracy" else 1
    points = sorted(
        (r[across], scale * r[up], r["epsilon"]) for r in rows if r[across] and r.get(up)
    )
    if points:
        x, y, epsilons = zip(*points, strict=True)
        axis.plot(x, y, style, color=colour, label=label)
        small = [(a, b) for a, b, epsilon in points if epsilon < 10]
        if small and across == "trained":
            axis.plot(*zip(*small, strict=True), "o", color="white", markeredgecolor=colour)
