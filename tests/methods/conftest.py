"""Synthetic sets to build on."""

import pytest

from tests.conftest import train_arguments, train_here

PROMPTS = ["--class_names", *"0123", "--caption_template", "the digit {label}"]


def draw(base, output, *more) -> str:
    arguments = ["--pretrained_model_name_or_path", base, *PROMPTS, "--num_images", 24]
    return train_here([*arguments, "--output_dir", output, *more], "sample")


@pytest.fixture(scope="module")
def drawn(tiny_base, image_folder, tmp_path_factory):
    """An adapter, and a set that was drawn with it."""
    folder = tmp_path_factory.mktemp("drawn")
    assert "saved" in train_here(train_arguments(tiny_base, image_folder, folder / "adapter"))
    assert "24 images" in draw(tiny_base, folder / "set", "--adapter", folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def public(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("public") / "set"
    assert "24 images" in draw(tiny_base, folder)
    return folder
