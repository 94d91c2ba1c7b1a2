"""Ordinary training on synthetic images, before the first private step."""

import torch
from PIL import Image

from tests.conftest import CAPTION, train_arguments, train_here
from tests.scripts.test_many_processes import forked
from utils.errors import UsageError
from utils.methods import fine_tuning, warm_start

WORKER = """
import sys
from types import SimpleNamespace
import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import nn
from utils.arguments.means import WarmStartArguments
from utils.arguments.training import TrainingArguments
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.methods import warm_start

together = Accelerator(cpu=True)
alone = SimpleNamespace(process_index=0, num_processes=1, is_main_process=False)

class Examples:
    def __init__(self, model, folders):
        self.model, self.captions = model, [""] * 20
        self.latents = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))

    def losses(self, rows, noise, quantiles):
        return (self.model(self.latents[rows] + noise) - quantiles[:, None]).square().mean(1)

def fit(accelerator, seed):
    torch.manual_seed(seed)
    model = nn.Linear(6, 3)
    warm_start.Examples = lambda stage, folders, _: Examples(model, folders)
    args = WarmStartArguments(["set"], warm_start_steps=3, warm_start_batch_size=7)
    training = SimpleNamespace(seed=None, train_batch_size=2)
    stage = SimpleNamespace(accelerator=accelerator)
    adapter = dict(model.named_parameters())
    warm_start.warm_up(stage, PerUnitGradients(model), adapter, args, training)
    return torch.cat([p.detach().flatten() for p in model.parameters()])

found, expected = gather(fit(together, together.process_index)[None]), fit(alone, 0)
if together.is_main_process:
    torch.save((found, expected), sys.argv[1])
"""


def test_processes_share_each_batch(tmp_path):
    """From the main one's weights, to what one process comes to; three processes, seven images."""
    (tmp_path / "worker.py").write_text(WORKER)
    run = forked(3, tmp_path / "worker.py", tmp_path / "found.pt")
    assert run.returncode == 0, run.stderr
    found, alone = torch.load(tmp_path / "found.pt")
    assert len(found) == 3 and (found == found[0]).all()
    torch.testing.assert_close(found[0], alone)


def test_no_more_pass_the_model_at_once_than_in_a_private_step(
    tiny_base, image_folder, tmp_path, monkeypatch
):
    """What fits in memory there fits here, and the weights do not depend on it."""
    (images := tmp_path / "set").mkdir()
    lines = []
    for i in range(7):
        Image.new("RGB", (16, 16), (30 * i, 99, 200 - 20 * i)).save(images / f"{i}.png")
        lines.append(f'{{"file_name": "{i}.png", "text": "the digit {i % 3}"}}')
    (images / "metadata.jsonl").write_text("\n".join(lines))
    passed, encoded, moves = [], [], []
    loss, fit, scale = warm_start.denoising_loss, warm_start.warm_up, warm_start.scale_to_unit_range

    def watched_loss(predictor, process, clean, *rest):
        passed.append(len(clean))
        return loss(predictor, process, clean, *rest)

    def watched_scale(pixels):
        encoded.append(len(pixels))
        return scale(pixels)

    def fit_only(stage, engine, *rest):
        before = torch.cat([p.detach().flatten() for p in engine.parameters])
        fit(stage, engine, *rest)
        after = torch.cat([p.detach().flatten() for p in engine.parameters])
        moves.append(after - before)
        raise UsageError("that was the warm start")

    monkeypatch.setattr(warm_start, "denoising_loss", watched_loss)
    monkeypatch.setattr(warm_start, "scale_to_unit_range", watched_scale)
    monkeypatch.setattr(warm_start, "images_at_once", lambda resolution: 3)
    monkeypatch.setattr(fine_tuning, "warm_up", fit_only)
    more = ["--warm_start", images, "--warm_start_is_public", "--warm_start_steps", 3]
    more += ["--warm_start_batch_size", 13, "--noise_multiplicity", 2, "--seed", 1]
    for size in (2, 30):
        arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *more)
        assert "that was" in train_here([*arguments, *CAPTION, "--train_batch_size", size])
    assert passed == [4, 4, 4, 1] * 3 + [13] * 3 and encoded == [3, 3, 1] * 2
    # Adam's steps are as large where a gradient is almost nothing as elsewhere.
    assert (moves[0] - moves[1]).norm() < 1e-3 * moves[0].norm()


def test_it_is_trained_for_what_the_private_steps_are(
    tiny_base, image_folder, tmp_path, monkeypatch
):
    (images := tmp_path / "set").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 99, 20)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"the digit {i}")
    seen = []

    def stop(predictor, process, clean, text, noise, quantiles):
        seen.append((process, quantiles))
        raise UsageError("that was the warm start")

    monkeypatch.setattr(warm_start, "denoising_loss", stop)
    more = ["--warm_start", images, "--warm_start_is_public", "--seed", 1]
    for own in ([], ["--timestep_sampling", "high_noise", "--snr_gamma", 5]):
        arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *more, *own)
        assert "that was" in train_here([*arguments, *CAPTION])
    (plain, uniform), (weighted, high) = seen
    torch.testing.assert_close(high, uniform.sqrt())
    assert (plain.snr_gamma, weighted.snr_gamma) == (None, 5)
