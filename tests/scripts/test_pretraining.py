"""The public stage, started as a user starts it."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline

from tests.conftest import CAPTION, read_json, train_arguments, train_here
from utils.arguments.pretraining import PretrainArguments
from utils.errors import UsageError
from utils.methods.pretraining import choose_tokenizer
from utils.methods.public_objectives import FlowObjective
from utils.models.families import find_family
from utils.models.pipelines import load_pipeline

Output = namedtuple("Output", "sample")


@pytest.mark.slow
def test_pretraining_saves_a_pipeline_and_resumes(run_script, image_folder, tmp_path):
    arguments = ["--train_data_dir", image_folder, *CAPTION, "--resolution", 16]
    arguments += ["--autoencoder_channels", 8, 16, "--unet_channels", 8, 16, "--text_width", 16]
    arguments += ["--text_layers", 1, "--train_batch_size", 4, "--checkpointing_steps", 2]
    arguments += ["--autoencoder_steps", 4, "--denoiser_steps", 4, "--latent_channels", 6]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run = run_script("pretrain_ldm.py", *arguments, "--output_dir", straight, launch=True)
    assert run.returncode == 0, run.stderr
    pipeline = DiffusionPipeline.from_pretrained(straight)
    assert isinstance(pipeline, StableDiffusionPipeline)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    pipeline("the digit 3", num_inference_steps=2)
    assert pipeline.vae.config.latent_channels == pipeline.unet.config.in_channels == 6
    assert pipeline.vae.config.scaling_factor != 0.18215
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert (straight / "samples.png").exists() and (straight / "reconstructions.png").exists()

    # Interrupted after the autoencoder: the same weights come out.
    shutil.copytree(straight / "checkpoints", resumed / "checkpoints")
    shutil.rmtree(resumed / "checkpoints" / "denoiser")
    settings = read_json(resumed / "checkpoints" / "settings.json")
    settings["output_dir"] = str(resumed)
    (resumed / "checkpoints" / "settings.json").write_text(json.dumps(settings))
    run = run_script("pretrain_ldm.py", *arguments, "--output_dir", resumed)
    assert run.returncode == 0, run.stderr
    again = DiffusionPipeline.from_pretrained(resumed)
    for old, new in zip(pipeline.unet.parameters(), again.unet.parameters(), strict=True):
        torch.testing.assert_close(old, new)

    # With other captions that is not the same run.
    (resumed / "model_index.json").unlink()
    run = run_script("pretrain_ldm.py", *arguments, "--caption", "", "--output_dir", resumed)
    assert run.returncode == 2 and "other settings (hash of images and captions was" in run.stderr

    run = run_script("pretrain_ldm.py", *arguments, "--output_dir", straight)
    assert run.returncode == 2 and "finished pipeline" in run.stderr


def test_the_autoencoder_of_another_pipeline_is_taken_as_it_is(
    run_script, tiny_base, image_folder, tmp_path
):
    # At a side that an autoencoder of one's own, which halves it twice, would not divide.
    arguments = ["--train_data_dir", image_folder, *CAPTION, "--resolution", 18]
    arguments += ["--architecture", "sd3", "--transformer_width", 32, "--transformer_layers", 1]
    arguments += ["--text_width", 16, "--text_layers", 1, "--train_batch_size", 4]
    arguments += ["--denoiser_steps", 2, "--autoencoder_from", tiny_base]
    run = run_script("pretrain_ldm.py", *arguments, "--output_dir", tmp_path / "base")
    assert run.returncode == 0, run.stderr
    ours, theirs = load_pipeline(str(tmp_path / "base")).vae, load_pipeline(str(tiny_base)).vae
    for name, value in theirs.state_dict().items():  # saved in fp16
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert ours.config.shift_factor != 0 and theirs.config.shift_factor is None


def test_a_second_stage_starts_from_the_weights_of_a_base(
    run_script, tiny_base, image_folder, tmp_path
):
    """With a rate of nothing, the base comes out again."""
    arguments = ["--train_data_dir", image_folder, "--caption", "", "--start_from", tiny_base]
    arguments += ["--train_batch_size", 4, "--denoiser_steps", 2, "--learning_rate"]
    same, moved = tmp_path / "same", tmp_path / "moved"
    for folder, rate in [(same, 0), (moved, 1e-3)]:
        run = run_script("pretrain_ldm.py", *arguments, rate, "--output_dir", folder)
        assert run.returncode == 0, run.stderr
    base, again, other = (load_pipeline(str(path)) for path in (tiny_base, same, moved))

    def has_moved(pipeline, part: str) -> bool:
        known = getattr(base, part).state_dict()
        now = getattr(pipeline, part).state_dict()
        return any((now[n].float() - v.float()).abs().max() > 1e-3 for n, v in known.items())

    parts = ("vae", "unet", "text_encoder")
    assert [has_moved(again, part) for part in parts] == [False] * 3  # saved in fp16
    assert [has_moved(other, part) for part in parts] == [False, True, True]
    assert again.vae.config.scaling_factor == base.vae.config.scaling_factor
    assert again.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert again.scheduler.config.prediction_type == base.scheduler.config.prediction_type


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"latent_channels": 0}, "--latent_channels 0 must be at least 1"),
        ({"denoiser_steps": 0}, "--denoiser_steps 0 must be at least 1"),
        ({"train_batch_size": -1}, "--train_batch_size -1 must be at least 1"),
        ({"learning_rate": float("nan")}, "--learning_rate nan must be"),
        ({"ema_decay": 1.0}, "--ema_decay 1.0 must be at least 0 and below 1"),
        ({"caption_dropout": 1.5}, "--caption_dropout 1.5 must be from 0 to 1"),
        ({"autoencoder_channels": [7, 9]}, "7 9: .* multiples of 3"),
        ({"autoencoder_channels": [16, 0]}, "16 0: .* multiples of 8"),
        ({"unet_channels": [1]}, "the first must be at least 2"),
        ({"text_width": 100}, "--text_width 100 must be below 64, or a multiple of 32"),
        ({"text_width": 160, "architecture": "sd3"}, "below 128, or a multiple of 64"),
        ({"text_width": 15, "architecture": "sd3"}, "--text_width must be even"),
        ({"transformer_width": 48, "architecture": "sd3"}, "a multiple of 32"),
    ],
)
def test_sizes_that_no_model_can_have_are_refused(given, said):
    with pytest.raises(UsageError, match=said):
        PretrainArguments(output_dir="unused", **given)


@pytest.mark.parametrize("option", ["--autoencoder_from", "--start_from"])
def test_a_private_result_is_no_base(run_script, image_folder, tmp_path, trained, option):
    arguments = ["--train_data_dir", image_folder, *CAPTION, "--resolution", 16]
    arguments += [option, trained[0], "--output_dir", tmp_path / "base"]
    run = run_script("pretrain_ldm.py", *arguments)
    assert run.returncode == 2 and f"{option} {trained[0]} is a private result" in run.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--architecture", "sd3"], "give the architecture that it has"),
        (["--resolution", 64], "pixels: give --resolution"),
        (["--autoencoder_from", "BASE"], "leave out --autoencoder_from"),
        (["--unet_channels", 8, 16], "leave out --unet_channels"),
        (["--kl_weight", 0.01], "leave out --kl_weight"),
        (["--latent_channels", 8], "leave out --latent_channels"),
    ],
)
def test_a_base_that_does_not_suit_is_refused(
    run_script, tiny_base, image_folder, tmp_path, more, said
):
    arguments = ["--train_data_dir", image_folder, *CAPTION, "--start_from", tiny_base]
    run = run_script("pretrain_ldm.py", *arguments, *more, "--output_dir", tmp_path / "base")
    assert run.returncode == 2 and said in run.stderr and not (tmp_path / "base").exists()


def test_a_second_stage_has_the_caption_template_of_its_base(
    run_script, tiny_base, image_folder, tmp_path
):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "sampling.json").write_text('{"caption_template": "a {label}"}')
    arguments = ["--train_data_dir", image_folder, "--label_column", "label", "--start_from", base]
    arguments += ["--train_batch_size", 4, "--denoiser_steps", 1, "--output_dir", tmp_path / "out"]
    run = run_script("pretrain_ldm.py", *arguments)
    assert run.returncode == 0 and "as the base model was trained: 'a {label}'" in run.stderr
    assert read_json(tmp_path / "out" / "sampling.json")["caption_template"] == "a {label}"


def test_captions_that_no_prompt_could_tell_apart_are_refused(
    run_script, tiny_base, image_folder, tmp_path
):
    """What a tokenizer does not know it cuts into letters, of which it reads the first few."""
    arguments = ["--train_data_dir", image_folder, "--label_column", "label", "--caption_template"]
    arguments += ["an unheard-of likeness, grey and unframed, of the {label}", "--resolution", 16]
    arguments += ["--output_dir", tmp_path / "base"]
    for more, said in [
        (["--start_from", tiny_base], f"{tiny_base} lacks their words"),
        (["--max_tokens", 5], "--max_tokens is too small"),
    ]:
        run = run_script("pretrain_ldm.py", *arguments, *more)
        assert run.returncode == 2 and "become the same tokens" in run.stderr and said in run.stderr
        assert not (tmp_path / "base").exists()


def test_captions_that_differ_in_capitals_or_spaces_are_one_unless_they_are_classes():
    args = PretrainArguments(output_dir="unused")
    captions = ["A cat", "a  cat ", "a dog", " "]
    tokenizer = choose_tokenizer([*captions, ""], False, None, args)
    ids = tokenizer(captions).input_ids
    assert ids[0] == ids[1] != ids[2]
    with pytest.raises(UsageError, match="differ in capitals or spaces only; give them other"):
        choose_tokenizer(captions, True, None, args)
    cut = PretrainArguments(output_dir="unused", max_tokens=3, vocab_size=1)
    with pytest.raises(UsageError, match="--max_tokens is too small"):
        choose_tokenizer(["ab", "ac"], False, None, cut)


@pytest.mark.parametrize("resolution", [0, -32, 4, 12])
def test_a_size_that_the_pipeline_could_not_draw_is_refused(
    run_script, image_folder, tmp_path, resolution
):
    arguments = ["--train_data_dir", image_folder, *CAPTION, "--resolution", resolution]
    arguments += ["--autoencoder_channels", 8, "--unet_channels", 8, "--output_dir", tmp_path / "x"]
    run = run_script("pretrain_ldm.py", *arguments)
    assert run.returncode == 2 and "must be a multiple of 8" in run.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_flow_is_pretrained_and_trained_on(run_script, image_folder, tmp_path):
    """In the layout of Stable Diffusion 3; text is what its pipeline makes of it."""
    arguments = ["--train_data_dir", image_folder, *CAPTION, "--resolution", 16]
    arguments += ["--architecture", "sd3", "--transformer_width", 32, "--transformer_layers", 2]
    arguments += ["--autoencoder_channels", 8, 16, "--text_width", 16, "--text_layers", 2]
    arguments += ["--train_batch_size", 4, "--autoencoder_steps", 4, "--denoiser_steps", 4]
    base = tmp_path / "base"
    run = run_script("pretrain_ldm.py", *arguments, "--output_dir", base)
    assert run.returncode == 0, run.stderr
    pipeline = load_pipeline(str(base))
    assert isinstance(pipeline, StableDiffusion3Pipeline)
    DiffusionPipeline.from_pretrained(base)
    assert pipeline.vae.config.shift_factor != 0
    assert read_json(base / "sampling.json")["max_sequence_length"] == 16

    family = find_family(pipeline)
    family.text_length = 16
    told, seen = family.encode_text(["the digit 3"], 16), []
    args = PretrainArguments(output_dir="unused", architecture="sd3", text_width=16)
    objective = FlowObjective.build((4, 8, 8), pipeline.tokenizer, args)
    objective.text_encoders = torch.nn.ModuleList(family.encoders)
    objective.transformer.forward = lambda noisy, **given: seen.append(given) or Output(noisy)
    objective(torch.zeros(1, 4, 8, 8), objective.tokenize(["the digit 3"]))
    for name, values in told.items():
        torch.testing.assert_close(seen[0][name], values)

    arguments = train_arguments(base, image_folder, tmp_path / "run", "--num_inference_steps", 2)
    assert "saved the weights" in train_here(arguments)
    drawing = read_json(tmp_path / "run" / "sampling.json")
    assert drawing["max_sequence_length"] == 16 and drawing["guidance_scale"] == 2.0

    again = ["--train_data_dir", image_folder, *CAPTION, "--architecture", "sd3"]
    again += ["--start_from", base, "--denoiser_steps", 2, "--learning_rate", 0]
    run = run_script("pretrain_ldm.py", *again, "--output_dir", tmp_path / "again")
    assert run.returncode == 0, run.stderr
    same = load_pipeline(str(tmp_path / "again"))
    for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        known, now = getattr(pipeline, part).state_dict(), getattr(same, part).state_dict()
        for name, value in known.items():
            torch.testing.assert_close(now[name], value, rtol=1e-3, atol=1e-4)
    assert same.vae.config.shift_factor == pipeline.vae.config.shift_factor


def test_pretraining_interrupted_within_a_stage_continues(accelerator, tmp_path, monkeypatch):
    from utils.arguments.pretraining import PretrainArguments
    from utils.methods import pretraining

    args = PretrainArguments(
        output_dir=str(tmp_path), autoencoder_channels=[8, 16], train_batch_size=4,
        autoencoder_steps=5, checkpointing_steps=2,
    )  # fmt: skip
    pixels = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8)
    save, saved = pretraining.save_state, []

    def keep_the_first(state, folder):
        saved.append(state["step"])
        if state["step"] == 2:
            save(state, folder)

    monkeypatch.setattr(pretraining, "save_state", keep_the_first)
    straight = pretraining.train_autoencoder(accelerator, pixels, args)
    assert saved == [2, 4, 5]
    resumed = pretraining.train_autoencoder(accelerator, pixels, args)
    assert saved == [2, 4, 5, 4, 5]
    for old, new in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(old, new)
