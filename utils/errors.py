"""Mistakes a user can make, told in one sentence; on several processes, everyone stops."""

import os
import sys
from collections.abc import Callable

from accelerate.utils import broadcast_object_list


class UsageError(ValueError):
    """A bad argument or bad data: its message says what was wrong and what to do."""


def on_main_process(work: Callable[[], object]) -> object:
    """Run `work` on the main process; every process gets its result, or its `UsageError`.

    Every process must call it: without it, the others would wait for a main process that stopped.
    """
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
    """Run a script's `main`; a `UsageError` becomes one sentence on stderr and exit code 2."""
    try:
        main()
    except UsageError as error:
        where = f" (process {_rank()})" if _rank() else ""
        print(f"error{where}: {error}", file=sys.stderr)
        sys.exit(2)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
