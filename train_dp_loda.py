"""DP-LoDA: low-dimensional adapters beside a frozen diffusion model, trained by DP-SGD.

    accelerate launch train_dp_loda.py --config examples/digits/dp_loda.yaml

    # what would it cost? prints the plan and stops
    accelerate launch train_dp_loda.py --config examples/digits/dp_loda.yaml --dry_run

Beside frozen attention, projection, feed-forward and convolution layers runs B(LeakyReLU(A(x)))
with r channels between (Liu et al., "Efficient differentially private fine-tuning of diffusion
models", section II). Writes adapter_config.json and adapter_model.safetensors, with loda.py (and,
of Stable Diffusion 1 and 2, pipeline.py) beside them so that people without this repository can
load it, the privacy statement, a model card and samples.
"""

from dataclasses import replace

from utils.arguments.methods import SHARED, LoDAArguments, StageArguments
from utils.arguments.parsing import parse
from utils.errors import run_script


def main():
    model, data, privacy, training, hub, stages, args = parse(
        *SHARED, StageArguments, LoDAArguments, description=__doc__
    )
    # Imported now, since it takes seconds: a mistake on the command line should not wait for it.
    from utils.methods.fine_tuning import Method, run_method
    from utils.methods.saliency_file import read_saliency
    from utils.models.loda.adapter import add_loda, describe_loda, save_loda

    selection = None
    if stages.saliency_file is not None:
        selection = read_saliency(stages.saliency_file)
        args = replace(args, target_modules=selection.selected)
    method = Method(
        "dp-loda",
        lambda pipeline: add_loda(pipeline, args),
        save_loda,
        describe_loda,
        args,
        stages,
        selection=selection,
    )
    run_method(method, model, data, privacy, training, hub)


if __name__ == "__main__":
    run_script(main)
