"""The licence on a card: as asked, checked before training; else that of the base model."""

import pytest

from tests.conftest import train_arguments, train_here
from utils.arguments.publishing import RepositoryArguments
from utils.arguments.training import ModelArguments
from utils.errors import UsageError
from utils.methods.publishing import choose_license


@pytest.mark.parametrize(
    "card, found",
    [
        ("---\nlicense: creativeml-openrail-m\n---\n", {"license": "creativeml-openrail-m"}),
        (
            "---\nlicense: other\nlicense_name: stable-licence\nlicense_link: LICENSE.md\n---\n",
            {"license": "other", "license_name": "stable-licence", "license_link": "LICENSE.md"},
        ),
        ("---\ntags: [a]\n---\n", {}),
        ("No front matter.", {}),
        ("---\nlicense: [a\n---\n", {}),
        (None, {}),
    ],
)
def test_without_one_it_is_that_of_the_base(tmp_path, card, found):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    base = ModelArguments(pretrained_model_name_or_path=str(tmp_path))
    assert choose_license(None, base) == found
    assert choose_license("mit", base) == {"license": "mit"}


def test_it_is_on_the_card(tiny_base, image_folder, tmp_path):
    import shutil

    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: openrail++\n---\n")
    for run, more, license in (("a", [], "openrail++"), ("b", ["--hub_license", "mit"], "mit")):
        arguments = train_arguments(tmp_path / "base", image_folder, tmp_path / run, *more)
        assert "saved the weights" in train_here(arguments)
        assert f"license: {license}\n" in (tmp_path / run / "README.md").read_text()


@pytest.mark.parametrize("name", ["Apache 2.0", "MIT", "apache_2.0", "", " mit", "cc by 4.0"])
def test_a_name_that_the_hub_does_not_use_is_refused(name):
    with pytest.raises(UsageError, match="did you mean"):
        RepositoryArguments(hub_license=name)


@pytest.mark.parametrize("name", ["apache-2.0", "mit", "openrail++", "creativeml-openrail-m"])
def test_names_of_the_hub_are_taken(name):
    assert RepositoryArguments(hub_license=name).hub_license == name
