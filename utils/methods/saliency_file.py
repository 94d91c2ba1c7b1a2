"""saliency.json: what a selection chose, and how stably; and whether a ledger paid for it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.errors import UsageError
from utils.files import SALIENCY, hash_file
from utils.ledger.charges import select_run
from utils.ledger.ledger import Ledger

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Saliency:
    """What `saliency.json` holds; everything in it is noisy or public.

    Attributes:
        candidates: names of the matrices. scored: what each is scored as.
        selected: names of the matrices to train.
        noisy_scores: by name of what is scored, the noisy mean over the expected units; noise_std:
            of their noise; stability, of_pure_noise: see `choice`; None for a random choice.
        settings: the arguments that led here.
        base_model_checksum: of the model whose gradients were measured.
        event, run: the mechanism, and its run in the ledger; None for a random choice.
    """

    mechanism: str
    scope: str
    normalise: str
    candidates: list[str]
    scored: list[str]
    selected: list[str]
    base_model_checksum: int
    noisy_scores: dict[str, float] | None = None
    noise_std: float | None = None
    stability: dict[str, float] | None = None
    of_pure_noise: float | None = None
    settings: dict | None = None
    event: dict | None = None
    run: str | None = None
    private: bool = True
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_saliency(path: str | Path) -> Saliency:
    """Raises: UsageError if the file is missing, is no selection, or comes from a newer version."""
    try:
        content = json.loads(Path(path).read_text())
        if content["schema_version"] > SCHEMA_VERSION:
            raise UsageError(f"--saliency_file {path} was written by a newer version of this code")
        return Saliency(**content)
    except (OSError, TypeError, KeyError) as error:
        raise UsageError(f"--saliency_file {path} cannot be read: {error}") from error
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--saliency_file {path} is not a selection: {error}") from error


def find_paid_selection(
    saliency_file: str | None, ledger: Ledger, base_checksum: int
) -> tuple[str, ...]:
    """The run of `--saliency_file` in the ledger; nothing if it was free.

    Raises:
        UsageError: the selection is about another base model, or the ledger did not pay for it.
    """
    if saliency_file is None:
        return ()
    saliency = read_saliency(saliency_file)
    if saliency.base_model_checksum != base_checksum:
        raise UsageError(
            f"--saliency_file {saliency_file} was made with another base model: select anew"
        )
    if saliency.mechanism == "random":
        return ()
    records, digest = ledger.records(), hash_file(Path(saliency_file))
    written = [r for r in select_run(records, saliency.run) if r["kind"] == "wrote"]
    if not any(record["files"].get(SALIENCY) == digest for record in written):
        raise UsageError(
            f"the ledger {ledger.path} did not pay for --saliency_file {saliency_file}: "
            "name the ledger that the selection is in, or select anew"
        )
    return (saliency.run,)
