"""Synthetic sets on the Hub."""

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from tests.conftest import ROOT, read_json
from tests.hub_stand_in import TOKEN
from utils.arguments.publishing import RepositoryArguments
from utils.hub.upload import list_files_to_publish, upload
from utils.privacy.accounting import quote


@pytest.mark.slow
def test_a_synthetic_set_is_published_pulled_and_evaluated(
    hub, on_hub, finished, image_folder, tmp_path
):
    assert (
        on_hub(
            *("push_to_hub.py", "--output_dir", finished, "--hub_model_id", "user/drawer")
        ).returncode
        == 0
    )
    arguments = ["--pretrained_model_name_or_path", "user/base", "--adapter", "user/drawer"]
    arguments += ["--adapter_revision", hub.repositories["model", "user/drawer"].sha()]
    arguments += ["--class_names", 0, 1, 2, 3, "--caption_template", "the digit {label}"]
    arguments += ["--num_images", 8, "--num_inference_steps", 2, "--output_dir", tmp_path / "set"]
    more = ["--push_to_hub", "--hub_dataset_id", "user/synthetic", "--hub_private_repo"]
    run = on_hub("sample.py", *arguments, *more)
    assert run.returncode == 0, run.stderr
    repository = hub.repositories["dataset", "user/synthetic"]
    names = ["README.md", "data/train-00000-of-00001.parquet", "grid.png", "privacy.json"]
    assert repository.private and sorted(repository.files()) == names
    card = repository.files()["README.md"].decode()
    epsilon = read_json(finished / "privacy.json")["epsilon"]["add_or_remove_one"]
    assert "synthetic" in card and "user/drawer" in card and quote(epsilon) in card
    for content in repository.files().values():
        assert str(tmp_path).encode() not in content and TOKEN.encode() not in content

    code = "from datasets import load_dataset; rows = load_dataset('user/synthetic', split='train')"
    code += (
        "; print(list(rows['label']), rows[5]['text'], rows[5]['image'].size, rows.column_names)"
    )
    pulled = on_hub("-c", code, cwd=tmp_path)
    assert pulled.returncode == 0, pulled.stderr
    assert "['0', '1', '2', '3', '0', '1', '2', '3'] the digit 1 (16, 16)" in pulled.stdout

    arguments = ["--synthetic", "user/synthetic", "--synthetic_revision", repository.sha()]
    arguments += ["--test_data_dir", image_folder, "--test_split", "train"]
    arguments += ["--classifier_steps", 2, "--classifier_seeds", 1]
    output = tmp_path / "metrics.json"
    run = on_hub("evaluate.py", *arguments, "--metrics", "utility", "--output_file", output)
    assert run.returncode == 0, run.stderr
    metrics = read_json(output)
    assert metrics["accuracy"]["num_synthetic"] == 8
    assert metrics["epsilon"]["value"] == epsilon  # of the statement that came with the set


def test_images_of_an_adapter_that_changed_are_not_published(
    hub, on_hub, finished, tiny_base, tmp_path
):
    """Neither under the epsilon of its successor, nor with weights that nobody paid for."""
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--adapter", finished]
    arguments += ["--prompts", "the digit 3", "--num_images", 2, "--num_inference_steps", 2]
    arguments += ["--output_dir", tmp_path / "set"]
    push = ["--push_to_hub", "--hub_dataset_id", "user/changed"]
    assert on_hub("sample.py", *arguments).returncode == 0
    statement = finished / "privacy.json"
    original = statement.read_text()
    statement.write_text(original + "\n")  # as of another run under the same name
    run = on_hub("sample.py", *arguments, *push)
    assert run.returncode == 2 and "other settings" in run.stderr
    statement.write_text(original)
    weights = finished / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    run = on_hub("sample.py", *arguments, *push)
    assert run.returncode == 2 and "is not the file that was paid for" in run.stderr
    assert ("dataset", "user/changed") not in hub.repositories


def test_an_upload_replaces_what_an_earlier_one_left(hub, finished, monkeypatch):
    """Weights, shards and samples of before would stand under the new statement."""
    from utils.hub import upload as hub_module

    class Api(HfApi):
        def __init__(self, token):
            super().__init__(endpoint=hub.url, token=TOKEN)

    monkeypatch.setattr(hub_module, "HfApi", Api)
    monkeypatch.setattr(hub_module.ModelCard, "validate", lambda self, repo_type: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    old = finished.parent / "old"
    for name in ("unet/config.json", "samples/0077.png", "notes.md", "README.md"):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text("old")
    hub.put("model", "user/replaced", old)
    files = list_files_to_publish(finished)
    files["README.md"] = files["README.md"].read_bytes()
    upload("user/replaced", files, RepositoryArguments(), "model", "")
    there = hub.repositories["model", "user/replaced"].files()
    assert set(there) == {*files, "notes.md"}


def test_a_repository_of_something_else_is_left_alone(hub, on_hub, finished, image_folder):
    """A base model's weights would be removed, and real scans called synthetic."""
    scans = finished.parent / "scans"
    (scans / "data").mkdir(parents=True, exist_ok=True)
    (scans / "data" / "train-00000-of-00001.parquet").write_bytes(b"scans")
    hub.put("dataset", "user/scans", scans)
    before = [
        hub.repositories[r].files() for r in (("model", "user/base"), ("dataset", "user/scans"))
    ]
    push = ["push_to_hub.py", "--output_dir", finished, "--hub_model_id"]
    run = on_hub(*push, "user/base")
    assert run.returncode == 2 and "which no upload from here left" in run.stderr, run.stderr
    draw = ["--pretrained_model_name_or_path", "user/base", "--prompts", "a", "--num_images", 1]
    draw += ["--num_inference_steps", 1, "--output_dir", finished.parent / "drawn"]
    run = on_hub("sample.py", *draw, "--push_to_hub", "--hub_dataset_id", "user/scans")
    assert run.returncode == 2 and "which no upload from here left" in run.stderr, run.stderr
    after = [
        hub.repositories[r].files() for r in (("model", "user/base"), ("dataset", "user/scans"))
    ]
    assert after == before
    assert on_hub(*push, "user/again").returncode == 0
    assert on_hub(*push, "user/again").returncode == 0  # its own may be replaced
    run = on_hub(*push, "user/again", "--hub_private_repo")
    assert run.returncode == 2 and "there already, and public" in run.stderr, run.stderr


@pytest.mark.slow
def test_a_curated_set_is_published_with_all_that_it_cost(
    hub, on_hub, image_folder, tmp_path, tiny_base
):
    """Of means, which no model drew, and a vote."""
    data = ["--train_data_dir", image_folder, "--label_column", "label"]
    data += ["--caption_template", "the digit {label}", "--target_delta", 1e-3]
    small = ["--generator_steps", 1, "--num_synthetic_images", 16, "--num_frequencies", 10]
    arguments = [*data, *small, "--target_epsilon", 2, "--output_dir", tmp_path / "means"]
    assert on_hub("release_means.py", *arguments).returncode == 0
    arguments = [*data, "--synthetic", tmp_path / "means" / "set", "--target_epsilon", 3]
    arguments += ["--extractor", "classifier", "--output_dir", tmp_path / "curated"]
    arguments += ["--classifier_weights", ROOT / "examples" / "digits" / "extractor.safetensors"]
    pushing = ["--push_to_hub", "--hub_dataset_id", "user/curated"]
    refused = on_hub("curate.py", *arguments, *pushing, "--debug_noise_seed", 1)
    assert refused.returncode == 2 and "--push_to_hub is refused" in refused.stderr
    run = on_hub("curate.py", *arguments, *pushing)
    assert run.returncode == 0, run.stderr
    repository = hub.repositories["dataset", "user/curated"]
    names = ["README.md", "data/train-00000-of-00001.parquet", "grid.png", "privacy.json"]
    assert sorted(repository.files()) == names
    card = repository.files()["README.md"].decode()
    epsilon = read_json(tmp_path / "curated" / "privacy.json")["epsilon"]["add_or_remove_one"]
    assert quote(epsilon) in card and "Every unit voted" in card and "noisy mean" in card
    assert "8 synthetic images" in card and "a small generator" in card


def test_a_dry_run_finds_what_an_upload_would_refuse(on_hub, finished, tmp_path):
    dry = ["push_to_hub.py", "--output_dir", finished, "--dry_run"]
    shown = on_hub(*dry)
    assert shown.returncode == 0 and "pytorch_lora_weights.safetensors" in shown.stdout
    run = on_hub(*dry, "--metrics_file", tmp_path / "none.json")
    assert run.returncode == 2 and "none.json" in run.stderr
    card = finished / "README.md"
    card.write_text(card.read_text().replace("epsilon = ", "epsilon = 0."))
    assert "README.md says epsilon 0.7" in on_hub(*dry).stderr
    (finished / "grid.png").touch()
    assert "is a synthetic set, and no model" in on_hub(*dry).stderr
