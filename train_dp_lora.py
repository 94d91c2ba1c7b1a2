"""DP-LoRA: fine-tune a latent diffusion model on private images, with differential privacy.

    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml

    # Stable Diffusion on an image folder with captions in metadata.jsonl
    accelerate launch train_dp_lora.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir scans --caption_column text --resolution 512 \\
        --target_epsilon 8 --target_delta 1e-6 --expected_batch_size 1024 --max_train_steps 300 \\
        --noise_multiplicity 4 --mixed_precision bf16 --output_dir runs/scans

    # what would it cost? prints the plan and stops
    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml --dry_run

    # DP-SAPF: spend a twentieth of the budget to learn which matrices to train
    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml --select_saliency

LoRA on the attention and projection layers of the U-Net, trained by DP-SGD (Tsai et al. 2025); with
--saliency_file or --select_saliency, on the matrices that a private ranking selects (Gong et al.
2026).
Writes pytorch_lora_weights.safetensors, which plain diffusers loads, the privacy statement
privacy.json, a model card and samples. No loss is shown: it is not private.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from select_saliency import select
from utils.arguments import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
    option,
    parse,
)
from utils.checkpoints import differences, steps_on_disk
from utils.errors import UsageError, on_main_process, run_script
from utils.fine_tuning import ARGUMENTS, Method, run_method
from utils.latent_files import latents_folder
from utils.lora import LoraArguments, add_lora, save_lora
from utils.publishing import check_repository
from utils.runs import LEDGER_NAME, claim_output_dir, private_folder
from utils.saliency import SaliencyArguments
from utils.selection import read_saliency

USAGE = """from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{base}")
pipeline.load_lora_weights("{adapter}")"""


@dataclass
class StageArguments:
    """Both stages of DP-SAPF at once."""

    select_saliency: bool = option(
        "first select what to train, into OUTPUT_DIR/selection, within the same budget", False
    )


def select_first(
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    lora: LoraArguments,
    saliency: SaliencyArguments,
) -> PrivacyArguments:
    """Run the selection, unless an earlier attempt at this run has paid for it; say where it is.

    Raises:
        UsageError: see `select`; or a selection was also named.
    """
    if privacy.saliency_file is not None:
        raise UsageError("give --select_saliency or --saliency_file, not both")
    output_dir = Path(training.output_dir)
    folder = output_dir / "selection"
    found = folder / "saliency.json"
    if found.exists():
        changed = differences(read_saliency(found).settings, asdict(saliency))
        if changed:
            raise UsageError(f"{found} was made with other settings: {'; '.join(changed)}")
        return replace(privacy, saliency_file=str(found))
    on_main_process(lambda: claim_output_dir(training).release())
    ledger = privacy.privacy_ledger or private_folder(output_dir) / LEDGER_NAME
    paid = steps_on_disk(private_folder(folder) / "checkpoints")  # an earlier attempt, interrupted
    if training.resume_from_checkpoint is not None and not paid:
        raise UsageError(f"--output_dir {output_dir} holds no selection to resume from")
    own = replace(privacy, privacy_ledger=str(ledger))
    resume = "latest" if paid else None
    select(
        model,
        data,
        own,
        replace(
            training,
            output_dir=str(folder),
            resume_from_checkpoint=resume,
            latents_dir=str(latents_folder(training)),
            discard_latents=False,
        ),
        lora,
        saliency,
    )
    return replace(privacy, saliency_file=str(found))


def main():
    model, data, privacy, training, hub, lora, saliency, stages = parse(
        *ARGUMENTS, LoraArguments, SaliencyArguments, StageArguments, description=__doc__
    )
    if stages.select_saliency:
        check_repository(hub, privacy)
        privacy = select_first(model, data, privacy, training, lora, saliency)
        if privacy.dry_run and not Path(privacy.saliency_file).exists():
            return  # the plans of both stages were shown
    if privacy.saliency_file is not None:
        lora = replace(lora, target_modules=read_saliency(privacy.saliency_file).selected)
    method = Method("dp-lora", lambda pipeline: add_lora(pipeline, lora), save_lora, USAGE, lora)
    run_method(method, model, data, privacy, training, hub)


if __name__ == "__main__":
    run_script(main)
