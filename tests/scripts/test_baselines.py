"""The baselines of benchmarks/ keep the promises that they are compared by."""

import json
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from tests.conftest import ROOT
from utils.privacy.accounting import pld_epsilon


def benchmark(name: str):
    """A module of benchmarks/, by its path: Opacus installs a package of that name."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py")))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """60 and 20 grey images of two classes, as a folder of parquet files."""
    folder = tmp_path_factory.mktemp("parquet")
    generator = np.random.default_rng(0)
    for split, count in (("train", 600), ("test", 20)):
        pixels = generator.integers(0, 120, (count, 28, 28), dtype=np.uint8)
        pixels[1::2] += 120
        columns = {
            "image": [PILImage.fromarray(image) for image in pixels],
            "label": [i % 2 for i in range(count)],
        }
        features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_the_dp_sgd_classifier_learns_and_says_what_it_spent(run_script, parquet):
    arguments = ["--dataset_name", parquet, "--noise_multiplier", 0.5, "--target_delta", 1e-3]
    arguments += ["--expected_batch_size", 300, "--max_train_steps", 12, "--learning_rate", 1.0]
    run = run_script("benchmarks/dp_sgd_classifier.py", *arguments, "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    event = {"mechanism": "poisson_subsampled_gaussian", "noise_multiplier": 0.5}
    expected = pld_epsilon([{**event, "sampling_rate": 0.5, "steps": 12}], 1e-3)
    assert result["epsilon"]["add_or_remove_one"] == pytest.approx(expected, abs=1e-9)
    assert result["accuracy"] > 0.9 and result["trainable_parameters"] > 20_000


def test_the_ceiling_trains_and_claims_no_privacy(run_script, tiny_base, image_folder, tmp_path):
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--train_data_dir", image_folder]
    arguments += ["--label_column", "label", "--caption_template", "the digit {label}"]
    arguments += ["--train_batch_size", 8, "--max_train_steps", 3, "--lr_scheduler", "cosine"]
    run = run_script("benchmarks/nonprivate_lora.py", *arguments, "--output_dir", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    assert "NOT PRIVATE" in run.stdout
    assert [path.name for path in (tmp_path / "run").iterdir()] == [
        "pytorch_lora_weights.safetensors"
    ]
