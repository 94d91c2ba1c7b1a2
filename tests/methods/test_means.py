"""Released means: what one unit can move, what is spent, and what may start from them."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import BUDGET, CAPTION, ROOT, read_json, train_arguments, train_here
from tests.scripts.test_many_processes import together
from utils.arguments.means import MeansArguments
from utils.ledger.charges import count_charged_steps, list_charged_events
from utils.ledger.ledger import Ledger
from utils.ledger.public_sets import refuse_as_public
from utils.ledger.statement import UNKNOWN_BASE, add_doubts
from utils.ledger.verification import find_problems, read_source
from utils.methods import means as story
from utils.methods import releases
from utils.methods.mean_features import (
    SIDE,
    add_count,
    build_features,
    sum_features,
)
from utils.methods.mean_generator import read_target
from utils.sampling.shards import hash_set

SMALL = ["--generator_steps", 2, "--num_synthetic_images", 40, "--num_frequencies", 50]


def features(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)[:, :48]


def test_rows_of_a_unit_are_averaged_by_class():
    image = torch.full((3, 4, 4), 0.01).double()
    rows = [(0, 0, image), (0, 0, 3 * image), (0, 1, 2 * image)]
    total = sum_features(rows, features, 2, 1.0)
    scale = (1 - 0.3**2) ** 0.5
    expected = torch.tensor([0.04 / 3, 0.02 / 3]).double() * scale
    torch.testing.assert_close(total[:, 0], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(total[:, -1], torch.tensor([0.2, 0.1]).double())


@pytest.mark.parametrize("kinds", [["random_features"], ["perceptual_features"],
                                   ["random_features", "perceptual_features"]])  # fmt: skip
@pytest.mark.parametrize("grey", [False, True])
def test_features_have_norm_one_at_most_and_depend_on_the_image_alone(kinds, grey):
    args = MeansArguments(release=kinds, num_frequencies=40, grey=grey)
    made = build_features(args, 0)
    images = torch.rand(5, 3, SIDE, SIDE) * 2 - 1
    images[3] = -1.0
    together = add_count(made(images), 10)
    assert (together.norm(dim=1) <= 1 + 1e-5).all() and (together.norm(dim=1) > 0.9).all()
    again = build_features(args, 0)(images[2:3])
    assert torch.equal(again, made(images[2:3]))
    torch.testing.assert_close(again, made(images)[2:3], rtol=1e-4, atol=1e-5)


def test_the_shares_of_classes_are_told_by_the_count():
    rows = [(i, 0 if i < 6 else 1, torch.ones(3, 4, 4) / 10) for i in range(8)]
    target = read_target(sum_features(rows, features, 2, 1.0).float() / 8)
    torch.testing.assert_close(target.shares, torch.tensor([0.75, 0.25]))
    negative = read_target(torch.tensor([[0.1, -0.2], [0.3, 0.4]]))
    assert (negative.shares > 0).all() and negative.shares.sum() == pytest.approx(1)


# The scripts -------------------------------------------------------------------------------------


def release(images, output, *more) -> str:
    budget = ["--target_epsilon", 3, "--target_delta", 1e-3]
    arguments = ["--train_data_dir", images, *CAPTION, *budget, *SMALL, "--output_dir", output]
    return train_here([*arguments, *more], "release_means")


@pytest.fixture(scope="module")
def released(image_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("means") / "run"
    shown = release(image_folder, output)
    assert "40 images, grid.png" in shown, shown
    assert "4 classes, whose names are published: 0, 1, 2, 3 (" in shown
    return output


def test_it_leaves_a_set_and_a_statement_that_verifies(released):
    statement = read_json(released / "privacy.json")
    (event,) = statement["events"]
    assert (event["purpose"], event["steps"], event["sampling_rate"]) == ("means", 1, 1.0)
    assert statement["epsilon"]["add_or_remove_one"] <= 3 and event["sensitivity"] == 1.0
    assert find_problems(read_source(str(released), None)) == []
    assert read_json(released / "set" / "privacy.json") == statement
    lines = (released / "set" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 40 and rows[3]["text"] == "the digit 3" and rows[3]["label"] == "3"
    assert (released / "set" / "grid.png").exists()
    page = (released / "set" / "report.html").read_text()
    assert "noisy mean of features" in page and "data:image" in page
    records = Ledger(released / "private" / "ledger.jsonl").records()
    assert records[-1]["files"] == {"set": hash_set(released / "set")}
    assert len(list_charged_events(records)) == 1


def test_a_warm_start_is_composed_to_one_budget(released, tiny_base, image_folder, tmp_path):
    copy = tmp_path / "means"
    shutil.copytree(released, copy)
    doubtful = add_doubts(read_json(copy / "set" / "privacy.json"), [UNKNOWN_BASE])
    (copy / "set" / "privacy.json").write_text(json.dumps(doubtful))
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run")
    arguments += ["--warm_start", copy / "set", "--warm_start_steps", 3]
    shown = train_here(arguments)
    assert "saved the weights" in shown
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert UNKNOWN_BASE in statement["not_covered"]  # what is doubted about the set
    assert [e["purpose"] for e in statement["events"]] == ["means", "training"]
    target = float(BUDGET[BUDGET.index("--target_epsilon") + 1])
    assert target - 0.02 < statement["epsilon"]["add_or_remove_one"] <= target
    assert find_problems(read_source(str(tmp_path / "run"), None)) == []
    assert "One noisy mean of features" in (tmp_path / "run" / "README.md").read_text()
    assert read_json(tmp_path / "run" / "privacy.json")["private"] is True


def test_what_no_ledger_paid_for_is_refused(released, tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run")

    def start(folder, *more) -> str:
        return train_here([*arguments, "--warm_start", folder, "--warm_start_steps", 1, *more])

    assert "is not a folder" in start(tmp_path / "nowhere")
    assert "what is public must lie elsewhere" in start(image_folder)
    shutil.copytree(image_folder, tmp_path / "images")
    assert "has no privacy.json" in start(tmp_path / "images")
    copy = tmp_path / "means"
    shutil.copytree(released, copy)
    other = ["--privacy_ledger", tmp_path / "other.jsonl"]
    assert "did not pay for" in start(copy / "set", *other)
    (copy / "set" / "000003.png").write_bytes((image_folder / "0" / "0.png").read_bytes())
    assert "its images are not those that were drawn" in start(copy / "set")
    shutil.copytree(released, tmp_path / "less")
    (tmp_path / "less" / "set" / "000007.png").unlink()
    assert "not those that were drawn" in start(tmp_path / "less" / "set")
    cheap = read_json(released / "privacy.json")
    cheap["epsilon"]["add_or_remove_one"] /= 2
    shutil.copytree(released, tmp_path / "cheap")
    (tmp_path / "cheap" / "set" / "privacy.json").write_text(json.dumps(cheap))
    assert "says epsilon" in start(tmp_path / "cheap" / "set")
    assert not (tmp_path / "run" / "privacy.json").exists()


def test_a_set_that_lost_its_statement_is_not_taken_as_public_silently(released, tmp_path, capsys):
    shutil.copytree(released / "set", tmp_path / "set")
    (tmp_path / "set" / "privacy.json").unlink()
    refuse_as_public("--stand_in", str(tmp_path / "set"))
    assert "or by a private run; here it is taken as public" in capsys.readouterr().err


def test_a_public_warm_start_costs_nothing(tiny_base, image_folder, tmp_path):
    folder = tmp_path / "public"
    folder.mkdir()
    for index in range(8):
        Image.fromarray(np.full((16, 16), 30 * index, np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("the digit 3")
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run")
    arguments += ["--warm_start", folder, "--warm_start_is_public", "--warm_start_steps", 2]
    assert "saved the weights" in train_here(arguments)
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["training"]


@pytest.mark.parametrize("script, more", [("train_dp_ldm", []), ("train_dp_loda", ["--rank", 2])])
def test_what_other_methods_train_starts_from_a_set_too(
    released, tiny_base, image_folder, tmp_path, run_script, script, more
):
    """In a process of its own, which a norm whose input asks for no gradient would end."""
    copy = tmp_path / "means"
    shutil.copytree(released, copy)
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *more)
    arguments += ["--warm_start", copy / "set", "--warm_start_steps", 3]
    run = run_script(f"{script}.py", *arguments)
    assert run.returncode == 0 and "saved the weights" in run.stdout, run.stderr
    events = read_json(tmp_path / "run" / "privacy.json")["events"]
    assert [e["purpose"] for e in events] == ["means", "training"]


def test_one_command_splits_the_budget(tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *SMALL)
    arguments += ["--release_means", "--warm_start_steps", 2, "--release_share", 0.25]
    planned = train_here([*arguments, "--dry_run"])
    assert '"purpose": "means"' in planned and not (tmp_path / "run" / "means" / "set").exists()
    assert "saved the weights" in train_here(arguments)
    statement = read_json(tmp_path / "run" / "privacy.json")
    target = float(BUDGET[BUDGET.index("--target_epsilon") + 1])
    assert [e["purpose"] for e in statement["events"]] == ["means", "training"]
    assert target - 0.02 < statement["epsilon"]["add_or_remove_one"] <= target
    first = read_json(tmp_path / "run" / "means" / "privacy.json")
    assert first["epsilon"]["add_or_remove_one"] == pytest.approx(target / 4, abs=0.01)
    assert find_problems(read_source(str(tmp_path / "run"), None)) == []


def test_an_interrupted_release_is_not_paid_for_twice(
    tiny_base, image_folder, tmp_path, monkeypatch
):
    def stop(*_):
        raise KeyboardInterrupt

    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *SMALL)
    arguments += ["--release_means", "--warm_start_steps", 2]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(releases, "fit_generator", stop)
        train_here(arguments)
    ledger = Ledger(tmp_path / "run" / "private" / "ledger.jsonl")
    (run,) = {r["run"] for r in ledger.records()}
    assert count_charged_steps(ledger.records(), run) == 1
    sums = []
    # It would read the images again.
    monkeypatch.setattr(releases, "sum_features", lambda *a: sums.append(a))
    assert "saved the weights" in train_here(arguments)
    assert sums == []
    events = list_charged_events(ledger.records())
    assert [e["purpose"] for e in events] == ["means", "training"]
    assert sum(e["steps"] for e in events) == 4


def test_the_noise_is_that_of_the_plan(image_folder, tmp_path, monkeypatch):
    """Variance of 4,000 values and more: a false alarm is a deviation by six standard errors."""
    sums = []
    real = releases.sum_features
    monkeypatch.setattr(releases, "sum_features", lambda *a: sums.append(real(*a)) or sums[-1])
    more = ["--num_frequencies", 500, "--secure_noise"]
    assert "grid.png" in release(image_folder, tmp_path / "run", *more)
    noisy, _ = story.read_means(tmp_path / "run" / "means.safetensors")
    event = read_json(tmp_path / "run" / "privacy.json")["events"][0]
    noise = (40 * noisy.double() - sums[0]).flatten() / event["noise_multiplier"]
    assert len(noise) >= 4000
    assert abs(noise.var().item() - 1) < 6 * (2 / len(noise)) ** 0.5
    assert abs(noise.mean().item()) < 6 / len(noise) ** 0.5


@pytest.mark.slow
def test_two_processes_release_one_sum(image_folder, tmp_path):
    """Each adds its share of the units, and the noise is added once."""
    budget = ["--target_epsilon", 3, "--target_delta", 1e-3, "--debug_noise_seed", 5]
    arguments = ["--train_data_dir", image_folder, *CAPTION, *budget, *SMALL]
    run = together(2, ROOT / "release_means.py", *arguments, "--output_dir", tmp_path / "two")
    said = run.communicate()
    assert run.returncode == 0, said
    release(image_folder, tmp_path / "one", "--debug_noise_seed", 5)
    one, two = (story.read_means(tmp_path / n / "means.safetensors")[0] for n in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--release", "beauty"], "--release beauty: there are random_features"),
        (["--release", "random_features", "random_features"], "one of them twice"),
        (["--class_names", "0", "1"], "a row has a class that --class_names does not name"),
        (["--class_names", "0", "0"], "names a class twice"),
        (["--privacy_unit_column", "label"], "would be those of whom to protect"),
        (["--num_frequencies", "0"], "--num_frequencies 0 must be at least 1"),
        (["--length_scale", "nan"], "positive and finite"),
        (["--release_epsilon", "-1"], "must be positive"),
        (["--target_delta", "1"], "below 1/N"),
        (["--push_to_hub"], "means are not published"),
        (["--caption", "x", "--class_names", "0"], "needs --label_column"),
    ],
)
def test_mistakes_get_a_sentence_and_nothing_is_released(image_folder, tmp_path, more, said):
    shown = release(image_folder, tmp_path / "run", *more)
    assert shown.startswith("error: ") and said in shown
    assert not (tmp_path / "run" / "means.safetensors").exists()
    ledger = tmp_path / "run" / "private" / "ledger.jsonl"
    if ledger.exists():
        assert list_charged_events(Ledger(ledger).records()) == []


def test_without_classes_there_is_one_mean(image_folder, tmp_path):
    assert "grid.png" in release(image_folder, tmp_path / "run", "--caption", "a digit")
    lines = (tmp_path / "run" / "set" / "metadata.jsonl").read_text().splitlines()
    assert {json.loads(line)["text"] for line in lines} == {"a digit"}
    assert "label" not in json.loads(lines[0])


def test_reproducible_noise_is_stamped(image_folder, tmp_path):
    for run in ("a", "b"):
        assert "grid" in release(image_folder, tmp_path / run, "--debug_noise_seed", 3)
    assert read_json(tmp_path / "a" / "privacy.json")["private"] is False
    same = [(tmp_path / run / "means.safetensors").read_bytes() for run in ("a", "b")]
    assert same[0] == same[1]
    release(image_folder, tmp_path / "c")
    assert (tmp_path / "c" / "means.safetensors").read_bytes() != same[0]
