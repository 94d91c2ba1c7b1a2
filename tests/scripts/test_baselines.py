"""The baselines of benchmarks/ keep the promises that they are compared by."""

import json
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from tests.conftest import ROOT, read_json
from tests.scripts.test_many_processes import together
from tests.worlds import build_plan
from utils.ledger.checks import check_statement
from utils.privacy.accounting import pld_epsilon
from utils.privacy.randomness import SecretRandomness


def benchmark(name: str):
    """A module of benchmarks/, by its path: Opacus installs a package of that name."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py")))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """60 and 20 grey images of two classes, as a folder of parquet files."""
    folder = tmp_path_factory.mktemp("parquet")
    generator = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 20)):
        pixels = generator.integers(0, 120, (count, 28, 28), dtype=np.uint8)
        pixels[1::2] += 120
        columns = {
            "image": [PILImage.fromarray(image) for image in pixels],
            "label": [i % 2 for i in range(count)],
        }
        features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


HOSTILE = {
    "ordinary": lambda rows: rows,
    "huge": lambda rows: rows * 1e6,
    "not a number": lambda rows: rows * float("nan"),
    "infinite": lambda rows: rows * float("inf"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("features", ["random", "perceptual"])
def test_one_image_moves_the_released_sum_by_at_most_one(kind, features):
    """DP-MERF and DP-MEPF, by replay: with and without one image whose features are hostile."""
    module = benchmark("mean_embeddings")
    compute = module.random_features(20.0, 0)
    if features == "perceptual":
        compute = module.perceptual_features()
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def hostile(batch: torch.Tensor) -> torch.Tensor:
        rows = compute(batch)
        if len(batch) == len(images):
            rows[-1:] = HOSTILE[kind](rows[-1:])
        return rows

    # Without noise, what is left is the sum over N.
    plan = build_plan(num_units=6, expected_batch_size=6, noise_multiplier=0.0)
    sums = [
        6 * module.noisy_mean(hostile, images[:n], labels[:n], 3, plan, SecretRandomness(0))
        for n in (6, 5)
    ]
    moved = (sums[0] - sums[1]).norm().item()
    assert moved <= 1 + 1e-5 and torch.isfinite(sums[0]).all()
    assert moved > 0.9 if kind in ("ordinary", "huge") else moved == 0


def test_the_released_mean_has_the_noise_of_the_plan():
    """Variance of 30,000 values: a false alarm is a deviation by six standard errors."""
    module = benchmark("mean_embeddings")
    compute = module.random_features(20.0, 0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0])
    quiet, noisy = (
        module.noisy_mean(
            compute,
            images,
            labels,
            3,
            build_plan(num_units=4, expected_batch_size=4, noise_multiplier=s),
            SecretRandomness(),
        )
        for s in (0.0, 2.0)
    )
    noise = (noisy - quiet).flatten().double() * 4
    assert len(noise) == 30_000
    assert abs(noise.var().item() / 4 - 1) < 6 * (2 / len(noise)) ** 0.5


def test_mean_embeddings_leave_images_and_a_statement_that_can_be_recomputed(
    run_script, parquet, tmp_path
):
    output = tmp_path / "images"
    arguments = ["--dataset_name", parquet, "--output_dir", output, "--features", "random"]
    arguments += ["--target_epsilon", 5, "--target_delta", 1e-3, "--num_images", 6]
    run = run_script(
        "benchmarks/mean_embeddings.py", *arguments, "--generator_steps", 2, "--generator_batch", 4
    )
    assert run.returncode == 0, run.stderr
    statement = read_json(output / "privacy.json")
    recomputed = pld_epsilon(statement["events"], 1e-3)
    assert recomputed == statement["epsilon"]["add_or_remove_one"] <= 5
    assert check_statement(statement) == []  # or evaluate.py would not believe it
    assert statement["events"][0]["sampling_rate"] == 1 and statement["events"][0]["steps"] == 1
    lines = [json.loads(line) for line in (output / "metadata.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == ["dark", "light"] * 3
    run = run_script("benchmarks/mean_embeddings.py", *arguments)
    assert run.returncode == 2 and "already holds files" in run.stderr


def test_a_mean_embedding_of_several_processes_is_refused(parquet, tmp_path):
    """Each would add the whole sum, and one image would move the release by several times C."""
    arguments = ["--dataset_name", parquet, "--output_dir", tmp_path / "images"]
    arguments += ["--target_epsilon", 5, "--target_delta", 1e-3, "--features", "random"]
    arguments += ["--generator_steps", 1, "--generator_batch", 2, "--num_images", 2]
    run = together(2, ROOT / "benchmarks" / "mean_embeddings.py", *arguments)
    said = run.communicate()
    assert run.returncode != 0 and "one process only" in "".join(map(str, said))
    assert not (tmp_path / "images").exists()


def test_the_dp_sgd_classifier_learns_and_says_what_it_spent(run_script, parquet):
    arguments = ["--dataset_name", parquet, "--noise_multiplier", 0.5, "--target_delta", 1e-3]
    arguments += ["--expected_batch_size", 30, "--max_train_steps", 12, "--learning_rate", 1.0]
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
