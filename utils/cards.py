"""Model and dataset cards: what the Hub shows; what a reader needs to use, trust and check it."""

import math
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

METHODS = {
    "dp-lora": "DP-LoRA adapter",
    "dp-loda": "DP-LoDA adapter",
    "dp-ldm": "DP-LDM: a U-Net whose attention was fine-tuned with differential privacy",
    "dp-diffusion": "DP-Diffusion: a U-Net fine-tuned with differential privacy",
}
PLACEHOLDER = "this/adapter"  # stands for the repository's name, which it gets when uploaded
RECOMPUTE = """import json

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from huggingface_hub import hf_hub_download

statement = json.load(open(hf_hub_download("{adapter}", "privacy.json")))
accountant = PLDAccountant(value_discretization_interval=1e-3)
for event in statement["events"]:
    noise = GaussianDpEvent(event["noise_multiplier"])
    step = PoissonSampledDpEvent(event["sampling_rate"], noise)
    accountant.compose(SelfComposedDpEvent(step, event["steps"]))
print(accountant.get_epsilon(statement["delta"]), "at delta", statement["delta"])"""


@dataclass(frozen=True)
class Facts:
    """What a model card says that the statement does not.

    Attributes:
        method: the tag of the method, such as dp-lora.
        usage: Python that makes `pipeline`; `{base}`, `{adapter}` and `{pipeline}` stand for the
            base model, the repository and the pipeline's class.
        base_model: folder or Hub id. pipeline: name of its class.
        prompts: of the images in samples/, of which there are `num_samples`: image i has prompt i
            modulo the number of prompts.
        setup: how it was trained, {what: value}.
        license: as the Hub names it, or None.
    """

    method: str
    usage: str
    base_model: str
    pipeline: str
    prompts: list[str]
    num_samples: int
    setup: dict[str, object]
    license: str | None = None


def model_card(facts: Facts, statement: dict) -> str:
    """The text of README.md."""
    is_folder = Path(facts.base_model).exists()
    base = Path(facts.base_model).resolve().name if is_folder else facts.base_model
    adapter = PLACEHOLDER
    usage = facts.usage.format(base=base, adapter=adapter, pipeline=facts.pipeline)
    text = f"""---
{_front_matter(facts, statement, is_folder)}
---

# {METHODS[facts.method]}, from {base}

<Gallery />

## Use it

```python
{usage}
image = pipeline({facts.prompts[0]!r}).images[0]
```

The images in `samples/` were drawn from this model. Sampling costs no further privacy.

## Privacy

{plain_words(statement)}

{privacy_paragraph(statement)}

{_numbers(statement)}

## Verify it

`python privacy_report.py verify {adapter}`, of the repository that made this adapter, recomputes
epsilon and checks that the weights are those that were paid for. With public packages alone:

```python
{RECOMPUTE.replace("{adapter}", adapter)}
```

## Training

{_table(("setting", "value"), facts.setup.items())}

## Intended use and limits

For images that resemble the private ones, where those may not be shared: data for other models,
teaching, prototypes. It is not evidence about any person, and no substitute for real data where a
decision rests on them. Noise hides rare things first: small groups are drawn worse than large ones.
What the base model knew, and its flaws, are still there.
"""
    return str(ModelCard(text))


def _front_matter(facts: Facts, statement: dict, is_folder: bool) -> str:
    family = ["lora", "template:sd-lora"] if facts.method == "dp-lora" else []
    shown = min(len(facts.prompts), facts.num_samples, 10)
    widget = [
        {"text": facts.prompts[i] or "(no prompt)", "output": {"url": f"samples/{i:04}.png"}}
        for i in range(shown)
    ]
    results = None
    if statement["private"]:
        results = [
            EvalResult(
                task_type="text-to-image",
                dataset_type="private",
                dataset_name=f"{statement['num_units']} private units",
                metric_type="epsilon",
                metric_name=f"epsilon (add or remove one) at delta {statement['delta']:g}",
                metric_value=round(statement["epsilon"]["add_or_remove_one"], 4),
            )
        ]
    data = ModelCardData(
        base_model=None if is_folder else facts.base_model,
        library_name="diffusers",
        license=facts.license,
        pipeline_tag="text-to-image",
        tags=[
            *("text-to-image", "diffusers", *family),
            *("differential_privacy", "dp-sgd", facts.method),
        ],
        model_name=PLACEHOLDER,
        eval_results=results,
        widget=widget or None,
    )
    return data.to_yaml()


def plain_words(statement: dict, what: str = "this repository") -> str:
    """The guarantee for a reader who knows no differential privacy and sees `what`."""
    if not statement["private"]:
        return f"**{statement['warning']}**"
    epsilon = statement["epsilon"]["add_or_remove_one"]
    factor = math.exp(min(epsilon, 700))
    shown = f"{factor:,.0f}" if 10 <= factor < 1e6 else f"{factor:.3g}"
    unit = "image" if statement["privacy_unit"] == "image" else "unit"
    weak = ""
    if epsilon > 5:
        weak = (
            " That is a worst case, over every attacker and every data set; at an epsilon this "
            "large it promises little by itself, though known attacks fall far short of it."
        )
    return (
        f"Nobody who sees {what}, whatever else they know, can tell with certainty "
        f"whether any one {unit} was among the training data: its odds of having been there, as "
        f"they saw them before, change by a factor of at most e^epsilon = {shown}, "
        f"but for a chance of delta = {statement['delta']:g}.{weak}"
    )


def privacy_paragraph(statement: dict) -> str:
    """The guarantee in the field's words."""
    if not statement["private"]:
        return f"**{statement['warning']}**"
    epsilon, accountants = statement["epsilon"], statement["accountants"]
    unit = statement["privacy_unit"]
    units = "images" if unit == "image" else f"units ({unit})"
    return (
        f"Trained with DP-SGD on {statement['num_units']} private {units}: "
        f"**epsilon = {epsilon['add_or_remove_one']:.3f}, delta = {statement['delta']:g}**, for "
        f"adding or removing one of them (epsilon = {epsilon['replace_one']:.3f} for replacing "
        f"one). {' '.join(_event_in_words(event) for event in statement['events'])} Accountants: "
        f"PLD (dp-accounting) {accountants['pld']['epsilon']:.3f}, PRV (Opacus) "
        f"{accountants['prv']['epsilon']:.3f}. `privacy.json` holds every event, so the number can "
        f"be recomputed. Not covered: {', '.join(statement['not_covered'])}.{_total(statement)}"
    )


def _event_in_words(event: dict) -> str:
    rate, noise = f"{event['sampling_rate']:.5g}", f"{event['noise_multiplier']:.4f}"
    if event["purpose"] == "selection":
        return (
            f"What is trained was selected by one release of noisy scores (sampling rate {rate}, "
            f"noise multiplier {noise})."
        )
    if event["purpose"] == "mean embedding":
        return f"One noisy mean of features of all images was released (noise multiplier {noise})."
    return (
        f"{event['steps']} steps, each on a Poisson batch with sampling rate {rate}; every unit's "
        f"gradient, averaged over {event['noise_multiplicity']} draw(s), is clipped once to "
        f"{event['max_grad_norm']:g}; noise multiplier {noise}."
    )


def _total(statement: dict) -> str:
    everything = statement.get("ledger", {}).get("everything")
    if everything is None:
        return ""
    epsilon = everything["epsilon"]
    return (
        f" Together with all else that its ledger records on these data: epsilon = "
        f"{epsilon['add_or_remove_one']:.3f} ({epsilon['replace_one']:.3f} for replacing one)."
    )


def _numbers(statement: dict) -> str:
    if not statement["private"]:
        return ""
    epsilon = statement["epsilon"]
    rows = [
        ("epsilon, adding or removing one unit", f"{epsilon['add_or_remove_one']:.4f}"),
        ("epsilon, replacing one unit", f"{epsilon['replace_one']:.4f}"),
        ("delta", f"{statement['delta']:g}"),
        ("privacy unit", statement["privacy_unit"]),
        ("units, N (public)", statement["num_units"]),
    ]
    for event in statement["events"]:
        noise = f"{event['noise_multiplier']:.4f}"
        mechanism = f"Poisson-sampled Gaussian, {event['steps']} steps"
        rate = f"q = {event['sampling_rate']:.5g}"
        rows.append((f"{event['purpose']} mechanism", f"{mechanism}, {rate}, sigma = {noise}"))
    return _table(("", "value"), rows)


def _table(header: tuple, rows) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    cells = ((_cell(name), _cell(value)) for name, value in rows)
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in cells)])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


@dataclass(frozen=True)
class Maker:
    """What drew a synthetic set.

    Attributes:
        base_model, adapter: folder or Hub id; no adapter is None.
        statement: the adapter's privacy statement; None without an adapter.
    """

    base_model: str
    adapter: str | None
    statement: dict | None


def dataset_card(made_by: Maker, num_images: int, repo_id: str, license: str | None) -> str:
    """The text of README.md of a synthetic set."""
    base, adapter = (
        Path(name).resolve().name if name and Path(name).exists() else name
        for name in (made_by.base_model, made_by.adapter)
    )
    statement = made_by.statement
    private = ["differential_privacy"] if statement else []
    data = DatasetCardData(
        license=license,
        tags=["synthetic", "diffusers", *private],
        task_categories=["text-to-image", "image-classification"],
        size_categories=_size_category(num_images),
        pretty_name=repo_id.split("/")[-1],
        configs=[{"config_name": "default", "data_files": "data/train-*.parquet"}],
    )
    source = f"the adapter {adapter} of the model {base}" if adapter else f"the model {base}"
    privacy = (
        "No adapter was used. Whatever the model's training data were, this card promises nothing "
        "about them."
    )
    if statement is not None:
        privacy = (
            f"{plain_words(statement)}\n\n{privacy_paragraph(statement)}\n\nDrawing images from "
            "the adapter costs no further privacy: the guarantee covers this set, however large. "
            "`privacy.json` is the adapter's statement."
        )
    text = f"""---
{data.to_yaml()}
---

# {repo_id.split("/")[-1]}: {num_images} synthetic images

Every image was drawn by {source}. None is a photograph or a scan of anyone.

![Some of them](grid.png)

```python
from datasets import load_dataset

rows = load_dataset("{repo_id}", split="train")
```

Columns: `image`; `text`, its prompt; and `label`, where classes were asked for.

## Privacy

{privacy}
"""
    return str(DatasetCard(text))


def _size_category(count: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")]
    bounds += [(1_000_000, "100K<n<1M")]
    return next((name for bound, name in bounds if count < bound), "1M<n<10M")
