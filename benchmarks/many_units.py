"""Does memory stay flat when the private set is large? Encode, plan and train on many small images.

    python benchmarks/many_units.py --num_units 1000000       # half an hour on two cores
    python benchmarks/many_units.py --num_units 10000 --json

Writes a parquet set of synthetic 32 x 32 images, every one different, and runs train_dp_lora.py on
it with the digits model, in a process of its own: 3 steps of 1,000 units. Shows its peak resident
memory (mapped files that were read count too), and how long it took.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SHARD = 50_000


def write_images(folder: Path, count: int) -> None:
    """Parquet shards with the columns image and label, as `datasets` reads them."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    hints = json.dumps(
        {"info": {"features": {
            "image": {"_type": "Image"},
            "label": {"dtype": "int64", "_type": "Value"},
        }}}
    )  # fmt: skip
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata={"huggingface": hints})
    for start in tqdm(range(0, count, SHARD), "writing images", leave=False):
        numbers = range(start, min(start + SHARD, count))
        images = [{"bytes": encode_png(number), "path": None} for number in numbers]
        table = pa.table({"image": images, "label": [n % 10 for n in numbers]}, schema=schema)
        pq.write_table(table, folder / f"train-{start:09}.parquet", row_group_size=1000)


def encode_png(number: int) -> bytes:
    """A picture of a number in binary: 4 x 8 squares."""
    bits = np.array([number >> i & 1 for i in range(32)], np.uint8).reshape(4, 8)
    file = io.BytesIO()
    Image.fromarray(np.kron(bits, np.full((8, 4), 255, np.uint8))).save(file, "PNG")
    return file.getvalue()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_units", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where the images and the run go; default: temporary")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    with TemporaryDirectory(dir=args.folder) as aside:
        images, run = Path(aside) / "images", Path(aside) / "run"
        images.mkdir()
        write_images(images, args.num_units)
        command = [
            *(sys.executable, ROOT / "train_dp_lora.py", "--train_data_dir", images),
            *("--config", ROOT / "examples" / "digits" / "dp_lora.yaml"),
            *("--pretrained_model_name_or_path", ROOT / "examples" / "digits" / "base"),
            *("--expected_batch_size", 1000, "--max_train_steps", 3, "--noise_multiplicity", 1),
            *("--target_delta", 0.1 / args.num_units, "--output_dir", run),
            *("--num_validation_images", 0, "--train_batch_size", 64),
        ]
        start = time.perf_counter()
        subprocess.run([str(part) for part in command], check=True, cwd=ROOT)
        seconds = time.perf_counter() - start
        statement = json.loads((run / "privacy.json").read_text())
        latents = next((run / "private" / "latents").glob("*/latents.f32")).stat().st_size
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result = {
        "num_units": statement["num_units"],
        "peak_resident_bytes": peak,
        "latents_file_bytes": latents,
        "seconds": seconds,
    }
    print(
        f"{args.num_units:,} units: {seconds:.0f} s, peak resident memory {peak / 2**30:.2f} GiB, "
        f"latents on disk {latents / 2**30:.2f} GiB"
    )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
