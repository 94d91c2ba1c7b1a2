"""Collections: what is published joins one, with its epsilon, before or after others."""

import pytest

from tests.conftest import read_json
from utils.arguments.publishing import RepositoryArguments
from utils.errors import UsageError


def test_what_is_published_joins_a_collection_once(hub, on_hub, finished):
    """By its title, which is made the first time, or by its slug."""
    push = ["push_to_hub.py", "--output_dir", finished, "--hub_model_id"]
    for _ in range(2):
        run = on_hub(*push, "user/first", "--hub_collection", "Private Digits")
        assert run.returncode == 0, run.stderr
    (slug,) = hub.collections
    made = hub.collections[slug]
    assert made["title"] == "Private Digits" and made["owner"]["name"] == "user"
    assert not made["private"]
    run = on_hub(*push, "user/second", "--hub_collection", slug)
    assert run.returncode == 0, run.stderr
    assert [(item["type"], item["id"]) for item in made["items"]] == [
        ("model", "user/first"),
        ("model", "user/second"),
    ]
    epsilon = read_json(finished / "privacy.json")["epsilon"]["add_or_remove_one"]
    note = f"epsilon {epsilon:.2f}, delta 0.001, for adding or removing one image"
    assert {item["note"]["text"] for item in made["items"]} == {note}


def test_a_private_set_of_a_public_model_makes_no_claim(hub, on_hub):
    code = "from utils.arguments.publishing import RepositoryArguments as Arguments; "
    code += "from utils.hub.collection import join_collection; "
    code += "arguments = Arguments(hub_collection='Sets', hub_private_repo=True); "
    run = on_hub("-c", code + "join_collection('user/set', 'dataset', None, arguments)")
    assert run.returncode == 0, run.stderr
    (made,) = (found for found in hub.collections.values() if found["title"] == "Sets")
    assert made["private"] and made["items"][0]["type"] == "dataset"
    assert made["items"][0]["note"]["text"].startswith("no epsilon")


def test_a_collection_that_is_not_there_stops_before_anything_is_published(hub, on_hub, finished):
    push = ["push_to_hub.py", "--output_dir", finished, "--hub_model_id", "user/third"]
    run = on_hub(*push, "--hub_collection", f"user/nothing-{'0' * 24}")
    assert run.returncode == 2 and "--hub_collection user/nothing-0" in run.stderr
    assert len(hub.repositories["model", "user/third"].commits) == 1
    with pytest.raises(UsageError, match="must not be blank"):
        RepositoryArguments(hub_collection=" ")
