"""Large images pass the model a few at a time, whoever draws, encodes or judges them."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from tests.conftest import ROOT, build_tiny_pipeline, train_arguments, train_here
from tests.methods.test_rehearsal import load
from utils import memory
from utils.arguments.evaluation import ExtractorArguments
from utils.arguments.sampling import DrawingArguments, SamplingArguments
from utils.arguments.training import TrainingArguments
from utils.audit.canaries import ImageCanaries
from utils.errors import UsageError
from utils.evaluation.features import build_extractor
from utils.methods import fine_tuning, trial
from utils.methods.pretraining import encode_all
from utils.methods.rendered import see_rendered
from utils.models.drawing import choose_settings
from utils.models.pipelines import load_pipeline
from utils.sampling.batches import generate, generate_all
from utils.sampling.variations import make_varying, vary


@pytest.fixture
def passes(monkeypatch):
    """How many images went through an autoencoder in each pass, if three are to."""
    found = []
    for name in ("encode", "decode"):
        whole = getattr(AutoencoderKL, name)

        def watched(self, images, *args, whole=whole, **more):
            found.append(len(images))
            return whole(self, images, *args, **more)

        monkeypatch.setattr(AutoencoderKL, name, watched)
    monkeypatch.setattr(memory, "PIXELS_AT_ONCE", 3 * 16**2)
    return found


def test_how_many_fit():
    sides = (16, 128, 256, 512, 1024, 2048)
    assert [memory.images_at_once(side) for side in sides] == [64, 64, 16, 4, 1, 1]


def test_training_draws_its_samples_a_few_at_a_time(tiny_base, image_folder, tmp_path, passes):
    more = ["--num_validation_images", 7, "--validation_steps", 2]
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *more)
    assert "saved the weights" in train_here(arguments)
    assert len(list((tmp_path / "run" / "samples").glob("000?.png"))) == 7
    assert max(passes) == 3


@pytest.mark.parametrize("asked, largest", [([], 3), (["--batch_size", 5], 5)])
def test_a_set_is_drawn_a_few_at_a_time_unless_told(tiny_base, tmp_path, passes, asked, largest):
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--class_names", 0, 1, 2]
    arguments += ["--num_images", 7, "--num_inference_steps", 2, "--output_dir", tmp_path / "set"]
    assert "7 images" in train_here([*arguments, *asked], "sample")
    assert max(passes) == largest


@pytest.mark.parametrize("asked", [{"batch_size": 0}, {"num_images": 0}, {"batch_size": -1}])
def test_none_at_once_is_no_batch(asked):
    with pytest.raises(UsageError, match="must be at least 1"):
        SamplingArguments(prompts=[""], **asked)


def test_others_take_a_few_at_a_time(tiny_base, passes):
    pipeline = build_tiny_pipeline("epsilon")
    drawing = choose_settings(pipeline, DrawingArguments(num_inference_steps=2), 16)
    drawing.use_scheduler(pipeline)
    prompts = [f"the digit {i}" for i in range(7)]
    images = generate_all(pipeline, prompts, 1, drawing)
    alone = generate(pipeline, prompts[5:6], [5], 1, drawing)[0]
    pairs = zip(images[5].tobytes(), alone.tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1
    grey = [Image.new("RGB", (16, 16), "grey")] * 7
    assert len(vary(make_varying(pipeline), grey, prompts, 0.5, drawing, 0)) == 7
    pixels = torch.zeros(7, 3, 16, 16, dtype=torch.uint8)
    assert len(encode_all(pipeline.vae, pixels, "cpu")) == 7
    weights = str(ROOT / "examples/digits/extractor.safetensors")
    asked = ExtractorArguments("classifier", classifier_weights=weights)
    extractor = build_extractor(asked, torch.device("cpu"))
    rendered = see_rendered(extractor, (str(tiny_base), None, None, None), torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert len(rendered.network(pixels)[0]) == 7
    assert max(passes) == 3 and passes.count(1) >= 4


def test_losses_are_of_a_few_images_at_a_time(tiny_base, image_folder, tmp_path, monkeypatch):
    """Those that judge a rehearsal, and those of an audit's canaries."""
    found, passed, whole = load(tiny_base, image_folder, tmp_path), [], UNet2DConditionModel.forward

    def watched(self, rows, *args, **more):
        passed.append(len(rows))
        return whole(self, rows, *args, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    monkeypatch.setattr(memory, "PIXELS_AT_ONCE", 3 * 16**2)
    pipeline, training = load_pipeline(str(tiny_base)), TrainingArguments(output_dir=str(tmp_path))
    assert trial.judge(pipeline, trial.encode_judges(pipeline, found), training) > 0
    assert passed == [3 * trial.JUDGED_AT] * 5 + [trial.JUDGED_AT]
    passed.clear()
    included = torch.ones(7, dtype=torch.bool)
    ImageCanaries(pipeline, found.judged_on, 16, included, tmp_path / "latents")
    assert passed == [3 * 16, 3 * 16, 16]


def test_no_pass_before_training_is_larger_than_one_of_training(
    tiny_base, image_folder, tmp_path, monkeypatch
):
    """Of one image with sixteen draws, on an fp32 base without autocast, it would be."""
    passed, whole = [], UNet2DConditionModel.forward

    def watched(self, rows, *args, **more):
        passed.append(len(rows))
        return whole(self, rows, *args, **more)

    def stop(*_):
        raise UsageError("that was before training")

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    monkeypatch.setattr(fine_tuning, "reserve", stop)
    more = ["--noise_multiplicity", 16, "--train_batch_size", 1]
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *more)
    assert "that was before training" in train_here(arguments)
    assert passed and max(passed) == 2
