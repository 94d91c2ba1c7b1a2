"""Collections of the Hub: repositories that belong together, each with a line about its privacy."""

import json
import re

from huggingface_hub import HfApi

from utils.arguments.publishing import RepositoryArguments
from utils.errors import UsageError
from utils.hub.failures import HUB_ERRORS, explain

SLUG = re.compile(r"[^/\s]+/[^/\s]+-[0-9a-f]{24}")  # USER/TITLE-NUMBER, as in its address


def find_collection(repo_id: str, args: RepositoryArguments) -> str:
    """The slug of `--hub_collection`: one that exists; or, by its title, that of the repository's
    owner, which is made if there is none.

    Raises:
        UsageError: it does not exist, or the Hub refuses its title or the token.
    """
    api, name = HfApi(token=args.hub_token), args.hub_collection
    try:
        if SLUG.fullmatch(name):
            return api.get_collection(name).slug
        return api.create_collection(
            name, namespace=repo_id.split("/")[0], private=args.hub_private_repo, exists_ok=True
        ).slug
    except HUB_ERRORS as error:
        raise UsageError(f"--hub_collection {name}: {explain(error)}") from error


def join_collection(
    repo_id: str, repo_type: str, statement: bytes | None, args: RepositoryArguments
) -> None:
    """Put the repository into `--hub_collection`, unless it is there, with its epsilon beside it.

    Raises:
        UsageError: see `find_collection`.
        HfHubHTTPError: the Hub does not add it.
    """
    note = "no epsilon: nothing is promised about the images behind it"
    if statement is not None:
        read = json.loads(statement)
        epsilon, unit = read["epsilon"]["add_or_remove_one"], read["privacy_unit"]
        who = "image" if unit == "image" else f"unit ({unit})"
        note = f"epsilon {epsilon:.2f}, delta {read['delta']:g}, for adding or removing one {who}"
    slug = find_collection(repo_id, args)
    HfApi(token=args.hub_token).add_collection_item(
        slug, repo_id, repo_type, note=note, exists_ok=True
    )
