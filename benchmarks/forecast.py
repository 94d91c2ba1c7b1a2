"""Is what `--dry_run` foresees what a run takes? Hours and peak memory, predicted and measured.

    python benchmarks/forecast.py                    # tiny: the digits model, minutes
    python benchmarks/forecast.py --shape sd15       # Stable Diffusion 1.5, random weights: 15 GB

A dry run first, then the run itself, on images of noise; each in a process of its own. Time is from
the sentence that announces the run to its end, so that starting and loading, which are no part of
the forecast, do not count; memory is the most that the process ever held.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).resolve().parent.parent))

from common import CAPTIONS, make_rows

from utils.models.public_models import build_stable_diffusion

ROOT = Path(__file__).resolve().parent.parent
# Images, and a plan that fits into minutes.
SHAPES = {
    "tiny": {"count": 400, "side": 32, "plan": [300, 4, 10, 32, 20]},
    "sd15": {"count": 12, "side": 256, "plan": [12, 2, 2, 4, 1]},
}
NAMES = ["expected_batch_size", "noise_multiplicity", "max_train_steps", "train_batch_size"]
NAMES += ["num_validation_images"]
ANNOUNCED = "private units ("


def write_images(folder: Path, count: int, side: int) -> None:
    folder.mkdir()
    lines = []
    for index, row in enumerate(make_rows(count, side)):
        row["image"].save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": row["text"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def run(command: list[str]) -> tuple[str, float, int]:
    """What a command prints; seconds from its announcement to its end; the most that it held."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    shown, started = [], [time.perf_counter()]

    def read() -> None:
        for line in process.stdout:
            shown.append(line)
            if ANNOUNCED in line:
                started[0] = time.perf_counter()

    reader = threading.Thread(target=read)
    reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started[0]
    reader.join()
    if status != 0:
        sys.exit(f"{' '.join(command)} failed")
    return "".join(shown), seconds, 1024 * usage.ru_maxrss


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    with TemporaryDirectory() as folder:
        base, images = ROOT / "examples" / "digits" / "base", Path(folder) / "images"
        if args.shape == "sd15":
            base = Path(folder) / "base"
            build_stable_diffusion("1.5", CAPTIONS).save_pretrained(base)
        write_images(images, shape["count"], shape["side"])
        command = ["train_dp_lora.py", "--pretrained_model_name_or_path", str(base)]
        command += ["--train_data_dir", str(images), "--caption_column", "text"]
        command += ["--target_epsilon", "8", "--target_delta", "1e-3", "--num_inference_steps", "8"]
        for name, value in zip(NAMES, shape["plan"], strict=True):
            command += [f"--{name}", str(value)]
        command += ["--resolution", str(shape["side"]), "--output_dir", f"{folder}/run"]
        foreseen = run([*command, "--dry_run"])[0]
        foreseen = json.loads(foreseen[foreseen.index("{") :])["forecast"]
        _, seconds, peak = run(command)
    hours = {"predicted": foreseen["hours"], "measured": seconds / 3600}
    memory = {"predicted": foreseen["memory"]["peak"], "measured": peak}
    for name, pair, unit in (("minutes", hours, 1 / 60), ("GiB", memory, 2**30)):
        predicted, measured = (pair[kind] / unit for kind in ("predicted", "measured"))
        off = f"{measured / predicted - 1:+.0%}"
        print(f"{name:8} predicted {predicted:7.2f}, measured {measured:7.2f}: {off}")
    if args.json:
        print(json.dumps({"shape": args.shape, "hours": hours, "memory": memory}))


if __name__ == "__main__":
    main()
