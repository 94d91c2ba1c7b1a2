"""The options of privacy_report.py."""

import math
from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.arguments.values import check_between

# Whose run a file may describe.
SCRIPTS = {"dp-lora": "train_dp_lora", "dp-loda": "train_dp_loda", "dp-ldm": "train_dp_ldm"}


@dataclass
class ShowArguments:
    """every event, the epsilon of all, two plots"""

    path: str = option("run folder, ledger (.jsonl), statement (.json) or Hub id", positional=True)
    revision: str | None = option("revision of a Hub id", None)
    plot: str = option("file of the plot", "privacy_report.png")
    json: bool = option("print one JSON object at the end", False)


@dataclass
class VerifyArguments:
    """recompute and compare; exit code 1 if anything is wrong"""

    path: str = option("run folder, ledger (.jsonl), statement (.json) or Hub id", positional=True)
    revision: str | None = option("revision of a Hub id", None)
    signers: str | None = option(
        "file of those whom you trust, a name and a public SSH key a line (allowed_signers): the "
        "statement must be signed by one of them",
        None,
    )


@dataclass
class SignArguments:
    """sign a statement with an SSH key: who stands behind it?"""

    path: str = option("run folder", positional=True)
    key: str = option("private key, such as ~/.ssh/id_ed25519")


@dataclass
class OfficerArguments:
    """a page for whoever must sign: what is promised, and what to ask; exit code as verify's"""

    path: str = option("run folder, synthetic set or Hub id", positional=True)
    revision: str | None = option("revision of a Hub id", None)
    output_file: str = option("the page, one HTML file", "officer.html")


@dataclass
class PlanArguments:
    """how much noise for how much epsilon"""

    num_units: int = option("N, the number of privacy units")
    config: str | None = option(
        "YAML file of a run, for what is not given here; if it names a model, the run is timed on "
        "public noise",
        None,
    )
    method: str | None = option(
        "whose run --config is; default: dp-loda or dp-ldm if the file has an option of theirs, or "
        "is named so, else dp-lora",
        None,
        choices=list(SCRIPTS),
    )
    expected_batch_size: float | None = option("B, units a step", None)
    max_train_steps: int | None = option("private steps", None)
    target_delta: float | None = option("delta of epsilon, below 1/N", None)
    target_epsilon: float | None = option("find the noise for this epsilon", None)
    noise_multiplier: float | None = option("sigma: find its epsilon, instead", None)
    plot: str = option("file of the plot", "privacy_plan.png")
    json: bool = option("print one JSON object at the end", False)

    def __post_init__(self):
        check_between("num_units", self.num_units, 1, math.inf)


@dataclass
class GiveUpArguments:
    """hand back what a dead run had reserved"""

    ledger: str = option("ledger file", positional=True)
    run: str = option("run, as `show` names it", positional=True)
