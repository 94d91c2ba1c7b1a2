"""What a card calls the models behind it."""

import pytest

from utils.hub.cards import name_publicly
from utils.methods.kept_sets import find_maker


@pytest.mark.parametrize("name", ["user/model", "gpt2", "user/my-model_v1.5"])
def test_an_id_of_the_hub_is_told(name):
    assert name_publicly(name) == name


@pytest.mark.parametrize(
    "path",
    ["/home/smith/trial/adapter", "./adapter", "~/adapter", "../adapter", "runs/smith/adapter"],
)
def test_where_a_model_lay_on_another_machine_is_not_told(path):
    assert name_publicly(path) == "adapter"


def test_a_set_that_was_chosen_twice_is_still_of_its_model():
    drawn = {"pretrained_model_name_or_path": "user/base", "adapter": "user/adapter"}
    twice = {"relabelled": {}, "from": {"curated": {}, "from": drawn}}
    for settings in (drawn, twice["from"], twice):
        assert find_maker(settings) == ("user/base", "user/adapter")
    assert find_maker({"curated": {}, "from": {"released": {}}}) == (None, None)
