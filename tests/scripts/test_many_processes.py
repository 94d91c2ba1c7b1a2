"""Clauses 2, 3 and 4 hold however many processes share the work (gloo, on the CPU)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import (
    CAPTION,
    ROOT,
    few_fast,
    quiet_environment,
    read_json,
    train_arguments,
    train_here,
)
from tests.forks import run_in_fork
from utils.ledger.checkpoints import list_steps
from utils.ledger.ledger import Ledger
from utils.ledger.verification import find_problems, read_source

WORKER = """
import os
import sys
import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import nn
import utils.privacy.training
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.privacy.plan import PrivacyPlan
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import TrainingState, private_steps

accelerator = Accelerator(cpu=True)

def noise_on_every_process(total, plan, randomness, accelerator):
    noisy = total + plan.noise_std * randomness.noise(total.shape)
    return accelerator.reduce(noisy.float(), reduction="sum") / plan.expected_batch_size

def noise_on_one_process_after_sharing(total, plan, randomness, accelerator):
    total = accelerator.reduce(total, reduction="sum")
    if accelerator.is_main_process:
        total = total + plan.noise_std * randomness.noise(total.shape)
    return total.float() / plan.expected_batch_size

def noise_of_ones_own(total, plan, randomness, accelerator):
    total = accelerator.reduce(total, reduction="sum")
    return (total + plan.noise_std * randomness.noise(total.shape)).float()

assert accelerator.num_processes == int(os.environ["WORLD_SIZE"])
if sys.argv[2] != "none":
    utils.privacy.training.add_noise_once = globals()[sys.argv[2]]

def run(sigma, randomness, batch, rate):
    torch.manual_seed(accelerator.process_index)  # an adapter's start, when no --seed was given
    model = nn.Linear(500, 40)
    engine = PerUnitGradients(model)
    torch.manual_seed(0)
    data = torch.randn(31, 500)
    plan = PrivacyPlan(
        num_units=31, expected_batch_size=batch, steps=3, noise_multiplier=sigma, max_grad_norm=0.5,
        delta=1e-3,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    state = TrainingState(engine, optimizer, schedule)
    for _ in private_steps(accelerator, state, lambda u: model(data[u]).square().mean(1),
                           plan, randomness, 4):
        pass
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    everywhere = gather(after[None])
    assert (everywhere == everywhere[0]).all(), "the processes drifted apart"
    return (before - after) * plan.expected_batch_size

results = {
    "clipped": run(0.0, SecretRandomness(debug_seed=3), 20.0, 1.0),
    "noise": run(2.0, SecretRandomness(), 1e-9, 1.0),
    "processes": accelerator.num_processes,
}
if accelerator.is_main_process:
    torch.save(results, sys.argv[1])
"""


def launch(processes: int, tmp_path, mutant: str = "none") -> dict:
    script, output = tmp_path / "worker.py", tmp_path / f"{processes}.pt"
    script.write_text(WORKER)
    run = forked(processes, script, output, mutant)
    assert output.exists(), run.stderr
    return torch.load(output)


def forked(processes: int, script: Path, *arguments) -> subprocess.CompletedProcess:
    """Run a script on several processes of this machine (gloo), without torchrun, in seconds."""
    environment = quiet_environment() | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return run_in_fork([script, *arguments], ROOT, environment, processes)


def together(processes: int, script: Path, *arguments) -> subprocess.Popen:
    """Start a script on several processes of this machine (gloo), under torchrun."""
    # Not `accelerate launch --cpu`, which starts one process whatever it is told.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", processes, script, *arguments]
    return subprocess.Popen(
        list(map(str, command)), env=quiet_environment() | {"PYTHONPATH": str(ROOT)}, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def assert_noise_once(noise: torch.Tensor) -> None:
    """Three steps of noise of standard deviation sigma * C = 1, added once, not once a process.

    6.5 standard deviations: a false-alarm rate below 1e-9.
    """
    count = noise.numel()
    assert abs(noise.square().mean().item() / 3 - 1) < 6.5 * (2 / count) ** 0.5


def test_two_and_three_processes_do_what_one_does(tmp_path):
    """Batches of about 20 of 31 units: uneven shares. With B 1e-9 every batch is empty, and has
    more processes than units."""
    one, two, three = (launch(count, tmp_path) for count in (1, 2, 3))
    assert [result["processes"] for result in (one, two, three)] == [1, 2, 3]
    for several in (two, three):
        difference = (one["clipped"] - several["clipped"]).norm() / one["clipped"].norm()
        assert difference < 1e-5
        assert_noise_once(several["noise"])
    assert_noise_once(one["noise"])


def test_noise_on_every_process_is_caught(tmp_path):
    noise = launch(2, tmp_path, "noise_on_every_process")["noise"]
    with pytest.raises(AssertionError):
        assert_noise_once(noise)


def test_noise_on_the_wrong_process_is_caught(tmp_path):
    """Noise that only the first process adds, after the gradient was shared."""
    with pytest.raises(AssertionError, match="drifted apart|did not move"):
        launch(2, tmp_path, "noise_on_one_process_after_sharing")


def test_accelerate_seed_reaches_no_secret_on_any_process(tmp_path):
    """`--seed` gives every process the same generators; batches and noise differ all the same."""
    script = tmp_path / "seeded.py"
    script.write_text(
        "import sys, torch\n"
        "from accelerate import Accelerator\n"
        "from accelerate.utils import set_seed, gather\n"
        "from utils.privacy.randomness import SecretRandomness\n"
        "accelerator = Accelerator(cpu=True)\n"
        "set_seed(7)\n"
        "draws = gather(SecretRandomness().noise((1, 8)))\n"
        "plain = gather(torch.randn(1, 8))\n"
        "if accelerator.is_main_process: torch.save((draws, plain), sys.argv[1])\n"
    )
    runs = []
    for name in ("a.pt", "b.pt"):
        forked(2, script, tmp_path / name)
        runs.append(torch.load(tmp_path / name))
    (first, plain), (second, again) = runs
    assert torch.equal(plain[0], plain[1]) and torch.equal(plain, again)
    everything = torch.cat([first, second])
    assert len(everything.unique()) == everything.numel()


def test_processes_that_drift_apart_are_caught(tmp_path):
    """Each adds its own noise after the gradient was shared: no two have the same weights."""
    with pytest.raises(AssertionError, match="weights differ after step 1"):
        launch(2, tmp_path, "noise_of_ones_own")


MORE = ["--checkpointing_steps", 1, "--num_validation_images", 1, "--freeze_lora_a"]


@pytest.mark.slow
def test_a_run_of_two_processes_publishes_and_one_process_resumes_it(
    tiny_base, image_folder, tmp_path
):
    output = tmp_path / "run"
    arguments = train_arguments(tiny_base, image_folder, output, *MORE)
    said = together(2, ROOT / "train_dp_lora.py", *arguments).communicate()
    assert "saved the weights" in said[0] and said[0].count("saved the weights") == 1, said
    assert not find_problems(read_source(str(output), None))
    planned = read_json(output / "privacy.json")["epsilon"]
    resume = [*arguments, "--resume_from_checkpoint"]
    assert "saved the weights" in train_here([*resume, "latest"])
    assert read_json(output / "privacy.json")["epsilon"] == planned
    said = together(3, ROOT / "train_dp_lora.py", *resume, "checkpoint-2").communicate()
    assert "charges 1 steps once more" in said[0], said
    assert not find_problems(read_source(str(output), None))
    assert read_json(output / "privacy.json")["epsilon"] != planned


@pytest.mark.slow
def test_first_stages_share_two_processes(tiny_base, image_folder, tmp_path):
    output = tmp_path / "run"
    more = ["--release_means", "--generator_steps", 2, "--num_synthetic_images", 40]
    more += ["--num_frequencies", 50, "--warm_start_steps", 2, "--select_saliency"]
    arguments = train_arguments(tiny_base, image_folder, output, *more)
    run = forked(2, ROOT / "train_dp_lora.py", *arguments)
    assert run.returncode == 0 and run.stdout.count("saved the weights") == 1, run.stderr
    assert not find_problems(read_source(str(output), None))
    events = read_json(output / "privacy.json")["events"]
    assert [e["purpose"] for e in events] == ["means", "selection", "training"]


@pytest.mark.slow
def test_a_mistake_that_one_process_sees_ends_all(tiny_base, image_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other.txt").write_text("somebody else's")
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run")
    process = together(2, ROOT / "train_dp_lora.py", *arguments)
    said = process.communicate(timeout=600)[1]
    assert process.returncode != 0 and "already holds files" in said


def test_a_dry_run_of_two_processes_says_what_it_takes(tiny_base, image_folder, tmp_path):
    output = tmp_path / "run"
    arguments = train_arguments(tiny_base, image_folder, output, "--dry_run")
    run = forked(2, ROOT / "train_dp_lora.py", *arguments)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["forecast"]["hours"] > 0
    assert list((output / "private" / "latents").iterdir()) == []


@pytest.mark.parametrize(
    "script, more, what",
    [
        ("audit_privacy.py", [], "an audit"),
        ("train_dp_lora.py", ["--replay_audit", "--select_saliency"], "a replay"),
        ("rehearse.py", [], "a rehearsal"),
    ],
)
def test_what_is_of_one_process_says_so(tiny_base, image_folder, tmp_path, script, more, what):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *more)
    if what == "an audit":
        arguments = ["--pretrained_model_name_or_path", tiny_base, "--output_dir", tmp_path / "run"]
    run = forked(2, ROOT / script, *arguments)
    assert run.returncode == 2 and f"error: {what}" in run.stderr, run.stderr
    assert "needs one process: start it with python" in run.stderr
    assert not list(tmp_path.rglob("ledger.jsonl"))


def list_children(parent: int) -> list[int]:
    found = subprocess.run(
        ["ps", "--ppid", str(parent), "-o", "pid="], capture_output=True, text=True
    )
    return sorted(int(pid) for pid in found.stdout.split())


@pytest.mark.parametrize("victim", few_fast([0, 1]))
def test_one_killed_process_ends_the_others_and_the_ledger_is_true(
    tiny_base, image_folder, tmp_path, victim
):
    output = tmp_path / "run"
    more = ["--max_train_steps", 500, "--checkpointing_steps", 1, "--num_validation_images", 0]
    arguments = train_arguments(tiny_base, image_folder, output, *more)
    process = together(2, ROOT / "train_dp_lora.py", *arguments)
    checkpoints = output / "private" / "checkpoints"
    while len(list_steps(checkpoints)) < 2 and process.poll() is None:
        time.sleep(0.1)
    os.kill(list_children(process.pid)[victim], signal.SIGKILL)
    said = process.communicate(timeout=600)[1]
    assert process.returncode != 0 and "another process ended" in said, said

    records = Ledger(output / "private" / "ledger.jsonl").records()
    released = {r["step"] for r in records if r["kind"] == "release"}
    assert set(list_steps(checkpoints)) <= released and max(released) < 500


@pytest.mark.slow
def test_sampling_and_evaluation_share_their_work(tiny_base, image_folder, tmp_path):
    """Two processes draw the images that one does, and train the classifiers that one does."""
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = ["--pretrained_model_name_or_path", tiny_base, "--class_names", 0, 1, 2]
        arguments += [*CAPTION[2:], "--num_images", 7, "--num_inference_steps", 2]
        arguments += ["--synthetic", folder, "--test_data_dir", image_folder]
        arguments += ["--test_split", "train", "--classifier_steps", 2, "--classifier_seeds", 3]
        arguments += ["--batch_size", 2, "--evaluation_resolution", 16]
        said = together(processes, ROOT / "evaluate.py", *arguments).communicate()
        assert (folder / "metrics.json").exists(), said
        names = sorted(path.name for path in folder.glob("*.png"))
        results.append((names, read_json(folder / "metrics.json")))
    (names, one), (same, two) = results
    distances = [metrics["frechet_distance"]["value"] for metrics in (one, two)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-2)  # images differ by rounding
    one, two = one["accuracy"], two["accuracy"]
    assert names == same and len(names) == 8
    assert one["value"] == pytest.approx(two["value"], abs=0.06) and two["classifier_seeds"] == 3
