"""report.html in a real browser: whole, readable on a phone and in the dark, and self-contained."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.worlds import build_plan
from utils.errors import UsageError
from utils.evaluation.features import ExtractedFeatures
from utils.evaluation.fidelity import measure_fidelity
from utils.evaluation.memorisation import compare, summarise_neighbours
from utils.evaluation.report import Page, read_runs, write_report
from utils.hub.officer import write_officers_page
from utils.ledger.statement import Circumstances, build_statement
from utils.ledger.verification import Source
from utils.privacy.accounting import account

BROWSER = (
    shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here")
CLASSES = [f"class <{i}> & co" for i in range(10)]  # names of users need escaping


def results(epsilon: float | None = 9.98) -> dict:
    """Real metrics of random features, and made-up accuracies."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(80, 8)).astype(np.float32)
    about = {"extractor": "inception", "extractor_weights": "0" * 64, "resize": "to 299 pixels"}
    synthetic = ExtractedFeatures(
        features[:40] + 0.3, np.log(generator.dirichlet(np.ones(5), 40)), about
    )
    entries = {"epsilon": {"value": epsilon, "std": None, "covered_by_epsilon": True}}
    entries |= measure_fidelity(
        synthetic, ExtractedFeatures(features[40:], None, about), has_epsilon=True, public=False
    )
    entries["accuracy"] = {
        "value": 0.912,
        "std": 0.004,
        "covered_by_epsilon": False,
        "networks": {"cnn": {"value": 0.912, "std": 0.004}},
        "per_class": {name: 0.85 + 0.01 * i for i, name in enumerate(CLASSES)},
        "class_names": CLASSES,
        "confusion": (np.eye(10) * 0.9 + 0.01).tolist(),
        "num_real": 1000,
        "classifier_steps": {"cnn": 600},
        "classifier_seeds": 3,
    }
    return entries


def build_mnist_statement() -> dict:
    plan = build_plan(
        num_units=60000,
        expected_batch_size=3000,
        steps=120,
        noise_multiplier=0.654,
        max_grad_norm=0.2,
        delta=1e-5,
    )
    return build_statement(plan, plan.events(), account(plan.events(), 1e-5), Circumstances())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with everything on it."""
    generator = np.random.default_rng(0)
    spaces = [compare("pixels", *generator.normal(size=(3, 60, 12)).astype(np.float32))]
    colours = {"synthetic": "navy", "real": "maroon"}
    sheets = {name: Image.new("RGB", (320, 192), colour) for name, colour in colours.items()}
    runs = [("public model", results(0.0)), ("a < b", results(1.0)), ("no statement", {})]
    everything = results() | summarise_neighbours(spaces)
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(
        Page("scans & more", everything, build_mnist_statement(), sheets, spaces, runs), path
    )
    return path


def test_it_needs_no_network_and_runs_no_script(report):
    text = report.read_text()
    for address in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert address.startswith(("data:image/png;base64,", "#")), address
    assert "<script" not in text and "@import" not in text and "url(http" not in text


def test_it_says_what_was_spent_and_marks_what_is_not_covered(report):
    text = report.read_text()
    assert "9.98" in text and "odds" in text and "1e-05" in text
    marks = text.count("not covered by epsilon</div>")
    assert marks == 6 + 1 + 1  # fidelity but for the inception score, accuracy, and neighbours
    assert "Do not publish these figures" in text
    assert "class &lt;0&gt; &amp; co" in text and "class <0>" not in text


def test_runs_are_compared_class_by_class(report):
    (label,) = re.findall(r'aria-label="(accuracy by class[^"]*)"', report.read_text())
    assert "scans &amp; more: worst" in label and "public model: worst" in label
    assert "no statement" not in label  # nothing is known of it


def test_runs_of_several_labels_are_compared_by_their_roc_areas(tmp_path):
    runs = []
    for epsilon in (1.0, 3.0):
        found = results(epsilon)
        found["auroc"] = found.pop("accuracy") | {"value": 0.71, "not_measured": []}
        runs.append((f"at {epsilon:g}", found))
    sheets = {"synthetic": Image.new("RGB", (9, 9))}
    page = Page(runs[0][0], runs[0][1], None, sheets, runs=runs[1:])
    write_report(page, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert re.search(r'aria-label="ROC area by class, a panel a run. at 1: worst', text)
    assert '<th scope="col" class="number">ROC area</th>' in text and "71 ± 0.4 %" in text
    assert '<th scope="col" class="number">accuracy</th>' not in text


def test_without_anything_private_there_is_no_mark(tmp_path):
    entries = {name: e | {"covered_by_epsilon": True} for name, e in results().items()}
    write_report(
        Page("x", entries, None, {"synthetic": Image.new("RGB", (9, 9))}), tmp_path / "r.html"
    )
    text = (tmp_path / "r.html").read_text()
    assert "not covered by epsilon" not in text and "not publish" not in text


MEASURE = """<!doctype html>
<iframe id=page src="report.html" width=WIDTH height=800></iframe>
<script>
onload = () => {
  const page = document.getElementById("page").contentDocument;
  const luminance = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3)
    .map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (/^rgb\\(/.test(c)) return c; } };
  let worst = 99, what = "";
  const texts = "h1, h2, h3, p, th, td, b, figcaption, caption, div.private, text";
  for (const e of page.querySelectorAll(texts)) {
    if (!e.textContent.trim() || e.closest(".confusion td")) continue;
    const style = getComputedStyle(e);
    const ink = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [x, y] = [luminance(ink), luminance(behind(e))];
    const [a, b] = [Math.min(x, y), Math.max(x, y)];
    const ratio = (b + 0.05) / (a + 0.05);
    if (ratio < worst) { worst = ratio; what = e.outerHTML.slice(0, 200); }
  }
  const unnamed = [...page.querySelectorAll("img, svg")].filter(
    e => !(e.getAttribute("alt") || e.getAttribute("aria-label") || "").trim()).length;
  const broken = [...page.images].filter(e => !e.naturalWidth).length;
  document.title = JSON.stringify({ width: page.documentElement.scrollWidth, worst, what, unnamed,
    broken, pictures: page.querySelectorAll("img, svg").length,
    dark: luminance(getComputedStyle(page.body).backgroundColor) < 0.2,
    headings: [...page.querySelectorAll("h1, h2")].map(e => e.textContent) });
};
</script>"""


def looked_at(report, width: int, dark: bool) -> dict:
    """What a browser with a window this wide finds on the page."""
    wrapper = report.with_name("measure.html")
    wrapper.write_text(MEASURE.replace("WIDTH", str(width)))
    run = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000"),
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            *("--allow-file-access-from-files", "--virtual-time-budget=2000"),
            *(f"--user-data-dir={report.parent / 'browser'}", "--dump-dom", wrapper.as_uri()),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"<title>(.*?)</title>", run.stdout, re.S)
    assert found, run.stdout[:500] + run.stderr[-500:]
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(text)


@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [375, 1100])
def test_it_is_readable_on_a_phone_and_in_the_dark(report, width, dark):
    """Nothing sticks out sideways, every text stands out (WCAG AA), every picture has words."""
    page = looked_at(report, width, dark)
    assert page["width"] <= width and page["dark"] is dark
    assert page["worst"] >= 4.5, page
    assert page["unnamed"] == page["broken"] == 0 and page["pictures"] == 6
    assert page["headings"] == [
        "scans & more",
        "Are they good?",
        "Are they useful?",
        "Do they give anyone away?",
        "Against other runs",
    ]


@in_a_browser
def test_the_officers_page_fits_a_phone(tmp_path):
    path = tmp_path / "report.html"
    statement = build_mnist_statement()
    statement["made_by"]["commit"] = "0123456789abcdef" * 4  # a word longer than a phone is wide
    write_officers_page("scans", Source(None, statement, None), [], [], path)
    page = looked_at(path, 375, dark=True)
    assert page["width"] <= 375 and page["worst"] >= 4.5, page
    assert page["headings"][1] == "Who is protected" and page["headings"][-1] == "Before signing"


def test_runs_to_compare_are_named_and_checked(tmp_path):
    (tmp_path / "first").mkdir()
    for path in (tmp_path / "first" / "metrics.json", tmp_path / "second.json"):
        path.write_text('{"accuracy": {"value": 1, "std": null}}')
    (tmp_path / "list.json").write_text("[1]")
    paths = [str(tmp_path / "first" / "metrics.json"), str(tmp_path / "second.json")]
    assert [name for name, _ in read_runs(paths)] == ["first", "second"]
    with pytest.raises(UsageError, match="not a metrics.json"):
        read_runs([str(tmp_path / "list.json")])
    with pytest.raises(UsageError, match="cannot be read"):
        read_runs([str(tmp_path / "none.json")])
