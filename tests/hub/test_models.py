"""What is pushed to the Hub and pulled from it, by the real scripts and unmodified clients."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import CAPTION, few_fast, read_json, train_arguments
from tests.hub.conftest import COMMON, KINDS, find_secrets, push
from utils.arguments.parsing import parse
from utils.arguments.publishing import RepositoryArguments
from utils.errors import UsageError
from utils.hub.upload import ATTEMPTS, list_files_to_publish, upload


@pytest.mark.parametrize("kind", few_fast(KINDS))
def test_a_run_pushes_exactly_these_files_and_they_come_back_whole(
    hub, on_hub, smiths, tmp_path, kind
):
    output = tmp_path / "run"
    pushed = push(on_hub, kind, smiths, output, "--report_to", "tensorboard")
    assert pushed.returncode == 0, pushed.stderr
    repository = hub.repositories["model", f"user/{kind}"]
    assert sorted(repository.files()) == sorted(COMMON + KINDS[kind][1])
    assert len(repository.commits) == 2  # the empty start, and one more
    for name, content in repository.files().items():
        own = (output / name).read_bytes()
        assert content == own.replace(b"this/adapter", f"user/{kind}".encode())
        for secret in find_secrets(smiths, output):
            assert secret not in content, (name, secret)

    # What it left verifies from the Hub, draws the same images from there, and from its card.
    verified = on_hub("privacy_report.py", "verify", f"user/{kind}")
    assert verified.returncode == 0, verified.stderr
    arguments = ["--pretrained_model_name_or_path", "user/base", "--prompts", "the digit 3"]
    arguments += ["--num_images", 1, "--num_inference_steps", 2, "--seed", 5]
    for adapter, folder in ((f"user/{kind}", "theirs"), (output, "ours")):
        drawn = on_hub(
            "sample.py", *arguments, "--adapter", adapter, "--output_dir", tmp_path / folder
        )
        assert drawn.returncode == 0, drawn.stderr
    theirs, ours = (tmp_path / folder / "000000.png" for folder in ("theirs", "ours"))
    assert theirs.read_bytes() == ours.read_bytes()
    card = repository.files()["README.md"].decode()
    assert "without a safety checker" in card  # which plain diffusers would run
    from_the_card(on_hub, card, output)


def assert_alike(*paths) -> None:
    """Two images, up to the rounding of a file, which other rows of a batch can tip."""
    both = (np.asarray(Image.open(path), float) for path in paths)
    assert np.abs(np.subtract(*both)).max() <= 1  # of 255


def from_the_card(on_hub, card: str, output) -> None:
    """The Python in the card, away from this repository, draws the first image of samples/."""
    tmp_path, expected = output.parent, output / "samples" / "0000.png"
    usage, recompute = re.findall(r"```python\n(.*?)```", card, re.S)
    assert "this/adapter" not in usage
    ran = on_hub("-c", f"{usage}image.save('card.png')", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert_alike(tmp_path / "card.png", expected)

    counted = on_hub("-c", recompute, cwd=tmp_path)
    assert counted.returncode == 0, counted.stderr
    stated = read_json(output / "privacy.json")["epsilon"]["add_or_remove_one"]
    assert float(counted.stdout.split()[0]) == pytest.approx(stated, abs=1e-6)


@pytest.mark.slow
def test_a_passing_failure_is_tried_again_and_a_lasting_one_keeps_everything(hub, on_hub, finished):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    command = ["push_to_hub.py", "--output_dir", finished, "--hub_model_id", "user/flaky"]
    hub.failures = 10**6
    failed = on_hub(*command, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert failed.returncode == 2 and "All files are safe here" in failed.stderr
    finish = failed.stderr.strip().splitlines()[-1]
    assert finish.startswith("python push_to_hub.py --output_dir")
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert hub.repositories["model", "user/flaky"].files() == {}
    hub.failures = 1
    again = on_hub(*finish.split()[1:])  # the command that it printed
    assert again.returncode == 0, again.stderr
    assert sorted(hub.repositories["model", "user/flaky"].files()) == sorted(
        list_files_to_publish(finished)
    )
    hub.upload_failures = 1  # of the weights, this time
    once_more = on_hub(*command)
    assert once_more.returncode == 0, once_more.stderr


def test_a_bad_token_is_refused_before_anything_is_spent(hub, on_hub, image_folder, tmp_path):
    arguments = train_arguments("user/base", image_folder, tmp_path / "run")
    more = ["--push_to_hub", "--hub_model_id", "user/never", "--hub_token", "hf_wrong"]
    run = on_hub("train_dp_lora.py", *arguments, *more)
    assert run.returncode == 2 and "log in with `hf auth login`" in run.stderr
    assert not (tmp_path / "run" / "private" / "ledger.jsonl").exists()


def test_what_is_not_private_or_was_changed_is_not_published(
    hub, on_hub, finished, tiny_base, image_folder, tmp_path
):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--debug_noise_seed", 1)
    run = on_hub("train_dp_lora.py", *arguments, "--push_to_hub", "--hub_model_id", "user/refused")
    assert run.returncode == 2 and "NOT PRIVATE" in run.stderr
    statement = finished / "privacy.json"
    command = ["push_to_hub.py", "--output_dir", finished, "--hub_model_id", "user/refused"]
    changed = read_json(statement)
    changed["epsilon"]["add_or_remove_one"] /= 2
    original = statement.read_text()
    for text in (json.dumps(changed), original.replace('"private": true', '"private": false')):
        statement.write_text(text)
        refused = on_hub(*command)
        assert refused.returncode == 2 and "is not published" in refused.stderr
    assert ("model", "user/refused") not in hub.repositories


def test_weights_beside_a_statement_are_seen_on_the_hub_whatever_their_format(
    hub, on_hub, finished
):
    command = ["push_to_hub.py", "--output_dir", finished, "--hub_model_id", "user/mixed"]
    assert on_hub(*command).returncode == 0
    repository = hub.repositories["model", "user/mixed"]
    repository.commits.append(("more", repository.files() | {"extra.bin": b"weights"}))
    verified = on_hub("privacy_report.py", "verify", "user/mixed")
    assert verified.returncode == 1 and "extra.bin: the statement does not" in verified.stderr
    revision = repository.sha(1)
    verified = on_hub("privacy_report.py", "verify", "user/mixed", "--revision", revision)
    assert verified.returncode == 0, verified.stderr


def test_a_signature_is_published_and_says_who(on_hub, finished, tmp_path):
    key, signers = tmp_path / "key", tmp_path / "signers"
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)]
    subprocess.run(command, check=True)
    signers.write_text(f"officer@hospital {key.with_suffix('.pub').read_text()}")
    signed = on_hub("privacy_report.py", "sign", finished, "--key", key)
    assert signed.returncode == 0, signed.stderr
    pushed = on_hub("push_to_hub.py", "--output_dir", finished, "--hub_model_id", "user/signed")
    assert pushed.returncode == 0, pushed.stderr
    verified = on_hub("privacy_report.py", "verify", "user/signed", "--signers", signers)
    assert verified.returncode == 0, verified.stderr
    assert "signed by officer@hospital" in verified.stdout


def test_a_card_that_claims_another_epsilon_does_not_verify(on_hub, finished):
    card = finished / "README.md"
    text = card.read_text()
    for pattern in (r"(\n\s+value: )[\d.]+", r"(\*\*epsilon = )[\d.]+\d"):
        card.write_text(re.sub(pattern, r"\g<1>0.5", text))
        assert card.read_text() != text
        verified = on_hub("privacy_report.py", "verify", finished)
        assert verified.returncode == 1 and "README.md says epsilon 0.5" in verified.stderr
    card.write_text(text.replace("tags:", "tags: [", 1))
    verified = on_hub("privacy_report.py", "verify", finished)
    assert verified.returncode == 1 and "cannot be read" in verified.stderr


@pytest.mark.slow
def test_two_processes_push_once(hub, on_hub, image_folder, tmp_path):
    arguments = train_arguments("user/base", image_folder, tmp_path / "run")
    arguments += ["--push_to_hub", "--hub_model_id", "user/pair"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    run = on_hub(*launch, "train_dp_lora.py", *arguments)
    assert run.returncode == 0, run.stderr
    assert len(hub.repositories["model", "user/pair"].commits) == 2
    assert run.stdout.count("published ") == 1


def test_a_link_out_of_the_folder_is_not_followed(finished):
    (finished / "samples" / "0001.png").unlink()
    (finished / "samples" / "0001.png").symlink_to(finished / "private" / "ledger.jsonl")
    with pytest.raises(UsageError, match="leads out of what is published"):
        list_files_to_publish(finished)


def test_a_token_leaves_the_command_line(monkeypatch):
    """Trackers publish it."""

    monkeypatch.setattr(sys, "argv", ["x.py", "--hub_token", "hf_a", "--hub_token=hf_b"])
    (parsed,) = parse(RepositoryArguments, description="")
    assert parsed.hub_token == "hf_b"
    assert "hf_" not in " ".join(sys.argv)


@pytest.mark.slow
def test_private_images_may_come_from_the_hub(hub, on_hub, image_folder, tmp_path):
    hub.put("dataset", "user/scans", image_folder)
    arguments = ["--pretrained_model_name_or_path", "user/base", "--dataset_name", "user/scans"]
    arguments += [*CAPTION, "--noise_multiplier", 1, "--target_delta", 1e-3, "--dry_run"]
    arguments += ["--expected_batch_size", 10, "--max_train_steps", 2]
    run = on_hub("train_dp_lora.py", *arguments, "--output_dir", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    assert '"num_units": 40' in run.stdout
    arguments.remove("--dry_run")
    more = ["--discard_latents", "--num_validation_images", 0]
    run = on_hub("train_dp_lora.py", *arguments, *more, "--output_dir", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    assert "hf cache rm dataset/user/scans" in run.stdout
    private = tmp_path / "run" / "private"
    left = [path for path in (private / "latents").rglob("*") if path.suffix != ".lock"]
    assert left == [] and not (private / "cache").exists()


def test_only_what_is_meant_is_published(finished):
    """The list is made from the statement: whatever else lies in the folder stays."""
    for name in ("notes.txt", "optimizer.pt", "samples/me.jpg", "samples/0000.png.bak"):
        (finished / name).write_text("private")
    names = set(list_files_to_publish(finished))
    assert names == {"pytorch_lora_weights.safetensors", *COMMON}


def test_only_samples_that_the_run_generated_are_published(finished, image_folder):
    """Whatever has the name of a sample could be a private image."""
    private = image_folder / "0" / "0.png"
    for name in ("0000.png", "0007.png", "grid.png"):
        path = finished / "samples" / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(private.read_bytes())
        with pytest.raises(UsageError, match=f"{name} is not an image that this run generated"):
            list_files_to_publish(finished)
        path.unlink() if before is None else path.write_bytes(before)
    assert set(list_files_to_publish(finished)) == {"pytorch_lora_weights.safetensors", *COMMON}
    (finished / "private" / "samples.json").unlink()
    with pytest.raises(UsageError, match="is not an image that this run generated"):
        list_files_to_publish(finished)


def test_waiting_grows_and_a_refusal_is_not_tried_again(finished, monkeypatch):
    import httpx2

    from utils.hub import upload as hub_module

    waits, calls = [], []

    class Api:
        def __init__(self, token):
            pass

        def list_repo_files(self, *arguments, **more):
            return []

        def create_commit(self, *arguments, **more):
            calls.append(1)
            raise self.error

    monkeypatch.setattr(hub_module, "HfApi", Api)
    monkeypatch.setattr(hub_module.ModelCard, "validate", lambda self, repo_type: None)
    files = list_files_to_publish(finished)
    files["README.md"] = files["README.md"].read_bytes()
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = httpx2.ReadError("gone")
    errors = [(httpx2.ConnectError("gone"), ATTEMPTS), (ValueError("no"), 1), (wrapped, ATTEMPTS)]
    for error, tries in errors:
        Api.error = error
        calls.clear()
        with pytest.raises(UsageError, match="finish it"):
            upload("user/x", files, RepositoryArguments(), "model", "finish it", waits.append)
        assert len(calls) == tries
    assert waits == 2 * [1.0, 2.0, 4.0]


def test_the_card_shows_private_metrics_only_if_asked_to(hub, on_hub, finished, tmp_path):
    """What read private images, and figures about other images than this adapter's, stay off it."""
    statement = read_json(finished / "privacy.json")
    epsilon = statement["epsilon"]["add_or_remove_one"]
    public = {"value": 3.25, "std": 0.1, "covered_by_epsilon": True, "num_synthetic": 1000}
    private = {"value": 0.8765, "std": None, "covered_by_epsilon": False, "num_real": 360}
    known = {"value": epsilon, "std": None, "covered_by_epsilon": True}
    known["weights"] = statement["files"]
    path = tmp_path / "metrics.json"

    def push(metrics: dict, *more):
        path.write_text(json.dumps(metrics))
        name = ["--output_dir", finished, "--hub_model_id", "user/measured"]
        return on_hub("push_to_hub.py", *name, "--metrics_file", path, *more)

    def card() -> str:
        return hub.repositories["model", "user/measured"].files()["README.md"].decode()

    both = {"epsilon": known, "inception_score": public, "accuracy": private}
    run = push(both)
    assert run.returncode == 0, run.stderr
    assert "3.25" in card() and "1000 synthetic" in card() and "0.8765" not in card()
    run = push(both, "--publish_private_metrics")
    assert run.returncode == 0, run.stderr
    assert "0.8765" in card() and "published on purpose" in card()
    assert card().index("## Evaluation") < card().index("## Training")

    run = push({"epsilon": known, "accuracy": private})
    assert run.returncode == 2 and "--publish_private_metrics" in run.stderr
    for changed in ({"value": epsilon / 2}, {"weights": {"pytorch_lora_weights.safetensors": ""}}):
        run = push({"epsilon": known | changed, "inception_score": public})
        assert run.returncode == 2 and "images of other weights" in run.stderr
    run = push({"inception_score": 3})
    assert run.returncode == 2 and "cannot be read" in run.stderr
