"""Collections: what is published joins one, with its epsilon, before or after others."""

import json

import pytest

from tests.conftest import read_json
from tests.hub_parts import Collections
from utils.arguments.publishing import RepositoryArguments
from utils.errors import UsageError
from utils.privacy.accounting import quote


@pytest.mark.slow
def test_what_is_published_joins_a_collection_once(hub, on_hub, finished):
    """By its title, which is made the first time, or by its slug."""
    push = ["push_to_hub.py", "--output_dir", finished, "--hub_model_id"]
    for _ in range(2):
        run = on_hub(*push, "user/first", "--hub_collection", "Private Digits")
        assert run.returncode == 0, run.stderr
    ((slug, made),) = [c for c in hub.collections.items() if c[1]["title"] == "Private Digits"]
    assert made["owner"]["name"] == "user"
    assert not made["private"]
    run = on_hub(*push, "user/second", "--hub_collection", slug)
    assert run.returncode == 0, run.stderr
    assert [(item["type"], item["id"]) for item in made["items"]] == [
        ("model", "user/first"),
        ("model", "user/second"),
    ]
    epsilon = read_json(finished / "privacy.json")["epsilon"]["add_or_remove_one"]
    note = f"epsilon {quote(epsilon)}, delta 0.001, for adding or removing one image"
    assert {item["note"]["text"] for item in made["items"]} == {note}


JOIN = """
import json, sys
from utils.arguments.publishing import RepositoryArguments
from utils.hub.collection import join_collection
name, statement = json.loads(sys.argv[1])
arguments = RepositoryArguments(hub_collection="Sets", hub_private_repo=True)
join_collection(name, "dataset", statement, arguments, "finish it")
"""


def test_its_note_is_the_epsilon_of_everything_and_claims_none_without(hub, on_hub, finished):
    """With a private base, what that cost is in it."""
    statement = read_json(finished / "privacy.json")
    statement["base"] = {"epsilon": {"add_or_remove_one": 9.5}, "delta": 0.002}
    for name, about in (("user/public", None), ("user/adapted", statement)):
        run = on_hub("-c", JOIN, json.dumps([name, about]))
        assert run.returncode == 0, run.stderr
    (made,) = (found for found in hub.collections.values() if found["title"] == "Sets")
    public, adapted = (item["note"]["text"] for item in made["items"])
    assert made["private"] and made["items"][0]["type"] == "dataset"
    assert public.startswith("no epsilon")
    assert adapted == "epsilon 9.500, delta 0.002, for adding or removing one image"


def test_what_did_not_join_is_published_and_says_how_to_go_on(hub, on_hub, finished, monkeypatch):
    monkeypatch.setattr(Collections, "add_to_collection", lambda self, slug: self.answer(500))
    push = ["push_to_hub.py", "--output_dir", finished, "--hub_model_id", "user/alone"]
    run = on_hub(*push, "--hub_collection", "Alone")
    assert run.returncode == 2 and "user/alone is published, but did not join" in run.stderr
    assert run.stderr.rstrip().endswith("--hub_model_id user/alone --hub_collection Alone")
    assert len(hub.repositories["model", "user/alone"].commits) == 2


def test_a_collection_that_is_not_there_stops_before_anything_is_published(hub, on_hub, finished):
    push = ["push_to_hub.py", "--output_dir", finished, "--hub_model_id", "user/third"]
    run = on_hub(*push, "--hub_collection", f"user/nothing-{'0' * 24}")
    assert run.returncode == 2 and "--hub_collection user/nothing-0" in run.stderr
    assert len(hub.repositories["model", "user/third"].commits) == 1
    with pytest.raises(UsageError, match="must not be blank"):
        RepositoryArguments(hub_collection=" ")
