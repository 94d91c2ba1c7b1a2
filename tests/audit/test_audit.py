"""The audit: its bound is right for mechanisms whose epsilon is known, and it sees broken loops."""

import json
import stat

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests.conftest import read_json
from utils.arguments.audit import MUTANTS
from utils.audit.auditing import (
    chance_of_guesses,
    epsilon_lower_bound,
    log_likelihood_ratio,
    measure,
    spread,
)
from utils.audit.canaries import add_noise_images
from utils.audit.mutants import PIECES
from utils.data.images import ImageRows, find_readable_rows
from utils.data.private_set import PrivateSet
from utils.data.rows import load_split
from utils.ledger.charges import list_charged_events
from utils.ledger.ledger import Ledger
from utils.privacy.accounting import pld_epsilon


def test_with_delta_zero_the_chance_is_binomial():
    """Randomised response with accuracy 3/4 is ln(3)-private: the chance of 10 of 10 is 0.75^10."""
    assert chance_of_guesses(10, 10, 100, np.log(3), 0.0) == pytest.approx(0.75**10)
    assert chance_of_guesses(0, 10, 100, 1.0, 0.0) == 1.0
    assert epsilon_lower_bound(10, 10, 100, 0.0, 1 - 0.75**10) == pytest.approx(np.log(3))


def test_delta_only_weakens_the_bound():
    bounds = [epsilon_lower_bound(95, 100, 1000, delta, 0.95) for delta in (0.0, 1e-6, 1e-4, 1e-2)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 2 and bounds[-1] == 0.0


def test_more_right_guesses_prove_more_and_coin_flips_prove_nothing():
    bounds = [epsilon_lower_bound(right, 100, 1000, 1e-6, 0.95) for right in (50, 70, 90, 100)]
    assert bounds[0] == 0.0 and bounds == sorted(bounds) and bounds[-1] > 3


def seen_by_an_attacker(generator, sigma, signal=1.0, q=0.5, steps=2, count=50_000):
    included = generator.random(count) < 0.5
    drawn = included & (generator.random((steps, count)) < q)
    return signal * drawn + sigma * generator.normal(size=(steps, count)), included


def audited(seen, included, sigma, q=0.5, confidence=0.95):
    scores = {"ratio": log_likelihood_ratio(seen, q, sigma), "spread": spread(seen)}
    return measure(scores, included, len(included) // 250, 1e-6, confidence)["lower_bound"]


@pytest.mark.parametrize("sigma", [0.77, 2.1, 6.0])
def test_the_bound_stays_below_the_epsilon_of_a_subsampled_gaussian(sigma):
    """With confidence 1 - 1e-7: the test's false-alarm rate."""
    event = {"mechanism": "poisson_subsampled_gaussian", "noise_multiplier": sigma}
    epsilon = pld_epsilon([event | {"sampling_rate": 0.5, "steps": 2}], 1e-6)
    seen, included = seen_by_an_attacker(np.random.default_rng(), sigma)
    assert audited(seen, included, sigma, confidence=1 - 1e-7) < epsilon
    if sigma < 1:  # a loose budget is visible
        assert audited(seen, included, sigma) > 1.5


@pytest.mark.parametrize("signal, repeats", [(2.0, False), (4.0, False), (1.0, True)])
def test_the_bound_exceeds_what_a_broken_gaussian_reports(signal, repeats):
    """Sigma 2.1 reports epsilon 2. Twice the signal, four times, or noise that repeats itself."""
    seen, included = seen_by_an_attacker(np.random.default_rng(0), 2.1, signal)
    if repeats:
        noise = 2.1 * np.random.default_rng(1).normal(size=seen.shape[1])
        drawn = included & (np.random.default_rng(2).random(seen.shape) < 0.5)
        seen = drawn + noise
    assert audited(seen, included, 2.1) > 2.05


SMALL = ["--num_images", 16, "--num_canaries", 3000, "--train_batch_size", 128]


@pytest.mark.promise
@pytest.mark.slow
def test_the_audit_runs_the_real_loop_and_every_mutant(run_script, tiny_base, tmp_path):
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--output_dir", tmp_path / "audit"]
    run = run_script("audit_privacy.py", *arguments, *SMALL, "--mutants", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.strip().splitlines()[-1])
    assert report == read_json(tmp_path / "audit" / "audit.json")
    assert 0 <= report["lower_bound"] < report["reported_epsilon"] <= 8
    assert report["right"] >= 8 and report["guesses"] == 12  # fewer: 1.4e-7
    assert set(report["mutants"]) == set(MUTANTS) == set(PIECES)
    # So few canaries cannot prove much, but they tell these from the real loop at the same epsilon.
    caught = {"no_noise": 12, "noise_divided_by_batch": 12, "copies_clipped_one_by_one": 10}
    for name, right in caught.items():  # the last has noise: fewer, 3e-10
        found = report["mutants"][name]
        assert found["right"] >= right and found["guesses"] == 12, name
    assert (tmp_path / "audit" / "audit.png").stat().st_size > 5000


@pytest.mark.promise
@pytest.mark.slow
def test_image_canaries_and_own_images(run_script, tiny_base, image_folder, tmp_path):
    (tmp_path / "set").mkdir()
    rows = load_split(None, None, str(image_folder), "train")
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--dataset_name", tmp_path / "set"]
    arguments += ["--label_column", "label", "--canaries", "images", "--num_canaries", 100]
    arguments += ["--output_dir", tmp_path / "audit", "--num_images", 40]
    run = run_script("audit_privacy.py", *arguments)
    assert run.returncode == 0, run.stderr
    report = read_json(tmp_path / "audit" / "private" / "audit.json")
    assert report["canaries"] == "images" and report["lower_bound"] < report["reported_epsilon"]
    # The copies that `datasets` makes of the images stay in private/, for their owner alone.
    private = tmp_path / "audit" / "private"
    assert list(private.rglob("*.arrow")) and stat.S_IMODE(private.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "change, words",
    [
        (["--num_canaries", "2499"], "at least 2500"),
        (["--sampling_rate", "0"], "in (0, 1]"),
        (["--mutant", "no_noise", "--mutants"], "not both"),
        (["--target_delta", "0.1"], "below 1/N"),
    ],
)
def test_mistakes(run_script, tiny_base, tmp_path, change, words):
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--output_dir", tmp_path / "audit"]
    run = run_script("audit_privacy.py", *arguments, *SMALL, *change)
    assert run.returncode == 2 and words in run.stderr


@pytest.mark.promise
@pytest.mark.slow
def test_an_audit_of_private_images_is_recorded_and_stays_private(
    run_script, tiny_base, image_folder, tmp_path
):
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--output_dir", tmp_path / "audit"]
    mine = [*arguments, "--train_data_dir", image_folder, "--label_column", "label"]
    for mutants in (["--mutants"], ["--mutant", "no_noise"]):
        run = run_script("audit_privacy.py", *mine, *SMALL, *mutants)
        assert run.returncode == 2 and "mutants train without a guarantee" in run.stderr
    assert not (tmp_path / "audit").exists()

    run = run_script("audit_privacy.py", *mine, *SMALL, "--privacy_unit_column", "label")
    assert run.returncode == 0, run.stderr
    private = tmp_path / "audit" / "private"
    assert [path.name for path in (tmp_path / "audit").iterdir()] == ["private"]
    assert read_json(private / "audit.json")["covered_by_epsilon"] is False
    records = Ledger(private / "ledger.jsonl").records()
    assert [record["kind"] for record in records] == ["reserve", "release"]
    assert records[0]["privacy_unit"] == "all images of one label"
    (event,) = list_charged_events(records)
    assert event["purpose"] == "audit" and event["steps"] == 2
    assert pld_epsilon([event], 1e-6) == read_json(private / "audit.json")["reported_epsilon"]

    public = [*mine, *SMALL, "--mutant", "no_noise", "--data_is_public", "--privacy_ledger"]
    run = run_script("audit_privacy.py", *public, tmp_path / "other.jsonl")
    assert run.returncode == 0 and (tmp_path / "audit" / "audit.json").exists()
    assert not (tmp_path / "other.jsonl").exists()


def test_no_canary_carries_the_caption_of_somebody_else():
    """Whose presence would then change the gradient of every canary."""
    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(2)]
    rows = Dataset.from_dict({"image": images})
    digests = find_readable_rows(ImageRows(rows, "image")).digests
    ordinary = PrivateSet(rows, "image", ["a rare disease", "b"], torch.arange(2), {}, digests)
    together = add_noise_images(ordinary, 3, 8)
    assert list(together.captions) == ["a rare disease", "b", "", "", ""]
    assert together.unit_of_row.tolist() == [0, 1, 2, 3, 4] and len(together.rows) == 5
