"""relabel.py --labeller: a published classifier names more images, and nothing is spent."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import CAPTION, ROOT, read_json, train_arguments, train_here
from tests.methods.conftest import draw
from tests.methods.test_relabelling import EXTRACTOR, relabel
from tests.scripts.test_many_processes import forked
from utils.arguments.relabelling import RelabellingArguments
from utils.files import LABELLER, hash_file
from utils.ledger.statement import STOPPED, UNKNOWN_BASE
from utils.ledger.verification import find_problems, read_source
from utils.methods import agreement, relabelling
from utils.methods.election import Candidates
from utils.sampling.paid_sets import find_set_ledger
from utils.sampling.shards import hash_set
from utils.sampling.synthetic_sets import read_privacy

OTHER = ["--extractor", "classifier", "--classifier_weights",
         ROOT / "examples" / "extractors" / "characters.safetensors"]  # fmt: skip


@pytest.fixture(scope="module")
def labeller(drawn, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labeller") / "run"
    relabel(drawn / "set", image_folder, folder, "--target_epsilon", 9)
    return folder


@pytest.fixture(scope="module")
def later(drawn, tiny_base, tmp_path_factory):
    """Other images of the adapter that drew the labeller's."""
    folder = tmp_path_factory.mktemp("later") / "set"
    adapter = ["--adapter", drawn / "adapter", "--seed", 5]
    assert "24 images" in draw(tiny_base, folder, *adapter)
    return folder


def name(labeller, candidates, output, *options) -> str:
    arguments = ["--labeller", labeller, "--synthetic", candidates, "--output_dir", output]
    return train_here([*arguments, *(options or EXTRACTOR)], "relabel")


def read_rows(folder) -> dict[str, str]:
    """The label of each image, by its digest."""
    rows = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    return {hash_file(folder / row["file_name"]): row["label"] for row in rows}


@pytest.mark.slow
def test_two_processes_name_a_set_together(public, image_folder, tmp_path):
    learn = ["--synthetic", public, "--train_data_dir", image_folder, *CAPTION, *EXTRACTOR]
    learn += ["--target_delta", 1e-3, "--target_epsilon", 3]
    for count, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        found = forked(count, ROOT / "relabel.py", *learn, "--output_dir", folder)
        assert found.returncode == 0, found.stderr
        assert len(read_rows(folder / "set")) == 24
        assert find_problems(read_source(str(folder), None)) == []
    one, two = (load_file(tmp_path / n / LABELLER) for n in ("one", "two"))
    for public_part in ("mean", "matrix"):  # of the candidates alone; the noise is another
        torch.testing.assert_close(one[public_part], two[public_part], rtol=1e-3, atol=1e-4)


def test_the_ledger_of_a_set_is_found_by_the_file_of_its_adapter(drawn, tmp_path):
    adapter = drawn / "adapter" / "pytorch_lora_weights.safetensors"
    for named in (adapter, adapter.parent):
        (tmp_path / "sampling.json").write_text(json.dumps({"adapter": str(named)}))
        assert find_set_ledger(str(tmp_path)) == adapter.parent / "private" / "ledger.jsonl"


def test_more_images_are_named_and_nothing_is_spent(labeller, drawn, later, tmp_path):
    ledger = drawn / "adapter" / "private" / "ledger.jsonl"
    before = ledger.read_bytes()
    shown = name(labeller, later, tmp_path / "named")
    assert "24 images are named by" in shown and "nothing is spent" in shown
    assert ledger.read_bytes() == before
    found = tmp_path / "named" / "set"
    assert (found / "privacy.json").read_bytes() == (labeller / "privacy.json").read_bytes()
    assert set(read_rows(found)) == {hash_file(path) for path in later.glob("0*.png")}
    statement, results = read_privacy(str(found), None)  # as evaluate.py reads it
    assert results["epsilon"]["value"] == statement["epsilon"]["add_or_remove_one"] <= 9
    with Image.open(tmp_path / "named" / "relabelled.png") as sheet:
        assert sheet.width > sheet.height / 2


def test_what_is_doubted_about_the_images_is_told_beside_them(labeller, later, tmp_path):
    doubtful, own = shutil.copytree(later, tmp_path / "set"), read_json(labeller / "privacy.json")
    told = read_json(later / "privacy.json")
    told["not_covered"] += [STOPPED, UNKNOWN_BASE]
    (doubtful / "privacy.json").write_text(json.dumps(told))
    name(labeller, doubtful, tmp_path / "named")
    statement = read_json(tmp_path / "named" / "set" / "privacy.json")
    assert set(statement["not_covered"]) - set(own["not_covered"]) == {STOPPED, UNKNOWN_BASE}
    assert {**statement, "not_covered": None} == {**own, "not_covered": None}


def test_it_names_as_it_did(labeller, drawn, tmp_path):
    name(labeller, drawn / "set", tmp_path / "again")
    assert hash_set(tmp_path / "again" / "set") == hash_set(labeller / "set")
    name(labeller, drawn / "set", tmp_path / "agreed", *EXTRACTOR, "--only_agreed")
    named, agreed = read_rows(labeller / "set"), read_rows(tmp_path / "agreed" / "set")
    assert set(agreed.items()) <= set(named.items())
    drawn_as = read_rows(drawn / "set")
    stayed = {label for digest, label in agreed.items() if drawn_as[digest] == label}
    assert all(drawn_as[d] == label or label not in stayed for d, label in agreed.items())


def test_what_it_leaves_can_be_built_on(labeller, later, image_folder, tmp_path):
    """The ledger knows what paid for the set: a second relabelling adds to all that came before."""
    name(labeller, later, tmp_path / "named")
    found = tmp_path / "named" / "set"
    assert find_set_ledger(str(found)).resolve() == (labeller / "private/ledger.jsonl").resolve()
    relabel(found, image_folder, tmp_path / "next", "--relabel_epsilon", 1)
    events = read_json(tmp_path / "next" / "privacy.json")["events"]
    assert [e["purpose"] for e in events] == ["training", "relabelling", "relabelling"]


def test_images_whose_cost_it_does_not_cover_are_refused(
    labeller, tiny_base, image_folder, public, tmp_path
):
    adapter = tmp_path / "other"
    train_here(train_arguments(tiny_base, image_folder, adapter))
    draw(tiny_base, tmp_path / "theirs", "--adapter", adapter)
    assert "did not pay for --synthetic" in name(labeller, tmp_path / "theirs", tmp_path / "named")
    (tmp_path / "theirs" / "privacy.json").unlink()
    shown = name(labeller, tmp_path / "theirs", tmp_path / "named")
    assert "has no privacy.json, so nobody can tell" in shown
    # Of the same ledger, but charged after the classifier.
    shared = ["--privacy_ledger", labeller / "private" / "ledger.jsonl"]
    train_here([*train_arguments(tiny_base, image_folder, tmp_path / "after"), *shared])
    draw(tiny_base, tmp_path / "later", "--adapter", tmp_path / "after")
    shown = name(labeller, tmp_path / "later", tmp_path / "named")
    assert "has cost privacy that the statement does not cover" in shown
    assert not (tmp_path / "named" / "set").exists()
    assert "24 images" in name(labeller, public, tmp_path / "free")  # of a public model


def test_an_adapter_that_went_on_is_not_covered(stopped, tiny_base, image_folder, tmp_path):
    """Published early, named, then finished under the same name: it has cost more since."""
    adapter, resume = stopped
    assert "after step 2 of 6" in train_here([*resume, "--publish_now"])
    draw(tiny_base, tmp_path / "early", "--adapter", adapter)
    draw(tiny_base, tmp_path / "more", "--adapter", adapter, "--seed", 5)
    budget = ["--relabel_epsilon", 1]
    assert "24 images" in relabel(tmp_path / "early", image_folder, tmp_path / "labeller", *budget)
    assert "saved the weights" in train_here(resume)
    draw(tiny_base, tmp_path / "late", "--adapter", adapter)
    shown = name(tmp_path / "labeller", tmp_path / "late", tmp_path / "named")
    assert "has cost privacy that the statement does not cover" in shown
    assert "nothing is spent" in name(tmp_path / "labeller", tmp_path / "more", tmp_path / "named")


def test_a_classifier_that_does_not_verify_is_refused(labeller, later, tmp_path):
    def copy(place):
        shutil.copytree(labeller, tmp_path / place, symlinks=True)
        return tmp_path / place

    assert "holds no labeller.safetensors" in name(later, later, tmp_path / "named")
    changed = copy("changed")
    file = changed / "labeller.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "does not verify: labeller.safetensors" in name(changed, later, tmp_path / "named")
    trimmed = copy("trimmed")
    statement = read_json(trimmed / "privacy.json")
    statement["events"] = statement["events"][1:]
    (trimmed / "privacy.json").write_text(json.dumps(statement))
    assert "does not verify" in name(trimmed, later, tmp_path / "named")
    silent, alone = copy("silent"), copy("alone")
    (silent / "privacy.json").unlink()
    assert "does not verify" in name(silent, later, tmp_path / "named")
    shutil.rmtree(alone / "private")
    assert "is not there, so nobody can tell" in name(alone, later, tmp_path / "named")
    assert not (tmp_path / "named" / "set").exists()


def test_other_features_and_classes_are_refused(labeller, later, tiny_base, tmp_path):
    draw(tiny_base, tmp_path / "two", "--class_names", "0", "1")
    for candidates, options, said in [
        (later, OTHER, "other features (extractor_weights)"),
        (later, [*EXTRACTOR, "--autoencoder", tiny_base], "other features (rendered_by, resize)"),
        (later, [*EXTRACTOR, "--privacy_ledger", "other.jsonl"], "not in --privacy_ledger other"),
        (tmp_path / "two", EXTRACTOR, "its classes are not those of --labeller"),
    ]:
        assert said in name(labeller, candidates, tmp_path / "named", *options)
    assert not (tmp_path / "named" / "set").exists()


def test_a_run_is_not_written_over(labeller, later):
    before = hash_set(labeller / "set")
    assert "already holds files" in name(labeller, later, labeller)
    again = [*EXTRACTOR, "--resume_from_checkpoint", "latest"]
    assert "nothing to resume" in name(labeller, later, labeller, *again)
    assert hash_set(labeller / "set") == before


def test_a_run_that_has_released_nothing_keeps_its_folder(
    labeller, later, public, image_folder, tmp_path, monkeypatch
):
    """Else its reservation would stay, and a resumed run would write over the set."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(relabelling, "learn", stop)
        relabel(public, image_folder, tmp_path / "run", "--target_epsilon", 3)
    assert "already holds files" in name(labeller, later, tmp_path / "run")
    assert not (tmp_path / "run" / "set").exists()


def test_a_class_that_nobody_agrees_about_is_not_lost():
    before, after = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 2, 1, 1])
    assert agreement.find_agreed(before, after) == [0, 1, 3, 4, 5]
    assert agreement.find_agreed(before, before) == list(range(6))


def test_equal_classes_leaves_the_first_drawn_of_every_class(accelerator, capsys):
    classes = np.array([0, 0, 1, 0, 2, 2, 1, 0, 2, 1, 1])
    drawn = Candidates([*range(11)], [{"label": str(c)} for c in classes], classes)
    for equal, count in [(False, 11), (True, 9)]:
        args = RelabellingArguments(synthetic="unused", equal_classes=equal)
        named = agreement.Named(drawn, np.linspace(0.1, 0.9, 11))
        kept = agreement.choose_kept(drawn, named, args, accelerator)
        assert kept.images == [0, 2, 4, 1, 6, 5, 3, 9, 8, 7, 10][:count]
    said = "9 images are left, 3 of each of 3 classes, as many as of the rarest, 2\n"
    assert capsys.readouterr().out.endswith(said)


def test_labels_that_agree_by_chance_are_told_of(capsys):
    """Cohen's kappa 0.2 is the most that is called slight."""
    before, args = np.arange(100) % 4, RelabellingArguments(synthetic="-", autoencoder="none")
    named = {"as drawn": before, "by chance": np.roll(before, 1), "of one class": 0 * before}
    named["in part"] = np.where(np.arange(100) < 60, before, np.roll(before, 1))
    said = {}
    for name, after in named.items():
        agreement.warn_of_slight_agreement(before, after, args)
        said[name] = capsys.readouterr().err
    assert said["as drawn"] == said["in part"] == ""
    assert "kappa -0.33" in said["by chance"] and "--autoencoder" in said["by chance"]
    assert "kappa 0.00" in said["of one class"]
    agreement.warn_of_slight_agreement(0 * before, 0 * before, args)
    agreement.warn_of_slight_agreement(before, np.roll(before, 1), replace(args, autoencoder=None))
    (line,) = capsys.readouterr().err.splitlines()
    assert "--autoencoder" not in line
