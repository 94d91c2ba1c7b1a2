"""report.html: one page, without scripts or network, that says how a synthetic set did."""

import base64
import io
import json
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image

from utils.errors import UsageError
from utils.evaluation.memorisation import Neighbours
from utils.evaluation.plots import (
    plot_classes_of_runs,
    plot_neighbour_distances,
    plot_quality_trade_off,
)
from utils.hub.pages import lay_out_numbers, lay_out_stages, mark_up, write_page
from utils.hub.privacy_words import describe_formally, describe_plainly, name_one
from utils.privacy.accounting import quote

FIDELITY = {
    "frechet_distance": ("Fréchet distance", "lower is better"),
    "kernel_distance": ("kernel distance", "lower is better"),
    "inception_score": ("inception score", "higher is better"),
    "clip_score": ("CLIP score", "how well images fit their prompts; higher is better"),
    "precision": ("precision", "share of synthetic images near real ones"),
    "recall": ("recall", "share of real images near synthetic ones"),
    "density": ("density", "how thickly real images surround synthetic ones; 1 is alike"),
    "coverage": ("coverage", "share of real images with a synthetic one near"),
}
LEARNT = {"accuracy": "accuracy", "auroc": "ROC area"}  # by classifiers: shares, class by class
COMPARED = {**LEARNT, "frechet_distance": "Fréchet distance"}
MARK = '<div class="private">not covered by epsilon</div>'


@dataclass(frozen=True)
class Page:
    """What the report is about.

    Attributes:
        title: name of the synthetic set. results: what metrics.json holds.
        statement: of the adapter that it was generated with, if any.
        sheets: of images that may be shown, by set: synthetic, real.
        spaces: nearest neighbours, if they were measured.
        runs: other runs to compare with, (name, results).
    """

    title: str
    results: dict
    statement: dict | None
    sheets: dict[str, Image.Image]
    spaces: list[Neighbours] = field(default_factory=list)
    runs: list[tuple[str, dict]] = field(default_factory=list)


def read_runs(paths: list[str]) -> list[tuple[str, dict]]:
    """Other runs' metrics.json; each is named after its folder, or after a file of another name.

    Raises:
        UsageError: one cannot be read.
    """
    runs = []
    for path in map(Path, paths):
        try:
            results = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"--compare {path} cannot be read: {error}") from error
        entries = results.values() if isinstance(results, dict) else [None]
        if not all(isinstance(e, dict) and {"value", "std"} <= set(e) for e in entries):
            raise UsageError(f"--compare {path} is not a metrics.json of this script")
        runs.append((path.resolve().parent.name if path.stem == "metrics" else path.stem, results))
    return runs


def write_report(page: Page, path: Path) -> None:
    """Write the page, whole or not at all."""
    parts = [
        f"<h1>{escape(page.title)}</h1>",
        _privacy(page),
        _fidelity(page),
        _utility(page.results),
        _memorisation(page),
        _comparison(page),
    ]
    write_page(path, f"{page.title}: evaluation", parts)


def _privacy(page: Page) -> str:
    epsilon, words = page.results.get("epsilon"), ""
    if page.statement is not None:
        words = mark_up(describe_plainly(page.statement, "these images"))
        words += mark_up(describe_formally(page.statement))
    elif epsilon is not None:
        words = (
            "<p>No adapter was used. Whatever the model's training data were, this page promises "
            "nothing about them.</p>"
        )
    else:
        words = (
            "<p>No privacy statement came with these images: nothing is promised, and they are not "
            "shown.</p>"
        )
    numbers = ""
    if epsilon is not None and epsilon["value"] is not None:
        cells = [("epsilon", quote(epsilon["value"]))]
        if page.statement is not None:
            cells += [("delta", f"{page.statement['delta']:g}")]
            cells += [("privacy unit", name_one(page.statement))]
        numbers = lay_out_numbers(cells)
        if page.statement is not None:
            numbers += lay_out_stages(page.statement)
    private = any(not entry["covered_by_epsilon"] for entry in page.results.values())
    note = ""
    if private:
        note = (
            '<p class="private">Figures marked "not covered by epsilon" were computed from images '
            "that are not public, or whose privacy is unknown. Do not publish these figures, or "
            "this page, unless the people in those images agreed to it.</p>"
        )
    return f'<section class="card" aria-label="Privacy">{numbers}{words}{note}</section>'


def _fidelity(page: Page) -> str:
    captions = {"synthetic": "Synthetic images", "real": "Real images, held out"}
    sheets = [_figure(image, captions[name]) for name, image in page.sheets.items()]
    rows, about = [], None
    for name, (title, meaning) in FIDELITY.items():
        if (entry := page.results.get(name)) is not None:
            about = entry if "num_real" in entry else about
            rows.append((f"{escape(title)}<div class='soft'>{escape(meaning)}</div>", entry))
    table = ""
    if rows:
        caption = (
            f"Through the extractor {about['extractor']}, {about['resize']}: "
            f"{about['num_synthetic']} synthetic against {about['num_real']} held-out real images."
        )
        if "warning" in about:
            caption += f" {about['warning'].capitalize()}."
        table = _table(caption, rows)
    by_class = page.results.get("frechet_distance", {}).get("per_class")
    if by_class:
        table += _bars(
            "Fréchet distance, class by class", "distance", by_class, max(by_class.values())
        )
    return f'<h2>Are they good?</h2><div class="grids">{"".join(sheets)}</div>{table}'


def _utility(results: dict) -> str:
    """What classifiers learn, of one label an image or of any number."""
    kinds = [kind for kind in LEARNT if kind in results]
    if not kinds:
        return ""
    kind = kinds[0]
    found, several = results[kind], kind == "auroc"
    rows = [("trained on these synthetic images", found)]
    if f"{kind}_of_real" in results:
        rows.append(("trained on the private images (no privacy)", results[f"{kind}_of_real"]))
    steps = found["classifier_steps"]
    networks = ", ".join(f"{name} ({count} steps)" for name, count in steps.items())
    what = "Area under the ROC curve, mean over labels," if several else "Accuracy"
    caption = (
        f"{what} on {found['num_real']} held-out real images of {networks}, "
        f"{found['classifier_seeds']} seeds each; the weights that are kept were picked on a "
        "tenth of the images that they were trained on."
    )
    if several and found["not_measured"]:
        caption += f" Not measured: {', '.join(found['not_measured'])}."
    title = "ROC area of each label; chance is 50 %" if several else "Accuracy on each class"
    bars = _bars(title, "area" if several else "accuracy", found["per_class"], 1.0)
    confusion = "" if several else _confusion(found)
    return f"<h2>Are they useful?</h2>{_table(caption, rows, percent=True)}{bars}{confusion}"


def _bars(caption: str, what: str, values: dict[str, float], full: float) -> str:
    """A number for each class, and a bar; `full` is the number whose bar is the longest: 1 makes
    numbers percentages."""
    form = "{:.1%}" if full == 1 else "{:.4g}"
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{form.format(value)}</td>'
        '<td style="width:60%"><div class="bar" '
        f'style="width:{100 * value / (full or 1):.1f}%"></div></td></tr>'
        for name, value in values.items()
    )
    return (
        f"<h3>By class</h3><table><caption>{escape(caption)}</caption>"
        f'<tr><th scope="col">class</th><th scope="col" class="number">{what}</th><td></td></tr>'
        f"{lines}</table>"
    )


def _confusion(accuracy: dict) -> str:
    names = [escape(name) for name in accuracy["class_names"]]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    lines = []
    for name, shares in zip(names, accuracy["confusion"], strict=True):
        cells = "".join(
            f'<td style="background:rgb(var(--mark) / {0.75 * share:.2f})">{100 * share:.0f}</td>'
            for share in shares
        )
        lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return (
        '<div class="wide"><table class="confusion"><caption>Confused classes: rows are real '
        "classes, columns what the classifiers said, in % of the row</caption>"
        f"<tr><td></td>{head}</tr>{''.join(lines)}</table></div>"
    )


def _memorisation(page: Page) -> str:
    if not page.spaces:
        return ""
    copies, rows = page.results["copies"], []
    for found in page.spaces:
        entry = page.results[f"nearest_neighbor_ratio_{found.space}"]
        share = f"{entry['share_nearer']:.1%} of the images are nearer to a private one"
        meaning = f"<div class='soft'>1 is alike; {share} (standard error "
        meaning += f"{entry['standard_error']:.1%})</div>"
        rows.append((f"distance to private over held-out images, {found.space}{meaning}", entry))
    said = "No synthetic image was found to be a copy of a private one."
    if copies["value"]:
        said = f"{copies['value']} synthetic images look like copies of private ones."
    criterion = (
        f"{copies['criterion'].capitalize()}, in pixels or in features. The closest pairs are in "
        "private/, beside this page."
    )
    return (
        f"<h2>Do they give anyone away?</h2><p><strong>{said}</strong></p>"
        f'<p class="soft">{escape(criterion)}</p>{_table("Nearest neighbours", rows)}'
        f"<figure>{plot_neighbour_distances(page.spaces)}<figcaption>Distance of each synthetic "
        "image to its nearest private and its nearest held-out image, among as many of each"
        "</figcaption></figure>"
    )


def _comparison(page: Page) -> str:
    if not page.runs:
        return ""
    runs = [(page.title, page.results), *page.runs]
    compared = {m: n for m, n in COMPARED.items() if any(m in results for _, results in runs)}
    lines = []
    for name, results in runs:
        cells = [format_metric(results.get("epsilon"))]
        cells += [format_metric(results.get(m), percent=m in LEARNT) for m in compared]
        row = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{row}</tr>')
    titles = ["epsilon", *compared.values()]
    head = "".join(f'<th scope="col" class="number">{title}</th>' for title in titles)
    plots = ""
    spent = [run for run in runs if format_metric(run[1].get("epsilon")) != "unknown"]
    for metric, label in compared.items():
        known = [run for run in spent if metric in run[1]]
        if len(known) > 1:
            plots += f"<figure>{plot_quality_trade_off(known, metric, label)}</figure>"
    for metric, name in LEARNT.items():
        known = [run for run in spent if "per_class" in run[1].get(metric, {})]
        if len(known) > 1:
            plots += f"<figure>{plot_classes_of_runs(known, metric, name)}</figure>"
    return (
        '<h2>Against other runs</h2><div class="wide"><table><caption>Fréchet distances compare '
        "only where extractor and numbers of images are the same</caption>"
        f'<tr><th scope="col">run</th>{head}</tr>{"".join(lines)}</table></div>{plots}'
    )


def _table(caption: str, rows: list[tuple[str, dict]], percent: bool = False) -> str:
    """Metrics, one a line, marked where no epsilon covers them."""
    lines = []
    for title, entry in rows:
        mark = "" if entry["covered_by_epsilon"] else MARK
        lines.append(
            f'<tr><th scope="row">{title}{mark}</th>'
            f'<td class="number">{format_metric(entry, percent)}</td></tr>'
        )
    return f"<table><caption>{escape(caption)}</caption>{''.join(lines)}</table>"


def format_metric(entry: dict | None, percent: bool = False) -> str:
    """A metric's value and spread, as text."""
    if entry is None or entry["value"] is None:
        return "unknown"
    scale, unit = (100, " %") if percent else (1, "")
    spread = "" if entry["std"] is None else f" ± {scale * entry['std']:.2g}"
    return f"{scale * entry['value']:.4g}{spread}{unit}"


def _figure(image: Image.Image, caption: str) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}, a sheet of samples">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
