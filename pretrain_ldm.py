"""Train a small latent diffusion model on PUBLIC captioned images: the public stage.

    accelerate launch pretrain_ldm.py --dataset_name runs/digits/public --label_column label \\
        --caption_template "the digit {label}" --resolution 32 --output_dir runs/digits/base

    # a minute on a laptop, to see that it runs
    accelerate launch pretrain_ldm.py --dataset_name runs/digits/public --label_column label \\
        --caption_template "the digit {label}" --resolution 32 --output_dir /tmp/base \\
        --autoencoder_steps 50 --denoiser_steps 50

    # a transformer trained by flow matching, in the layout of Stable Diffusion 3
    accelerate launch pretrain_ldm.py --dataset_name runs/digits/public --label_column label \\
        --caption_template "the digit {label}" --resolution 32 --output_dir runs/digits/flow_base \\
        --architecture sd3 --autoencoder_from examples/digits/base

    # a second public stage: train on a base with other images
    accelerate launch pretrain_ldm.py --start_from runs/digits/base --dataset_name FOLDER \\
        --label_column label --resolution 32 --output_dir runs/digits/second

Trains an autoencoder, then a text encoder and a U-Net (or a transformer) together, and saves a
pipeline folder that plain `DiffusionPipeline.from_pretrained` loads, with a grid of
reconstructions and a grid of samples. It gives NO privacy: only for images that may leak.
Run the same command again to resume after an interruption.
"""

from pathlib import Path

from utils.arguments.parsing import parse
from utils.arguments.pretraining import PretrainArguments
from utils.arguments.training import DataArguments, ModelArguments
from utils.errors import UsageError, run_script


def check_resolution(resolution: int | None, halvings: int, args: PretrainArguments) -> None:
    """Raises: UsageError if none was given, or the models cannot halve it often enough, of which
    the autoencoder does `halvings`; or if the pipeline of a U-Net, which wants eighths, cannot."""
    if resolution is None:
        raise UsageError("give --resolution, the side of the images in pixels")
    factor = 2**halvings
    if args.architecture == "unet":
        factor = max(8, factor * 2 ** (len(args.unet_channels) - 1))
    if resolution < 1 or resolution % factor:
        raise UsageError(
            f"--resolution {resolution} must be a multiple of {factor} for these models"
        )


def main():
    data, args = parse(DataArguments, PretrainArguments, description=__doc__)
    output_dir = Path(args.output_dir)
    if args.start_from is None:
        own = args.autoencoder_from is None
        check_resolution(data.resolution, len(args.autoencoder_channels) - 1 if own else 0, args)
    if (output_dir / "model_index.json").exists():
        raise UsageError(f"{output_dir} holds a finished pipeline; name another --output_dir")
    # Imported now, since it takes seconds: a mistake on the command line should not wait for it.
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from utils.data.images import (
        describe_left_out,
        read_pixel_batches,
    )
    from utils.data.rows import find_used_template, read_captions, refuse_unfilled
    from utils.methods import pretraining
    from utils.methods.public_objectives import check_base, take_base
    from utils.models.drawing import adopt_template
    from utils.models.public_models import save_in_fp16

    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)

    base, vae = take_base(args)
    if base is not None:
        data.resolution = check_base(base, data.resolution, args)
        data = adopt_template(data, ModelArguments(pretrained_model_name_or_path=args.start_from))
    elif vae is not None:
        check_resolution(data.resolution, len(vae.config.block_out_channels) - 1, args)
    images, left_out = pretraining.load_public_images(data)
    refuse_unfilled(data)
    captions = list(read_captions(images.rows, data))
    accelerator.print(
        f"{len(images)} public images, {len(set(captions))} captions; {describe_left_out(left_out)}"
    )
    template = find_used_template(data)
    tokenizer = pretraining.choose_tokenizer(captions, template is not None, base, args)
    pixels = torch.cat(list(read_pixel_batches(images, data.resolution, 256)))
    pretraining.check_settings(output_dir, pixels, captions, args, accelerator.is_main_process)

    if vae is None:
        vae = pretraining.train_autoencoder(accelerator, pixels, args)
    vae.to(accelerator.device)
    latents = pretraining.encode_all(vae, pixels, accelerator.device)
    latents = pretraining.scale_latents(latents, vae, args)
    trained = pretraining.train_denoiser(accelerator, latents, captions, tokenizer, base, args)

    if accelerator.is_main_process:
        pipeline = trained.assemble(vae)
        pipeline.set_progress_bar_config(disable=True)
        pretraining.save_grids(pipeline, pixels, captions, output_dir, args.seed, template)
        save_in_fp16(pipeline, output_dir)
        print(f"saved the pipeline, reconstructions.png and samples.png in {output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
