"""DP-LoRA: fine-tune a latent diffusion model on private images, with differential privacy.

    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml

    # Stable Diffusion on an image folder with captions in metadata.jsonl
    accelerate launch train_dp_lora.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir scans --caption_column text --resolution 512 \\
        --target_epsilon 8 --target_delta 1e-6 --mixed_precision bf16 --output_dir runs/scans

    # what would it cost, how long would it take, and can it work? says so and stops
    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml --dry_run

    # DP-SAPF: spend a twentieth of the budget to learn which matrices to train
    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml --select_saliency \\
        --output_dir runs/digits/sapf

    # a warm start: spend a share of it on noisy means, and start from images that match them
    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml --release_means \\
        --grey --learning_rate 4e-3 --output_dir runs/digits/warm

LoRA on the attention and projection layers of the denoiser, trained by DP-SGD (Tsai et al. 2025);
with --saliency_file or --select_saliency, on the matrices that a private ranking selects (Gong et
al. 2026).
Writes pytorch_lora_weights.safetensors, which plain diffusers loads (of PixArt-Sigma and DiT a
folder that plain peft loads), the privacy statement privacy.json, a model card and samples. No loss
is shown: it is not private.
"""

from dataclasses import replace

from utils.arguments.means import MeansArguments
from utils.arguments.methods import (
    SHARED,
    BothStagesArguments,
    LoraArguments,
    SaliencyArguments,
)
from utils.arguments.parsing import parse
from utils.errors import run_script


def main():
    model, data, privacy, training, hub, stages, lora, saliency, means = parse(
        *(*SHARED, BothStagesArguments, LoraArguments, SaliencyArguments, MeansArguments),
        description=__doc__,
    )
    # Imported now, since it takes seconds: a mistake on the command line should not wait for it.
    from utils.methods.fine_tuning import Method, run_method
    from utils.methods.saliency_file import read_saliency
    from utils.models.lora import add_lora, describe_lora, save_lora

    common, selection, to_come = (model, data, privacy, training, hub), None, ()
    if stages.release_means or stages.select_saliency:
        from utils.methods.first_stages import do_first_stages

        stages, selection, to_come = do_first_stages(stages, common, lora, saliency, means)
    if stages.saliency_file is not None:
        selection = read_saliency(stages.saliency_file)
    if selection is not None:
        lora = replace(lora, target_modules=selection.selected)
    method = Method(
        "dp-lora",
        lambda pipeline: add_lora(pipeline, lora),
        save_lora,
        describe_lora,
        lora,
        stages,
        to_come=to_come,
        selection=selection,
    )
    run_method(method, *common)


if __name__ == "__main__":
    run_script(main)
