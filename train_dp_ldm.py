"""DP-LDM and DP-Diffusion: fine-tune a diffusion model's own weights by DP-SGD.

    accelerate launch train_dp_ldm.py --config examples/digits/dp_ldm.yaml

    # only the attention of the second down block and of the middle
    accelerate launch train_dp_ldm.py --config examples/digits/dp_ldm.yaml \\
        --trainable_blocks down_blocks.1 mid_block --output_dir runs/digits/ldm_blocks

    # DP-Diffusion: every weight of the denoiser
    accelerate launch train_dp_ldm.py --config examples/digits/dp_ldm.yaml --trainable all \\
        --output_dir runs/digits/diffusion

Attention modules only (Liu et al. 2023, "Differentially private latent diffusion models"), or all
(Ghalebikesabi et al. 2023). Writes the whole denoiser to unet/ (or transformer/), which the
`from_pretrained` of its class loads, the privacy statement, a model card and samples.
"""

from utils.arguments.methods import SHARED, LdmArguments, StageArguments
from utils.arguments.parsing import parse
from utils.errors import run_script

NAMES = {"attention": "dp-ldm", "all": "dp-diffusion"}


def main():
    model, data, privacy, training, hub, stages, args = parse(
        *SHARED, StageArguments, LdmArguments, description=__doc__
    )
    # Imported now, since it takes seconds: a mistake on the command line should not wait for it.
    from utils.methods.fine_tuning import Method, run_method
    from utils.methods.saliency_file import read_saliency
    from utils.models.own_weights import describe_denoiser, save_denoiser, unfreeze
    from utils.privacy.defaults import WEIGHTS_RATE

    selection = selected = None
    if stages.saliency_file is not None:
        selection = read_saliency(stages.saliency_file)
        selected = selection.selected
    method = Method(
        NAMES[args.trainable],
        lambda pipeline: unfreeze(pipeline, args, selected),
        save_denoiser,
        describe_denoiser,
        args,
        stages,
        WEIGHTS_RATE,
        selection=selection,
    )
    run_method(method, model, data, privacy, training, hub)


if __name__ == "__main__":
    run_script(main)
