"""Central images, several releases in one ledger, and prompts as classes."""

import json

import numpy as np
import torch
from PIL import Image

from tests.conftest import BUDGET, read_json, train_arguments, train_here
from tests.methods.test_means import SMALL, release
from utils.arguments.means import MeansArguments
from utils.ledger.verification import find_problems, read_source
from utils.methods import means as story
from utils.methods import releases
from utils.methods.central_images import central_features, draw_central
from utils.methods.mean_features import SIDE, sum_features
from utils.methods.mean_generator import read_target


def test_central_images_are_means_of_poisson_batches(image_folder, tmp_path, monkeypatch):
    batches = []
    real = story.sample_poisson_batch
    monkeypatch.setattr(
        story, "sample_poisson_batch", lambda *a: batches.append(real(*a)) or batches[-1]
    )
    more = ["--release", "central_images", "--central_batches", 3, "--central_rate", 0.4]
    assert "40 images, grid.png" in release(image_folder, tmp_path / "run", *more)
    (event,) = read_json(tmp_path / "run" / "privacy.json")["events"]
    assert (event["steps"], event["sampling_rate"], event["purpose"]) == (3, 0.4, "means")
    means, _ = story.read_means(tmp_path / "run" / "means.safetensors")
    assert means.shape == (3, 4, 3 * 8 * 8 + 1) and len(batches) == 3
    assert len({tuple(batch.tolist()) for batch in batches}) > 1
    assert find_problems(read_source(str(tmp_path / "run"), None)) == []


def test_a_central_image_is_the_mean_of_its_class():
    args = MeansArguments(release=["central_images"], central_side=16)
    side = torch.linspace(-1, 1, SIDE).expand(SIDE, SIDE)
    images = [side.expand(3, -1, -1), side.T.expand(3, -1, -1)]
    rows = [(i, i % 2, images[i % 2]) for i in range(8)]
    total = sum_features(rows, central_features(args), 2, 1.0)
    target = read_target(total.float() / 8)
    for number in (0, 1):
        drawn = draw_central([target], number, torch.tensor([number]), args, seed=0)[0]
        wanted = images[number].add(1).mul(127.5)
        assert (drawn.float() - wanted).abs().mean() < 20  # it is moved by two pixels at most
        assert (drawn.float() - wanted.transpose(1, 2)).abs().mean() > 60


def test_two_releases_in_one_ledger_both_start_a_run(tiny_base, image_folder, tmp_path):
    ledger = ["--privacy_ledger", tmp_path / "ledger.jsonl"]
    central = ["--release", "central_images", "--target_epsilon", 1]
    release(image_folder, tmp_path / "a", *ledger, *central)
    release(image_folder, tmp_path / "b", *ledger, "--target_epsilon", 1)
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run")
    sets = ["--warm_start", tmp_path / "a" / "set", tmp_path / "b" / "set", "--warm_start_steps", 2]
    assert "saved the weights" in train_here([*arguments, *sets, *ledger])
    events = read_json(tmp_path / "run" / "privacy.json")["events"]
    assert [event["purpose"] for event in events] == ["means", "means", "training"]
    target = float(BUDGET[BUDGET.index("--target_epsilon") + 1])
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert target - 0.02 < statement["epsilon"]["add_or_remove_one"] <= target


def test_captions_count_towards_the_nearest_prompt(tiny_base, tmp_path, monkeypatch):
    """By the sum before its noise, which no budget makes small."""
    sums = []
    real = releases.sum_features
    monkeypatch.setattr(releases, "sum_features", lambda *a: sums.append(real(*a)) or sums[-1])
    images = tmp_path / "images"
    images.mkdir()
    for index in range(8):
        Image.fromarray(np.full((16, 16), 30 * index, np.uint8)).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text(f"the digit {min(index, 2) % 2}")
    arguments = ["--train_data_dir", images, "--caption_column", "text", "--target_epsilon", 500]
    arguments += ["--target_delta", 1e-3, *SMALL, "--output_dir", tmp_path / "run"]
    arguments += ["--class_prompts", "the digit 1", "the digit 0"]
    refused = train_here(arguments, "release_means")
    assert "needs --pretrained_model_name_or_path" in refused
    arguments += ["--pretrained_model_name_or_path", tiny_base]
    assert "grid.png" in train_here(arguments, "release_means")
    _, told = story.read_means(tmp_path / "run" / "means.safetensors")
    assert told["prompts"] == ["the digit 1", "the digit 0"]
    shares = read_target(sums[0].float() / 8).shares
    torch.testing.assert_close(shares, torch.tensor([0.125, 0.875]))
    lines = (tmp_path / "run" / "set" / "metadata.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["text"] == "the digit 0"
