"""What people do with bases of any family, beyond the arithmetic: files, options, samplers."""

import shutil
from fnmatch import fnmatch

import pytest
import sentencepiece
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image

from tests.conftest import build_tiny_pipeline, train_arguments, train_here
from tests.families import FAMILIES, SIDE, build_family, save_family
from tests.family_inputs import list_captions
from utils.arguments.sampling import DrawingArguments
from utils.errors import UsageError
from utils.models.drawing import choose_settings
from utils.models.families import find_family
from utils.models.pipelines import list_parts, load_pipeline, prepare_pipeline
from utils.models.placement import halve_frozen, ready_to_draw
from utils.models.shapes import CONFIGS, build_from_configs
from utils.models.text import embed_captions
from utils.sampling.batches import generate
from utils.sampling.variations import make_varying, vary


@pytest.mark.parametrize("name", FAMILIES)
def test_it_can_be_planned_from_the_files_of_its_configuration(tmp_path, name):
    """Under the older name of its transformer's class; with the names of its classes; with the
    template of a chat, which is a file of its own."""
    save_family(name, tmp_path / "base")
    kept = [path for path in (tmp_path / "base").rglob("*") if path.is_file()]
    for path in kept:
        if any(fnmatch(path.name, pattern) for pattern in CONFIGS):
            (copy := tmp_path / "shape" / path.relative_to(tmp_path / "base")).parent.mkdir(
                parents=True, exist_ok=True
            )
            shutil.copy(path, copy)
    planned = prepare_pipeline(build_from_configs(tmp_path / "shape"), name)
    real = load_pipeline(str(tmp_path / "base"))
    assert type(planned.transformer) is type(real.transformer)
    assert getattr(planned, "labels", {}) == getattr(real, "labels", {})
    text, same = (
        find_family(pipe).encode_text(list_captions(find_family(pipe)), SIDE)
        for pipe in (planned, real)
    )
    assert {k: v.shape for k, v in text.items()} == {k: v.shape for k, v in same.items()}


def test_a_tokenizer_that_comes_as_a_sentencepiece_model_only_is_read(tmp_path):
    """As PixArt-Sigma's does."""
    save_family("pixart", tmp_path / "base")
    folder = tmp_path / "base" / "tokenizer"
    for path in folder.iterdir():
        path.unlink()
    (tmp_path / "text").write_text("\n".join("the digit " + str(i) for i in range(500)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(folder / "spiece"), vocab_size=40,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}'
    )
    family, caption = find_family(load_pipeline(str(tmp_path / "base"))), "the digit 7"
    text = family.encode_text([caption], SIDE)
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model")).encode(caption)
    assert text["encoder_attention_mask"].sum() == len(pieces) + 1  # and an end
    assert family.count_cut([caption, 200 * caption]) == 1


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_more_tokens_than_are_read_are_refused_before_anything_is_spent(
    name, image_folder, tmp_path
):
    save_family(name, tmp_path / "base")
    more = ["--resolution", SIDE, "--max_sequence_length", 600]
    shown = train_here(train_arguments(tmp_path / "base", image_folder, tmp_path / "run", *more))
    assert shown.startswith("error: ") and "reads at most 512 tokens" in shown
    assert not (tmp_path / "run" / "private" / "ledger.jsonl").exists()


def test_a_run_is_not_resumed_with_captions_read_otherwise(image_folder, tmp_path):
    """Here FLUX.1 would be told of another guidance, which is free to change elsewhere."""
    save_family("flux", tmp_path / "base")
    more = ["--resolution", SIDE, "--num_validation_images", 0]
    arguments = train_arguments(tmp_path / "base", image_folder, tmp_path / "run", *more)
    assert "saved the weights" in train_here(arguments)
    again = [*arguments, "--resume_from_checkpoint", "latest"]
    assert "saved the weights" in train_here(again)
    assert train_here([*again, "--guidance_scale", 7]).startswith("error: ")


def test_a_negative_prompt_that_flux_would_ignore_is_refused():
    pipeline = prepare_pipeline(build_family("flux"), "flux")
    asked = DrawingArguments(negative_prompt="blurred")
    with pytest.raises(UsageError, match="negative_prompt is nothing that FLUX.1 takes"):
        choose_settings(pipeline, asked, SIDE)


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "z_image", "pixart"])
def test_what_fills_a_caption_up_says_nothing_of_what_it_is_about(name):
    """By its summary a caption counts towards the nearest of some prompts."""
    family, found = find_family(prepare_pipeline(build_family(name), name)), []
    for family.text_length in (100, 160):
        with torch.no_grad():
            found.append(family.summarise("the digit 3"))
    torch.testing.assert_close(*found)


def test_what_else_captions_depend_on_is_known():
    """The template of a chat: text that was cached under another is not read."""
    family = find_family(build_family("z_image"))
    before = repr(family.describe_reading())
    family.pipeline.tokenizer.chat_template += " "
    assert repr(family.describe_reading()) != before


def test_an_image_is_the_same_again_with_a_sampler_that_adds_noise():
    pipeline = build_tiny_pipeline("epsilon")
    scheduler = {"_class_name": EulerAncestralDiscreteScheduler.__name__}
    recorded = {"scheduler": scheduler, "num_inference_steps": 3, "guidance_scale": 1.0}
    drawing = choose_settings(pipeline, DrawingArguments(), 16, recorded)
    drawing.use_scheduler(pipeline)
    alone, again = (generate(pipeline, ["the digit 3"], [5], 1, drawing)[0] for _ in range(2))
    with_others = generate(pipeline, ["the digit 1", "the digit 3"], [4, 5], 1, drawing)[1]
    assert list(alone.getdata()) == list(again.getdata())
    pairs = zip(alone.tobytes(), with_others.tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_variations_have_the_size_of_what_was_drawn(name):
    pipeline = prepare_pipeline(build_family(name), name)
    drawing = choose_settings(pipeline, DrawingArguments(num_inference_steps=2), 24)
    images = [Image.new("RGB", (24, 24), "grey")] * 2
    varied = vary(make_varying(pipeline), images, ["the digit 3"] * 2, 0.5, drawing, 0)
    assert {image.size for image in varied} == {(24, 24)}


@pytest.mark.parametrize("name", ["klein", "sana", "pixart", "dit"])
def test_where_images_cannot_be_varied_that_is_said(name):
    """When it is asked for: not after the votes were paid for."""
    with pytest.raises(UsageError, match="cannot vary images .* leave --rounds at 1"):
        make_varying(build_family(name))


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"dit"}))
def test_text_encoders_in_half_the_memory_read_almost_the_same(name):
    """And each caption to the bit as it is read alone."""
    pipeline = prepare_pipeline(build_family(name), name)
    family = find_family(pipeline)
    whole = embed_captions(pipeline, list_captions(family), SIDE)
    halve_frozen(pipeline, family.denoiser.parameters())
    assert {p.dtype for part in family.encoders for p in part.parameters()} == {torch.bfloat16}
    alone = [embed_captions(pipeline, [words], SIDE) for words in list_captions(family)]
    for kind, values in embed_captions(pipeline, list_captions(family), SIDE).items():
        assert torch.equal(values, torch.cat([text[kind] for text in alone])), kind
        off = (values - whole[kind]).float().norm() / whole[kind].float().norm()
        assert values.dtype == whole[kind].dtype and off < 0.03, (kind, off)
    with ready_to_draw(pipeline):
        assert {p.dtype for part in list_parts(pipeline) for p in part.parameters()} == {
            torch.float32
        }
