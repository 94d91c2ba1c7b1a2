"""Clause 9: an epsilon is credited to images only after its statement was verified."""

import json
import shutil

import pytest
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from tests.conftest import read_json
from tests.sampling.conftest import find
from utils.arguments.sampling import SamplingArguments
from utils.arguments.training import ModelArguments
from utils.errors import UsageError
from utils.files import STATEMENT
from utils.ledger.statement import quote_total
from utils.sampling.generation import load_drawing, prepare_generation
from utils.sampling.sources import require_statement
from utils.sampling.synthetic_sets import read_privacy


def change_statement(folder, change) -> None:
    statement = read_json(folder / STATEMENT)
    change(statement)
    (folder / STATEMENT).write_text(json.dumps(statement))


def test_an_adapter_brings_its_verified_statement(tiny_base, adapter):
    source = find(tiny_base, adapter)
    assert source.statement == read_json(adapter / STATEMENT) and not source.is_public
    require_statement(source)


TAMPERED = {
    "epsilon": lambda s: s["epsilon"].update(add_or_remove_one=0.1),
    "weights": lambda s: s["files"].update({"pytorch_lora_weights.safetensors": "0" * 64}),
    "power": lambda s: s["membership_inference"].update({"0.01": 0.011}),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_statement_that_does_not_hold_is_refused(tiny_base, copied, what, tmp_path, run_script):
    change_statement(copied, TAMPERED[what])
    with pytest.raises(UsageError, match="--adapter"):
        find(tiny_base, copied)
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--adapter", copied]
    arguments += ["--prompts", "a", "--output_dir", tmp_path / "images"]
    if what == "epsilon":
        run = run_script("sample.py", *arguments)
        assert run.returncode == 2 and "come to" in run.stderr
        assert not (tmp_path / "images").exists()


def test_an_adapter_without_a_statement_is_of_unknown_privacy(tiny_base, copied, capsys):
    (copied / STATEMENT).unlink()
    source = find(tiny_base, copied)
    assert source.statement is None and not source.is_public
    assert "nobody can tell" in capsys.readouterr().err
    with pytest.raises(UsageError, match="has no privacy.json"):
        require_statement(source)


def test_another_base_than_that_of_the_training_is_told(tiny_base, adapter, tmp_path, capsys):
    """Of the same shape, it draws without an error."""
    other = shutil.copytree(tiny_base, tmp_path / "other")
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"][0] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    for base in (tiny_base, other):
        model = ModelArguments(pretrained_model_name_or_path=str(base))
        sampling = SamplingArguments(adapter=str(adapter))
        load_drawing(model, sampling, find(base, adapter), PartialState())
        said = capsys.readouterr().err
        assert (f"trained on another base model than {base}" in said) == (base == other), said


def test_an_adapter_that_is_replaced_while_it_is_loaded_is_refused(
    tiny_base, copied, tmp_path, accelerator
):
    """What was verified is what generates."""
    source, folder = find(tiny_base, copied), tmp_path / "images"
    weights = copied / "pytorch_lora_weights.safetensors"
    save_file({k: 2 * v for k, v in load_file(weights).items()}, weights)
    model = ModelArguments(pretrained_model_name_or_path=str(tiny_base))
    sampling = SamplingArguments(adapter=str(copied), prompts=["a"])
    with pytest.raises(UsageError, match="changed while it was loaded"):
        prepare_generation(model, sampling, source, folder, PartialState())
    assert not folder.exists()


@pytest.mark.parametrize("text", ["[]", '{"private": true}', '{"schema_version": 2, "private": 1}'])
def test_a_malformed_statement_gets_a_sentence(tiny_base, copied, tmp_path, text):
    for folder in (copied, tmp_path):
        (folder / STATEMENT).write_text(text)
    with pytest.raises(UsageError):
        find(tiny_base, copied)
    with pytest.raises(UsageError):
        find(tmp_path)
    with pytest.raises(UsageError):
        read_privacy(str(tmp_path), None)


@pytest.mark.slow
def test_a_set_brings_the_epsilon_that_was_verified(
    private_base, adapter, tmp_path, run_script, tiny_base
):
    arguments = ["--prompts", "a", "--num_images", 2, "--num_inference_steps", 1]
    for name, base, more in (
        ("both", private_base, ["--adapter", adapter]),
        ("base", private_base, []),
        ("public", tiny_base, []),
    ):
        images = ["--output_dir", tmp_path / name, "--pretrained_model_name_or_path", base]
        run = run_script("sample.py", *arguments, *images, *more)
        assert run.returncode == 0, run.stderr
    expected = {"both": find(private_base, adapter), "base": find(private_base)}
    for name, source in expected.items():
        statement, entry = read_privacy(str(tmp_path / name), None)
        assert statement == source.statement
        assert entry["epsilon"]["value"] == quote_total(statement)[0] > 0
    assert read_privacy(str(tmp_path / "public"), None)[1]["epsilon"]["value"] == 0
    # A record that does not say so, and a statement about other weights, prove nothing.
    settings = read_json(tmp_path / "public" / "sampling.json")
    del settings["is_public"]
    (tmp_path / "public" / "sampling.json").write_text(json.dumps(settings))
    assert read_privacy(str(tmp_path / "public"), None) == (None, {})
    change_statement(tmp_path / "both", TAMPERED["weights"])
    with pytest.raises(UsageError, match="about other weights"):
        read_privacy(str(tmp_path / "both"), None)


def test_what_is_stamped_not_private_brings_no_epsilon(tiny_base, copied, tmp_path):
    """Also if someone wrote a number beside the stamp, or broke the stamp off."""
    change_statement(copied, lambda s: s.update(private=False, warning="NOT PRIVATE"))
    source = find(tiny_base, copied)
    assert source.statement["private"] is False
    with pytest.raises(UsageError, match="stamped NOT PRIVATE"):
        require_statement(source)
    shutil.copy(copied / STATEMENT, tmp_path / STATEMENT)
    assert read_privacy(str(tmp_path), None)[1]["epsilon"]["value"] is None
    for change in (lambda s: s.pop("private"), lambda s: s.update(private="yes")):
        change_statement(copied, change)
        with pytest.raises(UsageError, match="--adapter"):
            find(tiny_base, copied)


def test_a_statement_names_its_circumstances(adapter):
    statement = read_json(adapter / STATEMENT)
    assert statement["schema_version"] == 2 and statement["made_by"]["version"]
    assert "operating system" in statement["randomness"] and statement["precision"] == "fp32"
    assert len(statement["date"]) == 10 and statement["audit"] is None
