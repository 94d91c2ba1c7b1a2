"""Mistakes a user can make, told in one sentence; on several processes, everyone stops."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

PATIENCE = timedelta(hours=6)  # of processes that wait for the main one, which checks all images


class UsageError(ValueError):
    """A bad argument or bad data: its message says what was wrong and what to do."""


class Stopped(Exception):
    """Training was asked to stop, and did, after a checkpoint."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.exit_code = 128 + signal


def on_main_process(work: Callable[[], object]) -> object:
    """Run `work` on the main process; every process gets its result, or its `UsageError`.

    Every process must call it: without it, the others would wait for a main process that stopped.

    Raises:
        UsageError: that of `work`; or several processes were started that do not know each other.
    """
    if _world_size() > 1 and PartialState().num_processes == 1:
        raise UsageError("several processes were started, but they do not know of each other")
    answer = [None, None]
    if _rank() == 0:
        try:
            answer = [work(), None]
        except UsageError as error:
            answer = [None, str(error)]
    result, mistake = broadcast_object_list(answer)
    if mistake is not None:
        raise UsageError(mistake)
    return result


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`, and end with a sentence on stderr rather than a traceback.

    Exit code 2 for a `UsageError`; 128 + signal for a clean stop; 1 if another process was lost.
    """
    where = f" (process {_rank()})" if _rank() else ""
    if _world_size() > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for Accelerator; and for PartialState:
        PartialState(cpu=True, timeout=PATIENCE)  # else each would think that it is alone
    try:
        main()
    except UsageError as error:
        print(f"error{where}: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(f"{stop}{where}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except RuntimeError as error:
        if not _lost_a_process(error):
            raise
        print(
            f"error{where}: another process ended, so this one does too; what was saved is safe: "
            f"go on with --resume_from_checkpoint latest ({str(error).splitlines()[0]})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an orderly exit would wait for the process that is gone


def _lost_a_process(error: RuntimeError) -> bool:
    signs = ("connection closed", "connection reset", "broken pipe", "timed out")
    from_network = isinstance(error, torch.distributed.DistError) or any(
        sign in str(error).lower() for sign in signs
    )
    return _world_size() > 1 and from_network


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
