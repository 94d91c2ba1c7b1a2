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
    epsilon, event = statement["epsilon"], statement["events"][0]
    unit = statement["privacy_unit"]
    units = "images" if unit == "image" else f"units ({unit})"
    return (
        f"Trained with DP-SGD on {statement['num_units']} private {units}: "
        f"**epsilon = {epsilon['add_or_remove_one']:.3f}, delta = {statement['delta']:g}**, for "
        f"adding or removing one of them (epsilon = {epsilon['replace_one']:.3f} for replacing "
        "one). "
        f"{event['steps']} steps, each on a Poisson batch with sampling rate "
        f"{event['sampling_rate']:.5g}; every unit's gradient, averaged over "
        f"{event['noise_multiplicity']} draw(s), is clipped once to {event['max_grad_norm']:g}; "
        f"noise multiplier {event['noise_multiplier']:.4f}. Accountants: PLD (dp-accounting) "
        f"{statement['accountants']['pld']['epsilon']:.3f}, PRV (Opacus) "
        f"{statement['accountants']['prv']['epsilon']:.3f}. `privacy.json` holds every event, so "
        f"the number can be recomputed. Not covered: {', '.join(statement['not_covered'])}."
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
