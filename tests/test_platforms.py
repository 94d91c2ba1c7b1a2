"""What is refused or avoided on other systems than Linux."""

import sys

import pytest
import torch
from accelerate import Accelerator

from utils.arguments.training import TrainingArguments
from utils.errors import run_script
from utils.methods.stages import start


def test_windows_gets_a_sentence_before_anything_else(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as end:
        run_script(lambda: ran.append(True))
    assert end.value.code == 2 and not ran
    assert "run it in WSL" in capsys.readouterr().err


@pytest.fixture
def mac(monkeypatch, no_device_yet):
    """A computer with Apple's GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)


def test_apples_gpu_would_be_taken(mac):
    assert Accelerator().device.type == "mps"


def test_apples_gpu_which_has_no_fp64_trains_nothing(mac, tmp_path, capsys):
    accelerator, _lock = start(TrainingArguments(output_dir=str(tmp_path / "run")))
    assert accelerator.device.type == "cpu"
    assert "the processor trains" in capsys.readouterr().err
