"""Pages in HTML, of one file each, without scripts or network; what such pages share."""

import re
from html import escape
from pathlib import Path

from utils.files import write_durably
from utils.ledger.statement import list_all_events, quote_total
from utils.privacy.accounting import split_budget

STYLE = Path(__file__).with_name("page.css")


def write_page(path: Path, title: str, parts: list[str]) -> None:
    """Write a page of `parts`, whole or not at all."""
    body = "\n".join(part for part in parts if part)
    write_durably(
        path,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{STYLE.read_text()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n",
    )


def mark_up(markdown: str) -> str:
    """Markdown as HTML paragraphs; only bold and code are understood."""
    return "".join(f"<p>{mark_up_words(part)}</p>" for part in markdown.split("\n\n"))


def mark_up_words(markdown: str) -> str:
    """The same of one paragraph's words."""
    text = escape(markdown, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def lay_out_numbers(cells: list[tuple[str, str]]) -> str:
    """Large numbers beside one another: (what it is, the number)."""
    tiles = "".join(f"<div><b>{escape(v)}</b>{escape(k)}</div>" for k, v in cells)
    return f'<div class="numbers">{tiles}</div>'


def lay_out_stages(statement: dict) -> str:
    """A bar of epsilon, cut into what each stage adds; nothing of a single stage."""
    if not statement["private"] or len(list_all_events(statement)) < 2:
        return ""
    events, (_, delta) = list_all_events(statement), quote_total(statement)
    parts = zip(events, split_budget(events, delta), strict=True)
    cells = "".join(
        f'<div style="flex-grow:{max(added, 0):.4f}"><b>{escape(event["purpose"])}</b> '
        f"{added:.2f}</div>"
        for event, added in parts
    )
    return f'<div class="stages" aria-label="What each stage adds to epsilon">{cells}</div>'
