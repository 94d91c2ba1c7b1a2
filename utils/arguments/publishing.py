"""The options of publishing on the Hugging Face Hub."""

import re
from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.errors import UsageError


@dataclass
class RepositoryArguments:
    """The repository on the Hugging Face Hub."""

    hub_private_repo: bool = option("make the repository private, if it is new", False)
    hub_token: str | None = option(
        "token that may write; default: the one that `hf auth login` saved, or HF_TOKEN, which "
        "other users of the machine cannot see in its list of processes",
        None,
    )
    hub_collection: str | None = option(
        "collection to put it into, with its epsilon: a title (made if there is none of it) or "
        "the slug USER/TITLE-NUMBER in its address",
        None,
    )
    hub_license: str | None = option(
        "licence on the card, as the Hub names it: apache-2.0, openrail; default for a model: that "
        "of its base model",
        None,
    )

    def __post_init__(self):
        if self.hub_collection is not None and not self.hub_collection.strip():
            raise UsageError("--hub_collection must not be blank")
        name = self.hub_license
        if name is not None and not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*[+]*", name):
            likely = re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-")
            raise UsageError(
                f"--hub_license '{name}': the Hub names licences in small letters and without "
                f"spaces; did you mean {likely}?"
            )


@dataclass
class HubArguments(RepositoryArguments):
    """Publishing on the Hugging Face Hub."""

    hub_model_id: str | None = option("model repository to publish in: USER/NAME", None)


@dataclass
class PublishArguments(HubArguments):
    """Publishing on the Hugging Face Hub, when done."""

    push_to_hub: bool = option("publish the adapter, its statement, card and samples", False)


@dataclass
class PublishSetArguments(RepositoryArguments):
    """Publishing on the Hugging Face Hub, when done."""

    push_to_hub: bool = option("publish the images as a dataset", False)
    hub_dataset_id: str | None = option("dataset repository; needed for --push_to_hub", None)

    def __post_init__(self):
        super().__post_init__()
        if self.push_to_hub and self.hub_dataset_id is None:
            raise UsageError("--push_to_hub needs --hub_dataset_id")


@dataclass
class MetricsArguments:
    """What the card says about the images."""

    metrics_file: str | None = option("metrics.json of evaluate.py, to show on the card", None)
    publish_private_metrics: bool = option(
        "show also what was computed from private images, which no epsilon covers", False
    )
