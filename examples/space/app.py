"""A Space for the Hugging Face Hub: what a budget means, and whether an adapter's statement holds.

    make space                                  # in runs/space: this app, and what it needs
    pip install -r runs/space/requirements.txt && python runs/space/app.py
    hf upload USER/private-adapters runs/space --repo-type space

It reads no private data. The first tab plans a run; the second downloads what an adapter or a set
on the Hub published, recomputes its epsilon, and shows the page for whoever must sign.
"""

import html
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from utils.errors import UsageError
from utils.hub.officer import write_officers_page
from utils.hub.privacy_words import per_hundred
from utils.ledger.verification import find_problems, read_source
from utils.privacy.accounting import account, membership_power
from utils.privacy.plan import calibrate_table, make_plan
from utils.privacy.plots import plot_noise_trade_off

EPSILONS = {0.5, 1.0, 2.0, 4.0, 8.0}
LONGEST = 20_000  # steps: more would keep a small machine busy
INTRODUCTION = """# Private adapters: the budget, and the proof

**Epsilon** bounds how much the result can say about one unit, an image or a person: whoever sees
it gains at most a factor of e^epsilon on whether that unit was in the training set, but for a
probability of delta.
"""


def explore(
    num_units: float, epsilon: float, delta: float | None, batch: float, steps: float
) -> Iterator[tuple[str, list[list], str | None]]:
    """Sentences on a plan, a table of noise by epsilon, and, seconds later, the file of a plot.

    Raises:
        gr.Error: the numbers are impossible; it says which.
    """
    try:
        count = int(num_units or 0)
        if count < 3:
            raise UsageError("the number of private units must be at least 3")
        if not 1 <= (steps or 0) <= LONGEST:
            raise UsageError(f"the steps must be between 1 and {LONGEST}")
        if not 0 < (epsilon or 0) <= 100:
            raise UsageError("epsilon must be above 0, and at most 100")
        plan = make_plan(
            target_epsilon=float(epsilon),
            num_units=count,
            expected_batch_size=min(float(batch or 0), count),
            steps=int(steps),
            max_grad_norm=1.0,
            delta=float(delta or 1 / (count * math.log(count))),
        )
    except UsageError as error:
        raise gr.Error(str(error)) from error
    spent, power = account([plan.event()], plan.delta), membership_power([plan.event()])
    noise = plan.noise_multiplier / plan.expected_batch_size
    said = (
        f"Noise multiplier **{plan.noise_multiplier:.3f}** is epsilon "
        f"**{spent.add_or_remove_one:.3f}** for adding or removing one of {count:,} units, and "
        f"{spent.replace_one:.3f} for replacing one, at delta {plan.delta:.2g}.\n\n"
        f"In a step the noise on the mean gradient is {noise:.2g} times the largest that one unit "
        f"may say. An attacker who is wrong about one stranger in a hundred finds at most "
        f"{per_hundred(power['0.01'])} % of the members; wrong about one in a thousand, "
        f"{per_hundred(power['0.001'])} %."
    )
    rows = [
        [row["epsilon"], round(row["noise_multiplier"], 4)]
        for row in calibrate_table(plan, EPSILONS | {float(epsilon)})
    ]
    yield said, rows, None
    picture = Path(tempfile.mkdtemp()) / "trade_off.png"
    plot_noise_trade_off(plan, str(picture))
    yield said, rows, str(picture)


def check(name: str, revision: str) -> tuple[str, str]:
    """A verdict on what a repository published, and the page for whoever must sign, as HTML.

    Raises:
        gr.Error: there is no such repository, or no statement in it.
    """
    name = (name or "").strip()
    if name.count("/") != 1 or Path(name).exists():
        raise gr.Error("give a repository of the Hub: USER/NAME")
    try:
        source = read_source(name, (revision or "").strip() or None)
    except UsageError as error:
        raise gr.Error(str(error)) from error
    if source.statement is None:
        raise gr.Error(f"{name} holds no privacy.json: nothing is promised")
    return judge(name, source)


def judge(name: str, source) -> tuple[str, str]:
    """The verdict on a source that was read, and its page."""
    problems = find_problems(source)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        write_officers_page(name, source, problems, [], page)
        shown = html.escape(page.read_text(), quote=True)
    verdict = "### It holds: the epsilon was recomputed from its events, and the files are those."
    if problems:
        verdict = "### It does not hold\n" + "\n".join(f"- {problem}" for problem in problems)
    frame = f'<iframe srcdoc="{shown}" style="width:100%;height:70vh;border:0"></iframe>'
    return verdict, frame


def build() -> gr.Blocks:
    with gr.Blocks(title="Private adapters") as app:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("What does a budget cost?"):
            with gr.Row():
                with gr.Column():
                    units = gr.Number(
                        60_000, label="private units (images, or people)", precision=0
                    )
                    epsilon = gr.Number(8, label="epsilon")
                    delta = gr.Number(0, label="delta; 0 is 1 / (N ln N)")
                    batch = gr.Number(3_000, label="expected batch size")
                    steps = gr.Number(120, label="steps", precision=0)
                    button = gr.Button("Compute", variant="primary")
                with gr.Column():
                    said = gr.Markdown()
                    table = gr.Dataframe(headers=["epsilon", "noise multiplier"], interactive=False)
                    picture = gr.Image(label="epsilon against noise", interactive=False)
            inputs, outputs = [units, epsilon, delta, batch, steps], [said, table, picture]
            button.click(explore, inputs, outputs)
            app.load(explore, inputs, outputs)
        with gr.Tab("Does a statement hold?"):
            gr.Markdown(
                "This recomputes what the repository says of itself. It shows that the statement "
                "is consistent and about these files, not who wrote it: trust whoever published "
                "it, or run `privacy_report.py verify` beside the ledger."
            )
            with gr.Row():
                name = gr.Textbox(label="repository on the Hub", placeholder="USER/NAME")
                revision = gr.Textbox(label="revision; empty: the newest")
            verify = gr.Button("Verify", variant="primary")
            verdict, page = gr.Markdown(), gr.HTML()
            verify.click(check, [name, revision], [verdict, page])
    return app


if __name__ == "__main__":
    build().launch()
