"""A model that is told a class, not a caption (DiT)."""

import pytest
import torch

from tests.conftest import CAPTION, train_arguments, train_here
from tests.families import SIDE, save_family
from utils.errors import UsageError
from utils.models.families import find_family
from utils.models.families.dit import NO_CLASS
from utils.models.pipelines import load_pipeline

BY_NAME = ["--resolution", SIDE, "--caption_template", "{label}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dit")
    save_family("dit", path)
    return path


def test_a_caption_is_a_class_by_name_or_number_and_none_is_no_class(folder):
    family = find_family(load_pipeline(str(folder)))
    found = family.encode_text(["animal 7", " creature 7 ", "7", "999", ""], SIDE)["class_labels"]
    assert found.tolist() == [7, 7, 7, 999, NO_CLASS]
    for wrong in ("1000", "-1", "Animal 7", "the digit 7", "7.0", "²"):
        with pytest.raises(UsageError, match="1 captions or prompts are no class") as raised:
            family.encode_text(["3", wrong], SIDE)
        assert wrong not in str(raised.value).split("below")[0]


def test_no_class_is_dropped_at_random(folder):
    """As the model does while it trains: the same classes, the same prediction."""
    family = find_family(load_pipeline(str(folder)))
    noise, time = torch.randn(8, *family.latent_shape(SIDE)), torch.full((8,), 500)
    text = family.encode_text(["7"] * 8, SIDE)
    with torch.no_grad():
        assert torch.equal(*(family.predictor(noise, time, text) for _ in range(2)))


@pytest.mark.parametrize("script", ["train_dp_lora", "select_saliency"])
@pytest.mark.parametrize(
    "wrong", [CAPTION, ["--validation_prompt", "the digit 0"]], ids=["captions", "prompts"]
)
def test_what_is_no_class_is_refused_before_anything_is_spent(
    folder, image_folder, tmp_path, wrong, script
):
    arguments = train_arguments(folder, image_folder, tmp_path / "run", *BY_NAME, *wrong)
    shown = train_here(arguments, script)
    assert shown.startswith("error: ") and "no class of this model" in shown
    assert not (tmp_path / "run" / "private" / "ledger.jsonl").exists()


def test_a_model_of_other_classes_is_refused(folder, tmp_path):
    pipeline = load_pipeline(str(folder))
    pipeline.transformer.register_to_config(num_embeds_ada_norm=10)
    with pytest.raises(UsageError, match="it knows 10 classes"):
        find_family(pipeline).check_parts()
