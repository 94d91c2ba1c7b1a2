"""What is refused or avoided on other systems than Linux."""

import sys

import pytest
import torch
from accelerate import Accelerator

from utils.errors import run_script
from utils.privacy.training import avoid_devices_without_fp64


def test_windows_gets_a_sentence_before_anything_else(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as end:
        run_script(lambda: ran.append(True))
    assert end.value.code == 2 and not ran
    assert "run it in WSL" in capsys.readouterr().err


@pytest.mark.parametrize("avoids", [True, False])
def test_apples_gpu_which_has_no_fp64_trains_nothing(monkeypatch, no_device_yet, capsys, avoids):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    if avoids:
        avoid_devices_without_fp64()
        assert "the processor trains" in capsys.readouterr().err
    assert Accelerator().device.type == ("cpu" if avoids else "mps")
