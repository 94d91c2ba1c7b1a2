"""One file of what may be a folder, or a repository on the Hugging Face Hub."""

from pathlib import Path

import httpx2
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError


def fetch_file(
    name: str, file: str, revision: str | None = None, repo_type: str = "model"
) -> tuple[Path | None, bool]:
    """Where `file` of a folder or Hub id is now, or None; and whether its absence is known: a Hub
    that cannot be reached tells nothing."""
    folder = Path(name)
    if folder.exists():
        path = folder / file
        return (path if path.is_file() else None), True
    try:
        return Path(hf_hub_download(name, file, repo_type=repo_type, revision=revision)), True
    except RemoteEntryNotFoundError:
        return None, True
    except (OSError, ValueError, httpx2.HTTPError):
        return None, False
