"""Every mistake gets one sentence, exit code 2, and nothing lost."""

import json
import re
import shutil
import sys
from unittest.mock import patch

import pytest
import torch

from tests.conftest import BUDGET, read_json, train_arguments, train_here
from utils.errors import run_script


@pytest.fixture
def occupied(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "privacy.json").write_text("{}")
    return tmp_path / "run"


MISTAKES = [
    (["--train_data_dir", "nowhere"], "nowhere is not a folder"),
    (["--train_data_dir", "EMPTY"], "EMPTY"),
    (["--image_column", "picture"], "the columns are image, label"),
    (["--label_column", "class"], "the columns are image, label"),
    (["--caption_template", "a digit"], "has no {label}"),
    (["--target_delta", "0.025"], "below 1/N"),
    (["--target_epsilon", "0"], "--target_epsilon 0.0 must be positive and finite"),
    (["--target_epsilon", "inf"], "--target_epsilon inf must be positive and finite"),
    (["--latents_dir", "A_FILE"], "A_FILE takes no files"),
    (["--caption", "a", "--caption_column", "label"], "not both"),
    (["--train_data_dir", "A_FILE"], "A_FILE is a file: name its folder"),
    (["--target_epsilon", "1e-6", "--target_delta", "1e-9"], "larger epsilon"),
    (["--expected_batch_size", "0"], "number of units"),
    (["--target_modules", "to_out"], "did you mean to_out.0"),
    (["--target_modules", "to_qq"], "did you mean to_q"),
    (["--rank", "0"], "at least 1"),
    (["--resolution", "18"], "multiple of 4"),
    (["--output_dir", "OCCUPIED"], "already holds files"),
    (["--pretrained_model_name_or_path", "no/such/model"], "cannot load a pipeline"),
    (["--train_batch_size", "0"], "at least 1"),
    (["--report_to", "telegraph"], "telegraph"),
    (["--noise_multiplicity", "0"], "at least 1"),
    (["--ema_decay", "1"], "below 1"),
    (["--snr_gamma", "0"], "must be positive"),
    (["--privacy_unit_column", "patient"], "there is no such column"),
    (["--secure_noise", "--debug_noise_seed", "1"], "exclude each other"),
    (["--mixed_precision", "fp16"], "its loss scaling looks at the data; use bf16"),
    (["--config", "no.yaml"], "no such file"),
    (["--seed", "-1"], "--seed -1 must be from 0 to 4294967295"),
    (["--seed", "4294967296"], "must be from 0 to"),
    (["--report_to", "wandb"], "its package is not installed"),
    (["--hub_license", "Apache 2.0"], "did you mean apache-2.0?"),
    (["--hub_license", "MIT"], "did you mean mit?"),
    (["--guidance_scale", "-1"], "at least 0"),
    (["--num_inference_steps", "0"], "at least 1"),
    (["--resolution", "0"], "must be positive"),
    (["--resolution", "-16"], "must be positive"),
    (["--variant", "fp16"], "fp16"),
    (["--learning_rate", "nan"], "positive and finite"),
    (["--learning_rate", "-1"], "positive and finite"),
    (["--learning_rate", "inf"], "positive and finite"),
    (["--learning_rate", "0"], "positive and finite"),
    (["--lr_warmup_steps", "50"], "more than --max_train_steps"),
    (["--lr_warmup_steps", "-5"], "at least 0"),
    (["--adam_beta1", "2"], "--adam_beta1 2.0 must be at least 0 and below 1"),
    (["--adam_beta2", "nan"], "at least 0 and below 1"),
    (["--adam_epsilon", "-1"], "at least 0"),
    (["--adam_weight_decay", "-1"], "at least 0"),
    (["--snr_gamma", "nan"], "must be positive"),
    (["--debug_noise_seed", "-1"], "at least 0"),
    (["--caption_column", "label"], "holds classes, whose captions would be numbers"),
    (["--privacy_unit_column", "image"], "a unit is named by a text or a number"),
]


@pytest.mark.parametrize("change, words", MISTAKES, ids=[" ".join(c[0]) for c in MISTAKES])
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    tiny_base, image_folder, tmp_path, occupied, capsys, change, words
):
    """In this process, for speed; the exit code and stderr are what the script would give."""
    import train_dp_lora

    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "A_FILE").touch()
    names = {name: str(tmp_path / name) for name in ("EMPTY", "A_FILE")}
    names["OCCUPIED"] = str(occupied)
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "output")
    arguments += [names.get(word, word) for word in change]
    argv = patch.object(sys, "argv", ["train_dp_lora.py", *map(str, arguments)])
    with argv, pytest.raises(SystemExit) as exit:
        run_script(train_dp_lora.main)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2
    assert "error: " in said and words in said
    assert not list(tmp_path.rglob("*.safetensors"))
    assert (occupied / "privacy.json").read_text() == "{}"


@pytest.mark.parametrize(
    "budget, said",
    [
        (["--target_delta", 1e-3], "give exactly one of --target_epsilon and --noise_multiplier"),
        (["--target_epsilon", 8, "--noise_multiplier", 1], "give exactly one of --target_epsilon"),
        (["--target_epsilon", 8], "give --target_delta, below 1/N"),
    ],
)
def test_a_missing_budget_waits_for_no_model(image_folder, tmp_path, budget, said):
    """Which would be downloaded first."""
    data = ["--train_data_dir", image_folder, "--caption", "", "--output_dir", tmp_path / "run"]
    for more in ([], ["--release_means"], ["--select_saliency"]):
        base = ["--pretrained_model_name_or_path", "no/such/model", *more]
        assert said in train_here([*base, *data, *budget])


def test_a_repository_that_nothing_goes_to_is_spoken_of(image_folder, tmp_path, capsys):
    data = ["--train_data_dir", image_folder, "--caption", "", "--output_dir", tmp_path / "run"]
    base = ["--pretrained_model_name_or_path", "no/such/model", *BUDGET]
    train_here([*base, *data, "--hub_model_id", "user/scans"])
    assert capsys.readouterr().err.count("nothing will be published") == 1
    train_here([*base, *data])
    assert "published" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_change(capsys, error):
    def fail():
        raise error

    with pytest.raises(SystemExit) as exit:
        run_script(fail)
    said = capsys.readouterr().err
    assert exit.value.code == 1
    for option in ("--train_batch_size", "--gradient_checkpointing", "--batch_size"):
        assert option in said
    assert "more" not in said.split("(")[-1]


def test_a_path_that_cannot_be_used_is_one_sentence(tmp_path, capsys):
    """Wherever it is met: a file where a folder is wanted, or the other way round."""
    (tmp_path / "file").touch()
    for work in (
        (tmp_path / "file" / "run").mkdir,
        (tmp_path / "file").mkdir,
        tmp_path.read_text,
    ):
        with pytest.raises(SystemExit) as exit:
            run_script(work)
        said = capsys.readouterr().err
        assert (
            exit.value.code == 2 and said.startswith(f"error: {tmp_path}") and said.count("\n") == 1
        )
    with pytest.raises(FileNotFoundError):  # may be a bug
        run_script((tmp_path / "nowhere").read_text)


def test_ctrl_c_is_one_sentence(capsys):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        run_script(stop)
    assert exit.value.code == 130
    assert capsys.readouterr().err == "interrupted; what was saved is safe\n"


def test_another_error_stays_what_it_is():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_script(fail)


def test_an_attempt_that_failed_does_not_block_its_folder(
    run_script, tiny_base, image_folder, tmp_path
):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--dry_run")
    assert run_script("train_dp_lora.py", *arguments, "--target_delta", 1).returncode == 2
    run = run_script("train_dp_lora.py", *arguments)
    assert run.returncode == 0, run.stderr
    plan = json.loads(run.stdout)
    assert "one row" in plan["protected"] and "several rows" in plan["protected"]
    assert plan["sampling_rate"] == 0.25 and plan["num_units"] == 40
    assert 0 < plan["epsilon"]["add_or_remove_one"] <= 8 < plan["epsilon"]["replace_one"]
    assert plan["trainable_parameters"] > 0 and plan["per_unit_gradient_bytes"] > 0


def test_unreadable_images_are_skipped_or_refused(run_script, tiny_base, image_folder, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(image_folder, damaged)
    (damaged / "0" / "3.png").write_bytes(b"this is no image")
    arguments = train_arguments(tiny_base, damaged, tmp_path / "run", "--dry_run")
    run = run_script("train_dp_lora.py", *arguments)
    assert run.returncode == 0, run.stderr
    plan = json.loads(run.stdout)
    assert plan["images_left_out"] == {"unreadable": 1} and plan["num_units"] == 40
    assert "1 of 40 units have no image that can be used (left out: 1 unreadable)" in run.stderr
    run = run_script("train_dp_lora.py", *arguments, "--strict_images")
    assert run.returncode == 2 and f"{damaged / '0' / '3.png'} (unreadable)" in run.stderr


def test_the_command_line_wins_over_the_config(run_script, tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--dry_run")
    config = tmp_path / "run.yaml"
    config.write_text("max_grad_norm: 1e-2\nmax_train_steps: 7\n")
    plan = json.loads(run_script("train_dp_lora.py", "--config", config, *arguments).stdout)
    assert plan["max_grad_norm"] == 0.01 and plan["steps"] == 3
    config.write_text("max_grad_nrom: 1.0\n")
    run = run_script("train_dp_lora.py", "--config", config, *arguments)
    assert run.returncode == 2 and "unknown argument max_grad_nrom" in run.stderr


def test_reproducible_noise_is_stamped_not_private(run_script, tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--debug_noise_seed", 1)
    run = run_script("train_dp_lora.py", *arguments)
    assert run.returncode == 0, run.stderr
    assert read_json(tmp_path / "run" / "privacy.json")["private"] is False
    assert "NOT PRIVATE" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    "script",
    [
        "train_dp_lora",
        "train_dp_loda",
        "train_dp_ldm",
        "pretrain_ldm",
        "sample",
        "evaluate",
        "audit_privacy",
        "select_saliency",
        "push_to_hub",
    ],
)
def test_help_teaches(run_script, script):
    """The script's story and its command, then every option, in groups, with a line of help."""
    run = run_script(f"{script}.py", "--help")
    assert run.returncode == 0
    story, options = run.stdout.split("\noptions:\n")
    assert f"{script}.py" in story and "--output" in options
    entries = re.findall(r"^  (--\w+).*(?:\n {10,}.*)*", options, re.M)
    assert len(entries) == len(set(entries)) >= 7
    for entry in re.finditer(r"^  --\w+.*(?:\n {10,}.*)*", options, re.M):
        assert re.search(r" {2,}\w.{3}", entry[0][3:]), entry[0]  # its help
    groups = re.findall(r"^(\w.*):$", options, re.M)
    assert groups and all(len(group) >= 8 for group in groups)


@pytest.mark.parametrize("script", ["curate", "relabel", "release_means", "select_saliency"])
@pytest.mark.parametrize(
    "more, said",
    [
        (["--publish_now", "--resume_from_checkpoint", "latest"], "done whole, or not at all"),
        (["--replay_audit"], "--replay_audit replays training steps"),
        (["--push_to_hub"], "not published"),
        (["--noise_multiplier", 50], "noise_multiplier"),
    ],
)
def test_what_only_training_heeds_is_no_option_of_other_stages(
    tiny_base, image_folder, tmp_path, script, more, said
):
    """Were it ignored, they would spend what nobody meant."""
    publishes, elects = more[0] == "--push_to_hub", script in ("curate", "relabel")
    if publishes and elects:
        return  # which they do
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *more)
    if elects:
        at = arguments.index("--noise_multiplicity")
        arguments = [*arguments[:at], *arguments[at + 2 :], "--synthetic", image_folder]
    shown = train_here(arguments, script)
    assert shown.startswith("error:") and said in shown, shown
    assert not (tmp_path / "run" / "private" / "ledger.jsonl").exists()
