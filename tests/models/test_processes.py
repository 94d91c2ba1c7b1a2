"""The training process is DDPM's, whichever scheduler a base ships."""

import inspect
from functools import partial

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from utils.errors import UsageError
from utils.models.denoising import denoising_loss
from utils.models.families.stable_diffusion import StableDiffusionXL
from utils.models.pipelines import load_pipeline
from utils.models.processes import DISTILLED, SAMPLERS, read_process

# The betas of Stable Diffusion 1, 2 and XL, as their makers' scheduler configs give them.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])
LEVELS = (TIMESTEPS + 0.5) / 1000  # quantiles of a thousand
# What Stable Diffusion XL ships: its scheduler_config.json.
SDXL = {
    **BETAS,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def build(name: str, **config):
    try:
        return getattr(diffusers, name).from_config(config)
    except ImportError as error:
        pytest.skip(str(error).strip())


def draw(rows: int = len(TIMESTEPS), side: int = 8) -> torch.Tensor:
    return torch.randn(2, rows, 4, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_trains_as_ddpm_does(name, predicts):
    latents, noise = draw()
    config = {**BETAS, "prediction_type": predicts}
    process = read_process(build(name, **config))
    noisy, time, target, weight = process.corrupt(latents, noise, LEVELS)
    assert torch.equal(time, TIMESTEPS) and weight is None
    ddpm = DDPMScheduler(**config)
    assert torch.equal(noisy, ddpm.add_noise(latents, noise, TIMESTEPS))
    velocity = ddpm.get_velocity(latents, noise, TIMESTEPS)
    assert torch.equal(target, noise if predicts == "epsilon" else velocity)


def test_euler_and_the_solvers_have_another_noise_of_their_own():
    """Why the base's scheduler is not asked: the noise that it adds is its sampler's."""
    latents, noise = draw()
    ddpm = DDPMScheduler(**BETAS).add_noise(latents, noise, TIMESTEPS)
    assert 0.9 < ddpm[-1].std() < 1.1
    euler = build("EulerDiscreteScheduler", **SDXL).add_noise(latents, noise, TIMESTEPS)
    assert euler[-1].std() > 14
    solver = build("DPMSolverMultistepScheduler", **BETAS)
    solver.set_timesteps(20)
    assert not torch.allclose(solver.add_noise(latents, noise, TIMESTEPS), ddpm, atol=0.1)


ZERO_SNR = [
    name
    for name in SAMPLERS
    if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, name).__init__).parameters
]


@pytest.mark.parametrize("name", ZERO_SNR)
def test_a_schedule_that_ends_in_pure_noise_is_kept(name):
    latents, noise = draw()
    config = {**BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    process = read_process(build(name, **config, timestep_spacing="trailing"))
    noisy, _, target, _ = process.corrupt(latents, noise, LEVELS)
    torch.testing.assert_close(noisy[-1], noise[-1])
    torch.testing.assert_close(target[-1], -latents[-1])


@pytest.mark.parametrize(
    "config",
    [
        {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4},
        {**BETAS, "num_train_timesteps": 500},
    ],
    ids=["linear", "cosine", "trained", "shorter"],
)
def test_other_betas_are_kept(config):
    latents, noise = draw()
    process = read_process(build("EulerDiscreteScheduler", **config))
    ddpm = DDPMScheduler(**config)
    assert process.num_timesteps == ddpm.config.num_train_timesteps
    last = torch.full((len(latents),), process.num_timesteps - 1)
    noisy, time, *_ = process.corrupt(latents, noise, torch.ones(len(latents)))
    assert torch.equal(time, last)
    assert torch.equal(noisy, ddpm.add_noise(latents, noise, last))


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_finite_where_nothing_is_left_of_the_image(predicts):
    config = {**BETAS, "prediction_type": predicts, "rescale_betas_zero_snr": True}
    weights = read_process(DDPMScheduler(**config), 5.0).corrupt(*draw(), LEVELS).weight
    assert weights.isfinite().all() and (weights >= 0).all() and (weights <= 1).all()


@pytest.mark.parametrize(
    "name, config, reason",
    [
        ("EDMEulerScheduler", {}, "DDPM"),
        ("EDMDPMSolverMultistepScheduler", {}, "DDPM"),
        ("CogVideoXDDIMScheduler", {}, "DDPM"),
        ("DDPMWuerstchenScheduler", {}, "DDPM"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "DDPM"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "DDPM"),
        ("DDIMScheduler", {**BETAS, "prediction_type": "sample"}, "'sample'"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "'flow_prediction'"),
    ],
)
def test_another_process_is_refused(name, config, reason):
    with pytest.raises(UsageError, match=reason):
        read_process(build(name, **config))


def test_every_scheduler_of_diffusers_is_known_or_refused():
    """None raises anything but a sentence, in its own defaults."""
    names = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    known = 0
    for name in sorted(names):
        try:
            scheduler = getattr(diffusers, name)()
        except (ImportError, TypeError, AttributeError, ValueError):
            continue  # needs a library, or has no defaults, or is a function of diffusers
        try:
            known += read_process(scheduler).num_timesteps == 1000
        except UsageError:
            assert name not in (*SAMPLERS, *DISTILLED)
    assert known >= 15


def test_the_loss_of_stable_diffusion_xl_is_that_of_its_training_script():
    """Euler ships with XL; its training script makes a DDPMScheduler of the same config."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    latents, noise = draw()
    rows = len(latents)
    text = {
        "encoder_hidden_states": torch.randn(rows, 7, 16),
        "text_embeds": torch.randn(rows, 16),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(rows, 6),
    }
    process = read_process(build("EulerDiscreteScheduler", **SDXL))
    predict = partial(StableDiffusionXL.predict, unet)
    losses = denoising_loss(predict, process, latents, text, noise, LEVELS)
    ddpm = DDPMScheduler.from_config(SDXL)  # as train_text_to_image_lora_sdxl.py does
    added = {"text_embeds": text["text_embeds"], "time_ids": text["time_ids"]}
    predicted = unet(
        ddpm.add_noise(latents, noise, TIMESTEPS),
        TIMESTEPS,
        text["encoder_hidden_states"],
        added_cond_kwargs=added,
    ).sample
    expected = torch.nn.functional.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_a_distilled_base_is_refused_when_it_is_loaded(tiny_base, tmp_path):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_base)
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="distilled"):
        load_pipeline(str(tmp_path))
