"""What a run publishes: the privacy statement and the model card."""

import json
import os
from pathlib import Path

from huggingface_hub import ModelCardData

METHODS = {
    "dp-lora": "DP-LoRA adapter",
    "dp-loda": "DP-LoDA adapter",
    "dp-ldm": "DP-LDM: a U-Net whose attention was fine-tuned with differential privacy",
    "dp-diffusion": "DP-Diffusion: a U-Net fine-tuned with differential privacy",
}


def write_durably(path: Path, text: str) -> None:
    """Write a file that is either whole on disk or not there at all."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_statement(statement: dict, output_dir: Path) -> None:
    """Write `privacy.json`; do so before the weights that it accounts for."""
    write_durably(output_dir / "privacy.json", json.dumps(statement, indent=2) + "\n")


def privacy_paragraph(statement: dict) -> str:
    """The guarantee in words."""
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


def write_card(
    base_model: str, statement: dict, method: str, usage: str, prompt: str, output_dir: Path
) -> None:
    """Write `README.md`, the model card.

    Args:
        method: the tag of the method, such as dp-lora.
        usage: Python that makes `pipeline`; `{base}` stands for the base model.
    """
    is_folder = Path(base_model).exists()
    family = ["lora"] if method == "dp-lora" else []
    data = ModelCardData(
        base_model=None if is_folder else base_model,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", "text-to-image", "differential-privacy", method, *family],
    )
    shown = Path(base_model).name if is_folder else base_model
    text = f"""---
{data.to_yaml()}
---

# {METHODS[method]}, from {shown}

{privacy_paragraph(statement)}

```python
{usage.format(base=shown)}
image = pipeline({prompt!r}).images[0]
```

The images in `samples/` were drawn from this model. Sampling costs no further privacy.
"""
    write_durably(output_dir / "README.md", text)
