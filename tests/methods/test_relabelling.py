"""relabel.py: what it spends, what it calls images, and what it refuses."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import CAPTION, ROOT, read_json, train_here
from tests.methods.test_curation import curate
from tests.methods.test_means import release
from utils.arguments.evaluation import ExtractorArguments
from utils.arguments.relabelling import RelabellingArguments
from utils.data.images import crop_to_pixels
from utils.errors import UsageError
from utils.evaluation.features import Extractor, build_extractor
from utils.files import hash_file
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.ledger.charges import list_charged_events
from utils.ledger.ledger import Ledger
from utils.ledger.verification import find_problems, read_source
from utils.methods import labeller
from utils.methods import relabelling as story
from utils.methods.election import extract_pixels
from utils.methods.labeller import (
    UnitImages,
    Whitening,
    build_losses,
    build_state,
    fit_whitening,
    read_images,
)
from utils.methods.naming import find_prompts
from utils.privacy.plan import make_plan
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import clipped_gradient_sum, private_steps

EXTRACTOR = ["--extractor", "classifier", "--classifier_weights",
             ROOT / "examples" / "digits" / "extractor.safetensors"]  # fmt: skip


def relabel(candidates, images, output, *more, autoencoder="none") -> str:
    arguments = ["--synthetic", candidates, "--train_data_dir", images, *CAPTION, *EXTRACTOR]
    arguments += ["--target_delta", 1e-3, "--output_dir", output]
    arguments += ["--autoencoder", autoencoder] if autoencoder is not None else []
    return train_here([*arguments, *more], "relabel")


def read_events(folder) -> list[dict]:
    return list_charged_events(Ledger(folder / "private" / "ledger.jsonl").records())


def test_its_cost_is_composed_with_that_of_the_set(drawn, image_folder, tmp_path):
    run = tmp_path / "run"
    shown = relabel(drawn / "set", image_folder, run, "--target_epsilon", 9)
    assert (
        "4 classes learns from 40 private units, to name 24 images: with what those cost, epsilon"
        in shown
    )
    statement = read_json(run / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["training", "relabelling"]
    assert statement["events"][1]["steps"] == 200
    assert statement["events"][1]["sampling_rate"] == 1
    assert 8.98 < statement["epsilon"]["add_or_remove_one"] <= 9
    assert find_problems(read_source(str(run), None)) == []
    assert read_json(run / "set" / "privacy.json") == statement
    assert "A classifier, which named" in (run / "set" / "report.html").read_text()
    rows = [json.loads(line) for line in (run / "set/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert all(row["text"] == f"the digit {row['label']}" for row in rows)
    events = list_charged_events(Ledger(drawn / "adapter/private/ledger.jsonl").records())
    assert [e["purpose"] for e in events] == ["training", "relabelling"]
    assert events[-1]["steps"] == 200


@pytest.mark.parametrize(
    "stage, work",
    [(relabel, "relabelling.extract_candidates"), (relabel, "relabelling.read_images")]
    + [(curate, "curation.number_rows")]
    + [(lambda _, *more: release(*more), "means.number_rows")],
    ids=["candidates", "relabel", "curate", "release_means"],
)
def test_what_ends_before_the_first_release_holds_no_budget(
    public, image_folder, tmp_path, monkeypatch, stage, work
):
    def end(*_):
        raise MemoryError

    monkeypatch.setattr(f"utils.methods.{work}", end)
    with pytest.raises(MemoryError):
        stage(public, image_folder, tmp_path / "run", "--target_epsilon", 3)
    records = Ledger(tmp_path / "run" / "private" / "ledger.jsonl").records()
    assert [record["kind"] for record in records] == ["reserve", "give_up"]


def test_an_interrupted_run_goes_on_and_pays_once(public, image_folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    more = ["--target_epsilon", 3, "--relabel_steps", 6, "--checkpointing_steps", 2]
    monkeypatch.setattr(story, "name_precision", lambda _: "bf16")  # a process can have but one
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            story, "name_images", stop
        )  # after the last step, before anything is published
        relabel(public, image_folder, tmp_path / "run", *more)
    assert not (tmp_path / "run" / "labeller.safetensors").exists()
    more += ["--resume_from_checkpoint", "latest"]
    assert "24 images" in relabel(public, image_folder, tmp_path / "run", *more)
    assert [event["steps"] for event in read_events(tmp_path / "run")] == [6]
    assert read_json(tmp_path / "run" / "privacy.json")["precision"] == "bf16"


def test_labels_follow_the_published_classifier_alone(public, image_folder, tmp_path):
    shown = relabel(public, image_folder, tmp_path / "run", "--target_epsilon", 3)
    assert "of 24 images got another label" in shown
    file = load_file(tmp_path / "run" / "labeller.safetensors")
    assert file["weights"].shape == (4, 257)
    # From what is public alone, features were made white, and the images named.
    extractor = build_extractor(
        ExtractorArguments("classifier", classifier_weights=str(EXTRACTOR[-1])),
        torch.device("cpu"),
    )
    files = sorted(public.glob("0*.png"))
    pixels = torch.stack([crop_to_pixels(Image.open(path), 32) for path in files])
    seen = extract_pixels(extractor, pixels, Accelerator())
    whiten = Whitening(file["mean"], file["matrix"])
    again = fit_whitening(seen)
    assert torch.allclose(again.mean, whiten.mean, atol=1e-5)
    assert torch.allclose(again(seen), whiten(seen), atol=1e-3)
    named = (whiten(seen) @ file["weights"].T).argmax(1).tolist()
    found = {hash_file(path): "0123"[number] for path, number in zip(files, named, strict=True)}
    folder = tmp_path / "run" / "set"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    order = [hash_file(path) for path in files]
    places = {name: [] for name in "0123"}
    for row in rows:
        digest = hash_file(folder / row["file_name"])
        assert found[digest] == row["label"]
        places[row["label"]].append(order.index(digest))
    assert all(own == sorted(own) for own in places.values())  # as drawn, not the surest first
    again = relabel(tmp_path / "run" / "set", image_folder, tmp_path / "again",
                    "--relabel_epsilon", 2, "--num_images", 7)  # fmt: skip
    assert "7 images, grid.png" in again
    events = read_json(tmp_path / "again" / "privacy.json")["events"]
    assert [event["purpose"] for event in events] == ["relabelling"] * 2


def test_only_agreed_leaves_what_kept_its_label(public, image_folder, tmp_path):
    """Whatever the noisy classifier says, which may be that a class has none of its own images."""
    more = ["--target_epsilon", 3, "--only_agreed"]
    shown = relabel(public, image_folder, tmp_path / "run", *more)
    labels = {hash_file(path): f"{i % 4}" for i, path in enumerate(sorted(public.glob("0*.png")))}
    folder = tmp_path / "run" / "set"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    kept = [(labels[hash_file(folder / row["file_name"])], row["label"]) for row in rows]
    stayed = [named for own, named in kept if own == named]
    changed = int(re.search(r"(\d+) of 24 images got another label", shown)[1])
    assert len(stayed) == 24 - changed  # none of them is missing
    assert f"{len(stayed)} images are left, about which both agree" in shown
    assert not {named for own, named in kept if own != named} & set(stayed)
    more = f", and {len(kept) - len(stayed)} of classes of which none does"
    assert (more in shown) == (len(kept) > len(stayed))


@pytest.mark.parametrize(
    "more, said",
    [
        ([], "give --target_epsilon, for all; or --relabel_epsilon"),
        (["--target_epsilon", 3, "--relabel_steps", 0], "--relabel_steps 0 must be at least 1"),
        (["--relabel_epsilon", "nan"], "must be positive"),
        (["--target_epsilon", 3, "--num_images", 25], "there are 24 images"),
        (["--push_to_hub", "--target_epsilon", 3], "needs --hub_dataset_id"),
        (["--target_epsilon", 3, "--caption", "a digit"], "a classifier needs labels"),
    ],
)
def test_mistakes_get_a_sentence_and_nothing_is_spent(public, image_folder, tmp_path, more, said):
    shown = relabel(public, image_folder, tmp_path / "run", *more)
    assert shown.startswith("error: ") and said in shown
    assert not (tmp_path / "run" / "labeller.safetensors").exists()


def test_a_class_with_several_prompts_is_refused():
    entries = [{"label": name, "text": f"the digit {name}"} for name in "0101"]
    candidates = SimpleNamespace(entries=entries, images=entries)
    args = RelabellingArguments(synthetic="set")
    assert find_prompts(candidates, ["0", "1"], args) == ["the digit 0", "the digit 1"]
    entries[2]["text"] = "a zero"
    with pytest.raises(UsageError, match="images of class 0 have different prompts"):
        find_prompts(candidates, ["0", "1"], args)


def test_one_unit_moves_the_sum_by_the_bound_and_nobody_else():
    """A unit of many rows counts once; an image of no class, or without features, not at all; nor
    a unit without an image."""
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 3, bias=False)
    torch.nn.init.zeros_(head.weight)  # every class as likely, so that no gradient is small
    count = torch.tensor([1, 3, 2, 1, 0, 1])
    first = count.cumsum(0) - count
    features, classes = 50 * torch.randn(8, 5), torch.tensor([0, 1, 1, 2, -1, -1, 2, 0])
    features[6] = 0.0
    images = UnitImages(features, classes, first, count)
    engine, accelerator = PerUnitGradients(head), Accelerator()
    losses = build_losses(head, images, SecretRandomness(), accelerator)
    plan = make_plan(noise_multiplier=1.0, num_units=6, expected_batch_size=6, steps=1,
                     max_grad_norm=1.0, delta=1e-3)  # fmt: skip

    def total(units: list[int]) -> torch.Tensor:
        units = torch.tensor(units)
        return clipped_gradient_sum(accelerator, engine, losses, units, plan, 4)

    assert 0.9 < total([0]).norm() <= 1
    assert 0.9 < total([1]).norm() <= 1
    assert total([2]).norm() == total([3]).norm() == total([4]).norm() == 0
    assert torch.equal(total([0, 2]), total([0]))


def test_whitening_removes_the_mean_and_correlations():
    torch.manual_seed(0)
    mixed = torch.randn(5000, 6) @ torch.randn(6, 6) + 3
    whiten = fit_whitening(mixed)
    white = (mixed - whiten.mean) @ whiten.matrix
    covariance = white.T @ white / len(white)
    off = covariance - covariance.diag().diag()
    assert white.mean(0).abs().max() < 1e-3 and off.abs().max() < 1e-3
    assert covariance.diag().max() < 1.0001  # the floor only makes directions smaller
    assert torch.allclose(whiten(mixed)[:, :-1].norm(dim=1), torch.ones(5000), atol=1e-5)
    assert fit_whitening(torch.ones(4, 3))(torch.ones(2, 3)).isfinite().all()


def test_it_learns_what_can_be_learned(tmp_path):
    """1,000 units of 4 classes, epsilon about 3: the labels of others come out right. The noise
    is a fixed stream: the same each time."""
    torch.manual_seed(0)
    centres = torch.randn(4, 32)
    labels = torch.randint(4, (1000,))
    seen = centres[labels] + torch.randn(1000, 32)
    whiten = fit_whitening(seen)
    images = UnitImages(whiten(seen), labels, torch.arange(1000), torch.ones(1000, dtype=int))
    plan = make_plan(target_epsilon=3.0, num_units=1000, expected_batch_size=1000, steps=200,
                     max_grad_norm=1.0, delta=1e-4)  # fmt: skip
    head, accelerator = torch.nn.Linear(33, 4, bias=False), Accelerator()
    state = build_state(head, plan)
    randomness = SecretRandomness(debug_seed=1)
    losses = build_losses(head, images, randomness, accelerator)
    for _ in private_steps(accelerator, state, losses, plan, randomness, 1000, False):
        pass
    others = torch.randint(4, (1000,))
    found = head(whiten(centres[others] + torch.randn(1000, 32))).argmax(1)
    assert (found == others).double().mean() > 0.9


def test_a_row_without_finite_features_says_nothing(monkeypatch):
    seen = [torch.ones(2), torch.tensor([float("nan"), 1.0]), torch.tensor([2.0, -1.0])]
    rows = [(0, 1, None), (0, 2, None), (2, 0, None)]  # unit 1 has no image that can be used
    monkeypatch.setattr(labeller, "read_units", lambda *_: iter(rows))
    monkeypatch.setattr(labeller, "extract_pixels", lambda *_: seen.pop(0)[None])
    whiten = Whitening(torch.zeros(2), torch.eye(2))
    extractor = Extractor("none", "", 32, None)
    rows[:] = [(unit, number, torch.zeros(3, 2, 2)) for unit, number, _ in rows]
    units = SimpleNamespace(num_units=4)  # nor has the last
    images = read_images(units, [], extractor, whiten, Accelerator())
    assert images.features.isfinite().all() and not images.features[1].any()
    assert images.classes.tolist() == [1, 2, 0]
    assert images.count.tolist() == [2, 0, 1, 0] and images.first.tolist() == [0, 2, 2, 2]
