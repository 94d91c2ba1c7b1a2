"""DP-SAPF's first stage: spend a small part of the budget to learn where to spend the rest.

    accelerate launch select_saliency.py --config examples/digits/dp_lora.yaml \\
        --output_dir runs/digits/selection
    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml \\
        --saliency_file runs/digits/selection/saliency.json

    # both stages with one command
    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml --select_saliency

The gradients of the private images say which weight matrices of the public model matter, and noise
makes that private (Gong et al. 2026). Takes the arguments of train_dp_lora.py but those of a warm
start, so one config serves both stages: --target_epsilon is for both together, and the selection
takes --selection_share of it. Writes saliency.json (noisy scores and the selected names),
saliency.png, privacy.json, and an entry in the ledger; its cost is composed with that of the
training that follows.
"""

from utils.arguments.methods import (
    OF_TRAINING,
    SHARED,
    LoraArguments,
    SaliencyArguments,
    refuse_of_training,
)
from utils.arguments.parsing import parse
from utils.errors import UsageError, run_script


def main():
    model, data, privacy, training, hub, lora, saliency = parse(
        *(*SHARED, LoraArguments, SaliencyArguments), description=__doc__, others=OF_TRAINING
    )
    refuse_of_training("a selection", privacy, training)
    if hub.push_to_hub:
        raise UsageError("--push_to_hub: a selection is not published, but what is trained with it")
    # Imported now, since it takes seconds: a mistake on the command line should not wait for it.
    from utils.methods.selection import run_selection

    run_selection(model, data, privacy, training, lora, saliency)


if __name__ == "__main__":
    run_script(main)
