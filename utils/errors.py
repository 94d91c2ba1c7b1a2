"""Mistakes a user can make, told in one sentence."""

import sys
from collections.abc import Callable


class UsageError(ValueError):
    """A bad argument or bad data: its message says what was wrong and what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UsageError` becomes one sentence on stderr and exit code 2."""
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
