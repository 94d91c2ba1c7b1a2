"""Model and dataset cards: what the Hub shows; what a reader needs to use, trust and check it."""

import re
from dataclasses import dataclass
from pathlib import Path

import diffusers
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from utils.arguments.training import ModelArguments
from utils.hub.privacy_words import describe_formally, describe_plainly
from utils.ledger.statement import quote_total
from utils.models.drawing import DrawingSettings
from utils.models.families import FAMILIES
from utils.models.lora import loads_lora
from utils.privacy.accounting import quote

METHODS = {
    "dp-lora": "DP-LoRA adapter",
    "dp-loda": "DP-LoDA adapter",
    "dp-ldm": "DP-LDM: a denoiser whose attention was fine-tuned with differential privacy",
    "dp-diffusion": "DP-Diffusion: a denoiser fine-tuned with differential privacy",
}
RELATIONS = {"dp-lora": "adapter", "dp-loda": "adapter"}  # to the base; the others are finetunes
PLACEHOLDER = "this/adapter"  # stands for the repository's name, which it gets when uploaded
RECOMPUTE = """import json

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from huggingface_hub import hf_hub_download

statement = json.load(open(hf_hub_download("{adapter}", "privacy.json")))
base = statement.get("base", {"events": [], "delta": statement["delta"]})
accountant = PLDAccountant(value_discretization_interval=1e-3)
for event in base["events"] + statement["events"]:
    noise = GaussianDpEvent(event["noise_multiplier"])
    step = PoissonSampledDpEvent(event["sampling_rate"], noise)
    accountant.compose(SelfComposedDpEvent(step, event["steps"]))
print(accountant.get_epsilon(base["delta"]), "at delta", base["delta"])"""


@dataclass(frozen=True)
class Facts:
    """What a model card says that the statement does not.

    Attributes:
        method: the tag of the method, such as dp-lora.
        usage: Python that makes `pipeline`; `{load}({base})` and `{adapter}` stand for what loads
            the base model, and for the repository.
        base: where the base model is. pipeline: its class. drawing: how samples/ were drawn.
        prompt_code: the first prompt, as Python that calls the pipeline has it.
        prompts: of those, of which there are `num_samples`: image i has prompt i modulo the number
            of prompts, and starts from the noise of a generator whose seed is i.
        setup: how it was trained, {what: value}.
        license: `license` as the Hub names it, and what belongs to it; empty if there is none.
    """

    method: str
    usage: str
    base: ModelArguments
    pipeline: str
    drawing: DrawingSettings
    prompt_code: str
    prompts: list[str]
    num_samples: int
    setup: dict[str, object]
    license: dict[str, str]


def build_model_card(facts: Facts, statement: dict) -> str:
    """The text of README.md."""
    base, adapter = name_publicly(facts.base.pretrained_model_name_or_path), PLACEHOLDER
    text = f"""---
{_front_matter(facts, statement)}
---

# {METHODS[facts.method]}, from {base}

<Gallery />

## Use it

```python
{_write_code(facts, base)}
```

This draws the first of the images in `samples/`, all of which this model made; `sampling.json` has
the settings. Sampling costs no further privacy.
{FAMILIES[facts.pipeline].about_unused}

## Privacy

{describe_plainly(statement)}

{describe_formally(statement)}

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
decision rests on them. Noise hides rare things first: small groups come out worse than large ones.
What the base model knew, and its flaws, are still there.
"""
    return str(ModelCard(text))


def name_publicly(model: str) -> str:
    """A Hub id as it is; of a folder or file, the name alone, not where it lies, or once lay, on
    this or another machine."""
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model) and not Path(model).exists()
    return model if is_id else Path(model).resolve().name


def _write_code(facts: Facts, base: str) -> str:
    """Python that draws the first sample with public packages alone."""
    model, drawing = facts.base, facts.drawing
    is_file = Path(model.pretrained_model_name_or_path).is_file()
    load = f"{facts.pipeline}.from_{'single_file' if is_file else 'pretrained'}"
    named = {"revision": model.revision, "variant": model.variant}
    words = [f'"{base}"', *(f'{k}="{v}"' for k, v in named.items() if v is not None)]
    words.append("dtype=torch.float32")  # else text encoders come as their configuration says
    usage = facts.usage.format(load=load, base=", ".join(words), adapter=PLACEHOLDER)
    scheduler = dict(drawing.scheduler)
    kind = scheduler.pop("_class_name")
    changes = "".join(f"    {name}={value!r},\n" for name, value in scheduler.items())
    call = "".join(
        f"    {name}={value!r},\n" for name, value in drawing.describe_call(facts.pipeline).items()
    )
    code = f"""{usage}
pipeline.scheduler = {kind}.from_config(
    pipeline.scheduler.config,
{changes})
image = pipeline(
    {facts.prompt_code},
{call}    generator=torch.Generator().manual_seed(0),
).images[0]"""
    names = sorted({name for name in re.findall(r"[A-Z]\w+", code) if hasattr(diffusers, name)})
    return f"import torch\nfrom diffusers import {', '.join(names)}\n\n{code}"


def _front_matter(facts: Facts, statement: dict) -> str:
    base = facts.base.pretrained_model_name_or_path
    is_local = Path(base).exists()
    is_lora = facts.method == "dp-lora" and loads_lora(getattr(diffusers, facts.pipeline))
    family = ["lora", "template:sd-lora"] if is_lora else []
    count = min(len(facts.prompts), facts.num_samples, 10)
    widget = [
        {"text": facts.prompts[i] or "(no prompt)", "output": {"url": f"samples/{i:04}.png"}}
        for i in range(count)
    ]
    results = None
    if statement["private"]:
        epsilon, delta = quote_total(statement)
        results = [
            EvalResult(
                task_type="text-to-image",
                dataset_type="private",
                dataset_name=f"{statement['num_units']} private units",
                metric_type="epsilon",
                metric_name=f"epsilon (add or remove one) at delta {delta:g}",
                metric_value=float(quote(epsilon)),
            )
        ]
    data = ModelCardData(
        base_model=None if is_local else base,
        base_model_relation=None if is_local else RELATIONS.get(facts.method, "finetune"),
        library_name="diffusers",
        **facts.license,
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


def _numbers(statement: dict) -> str:
    if not statement["private"]:
        return ""
    epsilon = statement["epsilon"]
    rows = [
        ("epsilon, adding or removing one unit", quote(epsilon["add_or_remove_one"])),
        ("epsilon, replacing one unit", quote(epsilon["replace_one"])),
        ("delta", f"{statement['delta']:g}"),
        ("privacy unit", statement["privacy_unit"]),
        ("units, N (public)", statement["num_units"]),
    ]
    if "base" in statement:
        total, delta = quote_total(statement)
        rows.append((f"epsilon with its base model, at delta {delta:g}", quote(total)))
    for rate, power in statement.get("membership_inference", {}).items():
        rows.append((f"membership inference at a false-positive rate of {rate}", quote(power, 4)))
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
    """What a synthetic set was generated with.

    Attributes:
        base_model, adapter: folder or Hub id; no adapter is None, and so is no model, where a small
            generator was fitted to noisy means.
        statement: the adapter's privacy statement; None without an adapter.
    """

    base_model: str | None
    adapter: str | None
    statement: dict | None


def build_dataset_card(made_by: Maker, num_images: int, repo_id: str, license: str | None) -> str:
    """The text of README.md of a synthetic set."""
    base = name_publicly(made_by.base_model) if made_by.base_model else None
    adapter = name_publicly(made_by.adapter) if made_by.adapter else None
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
    if base is None:
        source = "a small generator that was fitted to noisy means"
    privacy = (
        "No adapter was used. Whatever the model's training data were, this card promises nothing "
        "about them."
    )
    if statement is not None:
        privacy = (
            f"{describe_plainly(statement)}\n\n{describe_formally(statement)}\n\nGenerating images "
            "costs no further privacy: the guarantee covers this set, however large. "
            "`privacy.json` is the statement of what generated it."
        )
    text = f"""---
{data.to_yaml()}
---

# {repo_id.split("/")[-1]}: {num_images} synthetic images

Every image was generated by {source}. None is a photograph or a scan of anyone.

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
