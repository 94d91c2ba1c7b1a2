"""What a card says about how good, useful and safe the images are."""

import json
from pathlib import Path

from utils.arguments.publishing import MetricsArguments
from utils.errors import UsageError
from utils.ledger.statement import quote_total

PLACE = "\n## Training\n"  # in a model card; a dataset card ends with its evaluation


def build_evaluation_section(args: MetricsArguments, statement: dict | None) -> str:
    """A card's section on `--metrics_file`; nothing if none was named.

    What read private images is left out unless `--publish_private_metrics` asks for it.

    Raises:
        UsageError: the file cannot be read, is about images of other weights, or holds nothing
            that may be shown.
    """
    if args.metrics_file is None:
        return ""
    try:
        results = json.loads(Path(args.metrics_file).read_text())
        about = results.get("epsilon", {})
        found = (about.get("value"), about.get("weights"))
        public = {
            name: entry
            for name, entry in results.items()
            if name != "epsilon" and (entry["covered_by_epsilon"] or args.publish_private_metrics)
        }
        lines = [_format_line(name, entry) for name, entry in public.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--metrics_file {args.metrics_file} cannot be read: {error!r}") from error
    expected = (0.0, None)
    if statement is not None:
        expected = (quote_total(statement)[0], statement["files"])
    if found != expected:
        raise UsageError(f"--metrics_file {args.metrics_file} is about images of other weights")
    if not public:
        raise UsageError(
            f"all of {args.metrics_file} was computed from private images, which no epsilon "
            "covers; add --publish_private_metrics if those people agreed to it"
        )
    section = "\n## Evaluation\n\n| metric | value | images | covered by epsilon |\n"
    section += "| --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
    if not all(entry["covered_by_epsilon"] for entry in public.values()):
        section += (
            "\nWhat epsilon does not cover was computed from private images, and published on "
            "purpose.\n"
        )
    return section


def insert_section(card: str, section: str) -> str:
    """The card with `section` (of `build_evaluation_section`) in its place."""
    return card.replace(PLACE, section + PLACE, 1) if PLACE in card else card + section


def _format_line(name: str, entry: dict) -> str:
    spread = "" if entry["std"] is None else f" ± {entry['std']:.2g}"
    counts = [f"{entry[key]} {key[4:]}" for key in entry if key.startswith("num_")]
    extractor = f" ({entry['extractor']})" if "extractor" in entry else ""
    covered = "yes" if entry["covered_by_epsilon"] else "no"
    title = name.replace("_", " ") + extractor
    return f"| {title} | {entry['value']:.4g}{spread} | {', '.join(counts)} | {covered} |"
