"""How a script ends: a mistake of its user in one sentence, or a clean stop; on every process.

PyTorch is imported where it is needed: a mistake on the command line should not wait for it.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

from safetensors import SafetensorError

from utils.chatter import drop_chatter

PATIENCE = timedelta(hours=6)  # of processes that wait for the main one, which checks all images

BAD_PATHS = {
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG),
}
WINDOWS = (
    "on Windows it would not keep what it promises of private folders, that only their owner reads "
    "them, and of the ledger, that it outlives a power cut: run it in WSL (wsl --install)"
)
OUT_OF_MEMORY = (
    "the memory does not suffice. For training, take a smaller --train_batch_size, which changes "
    "no result, --gradient_checkpointing or --mixed_precision bf16 (or fewer draws, "
    "--noise_multiplicity, which does change it), and --resume_from_checkpoint latest if a "
    "checkpoint was saved; for drawing images, a smaller --batch_size"
)
MAKE_ROOM = "; make room, and give the command again"
# Of torch.save, and of safetensors: neither has an OSError.
DISK_IS_FULL = ("PytorchStreamWriter", "unexpected pos", "os error 28", "os error 122")


class UsageError(ValueError):
    """A bad argument or bad data: its message says what was wrong and what to do."""


class CannotLoad(UsageError):
    """A public model that is not there, or cannot be reached."""


class Stopped(Exception):
    """Training was asked to stop, and did, after a checkpoint."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.exit_code = 128 + signal


class StopRequest:
    """Within this context SIGTERM and Ctrl-C ask for a clean stop; a second Ctrl-C stops at once.

    A launcher that has lost one process sends the others SIGTERM: one that an error ends, mostly
    for that very reason, is left to say so.
    """

    def __enter__(self):
        self.signal: int | None = None
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, error, *_):
        is_told = error is not None and _world_size() > 1
        for number, handler in self._before.items():
            if not (is_told and number == signal.SIGTERM):
                signal.signal(number, handler)

    def _note(self, number, frame):
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def find_signal(self, accelerator) -> int:
        """The number of the signal that any process has received; 0 for none."""
        import torch

        received = torch.tensor([self.signal or 0], device=accelerator.device)
        return int(accelerator.gather(received).max())


def on_main_process(work: Callable[[], object]) -> object:
    """Run `work` on the main process; every process gets its result, or its `UsageError`.

    Every process must call it: otherwise the others would wait for a main process that stopped.

    Raises:
        UsageError: that of `work`; or several processes were started without a launcher, so that
            each believes it is the only one.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

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


def require_alike(told: dict) -> None:
    """Stop if the processes were told different things: each bounds what its own units contribute,
    and only what the main one was told is on record.

    Raises:
        UsageError: on every process; it names what differs.
    """
    from accelerate.utils import gather_object

    first, *others = gather_object([told])
    found = [difference for other in others for difference in find_differences(first, other)]
    if found:
        differ = dict.fromkeys(f"{name}: {here} and {there}" for name, here, there in found)
        raise UsageError(
            f"the processes were not started alike ({'; '.join(differ)}): give all of them the "
            "same command, files, packages and version of this code, and devices of one kind"
        )


def find_differences(one: dict, other: dict) -> Iterator[tuple[str, object, object]]:
    """What two nested dictionaries do not share: its name, and both values; None where it lacks."""
    for name in dict.fromkeys([*one, *other]):
        mine, theirs = one.get(name), other.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            yield from find_differences(mine, theirs)
        elif mine != theirs:
            yield name, mine, theirs


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`, and end with a sentence on stderr rather than a traceback.

    Exit code 2 for a `UsageError`, a path that cannot be read or written as it was meant, or a full
    disk; 128 + signal for a clean stop; 1 if memory ran out, or another
    process was lost.
    """
    where = f" (process {_rank()})" if _rank() else ""
    drop_chatter()
    if _world_size() > 1:
        _join_on_cpu()
    try:
        if sys.platform == "win32":
            raise UsageError(WINDOWS)
        main()
    except UsageError as error:
        print(f"error{where}: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(f"{stop}{where}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print(f"interrupted{where}; what was saved is safe", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # found while writing: no name then
        if error.errno not in BAD_PATHS or (error.filename is None and not is_full):
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        then = MAKE_ROOM if is_full else ""
        print(f"error{where}: {place}{error.strerror}{then}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError, SafetensorError) as error:
        if _ran_out_of_memory(error):
            print(f"error{where}: {OUT_OF_MEMORY} ({first_line(error)})", file=sys.stderr)
            sys.exit(1)
        if any(words in str(error) for words in DISK_IS_FULL):
            print(f"error{where}: a disk is full ({first_line(error)}){MAKE_ROOM}", file=sys.stderr)
            sys.exit(2)
        if not _lost_a_process(error):
            raise
        print(
            f"error{where}: another process ended, so this one does too; what was saved is safe: "
            "give the command again, of a private run with --resume_from_checkpoint latest "
            f"({first_line(error)})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an orderly exit would wait for the process that is gone


def _join_on_cpu() -> None:
    """Without a GPU, join the processes by gloo; else each would believe that it is alone."""
    import torch
    from accelerate import PartialState

    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for Accelerator; and for PartialState:
        PartialState(cpu=True, timeout=PATIENCE)


def first_line(error: BaseException) -> str:
    """What an error says first; its kind, if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _ran_out_of_memory(error: BaseException) -> bool:
    import torch

    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in str(error).lower() for sign in signs
    )


def _lost_a_process(error: BaseException) -> bool:
    import torch

    signs = ("connection closed", "connection reset", "broken pipe", "timed out")
    from_network = isinstance(error, torch.distributed.DistError) or any(
        sign in str(error).lower() for sign in signs
    )
    return _world_size() > 1 and from_network


def need_one_process(what: str) -> None:
    """Raises: UsageError if several processes were started for `what`, which is the work of one."""
    if _world_size() > 1:
        raise UsageError(f"{what} needs one process: start it with python")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
