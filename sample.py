"""Prompts or class names -> a folder of synthetic images, from a public model or a private adapter.

    python sample.py --pretrained_model_name_or_path examples/digits/base \\
        --adapter runs/digits/adapter --class_names 0 1 2 3 4 5 6 7 8 9 \\
        --caption_template "the digit {label}" \\
        --num_images 1000 --output_dir runs/digits/private_images

    python sample.py --pretrained_model_name_or_path examples/digits/base \\
        --prompts "the digit 7" --num_images 16 --output_dir /tmp/sevens

Images are balanced over the prompts. The folder holds metadata.jsonl (columns file_name, text, and
label for class names), which `datasets.load_dataset(FOLDER)` reads, and grid.png. Run the same
command again to go on after an interruption. It never reads private data: sampling from an adapter
costs no further privacy.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from utils.arguments import ModelArguments, option, parse
from utils.errors import UsageError, run_script
from utils.generation import generate, image_grid, use_dpm_solver
from utils.pipelines import check_resolution, load_adapter, load_pipeline


@dataclass
class SampleArguments:
    """What to draw, and how."""

    output_dir: str = option("folder of the images")
    adapter: str | None = option("folder or Hub id of a LoRA adapter", None)
    prompts: list[str] | None = option("prompts, one or more", None)
    prompts_file: str | None = option("text file with a prompt a line", None)
    class_names: list[str] | None = option("class names that fill --caption_template", None)
    caption_template: str = option("prompt of a class name", "a photo of a {label}")
    num_images: int = option("how many images in all", 100)
    resolution: int | None = option("pixels; default: what the model makes", None)
    num_inference_steps: int = option("steps of DPM-Solver++", 20)
    guidance_scale: float = option("classifier-free guidance; 1 is none", 2.0)
    batch_size: int = option("images per batch", 64)
    seed: int = option("image i starts from noise that depends on the seed and i alone", 0)


def read_prompts(args: SampleArguments) -> list[dict]:
    """One entry a prompt: its text, and its label where class names were given.

    Raises:
        UsageError: not exactly one source of prompts, a missing or empty file, a bad template.
    """
    given = [args.prompts is not None, args.prompts_file is not None, args.class_names is not None]
    if sum(given) != 1:
        raise UsageError("give exactly one of --prompts, --prompts_file and --class_names")
    if args.class_names is not None:
        if "{label}" not in args.caption_template:
            raise UsageError(f"--caption_template '{args.caption_template}' has no {{label}}")
        return [
            {"text": args.caption_template.format(label=name.replace("_", " ")), "label": name}
            for name in args.class_names
        ]
    texts = args.prompts
    if args.prompts_file is not None:
        path = Path(args.prompts_file)
        if not path.is_file():
            raise UsageError(f"--prompts_file {path}: there is no such file")
        texts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not texts:
        raise UsageError("there are no prompts")
    return [{"text": text} for text in texts]


def claim_folder(folder: Path, settings: dict) -> None:
    """Start or go on with a folder of images.

    Raises:
        UsageError: it holds something else, or images made with other settings.
    """
    record = folder / "sampling.json"
    if record.exists():
        if json.loads(record.read_text()) != settings:
            raise UsageError(f"{folder} holds images of other settings; name another --output_dir")
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"--output_dir {folder} already holds other files")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=2))


def draw_missing(pipeline, entries: list[dict], args: SampleArguments, folder: Path) -> None:
    """Draw the images that are not on disk yet; entry i becomes image i."""
    missing = [i for i in range(len(entries)) if not (folder / f"{i:06}.png").exists()]
    bar = tqdm(total=len(entries), initial=len(entries) - len(missing), desc="images")
    for start in range(0, len(missing), args.batch_size):
        part = missing[start : start + args.batch_size]
        images = generate(
            pipeline,
            [entries[i]["text"] for i in part],
            part,
            args.seed,
            args.num_inference_steps,
            args.guidance_scale,
            args.resolution,
        )
        for index, image in zip(part, images, strict=True):
            aside = folder / f"{index:06}.tmp"
            image.save(aside, format="PNG")
            aside.replace(folder / f"{index:06}.png")
        bar.update(len(part))
    bar.close()


def main():
    model, args = parse(ModelArguments, SampleArguments, description=__doc__)
    prompts = read_prompts(args)
    if args.num_images < 1 or args.batch_size < 1 or args.num_inference_steps < 1:
        raise UsageError("--num_images, --batch_size and --num_inference_steps must be at least 1")
    pipeline = load_pipeline(model.pretrained_model_name_or_path, model.revision)
    if args.resolution is not None:
        check_resolution(pipeline, args.resolution)
    if args.adapter is not None:
        load_adapter(pipeline, args.adapter)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    use_dpm_solver(pipeline)

    folder = Path(args.output_dir)
    drawing = asdict(args) | asdict(model)
    for name in ("output_dir", "batch_size"):
        del drawing[name]
    claim_folder(folder, drawing)
    entries = [prompts[i % len(prompts)] for i in range(args.num_images)]
    draw_missing(pipeline, entries, args, folder)

    lines = [json.dumps({"file_name": f"{i:06}.png", **entry}) for i, entry in enumerate(entries)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    columns = min(len(prompts), 10) if len(prompts) > 1 else 8
    shown = [Image.open(folder / f"{i:06}.png") for i in range(min(args.num_images, 10 * columns))]
    image_grid(shown, columns).save(folder / "grid.png")
    print(f"{args.num_images} images, metadata.jsonl and grid.png in {folder}")


if __name__ == "__main__":
    run_script(main)
