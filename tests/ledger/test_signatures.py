"""Signatures: by whom, of which statement, and what is refused."""

import json
import shutil
import subprocess

import pytest

from tests.conftest import train_arguments, train_here
from utils.errors import UsageError
from utils.hub.upload import list_files_to_publish
from utils.ledger.signatures import check_signature, sign

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen here")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two keys, and a file that trusts the first, as `officer@hospital`."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("officer", "stranger"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / name]
        subprocess.run(command, check=True)
    public = (folder / "officer.pub").read_text()
    (folder / "signers").write_text(f"officer@hospital {public}")
    return folder


@pytest.fixture(scope="module")
def published(tiny_base, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "run"
    assert "saved" in train_here(train_arguments(tiny_base, image_folder, folder))
    return folder


@pytest.fixture
def run(published, tmp_path):
    shutil.copytree(published, tmp_path / "run")
    return tmp_path / "run"


def report(*arguments) -> str:
    return train_here(list(arguments), "privacy_report")


def test_a_signature_says_who_and_is_published(run, keys):
    assert "privacy.json.sig" not in list_files_to_publish(run)
    assert "signed: " in report("sign", run, "--key", keys / "officer")
    assert "signed by officer@hospital" in report("verify", run, "--signers", keys / "signers")
    assert "signed; --signers FILE says by whom" in report("verify", run)
    assert "privacy.json.sig" in list_files_to_publish(run)


def test_a_stranger_and_a_changed_statement_are_found_out(run, keys):
    signers = str(keys / "signers")
    assert check_signature(run, None) == ([], [])
    assert check_signature(run, signers) == ([], ["it is not signed"])
    sign(run, str(keys / "stranger"))
    assert check_signature(run, signers)[1] == [f"it is signed by nobody in {signers}"]
    sign(run, str(keys / "officer"))
    assert check_signature(run, signers) == (["signed by officer@hospital"], [])
    statement = json.loads((run / "privacy.json").read_text())
    (run / "privacy.json").write_text(json.dumps(statement))  # the same, but for its bytes
    for trusted in (None, signers):
        assert check_signature(run, trusted)[1] == ["its signature is not of this statement"]
    with pytest.raises(UsageError, match="sign it again"):
        list_files_to_publish(run)


def test_a_signature_for_something_else_is_none(run, keys):
    """A key signs mail and commits, too: only what was signed as a privacy statement counts."""
    command = [
        "ssh-keygen",
        "-Y",
        "sign",
        "-n",
        "git",
        "-f",
        keys / "officer",
        run / "privacy.json",
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert check_signature(run, str(keys / "signers"))[1]


def test_mistakes_get_a_sentence(run, keys, tmp_path):
    assert "there is no such file" in report("sign", run, "--key", tmp_path / "none")
    assert "error: --key" in report("sign", run, "--key", keys / "signers")
    assert not (run / "privacy.json.sig").exists()
    assert "there is no such file" in report("verify", run, "--signers", tmp_path / "none")
    shown = report("verify", run / "privacy.json", "--signers", keys / "signers")
    assert "is not a folder or Hub id" in shown
    weights = run / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "is not signed" in report("sign", run, "--key", keys / "officer")
