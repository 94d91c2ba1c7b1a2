"""Images are not called public that are known to come from private ones, wherever that is asked."""

import json
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.worlds import build_plan
from utils.arguments.evaluation import EvaluateArguments, ExtractorArguments
from utils.arguments.rehearsal import RehearsalArguments
from utils.arguments.training import DataArguments, ModelArguments
from utils.errors import UsageError
from utils.evaluation.features import build_extractor
from utils.evaluation.trained_extractors import list_public_data, refuse_as_learned_from
from utils.ledger.ledger import Ledger
from utils.ledger.public_sets import (
    refuse_as_private,
    refuse_as_public,
    refuse_own_images,
)
from utils.ledger.remembered import remember_run
from utils.methods.stand_in import load_stand_in
from utils.metrics.synthetic_accuracy.classifiers import CLASSIFIERS

REFUSED = "called public and lose that epsilon"


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.mark.parametrize(
    "name, content, warns",
    [
        ("sampling.json", {"is_public": False}, True),
        ("sampling.json", [], True),
        ("sampling.json", {"is_public": True}, False),
        ("sampling.json", {"steps": 8}, False),
        ("metadata.jsonl", {}, False),
    ],
)
def test_a_doubt_about_images_is_told(images, capsys, name, content, warns):
    """Whoever calls them public may know, as on a machine that does not reach the Hub."""
    (images / name).write_text(json.dumps(content))
    refuse_as_public("--stand_in", str(images))
    said = capsys.readouterr().err
    assert said.count("drawn by what nobody could tell") == warns and bool(said) == warns


@pytest.mark.parametrize("configuration", ["", ", chest"])
def test_private_images_that_are_called_public_are_told_of(images, tmp_path, capsys, configuration):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    run = ledger.reserve(build_plan().terms(True)).run
    remember_run(f"{images.resolve()}{configuration}", ledger, run, 1.0, 1e-4)
    refuse_as_public("--public_data", str(images))
    said = capsys.readouterr().err
    assert f"charged to the ledger {ledger.path} as private images" in said
    refuse_as_public("--public_data", None)
    assert capsys.readouterr().err == ""


def test_public_inputs_of_every_kind_are_asked(images, tmp_path, run_script):
    (images / "privacy.json").write_text("{}")
    extracting = ExtractorArguments(
        "classifier", classifier_weights=str(tmp_path / "weights"), public_data=[str(images)]
    )
    with pytest.raises(UsageError, match=f"--public_data .*{REFUSED}"):
        build_extractor(extracting, torch.device("cpu"))
    rehearsing = RehearsalArguments(stand_in=str(images))
    base = ModelArguments(pretrained_model_name_or_path="base")
    with pytest.raises(UsageError, match=f"--stand_in .*{REFUSED}"):
        load_stand_in(base, DataArguments(), rehearsing, tmp_path, None, 9)
    more = ["--resolution", 32, "--label_column", "label", "--output_dir", tmp_path / "base"]
    run = run_script("pretrain_ldm.py", "--dataset_name", images, *more)
    assert run.returncode == 2 and REFUSED in run.stderr and not (tmp_path / "base").exists()
    more = ["--test_data_dir", images, "--test_is_public"]
    run = run_script("evaluate.py", "--synthetic", tmp_path / "set", *more)
    assert run.returncode == 2 and f"--test_is_public: {images}" in run.stderr
    more = ["--data_is_public", "--mutants", "--label_column", "label"]
    run = run_script("audit_privacy.py", "--train_data_dir", images, *more)
    assert run.returncode == 2 and f"--data_is_public: {images}" in run.stderr


MADE = {
    "the set": ("set", "set"),
    "its shards": ("set", "set/data"),
    "the samples of an adapter": ("adapter", "adapter/samples"),
    "a folder that holds a set": ("run/set", "run"),
    "a folder deep in which a set lies": ("all/runs/first/set", "all"),
}


@pytest.mark.parametrize("carrier, named", MADE.values(), ids=MADE)
def test_images_made_of_private_ones_are_neither_public_nor_private_anew(images, carrier, named):
    """As private ones of a run, they would lose what they cost."""
    (images / carrier).mkdir(parents=True)
    (images / named).mkdir(exist_ok=True, parents=True)
    (images / carrier / "sampling.json").write_text("{}")
    name, statement = str(images / named), images / carrier / "privacy.json"
    for refuse in (partial(refuse_as_public, "--stand_in"), refuse_as_private):
        refuse(name)
        statement.write_text("{}")
        with pytest.raises(UsageError, match=f"{images / carrier} has a privacy.json"):
            refuse(name)
        statement.unlink()


def test_images_beside_a_run_are_as_private_as_before(images):
    """privacy.json of a run in the folder above says nothing about other folders in it."""
    (images.parent / "privacy.json").write_text("{}")
    refuse_as_private(str(images))


def test_what_cannot_be_asked_is_told(capsys):
    """Offline, as the tests are."""
    refuse_as_public("--public_data", "someone/unheard-of")
    assert "may have a privacy.json on the Hub" in capsys.readouterr().err


def test_the_private_images_themselves_are_not_public(images, monkeypatch):
    monkeypatch.chdir(images.parent)
    (images / "some").mkdir()
    for public, private in (
        ("images", str(images)),
        ("images/some", "images/"),
        (str(images), "images/some"),
        ("user/scans", "user/scans"),
    ):
        with pytest.raises(UsageError, match="what is public must lie elsewhere"):
            refuse_own_images(["user/other", public], private)
    refuse_own_images(["user/other", "images/some"], "user/scans")


@pytest.mark.parametrize("deep", [False, True], ids=["a folder", "its files"])
def test_what_links_lead_to_is_asked_as_well(images, tmp_path, deep):
    """Images are read behind links, so that is where they lie."""
    (made := tmp_path / "run" / "set").mkdir(parents=True)
    (public := tmp_path / "public").mkdir()
    for number, place in enumerate((images, made)):
        Image.new("L", (8, 8), number).save(place / "x.png")
        link = public / place.name
        if deep:
            link.mkdir()
            (link / "x.png").symlink_to(place / "x.png")
        else:
            link.symlink_to(place)
    for private, other in ((images, public), (public, images)):
        with pytest.raises(UsageError, match="or leads to it by a link"):
            refuse_own_images([str(other)], str(private))
    refuse_own_images([str(images)], str(made))
    for refuse in (partial(refuse_as_public, "--stand_in"), refuse_as_private):
        refuse(str(public))
    (made / "privacy.json").write_text("{}")
    for refuse in (partial(refuse_as_public, "--stand_in"), refuse_as_private):
        with pytest.raises(UsageError, match=f"{made} has a privacy.json"):
            refuse(str(public))


def test_links_to_other_files_of_one_pool_are_no_overlap(images, tmp_path):
    for number, name in enumerate(("private", "public")):
        Image.new("L", (8, 8), number).save(images / f"{number}.png")
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").symlink_to(images / f"{number}.png")
    refuse_own_images([str(tmp_path / "public")], str(tmp_path / "private"))
    (tmp_path / "public" / "y.png").symlink_to(images / "0.png")
    with pytest.raises(UsageError, match="or leads to it by a link"):
        refuse_own_images([str(tmp_path / "public")], str(tmp_path / "private"))


def test_every_stage_asks_what_its_private_images_are(images, tiny_base, run_script, tmp_path):
    (images / "privacy.json").write_text("{}")
    data = ["--train_data_dir", images, "--label_column", "label", "--output_dir", tmp_path / "run"]
    budget = ["--target_epsilon", 8, "--target_delta", 1e-3]
    base = ["--pretrained_model_name_or_path", tiny_base]
    for script in (
        ["train_dp_lora.py", *base],
        ["release_means.py"],
        ["select_saliency.py", *base],
    ):
        run = run_script(*script, *data, *budget)
        assert run.returncode == 2 and "--warm_start, which counts it" in run.stderr


@pytest.mark.parametrize("script", ["train_dp_lora.py", "relabel.py", "rehearse.py"])
def test_a_stage_does_not_take_its_private_images_as_public(
    script, images, tiny_base, run_script, tmp_path
):
    public = {
        "train_dp_lora.py": ["--warm_start", images, "--warm_start_is_public"],
        "relabel.py": ["--synthetic", tmp_path / "set", "--extractor", "classifier"]
        + ["--public_data", images, "--classifier_weights", tmp_path / "x.safetensors"],
        "rehearse.py": ["--stand_in", images],
    }
    data = ["--train_data_dir", images, "--label_column", "label", "--output_dir", tmp_path / "run"]
    budget = ["--target_epsilon", 8, "--target_delta", 1e-3]
    base = ["--pretrained_model_name_or_path", tiny_base]
    run = run_script(script, *public[script], *base, *data, *budget)
    assert run.returncode == 2 and "what is public must lie elsewhere" in run.stderr


@pytest.mark.parametrize("script", ["curate.py", "relabel.py"])
def test_nor_a_network_that_learned_from_them(script, images, run_script, tmp_path):
    """Its features are a function of everybody, without noise."""
    weights = tmp_path / "weights.safetensors"
    network = CLASSIFIERS["cnn"](2).state_dict()
    data = ["--train_data_dir", images, "--label_column", "label", "--output_dir", tmp_path / "run"]
    budget = ["--target_epsilon", 8, "--target_delta", 1e-3, "--synthetic", tmp_path / "set"]
    extractor = ["--extractor", "classifier", "--classifier_weights", weights]
    for learned_from, refused in (([str(images.resolve())], True), (["elsewhere"], False)):
        save_file(network, weights, {"network": "cnn", "public_data": json.dumps(learned_from)})
        run = run_script(script, *data, *budget, *extractor)
        assert run.returncode == 2
        assert ("what is public must lie elsewhere" in run.stderr) == refused
    (images / "privacy.json").write_text("{}")
    save_file(network, weights, {"public_data": json.dumps([str(images)])})
    with pytest.raises(UsageError, match=f"learned from .*{REFUSED}"):
        list_public_data(ExtractorArguments("classifier", classifier_weights=str(weights)))


def test_a_network_tells_what_it_learned_from(images, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (images / name).mkdir()
        Image.new("L", (32, 32)).save(images / name / "x.png")
    weights = tmp_path / "weights.safetensors"
    monkeypatch.chdir(tmp_path)
    made = ExtractorArguments("classifier", public_data=["images"], public_steps=1)
    made.classifier_weights = str(weights)
    extractor = build_extractor(made, torch.device("cpu"))
    again = ExtractorArguments("classifier", classifier_weights=str(weights))
    assert list_public_data(again) == [str(images)]
    assert build_extractor(again, torch.device("cpu")).weights == extractor.weights
    for content in (b"not weights", b""):
        weights.write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read"):
            list_public_data(again)
    save_file({"other": torch.zeros(1)}, weights)
    with pytest.raises(UsageError, match="is not what --public_data makes"):
        build_extractor(again, torch.device("cpu"))


def test_evaluation_does_not_learn_from_the_images_to_protect(images, tmp_path, run_script):
    words = ["--synthetic", tmp_path, "--extractor", "classifier", "--public_data", images]
    run = run_script("evaluate.py", *words, "--test_data_dir", images)
    assert run.returncode == 2 and "or the test images be --test_is_public" in run.stderr
    extractor = ExtractorArguments("classifier", public_data=[str(images)])
    own, elsewhere = {"test_data_dir": str(images)}, {"test_data_dir": str(tmp_path / "elsewhere")}
    private = elsewhere | {"private_data_dir": str(images)}
    for sets in (own, private, private | {"test_is_public": True}):
        with pytest.raises(UsageError, match="what is public must lie elsewhere"):
            refuse_as_learned_from(EvaluateArguments(synthetic="set", **sets), extractor)
    for sets in (elsewhere, own | {"test_is_public": True}):
        refuse_as_learned_from(EvaluateArguments(synthetic="set", **sets), extractor)


@pytest.mark.parametrize(
    "script",
    ["train_dp_lora.py", "release_means.py", "curate.py", "rehearse.py", "audit_privacy.py"],
)
def test_results_do_not_lie_among_the_images(script, images, run_script, tmp_path, tiny_base):
    """The sheet of what training sees would be a row of the next run, of dozens of units."""
    Image.new("L", (32, 32)).save(images / "x.png")
    inside, budget = images / "runs" / "first", ["--target_epsilon", 8]
    data = ["--train_data_dir", images, "--output_dir", inside, *budget]
    more = {
        "curate.py": ["--synthetic", tmp_path / "set"],
        "audit_privacy.py": [],
        "release_means.py": ["--target_delta", 1e-3],
    }
    base = ["--pretrained_model_name_or_path", tiny_base, "--target_delta", 1e-3]
    run = run_script(script, *data, *more.get(script, base))
    assert run.returncode == 2 and "name a folder elsewhere" in run.stderr, run.stderr
    assert [path.name for path in images.iterdir()] == ["x.png"]


@pytest.mark.parametrize("script", ["curate.py", "relabel.py"])
def test_nor_among_the_synthetic_images(script, images, run_script, tmp_path):
    """Its digest would be another from then on."""
    (tmp_path / "set").mkdir()
    more = ["--train_data_dir", images, "--synthetic", tmp_path / "set"]
    for own in ([], ["--labeller", tmp_path]) if script == "relabel.py" else ([],):
        run = run_script(script, *more, *own, "--output_dir", tmp_path / "set" / "kept")
        assert run.returncode == 2 and "name a folder elsewhere" in run.stderr, run.stderr
        assert not list((tmp_path / "set").iterdir())
