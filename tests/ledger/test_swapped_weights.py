"""Other weights than were paid for are found out, however they are brought in."""

import json
from pathlib import Path

import pytest

from utils.errors import UsageError
from utils.files import PRIVATE_MARK
from utils.ledger import bases
from utils.ledger.bases import read_base_statement
from utils.ledger.verification import Source, find_problems, read_source
from utils.sampling.paid_sets import examine
from utils.sampling.shards import hash_set


def test_weights_do_not_pass_for_a_set(published):
    """Of a set the statement is about weights elsewhere; who holds them is no set."""
    (published / "a.safetensors").write_bytes(b"other")
    (published / "sampling.json").write_text(json.dumps({"set": hash_set(published)}))
    assert "a.safetensors is not the file that was paid for" in examine(str(published), None)[1]
    (published / "a.safetensors").unlink()
    (published / "b.safetensors").unlink()
    (published / "other.safetensors").write_bytes(b"other")
    (published / "sampling.json").write_text(json.dumps({"set": hash_set(published)}))
    problems = examine(str(published), None)[1]
    assert "other.safetensors: the statement does not account for it" in problems


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors.index.json",  # which diffusers reads first
        "unet/shard.dat",
        "unet/private/shard.dat",
        "transformer/config.json",
        "pytorch_lora_weights.safetensors.index.json",
    ],
)
def test_what_a_loader_reads_beside_the_weights_must_be_accounted_for(published, name):
    (published / name).parent.mkdir(parents=True, exist_ok=True)
    (published / name).write_text("{}")
    wrong = find_problems(read_source(str(published), None))
    assert wrong == [f"{name}: the statement does not account for it"]


def test_a_linked_folder_is_looked_into(published, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.bin").write_bytes(b"")
    (published / "more").symlink_to(tmp_path / "elsewhere")
    (published / "upwards").symlink_to(published)
    wrong = find_problems(read_source(str(published), None))
    assert wrong == ["more/model.bin: the statement does not account for it"]


def as_base(folder: Path) -> dict:
    """The statement of a run, as if it had trained the denoiser."""
    statement = json.loads((folder / "privacy.json").read_text())
    (folder / "unet").mkdir()
    for name in list(statement["files"]):
        (folder / name).rename(folder / "unet" / name)
        statement["files"][f"unet/{name}"] = statement["files"].pop(name)
    (folder / "privacy.json").write_text(json.dumps(statement))
    return statement


def test_a_base_has_no_other_denoiser_than_its_statement_is_about(published):
    statement = as_base(published)
    (published / "vae").mkdir()
    (published / "vae" / "model.safetensors").write_bytes(b"public")
    assert read_base_statement(str(published)) == (statement, True)
    (published / "unet" / "a.fp16.safetensors").write_bytes(b"other")  # --variant fp16
    with pytest.raises(UsageError, match="unet/a.fp16.safetensors: the statement does not account"):
        read_base_statement(str(published))


def test_the_statement_beside_a_single_file_counts(published):
    """As for adapters: it is named by its file, but its statement lies in its folder."""
    statement = json.loads((published / "privacy.json").read_text())
    assert read_base_statement(str(published / "a.safetensors")) == (statement, True)
    converted = published / "converted.safetensors"
    converted.write_bytes(b"the same weights, for another program")
    with pytest.raises(UsageError, match="converted.safetensors: it does not account for it; if"):
        read_base_statement(str(converted))
    (published / "privacy.json").unlink()
    assert read_base_statement(str(converted)) == (None, True)


def test_a_denoiser_of_private_images_needs_a_statement_that_counts_it(published):
    """Not that of a LoRA, which says nothing of what the denoiser cost."""
    (published / "unet").mkdir()
    (published / "unet" / "config.json").write_text(json.dumps({PRIVATE_MARK: True}))
    with pytest.raises(UsageError, match="it is not of the denoiser"):
        read_base_statement(str(published))
    (published / "unet" / "config.json").write_text("{}")
    assert read_base_statement(str(published))[1]


def test_a_base_on_the_hub_is_compared_too(published, monkeypatch):
    statement, files = as_base(published), ("unet/a.safetensors", "unet/b.safetensors", "vae/c.bin")
    monkeypatch.setattr(bases, "fetch_statement", lambda *_: (statement, True))
    asked = lambda *_: Source(published, statement, None, files)  # noqa: E731
    monkeypatch.setattr(bases, "read_source", asked)
    assert read_base_statement("someone/base") == (statement, True)
    (published / "unet" / "a.safetensors").write_bytes(b"of a run that cost more")
    with pytest.raises(UsageError, match="unet/a.safetensors is not the file that was paid for"):
        read_base_statement("someone/base")


@pytest.mark.parametrize("name", ["/etc/hostname", "../a", "a/../b", "a//b", "a\nok: it holds", ""])
def test_a_statement_is_about_files_of_its_own_folder(published, name):
    statement = json.loads((published / "privacy.json").read_text())
    statement["files"][name] = "digest"
    (published / "privacy.json").write_text(json.dumps(statement))
    (problem,) = find_problems(read_source(str(published), None))[:1]
    assert problem == f"the statement is about a file outside of its folder, {name!r}"


def test_a_run_is_verified_with_the_set_that_it_left(published):
    (published / "set").mkdir()
    (published / "set" / "000000.png").write_bytes(b"drawn")
    (published / "set" / "privacy.json").write_bytes((published / "privacy.json").read_bytes())
    (published / "set" / "sampling.json").write_text('{"set": "of other images"}')
    _, wrong, _ = examine(str(published), None)
    assert wrong == ["set/: its images are not those that were drawn"]
