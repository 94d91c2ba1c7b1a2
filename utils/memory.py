"""How much memory something takes, on the device where it runs."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

PIXELS_AT_ONCE = 2**20  # four images of 512 pixels, of which an autoencoder has room for few
RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def images_at_once(resolution: int) -> int:
    """How many images, of so many pixels a side, are encoded, drawn or judged in one batch."""
    return max(1, min(64, PIXELS_AT_ONCE // resolution**2))


@dataclass
class Memory:
    """Bytes: in use before, and at the most while it was measured; None where nobody can tell."""

    before: int | None = None
    peak: int | None = None

    @property
    def added(self) -> int | None:
        return None if self.peak is None or self.before is None else self.peak - self.before


@contextmanager
def measure_memory(device: torch.device) -> Iterator[Memory]:
    """Fills what it gives when the context is left: the allocations of a GPU, or of this process
    on a CPU (Linux: elsewhere the peak cannot be reset, and None is left)."""
    found = Memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        found.before = torch.cuda.memory_allocated(device)
        yield found
        found.peak = torch.cuda.max_memory_allocated(device)
        return
    try:
        RESET.write_text("5")  # VmHWM starts again from here (man 5 proc)
        found.before = _read_status("VmRSS")
    except OSError:
        yield found
        return
    yield found
    found.peak = _read_status("VmHWM")


def _read_status(name: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def peak_of_process() -> int:
    """The most that this process has ever taken, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
