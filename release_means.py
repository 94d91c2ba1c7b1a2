"""Noisy means of private images, released once, and a synthetic set that matches them.

    python release_means.py --config examples/digits/dp_lora.yaml --target_epsilon 3 \\
        --grey --output_dir runs/digits/means

    # train from there, in the same ledger: --target_epsilon is for both
    python train_dp_lora.py --config examples/digits/dp_lora.yaml \\
        --warm_start runs/digits/means/set --learning_rate 4e-3 --output_dir runs/digits/warm

The mean over the private images of their features, by class, is released with noise (DP-MERF,
Harder et al. 2021; DP-MEPF, Harder et al. 2023); or, with --release moments, their second moments.
A small generator, or mixtures of Gaussians, are then fitted to what was released, never reading the
private images again. In --output_dir: means.safetensors, the noisy
means, with their statement privacy.json; and set/, images with prompts and labels, as sample.py
leaves them. With --resume_from_checkpoint latest an interrupted release goes on: what is paid for
is not paid for twice. --config may be that of a training script, whose other options are
ignored, but those of what is spent.
"""

from utils.arguments.means import LaterModelArguments, MeansArguments
from utils.arguments.methods import OF_TRAINING, SHARED, refuse_of_training
from utils.arguments.parsing import parse
from utils.errors import UsageError, run_script


def main():
    model, data, privacy, training, hub, args = parse(
        *(LaterModelArguments, *SHARED[1:], MeansArguments),
        description=__doc__,
        others=OF_TRAINING,
    )
    refuse_of_training("a release of means", privacy, training)
    if hub.push_to_hub:
        raise UsageError("--push_to_hub: means are not published; sample.py publishes a set")
    # Imported now, since it takes seconds: a mistake on the command line should not wait for it.
    from utils.methods.means import run_release

    run_release(model, data, privacy, training, args)


if __name__ == "__main__":
    run_script(main)
