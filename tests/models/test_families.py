"""Every family, against the pipeline that its makers ship: one question a test."""

import inspect
import math
from contextlib import contextmanager

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from peft import PeftModel

from tests.conftest import train_arguments, train_here
from tests.families import SIDE, build_family
from tests.family_inputs import ADAPTERS, draw_inputs, list_captions
from utils.arguments.sampling import DrawingArguments
from utils.data.latents import Objective
from utils.errors import UsageError
from utils.models.adapters import load_adapter
from utils.models.denoising import denoising_loss
from utils.models.drawing import adopt_reading
from utils.models.families import find_family
from utils.models.lora import loads_lora, save_lora
from utils.models.pipelines import load_pipeline, prepare_pipeline
from utils.models.processes import read_process
from utils.models.text import embed_captions
from utils.privacy.randomness import SecretRandomness

SMALL = ["--resolution", SIDE]


@pytest.fixture
def base(family_base):
    return family_base


@pytest.fixture
def pipeline(family_base):
    return load_pipeline(str(family_base))


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def call(pipeline):
    """One step of the pipeline, without classifier-free guidance, as it is called elsewhere."""
    family = find_family(pipeline)
    plain = {"Z-Image": 0.0, "FLUX.1": family.read_default("guidance_scale")}
    how = {"guidance_scale": plain.get(family.title, 1.0), "num_inference_steps": 1}
    sides = {"height": SIDE, "width": SIDE} if family.takes("height") else {}
    start = family.begin(list_captions(family), seeds(), SIDE)
    return pipeline(**start, **how, **sides, **family.call)


@contextmanager
def change_steps(pipeline, change):
    """What a step of the scheduler leaves, within this context, is `change` of it."""
    whole = pipeline.scheduler.step

    def step(*args, **kwargs):
        return DDIMSchedulerOutput(prev_sample=change(whole(*args, **kwargs)[0]))

    pipeline.scheduler.step = step
    try:
        yield
    finally:
        del pipeline.scheduler.step


def as_in_the_loop(family, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline's loop has them."""
    return (
        latents.flatten(2).transpose(1, 2) if family.title[:6] == "FLUX.2" else family.pack(latents)
    )


@contextmanager
def watch(denoiser):
    """What the denoiser is given within this context, an item a call."""
    whole, seen = denoiser.forward, []
    names = inspect.signature(whole)

    def keep(*args, **kwargs):
        seen.append(dict(names.bind(*args, **kwargs).arguments))
        return whole(*args, **kwargs)

    denoiser.forward = keep
    try:
        yield seen
    finally:
        del denoiser.forward


def test_the_denoiser_is_given_what_the_pipeline_gives_it(pipeline):
    """Of the same noise at the same time: text, masks, packing, ids, guidance and the scale of
    time. And one step of the real pipeline, from noise to nothing, is what `predict` says."""
    family, ends = find_family(pipeline), []
    noise = torch.stack([torch.randn(family.latent_shape(SIDE), generator=g) for g in seeds()])
    with watch(family.denoiser) as theirs, change_steps(pipeline, lambda x: ends.append(x) or x):
        call(pipeline)
    time = pipeline.scheduler.timesteps[0].expand(2)
    with torch.no_grad(), watch(family.denoiser) as ours:
        text = family.encode_text(list_captions(family), SIDE)
        predicted = family.predict(family.denoiser, noise, time.float(), text)
    given = {k: v for k, v in theirs[0].items() if v is not None and k in ours[0]}
    assert set(ours[0]) == set(given)
    for name, value in ours[0].items():
        if name == "added_cond_kwargs":
            assert value == given[name]
        else:
            torch.testing.assert_close(value, given[name], check_dtype=False, rtol=1e-5, atol=1e-5)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    if family.process == "Flow":
        expected = noise - pipeline.scheduler.sigmas[0] * predicted
    else:
        scheduler.set_timesteps(1)
        expected = scheduler.step(predicted, scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(ends[0], as_in_the_loop(family, expected), rtol=1e-3, atol=1e-3)


def test_latents_are_undone_by_the_pipeline(pipeline):
    """What decodes is what was encoded: the mean, the scale and their order."""
    family, vae, seen = find_family(pipeline), pipeline.vae, []
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(images)
    assert latents.shape[1:] == family.latent_shape(SIDE)
    whole = vae.decode
    vae.decode = lambda z, *args, **kwargs: seen.append(z) or whole(z, *args, **kwargs)
    with change_steps(pipeline, lambda _: as_in_the_loop(family, latents)):
        call(pipeline)
    encoded = vae.encode(images)
    expected = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


def test_flux_is_told_the_guidance_that_images_are_drawn_with():
    pipeline = prepare_pipeline(build_family("flux"), "flux")
    family, digests = find_family(pipeline), []
    for asked, base, told in ((None, {}, 3.5), (None, {"guidance_scale": 2}, 2), (7, {}, 7)):
        adopt_reading(pipeline, DrawingArguments(guidance_scale=asked), base)
        text = embed_captions(pipeline, ["the digit 3"], SIDE)
        assert text["guidance"].tolist() == [told]
        digests.append(repr(family.describe_reading()))
    assert len(set(digests)) == 3  # no cache of another scale is read


SCHEMES = ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_is_that_of_the_example_on_the_same_draws(pipeline, scheme):
    """Its arithmetic (without the preconditioning that it may add), on its scheduler."""
    family = find_family(pipeline)
    if family.process != "Flow":
        pytest.skip("a DDPM, whose loss is tested below")
    latents, noise, quantiles, text = draw_inputs(family)
    process = read_process(pipeline.scheduler, weighting=scheme)
    ours = denoising_loss(family.predictor, process, latents, text, noise, quantiles)
    config = dict(pipeline.scheduler.config)
    shift = {"shift": config.get("flow_shift", config.get("shift"))}  # by another name: not read
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, **shift)
    indices = 999 - (quantiles * 1000).long()
    sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    predicted = family.predict(family.denoiser, noisy, scheduler.timesteps[indices], text)
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
    theirs = (weighting * (predicted - (noise - latents)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_the_loss_of_a_ddpm_is_that_of_the_text_to_image_example(name):
    """On the first half of what these predict; the other is a variance."""
    pipeline = prepare_pipeline(build_family(name), name)
    family = find_family(pipeline)
    latents, noise, quantiles, text = draw_inputs(family)
    process = read_process(pipeline.scheduler)
    ours = denoising_loss(family.predictor, process, latents, text, noise, quantiles)
    scheduler = DDPMScheduler(beta_start=0.0001, beta_end=0.02)
    timesteps = (quantiles * 1000).long()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = family.predict(family.denoiser, noisy, timesteps, text)
    theirs = (predicted - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_noise_levels_are_distributed_as_the_examples_are(scheme, mean, std):
    """Ten cells; both empirical, so each within 6.5 standard deviations of a difference."""
    torch.manual_seed(0)
    scale, count = 1.29, 200_000
    theirs = compute_density_for_timestep_sampling(scheme, count, mean, std, scale)
    objective = Objective(1, "uniform" if scheme == "none" else scheme, mean, std, scale)
    ours = 1 - objective.quantiles(count, SecretRandomness()).flatten().float()
    cells = [(t * 10).long().clamp(0, 9).bincount(minlength=10).double() for t in (ours, theirs)]
    assert ((cells[0] - cells[1]).abs() < 6.5 * (2 * cells[1]).sqrt() + 6.5).all()


def test_an_adapter_reloads_in_plain_diffusers_and_draws_the_same(base, tmp_path):
    ours, plain = load_pipeline(str(base)), DiffusionPipeline.from_pretrained(base)
    torch.manual_seed(0)
    ADAPTERS["lora"](ours)
    for name, parameter in find_family(ours).denoiser.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(ours, tmp_path)
    fused = load_pipeline(str(base))
    load_adapter(fused, tmp_path)
    family = find_family(ours)
    how = {"num_inference_steps": 2, "output_type": "np", **family.call}
    how |= {"height": SIDE, "width": SIDE} if family.takes("height") else {}

    def draw(pipeline):
        start = family.begin(list_captions(family), seeds(), SIDE)
        return torch.from_numpy(pipeline(**start, **how).images)

    before = draw(plain)
    if loads_lora(plain):
        plain.load_lora_weights(tmp_path)
    else:
        plain.transformer = PeftModel.from_pretrained(plain.transformer, tmp_path)
    assert not torch.allclose(before, draw(plain), atol=1e-2)
    torch.testing.assert_close(draw(ours), draw(plain), rtol=0, atol=1e-4)
    torch.testing.assert_close(draw(ours), draw(fused), rtol=0, atol=1e-4)


def test_what_is_for_other_models_is_said(base, image_folder, tmp_path):
    is_flow = find_family(load_pipeline(str(base))).process == "Flow"
    options = [("--snr_gamma", 5), ("--timestep_sampling", "uniform")]
    options = options if is_flow else [("--weighting_scheme", "mode"), ("--logit_mean", 1)]
    for option, value in options:
        arguments = train_arguments(base, image_folder, tmp_path / "run", option, value, *SMALL)
        shown = train_here([*arguments, "--caption_template", "{label}"])
        kind = "DDPM models" if is_flow else "flow-matching models"
        assert f"error: {option} is for {kind}" in shown
    if is_flow:
        more = [*SMALL, "--weighting_scheme", "cosmap", "--logit_std", 2]
        arguments = train_arguments(base, image_folder, tmp_path / "run", *more)
        assert "--logit_std is for --weighting_scheme logit_normal" in train_here(arguments)


def test_layers_that_pack_rows_are_refused(base, image_folder, tmp_path):
    family = find_family(load_pipeline(str(base)))
    packed = [n for n, _ in family.denoiser.named_modules() if family.packs_rows(n)]
    if not packed:
        pytest.skip("it packs none")
    more = [*SMALL, "--target_modules", packed[0]]
    shown = train_here(train_arguments(base, image_folder, tmp_path / "run", *more))
    assert shown.startswith("error: a trainable layer saw") and "packs the tokens" in shown
    assert not (tmp_path / "run" / "private" / "ledger.jsonl").exists()


def test_a_side_without_positions_is_refused(base, image_folder, tmp_path):
    family = find_family(load_pipeline(str(base)))
    if math.isinf(family.largest_side):
        pytest.skip("it has positions for any")
    side = 2 * int(family.largest_side) * family.pixels_per_side
    arguments = train_arguments(base, image_folder, tmp_path / "run", "--resolution", side)
    assert "more than this model has positions for" in train_here(arguments)


def test_a_scheduler_of_another_process_is_refused(base, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(base)
    own, flow = find_family(pipeline).process, FlowMatchEulerDiscreteScheduler
    other, kind = ("Ddpm", DDIMScheduler) if own == "Flow" else ("Flow", flow)
    pipeline.scheduler = kind()
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"samples from a {other}; .* is trained as a {own}"):
        load_pipeline(str(tmp_path))


def make_schnell(pipeline) -> None:
    pipeline.transformer.register_to_config(guidance_embeds=False)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)


@pytest.mark.parametrize(
    "name, distil",
    [("flux", make_schnell), ("klein", lambda p: p.register_to_config(is_distilled=True))],
)
def test_a_distilled_one_is_refused_unless_it_is_meant(name, distil):
    pipeline = build_family(name)
    prepare_pipeline(pipeline, "user/model")
    distil(pipeline)
    with pytest.raises(UsageError, match="distilled to a few steps"):
        prepare_pipeline(pipeline, "user/model")
    prepare_pipeline(pipeline, "user/model", allow_distilled=True)
