"""The officer's page: what one result promises, to whom, and what is left to ask before signing."""

from datetime import date
from html import escape
from pathlib import Path

from utils.hub.pages import (
    lay_out_numbers,
    lay_out_stages,
    mark_up,
    mark_up_words,
    write_page,
)
from utils.hub.privacy_words import describe_formally, describe_plainly, name_one, per_hundred
from utils.ledger.statement import quote_total
from utils.ledger.verification import Source, describe_verified
from utils.privacy.accounting import pld_epsilon, quote

HOUSEHOLD = 4


def write_officers_page(
    name: str, source: Source, problems: list[str], known: list[str], path: Path
) -> None:
    """Write the page on a result with a statement.

    Args:
        problems: what `find_problems` found. known: of the images, if it is a synthetic set.
    """
    statement, title = source.statement, f"{name}: what is promised"
    parts = [f"<h1>{escape(title)}</h1>", _summarise(statement, problems)]
    if statement["private"] and not problems:
        parts += [_who(statement), _how_sure(statement), _left_out(statement)]
        parts += [_checked(name, source, known), _before_signing(statement)]
    write_page(path, title, parts)


def _summarise(statement: dict, problems: list[str]) -> str:
    if problems:
        said = "".join(f"<li>{mark_up_words(problem)}</li>" for problem in problems)
        return (
            '<section class="card wrong"><p><strong>The statement does not hold. Do not sign.'
            f"</strong></p><ul>{said}</ul></section>"
        )
    if not statement["private"]:
        return f'<section class="card wrong">{mark_up(describe_plainly(statement))}</section>'
    epsilon, delta = quote_total(statement)
    cells = [("epsilon", quote(epsilon)), ("delta", f"{delta:g}")]
    cells += [("protected, each", name_one(statement)), ("of them", f"{statement['num_units']:,}")]
    words = mark_up(describe_plainly(statement, "these files"))
    return (
        f'<section class="card" aria-label="The promise">{lay_out_numbers(cells)}'
        f"{lay_out_stages(statement)}{words}</section>"
    )


def _who(statement: dict) -> str:
    unit = name_one(statement)
    if statement["privacy_unit"] == "image":
        who = (
            "**One image, with its caption.** Whoever has k images in the set is protected for all "
            "of them together at k times epsilon only. If anybody has several, ask for a run with "
            "`--privacy_unit_column`, which protects all images of one person together."
        )
    else:
        who = f"**All images of one {unit} together**, however many there are."
    epsilon, _ = quote_total(statement)
    return f"<h2>Who is protected</h2>{mark_up(who)}" + mark_up(
        f"A group of {HOUSEHOLD}, such as a household, is protected together at {HOUSEHOLD} times "
        f"epsilon, {quote(HOUSEHOLD * epsilon)}, and a larger delta. What holds of everybody is "
        "what the model is for, and stays no secret."
    )


def _how_sure(statement: dict) -> str:
    unit = name_one(statement)
    rows = "".join(
        f'<tr><td class="number">{100 * float(rate):g} %</td>'
        f'<td class="number">{per_hundred(power)} %</td></tr>'
        for rate, power in statement.get("membership_inference", {}).items()
    )
    table = (
        "<table><caption>The best attacker there can be, who guesses of each "
        f"{escape(unit)} whether it was used</caption>"
        f'<tr><th scope="col" class="number">wrongly accused, of those that were not</th>'
        f'<th scope="col" class="number">found, of those that were, at most</th></tr>{rows}</table>'
    )
    return (
        "<h2>Against whom, and how sure</h2>"
        + mark_up(
            "Against everybody who sees these files, or anything that is ever made with them, "
            "whatever else they know, and for good. Not against whoever ran the training: they "
            "saw the images."
        )
        + (table if rows else "")
        + mark_up(describe_formally(statement))
    )


def _left_out(statement: dict) -> str:
    points = [f"{point[0].upper()}{point[1:]}." for point in statement["not_covered"]]
    points += [
        "Figures on the card that are marked as not covered: they were computed from images.",
        "Whoever watched the machine that trained (its clock, power, memory, the dates of files).",
        "Runs on the same images that are in no ledger, or in another one.",
    ]
    if "Philox" in statement.get("randomness", ""):
        points.append("Attacks on the rounding of the noise: it was not `--secure_noise`.")
    if "base" in statement:
        points.append("The base model is a private result itself; the epsilon above counts both.")
    lines = "".join(f"<li>{mark_up_words(point)}</li>" for point in points)
    return f"<h2>What is left out</h2><ul>{lines}</ul>"


def _checked(name: str, source: Source, known: list[str]) -> str:
    statement = source.statement
    sentences = [*describe_verified(source), *known]
    if source.ledger is not None:
        with_base = " and its base model" if "base" in statement else ""
        everything = pld_epsilon(source.events(), source.delta())
        sentences.append(
            f"all that the ledger records on these images, this{with_base} included, comes to "
            f"epsilon {quote(everything)} at delta {source.delta():g}"
        )
    said = "".join(f"<li>{mark_up_words(sentence)}</li>" for sentence in sentences)
    made, audit = statement.get("made_by", {}), statement.get("audit")
    by = f"Made by version {made.get('version', 'unknown')} (commit {made.get('commit')}) on "
    by += f"{statement.get('date', 'an unknown day')}; this page on {date.today().isoformat()}."
    proof = "No audit of this very set-up was made."
    if audit is not None:
        proof = f"Before the run, its own loop was audited ({audit['kind']}), and passed."
    command = f"python privacy_report.py verify {name}"
    return (
        f"<h2>How it was checked</h2><ul>{said}</ul>{mark_up(proof)}{mark_up(by)}"
        f"<p>Again, by anyone:</p><pre>{escape(command)}</pre>"
        + mark_up(
            "This shows that statement and files belong together and that the arithmetic is right. "
            "It does not show who wrote them: get them from somebody you trust."
        )
    )


def _before_signing(statement: dict) -> str:
    unit, told = name_one(statement), quote(quote_total(statement)[0])
    questions = [
        "The images may be used for this: consent, law, contract.",
        f"Epsilon {told} is what was agreed to for these images, all runs on them together.",
        f"No person is behind more than one {unit}.",
        f"That there are {statement['num_units']:,} of them may be known, and the prompts too.",
        "The ledger in `private/` is kept as long as the images; the copies in it are deleted.",
        "No other run on these images was published outside this ledger.",
        "Somebody looked at the samples, and at how small groups fare in them.",
    ]
    boxes = "".join(f"<li>{mark_up_words(question)}</li>" for question in questions)
    return (
        f'<h2>Before signing</h2><ul class="boxes">{boxes}</ul>'
        '<p class="sign soft">Name, date, signature</p>'
    )
