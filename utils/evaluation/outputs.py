"""Where an evaluation writes: beside a set that is ours, never among images that others read."""

from pathlib import Path

from utils.arguments.evaluation import EvaluateArguments
from utils.data.folders import refuse_among_images
from utils.errors import UsageError
from utils.files import METADATA, METRICS, SAMPLING_SETTINGS, check_takes_files


def choose_output(args: EvaluateArguments) -> Path:
    """`--output_file`; or metrics.json in a folder that sample.py left, or else in runs/NAME.

    Pictures of private images are left beside it, which nothing may read as images of a set.

    Raises:
        UsageError: it is a folder, its folder takes no files, or lies in one of the sets.
    """
    folder = Path(args.synthetic)
    ours = any((folder / name).is_file() for name in (METADATA, SAMPLING_SETTINGS))
    # In a folder of any other kind, `datasets` would read metrics.json as part of the set.
    home = folder if ours else Path("runs") / folder.name
    if not ours and home.resolve() == folder.resolve():
        home = home.with_name(f"{folder.name}-evaluation")
    output = home / METRICS if args.output_file is None else Path(args.output_file)
    if output.is_dir():
        raise UsageError(f"--output_file {output} is a folder: name a file in it")
    sets = [args.test_data_dir, args.test_dataset_name]
    sets += [args.private_data_dir, args.private_dataset_name]
    if not (ours and output.resolve() == (folder / METRICS).resolve()):  # which is no part of it
        sets.append(args.synthetic)
    refuse_among_images(output.parent, *sets, option="--output_file: the folder")
    check_takes_files(output.parent, "--output_file: the folder")
    return output
