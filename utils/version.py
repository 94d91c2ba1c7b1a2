"""Which version of this code made something: on every statement."""

import subprocess
from pathlib import Path

VERSION = "0.9.0"


def find_commit() -> str | None:
    """The commit of this checkout, with "-changed" if files differ from it; None outside of git."""
    here = Path(__file__).parent

    def ask(*command: str) -> str:
        command = ["git", "-C", str(here), *command]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        return f"{commit}-changed" if ask("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.CalledProcessError):
        return None
