"""curate.py: what it spends, what it keeps, and what it refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import CAPTION, ROOT, read_json, train_arguments, train_here
from tests.methods.conftest import draw
from tests.sampling.conftest import state
from utils.files import hash_file
from utils.ledger.charges import list_charged_events
from utils.ledger.checks import check_statement
from utils.ledger.ledger import Ledger
from utils.ledger.verification import find_problems, read_source
from utils.methods import curation as story
from utils.privacy.accounting import account, membership_power
from utils.sampling.paid_sets import examine, is_drawn_with
from utils.sampling.shards import hash_set

EXTRACTOR = ["--extractor", "classifier", "--classifier_weights",
             ROOT / "examples" / "digits" / "extractor.safetensors"]  # fmt: skip


def curate(candidates, images, output, *more) -> str:
    arguments = ["--synthetic", candidates, "--train_data_dir", images, *CAPTION, *EXTRACTOR]
    arguments += ["--target_delta", 1e-3, "--output_dir", output]
    return train_here([*arguments, *more], "curate")


def read_events(folder) -> list[dict]:
    return list_charged_events(Ledger(folder / "private" / "ledger.jsonl").records())


def test_votes_are_composed_with_what_the_candidates_cost(drawn, image_folder, tmp_path):
    shown = curate(drawn / "set", image_folder, tmp_path / "run", "--target_epsilon", 9)
    assert "vote for 24 candidates: with what those cost, epsilon 9.0" in shown or "8.99" in shown
    assert "12 images, grid.png" in shown
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["training", "curation"]
    assert 8.98 < statement["epsilon"]["add_or_remove_one"] <= 9
    assert statement["events"][1]["sensitivity"] == 2.0  # the root of four votes
    assert find_problems(read_source(str(tmp_path / "run"), None)) == []
    kept = tmp_path / "run" / "set"
    page = (kept / "report.html").read_text()
    assert "Every unit voted" in page and 'aria-label="What each stage adds to epsilon"' in page
    assert read_json(kept / "privacy.json") == statement
    rows = [json.loads(line) for line in (kept / "metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [*"0123"] * 3
    originals = {hash_file(path) for path in (drawn / "set").glob("0*.png")}
    assert {hash_file(path) for path in kept.glob("0*.png")} <= originals
    events = list_charged_events(Ledger(drawn / "adapter/private/ledger.jsonl").records())
    assert [event["purpose"] for event in events][:2] == ["training", "curation"]


def test_a_set_verifies_as_long_as_its_images_are_those_that_were_paid_for(
    drawn, image_folder, tmp_path, run_script
):
    """One of sample.py, and one that a stage left; the weights behind them lie elsewhere."""
    run = tmp_path / "run"
    curate(drawn / "set", image_folder, run, "--target_epsilon", 9)

    def judge(folder) -> tuple[list[str], list[str]]:
        return examine(str(folder), None)[1:]

    paid = ([], ["ok: its images are those that the ledger of their run paid for"])
    assert judge(drawn / "set") == judge(run / "set") == paid
    alone = shutil.copytree(run / "set", tmp_path / "alone" / "set")
    assert judge(alone)[0] == [] and "is not here" in judge(alone)[1][0]

    cheaper = (drawn / "adapter" / "privacy.json").read_text()
    dearer = (run / "privacy.json").read_text()
    own = json.loads(dearer)  # as it would be without the training before the vote
    spent = account(own["events"][1:], own["delta"])
    forged = state() | {key: own[key] for key in ("files", "ledger", "delta", "num_units")}
    forged |= {"events": own["events"][1:], "epsilon": spent.both_relations()}
    forged |= {"membership_inference": membership_power(forged["events"])}
    for name, epsilon in (("pld", spent.add_or_remove_one), ("prv", spent.prv)):
        forged["accountants"][name]["epsilon"] = epsilon
    assert check_statement(forged) == []
    for folder, statement, said in (
        (run / "set", cheaper, "its statement is not that of the run"),
        (drawn / "set", dearer, "its statement is not that of the adapter"),
        (run / "set", json.dumps(forged), "the ledger's events are not those of the statement"),
    ):
        own = (folder / "privacy.json").read_text()
        (folder / "privacy.json").write_text(statement)
        assert said in judge(folder)[0][0]
        (folder / "privacy.json").write_text(own)

    (alone / "more.png").write_bytes(b"")
    assert judge(alone)[0] == ["its images are not those that were drawn"]
    (run / "set" / "more.png").write_bytes(b"")
    (run / "set" / "sampling.json").write_text(json.dumps({"set": hash_set(run / "set")}))
    assert "did not pay for the set" in judge(run / "set")[0][0]
    begun = shutil.copytree(drawn / "set", tmp_path / "begun")
    settings = read_json(begun / "sampling.json")
    del settings["set"]
    (begun / "sampling.json").write_text(json.dumps(settings))
    assert "not all of its images were drawn" in judge(begun)[0][0]

    page = tmp_path / "page.html"
    shown = run_script("privacy_report.py", "officer", drawn / "set", "--output_file", page)
    assert shown.returncode == 0 and "Do not sign" not in page.read_text()
    assert "its images are those that the ledger of their run paid for" in page.read_text()
    shown = run_script("privacy_report.py", "verify", alone)
    assert shown.returncode == 1 and "not those that were drawn" in shown.stderr


def test_equal_settings_are_not_equal_weights():
    """Two LoDA runs of one recipe have the same adapter_config.json."""
    files = {"adapter_model.safetensors": "of one run", "adapter_config.json": "of both"}
    assert is_drawn_with({"files": files}, {"adapter_files": files | {"privacy.json": "its own"}})
    other = files | {"adapter_model.safetensors": "of another"}
    assert not is_drawn_with({"files": files}, {"adapter_files": other})
    assert not is_drawn_with({"files": {}}, {"adapter_files": files})


def test_what_is_kept_follows_the_published_votes(public, image_folder, tmp_path):
    curate(public, image_folder, tmp_path / "run", "--target_epsilon", 3, "--num_images", 8)
    votes = load_file(tmp_path / "run" / "votes.safetensors")["votes"]
    assert votes.shape == (1, 24)
    best = [max(range(label, 24, 4), key=lambda i: votes[0, i]) for label in range(4)]
    kept = [hash_file(tmp_path / "run" / "set" / f"{i:06}.png") for i in range(4)]
    assert kept == [hash_file(public / f"{i:06}.png") for i in best]
    assert [event["purpose"] for event in read_events(tmp_path / "run")] == ["curation"]


def test_the_noise_is_that_of_the_plan(public, image_folder, tmp_path, monkeypatch):
    """Variance of 24 x 40 values: a false alarm is a deviation by six standard errors."""
    counts = []
    real = story.count_votes
    monkeypatch.setattr(story, "count_votes", lambda *a: counts.append(real(*a)) or counts[-1])
    more = ["--curation_epsilon", 2, "--rounds", 40, "--num_images", 24]
    shown = curate(public, image_folder, tmp_path / "run", *more)
    assert "24 images, grid.png" in shown, shown
    votes = load_file(tmp_path / "run" / "votes.safetensors")["votes"].double()
    (event,) = read_json(tmp_path / "run" / "privacy.json")["events"]
    assert event["steps"] == 40
    noise = (votes - torch.stack(counts)) / (2 * event["noise_multiplier"])
    assert abs(noise.var().item() - 1) < 6 * (2 / noise.numel()) ** 0.5
    assert abs(noise.mean().item()) < 6 / noise.numel() ** 0.5


def test_rounds_vary_the_winners(public, image_folder, tmp_path):
    """Private Evolution: no training at all."""
    more = ["--target_epsilon", 3, "--rounds", 2, "--num_images", 8, "--keep", "resample"]
    assert "8 images, grid.png" in curate(public, image_folder, tmp_path / "run", *more)
    (event,) = read_json(tmp_path / "run" / "privacy.json")["events"]
    assert event["steps"] == 2 and event["purpose"] == "curation"
    originals = {hash_file(path) for path in public.glob("0*.png")}
    kept = {hash_file(path) for path in (tmp_path / "run" / "set").glob("0*.png")}
    assert kept - originals


def test_an_interrupted_round_is_not_paid_for_twice(public, image_folder, tmp_path, monkeypatch):
    more = ["--target_epsilon", 3, "--rounds", 2, "--debug_noise_seed", 4]
    real, done = story.evolve, []

    def stop(*arguments):
        done.append(real(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(story, "evolve", stop)
        curate(public, image_folder, tmp_path / "run", *more)
    again = []
    monkeypatch.setattr(story, "evolve", lambda *a: again.append(real(*a)) or again[-1])
    resume = ["--resume_from_checkpoint", "latest"]
    assert "12 images" in curate(public, image_folder, tmp_path / "run", *more, *resume)
    assert [event["steps"] for event in read_events(tmp_path / "run")] == [2]
    for before, after in zip(done[0].images, again[0].images, strict=True):
        assert before.tobytes() == after.tobytes()


def test_an_interruption_before_the_set_is_there_costs_nothing(
    public, image_folder, tmp_path, monkeypatch
):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(story, "leave_set", stop)
        curate(public, image_folder, tmp_path / "run", "--target_epsilon", 3)
    assert not (tmp_path / "run" / "set").exists()
    monkeypatch.setattr(story, "count_votes", None)  # would read the private images again
    more = ["--target_epsilon", 3, "--resume_from_checkpoint", "latest"]
    assert "12 images" in curate(public, image_folder, tmp_path / "run", *more)
    assert [event["steps"] for event in read_events(tmp_path / "run")] == [1]


def test_what_no_ledger_paid_for_is_refused(drawn, public, tiny_base, image_folder, tmp_path):
    def start(candidates, *more) -> str:
        more = ["--target_epsilon", 9, *more]
        return curate(candidates, image_folder, tmp_path / "run", *more)

    assert "is not a folder" in start(tmp_path / "nowhere")
    assert "has no privacy.json" in start(image_folder)
    for origin in (drawn / "set", public):
        copy = tmp_path / origin.parent.name
        shutil.copytree(origin, copy)
        (copy / "000003.png").write_bytes((image_folder / "0" / "0.png").read_bytes())
        said = start(copy)
        assert "not those that were drawn" in said or "holds other images" in said
    other = ["--privacy_ledger", tmp_path / "other.jsonl"]
    assert "did not pay for" in start(drawn / "set", *other)
    stolen = tmp_path / "stolen"  # a set of the public model, under a statement of other images
    shutil.copytree(public, stolen)
    shutil.copy(drawn / "set" / "privacy.json", stolen)
    ledger = ["--privacy_ledger", drawn / "adapter" / "private" / "ledger.jsonl"]
    assert "not those that were drawn" in start(stolen, *ledger)
    assert not (tmp_path / "run" / "votes.safetensors").exists()


@pytest.mark.slow
def test_a_curated_set_is_a_warm_start(drawn, tiny_base, image_folder, tmp_path):
    """And so is one of sample.py: what its adapter cost is composed."""
    for name in ("adapter", "set"):
        shutil.copytree(drawn / name, tmp_path / name, symlinks=True)
    record = tmp_path / "set" / "sampling.json"
    settings = read_json(record) | {"adapter": str(tmp_path / "adapter")}
    record.write_text(json.dumps(settings))
    ledger = Ledger(tmp_path / "adapter" / "private" / "ledger.jsonl")
    curate(tmp_path / "set", image_folder, tmp_path / "run", "--target_epsilon", 8.5)
    for number, start in enumerate((tmp_path / "run" / "set", tmp_path / "set")):
        arguments = train_arguments(tiny_base, image_folder, tmp_path / f"warm{number}")
        at = arguments.index("--target_epsilon")
        arguments[at + 1] = 12
        more = ["--warm_start", start, "--warm_start_steps", 2, "--privacy_ledger", ledger.path]
        assert "saved the weights" in train_here([*arguments, *more])
        events = read_json(tmp_path / f"warm{number}" / "privacy.json")["events"]
        expected = ["training", "curation", "training"] if number == 0 else ["training"] * 2
        assert [event["purpose"] for event in events] == expected
        assert find_problems(read_source(str(tmp_path / f"warm{number}"), None)) == []


@pytest.mark.parametrize(
    "more, said",
    [
        ([], "give --target_epsilon, for all; or --curation_epsilon"),
        (["--target_epsilon", 3, "--votes_per_row", 0], "--votes_per_row 0 must be at least 1"),
        (["--target_epsilon", 3, "--rounds", 0], "--rounds 0 must be at least 1"),
        (["--target_epsilon", 3, "--num_images", 0], "--num_images 0 must be at least 1"),
        (["--curation_epsilon", "nan"], "must be positive"),
        (["--target_epsilon", 3, "--variation_strength", 1.5], "must be in (0, 1]"),
        (["--push_to_hub", "--target_epsilon", 3], "needs --hub_dataset_id"),
        (["--target_epsilon", 3, "--num_images", 25], "there are 24 candidates; draw more"),
    ],
)
def test_mistakes_get_a_sentence_and_nothing_is_spent(public, image_folder, tmp_path, more, said):
    shown = curate(public, image_folder, tmp_path / "run", *more)
    assert shown.startswith("error: ") and said in shown
    assert not (tmp_path / "run" / "votes.safetensors").exists()


def test_classes_that_have_nothing_in_common_are_refused(tiny_base, image_folder, tmp_path):
    draw(tiny_base, tmp_path / "other", "--class_names", "cat", "dog")
    shown = curate(tmp_path / "other", image_folder, tmp_path / "run", "--target_epsilon", 3)
    assert "no class of --label_column label is among those of the candidates: cat, dog" in shown


def test_captions_vote_within_the_nearest_prompt(public, tiny_base, tmp_path):
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for index in range(6):
        Image.new("L", (16, 16), 30 * index).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text(f"the digit {index % 4}")
    arguments = ["--synthetic", public, "--train_data_dir", images, "--caption_column", "text"]
    arguments += [*EXTRACTOR, "--target_delta", 1e-2, "--target_epsilon", 3]
    arguments += ["--output_dir", tmp_path / "run"]
    assert "needs --pretrained_model_name_or_path" in train_here(arguments, "curate")
    more = ["--pretrained_model_name_or_path", tiny_base]
    assert "12 images, grid.png" in train_here([*arguments, *more], "curate")


def test_a_dry_run_spends_nothing(drawn, image_folder, tmp_path):
    before = hash_set(drawn / "adapter" / "private" / "checkpoints")
    more = ["--target_epsilon", 9, "--dry_run"]
    assert '"purpose": "curation"' in curate(drawn / "set", image_folder, tmp_path / "run", *more)
    assert not (tmp_path / "run" / "set").exists()
    assert hash_set(drawn / "adapter" / "private" / "checkpoints") == before
