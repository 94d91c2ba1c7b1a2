"""Collections of the Hub: repositories that belong together, each with a line about its privacy."""

import re

from huggingface_hub import HfApi

from utils.arguments.publishing import RepositoryArguments
from utils.errors import UsageError
from utils.hub.failures import HUB_ERRORS, explain
from utils.hub.privacy_words import name_one
from utils.ledger.statement import quote_total
from utils.privacy.accounting import quote

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
    repo_id: str, repo_type: str, statement: dict | None, args: RepositoryArguments, finish: str
) -> None:
    """Put a published repository into `--hub_collection`, unless it is there, with the epsilon of
    everything in it, a private base included.

    Args:
        finish: the command that tries again, for the message.

    Raises:
        UsageError: the Hub does not add it; what is published stays.
    """
    note = "no epsilon: nothing is promised about the images behind it"
    if statement is not None:
        epsilon, delta = quote_total(statement)
        note = f"epsilon {quote(epsilon)}, delta {delta:g}, for adding or removing one "
        note += name_one(statement)
    try:
        HfApi(token=args.hub_token).add_collection_item(
            find_collection(repo_id, args), repo_id, repo_type, note=note, exists_ok=True
        )
    except HUB_ERRORS as error:
        why = str(error) if isinstance(error, UsageError) else explain(error)
        raise UsageError(
            f"{repo_id} is published, but did not join the collection {args.hub_collection}: "
            f"{why}. To try again:\n{finish}"
        ) from error
