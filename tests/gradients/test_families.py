"""The engine on every family, against autograd a row at a time; and what one unit can change."""

from statistics import median

import pytest
import torch

from tests.conftest import few_fast
from tests.families import SIDE
from tests.family_inputs import ADAPTERS, draw_inputs
from tests.worlds import build_plan
from utils.arguments.training import PrivacyArguments, TrainingArguments
from utils.audit.replay import SetUp, replay
from utils.errors import UsageError
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.methods.public_passes import leave_out_unused
from utils.methods.saliency import find_candidates
from utils.models.denoising import denoising_loss
from utils.models.families import find_family
from utils.models.pipelines import load_pipeline
from utils.models.processes import read_process
from utils.privacy.dp_sgd import clip_scales
from utils.privacy.precision import highest_precision

# A parameter outside any layer, whose gradients by unit are not known.
BARE = {"Sana": "scale_shift_table", "Z-Image": "x_pad_token"}
BARE |= {"PixArt-Sigma": "scale_shift_table"}


@pytest.fixture
def pipeline(family_base):
    return load_pipeline(str(family_base))


def measure_rows(family, engine, draws: int, autocast: bool, seed: int = 0):
    """Gradients of two units [2, P]: the engine's, and those of autograd, a row of the batch at a
    time; and what the engine recorded."""
    latents, noise, quantiles, text = draw_inputs(family, 2, draws, seed)
    process = read_process(family.pipeline.scheduler)

    def losses(part: slice) -> torch.Tensor:
        words = {name: values[part] for name, values in text.items()}
        inputs = (latents[part], words, noise[part], quantiles[part])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return denoising_loss(family.predictor, process, *inputs)

    with engine.recording(2) as record:
        losses(slice(None)).view(2, draws).mean(1).sum().backward()
    alone = []
    for unit in range(2):
        rows = [losses(slice(r, r + 1)) for r in range(unit * draws, (unit + 1) * draws)]
        gradients = torch.autograd.grad(torch.cat(rows).mean(), engine.parameters)
        alone.append(torch.cat([g.flatten() for g in gradients]))
    return record.rows(), torch.stack(alone), record


def adapt(pipeline, method: str) -> None:
    """With what starts at zero moved off it, since it would hide others."""
    torch.manual_seed(0)
    ADAPTERS[method](pipeline)
    for parameter in find_family(pipeline).denoiser.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("autocast", [False, True])
def test_one_more_unit_in_front_changes_no_other_gradient(pipeline, threads, autocast):
    """Of images so large that a CPU's threads share them out."""
    adapt(pipeline, "lora")
    family = find_family(pipeline)
    side = int(min(128, family.largest_side * family.pixels_per_side))
    leave_out_unused(pipeline, side, silently=True)
    engine, process = PerUnitGradients(family.denoiser), read_process(pipeline.scheduler)
    latents, noise, quantiles, text = draw_inputs(family, 6, side=side)
    found = []
    for units in (slice(5), slice(1, 6)):
        words = {name: values[units] for name, values in text.items()}
        with highest_precision(), engine.recording(5) as record:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                inputs = (latents[units], words, noise[units], quantiles[units])
                losses = denoising_loss(family.predictor, process, *inputs)
            losses.sum().backward()
        found.append(record.digest_units())
    assert found[0][1:] == found[1][:-1]


@pytest.mark.parametrize(
    "draws, checkpointing", few_fast([(1, False), (2, True), (1, True), (2, False)], 2)
)
@pytest.mark.parametrize("method", ADAPTERS)
def test_per_unit_gradients_are_those_of_batch_size_one(pipeline, method, draws, checkpointing):
    adapt(pipeline, method)
    family = find_family(pipeline)
    if method == "all" and family.title in BARE:
        with pytest.raises(UsageError, match=BARE[family.title]):
            PerUnitGradients(family.denoiser, draws)
        return
    if checkpointing:
        family.denoiser.enable_gradient_checkpointing()
    engine = PerUnitGradients(family.denoiser, draws)
    found, alone, record = measure_rows(family, engine, draws, autocast=False)
    assert (found - alone).norm() <= 1e-4 * alone.norm()
    norms = record.squared_norms().sum(1).sqrt()
    assert (norms >= alone.double().norm(dim=1) * (1 - 1e-4)).all()
    scales = clip_scales(record.squared_norms(), build_plan(num_units=2, clipping="automatic"))
    contributed = (record.squared_norms() * scales.square()).sum(1).sqrt()
    assert (contributed <= build_plan().max_grad_norm * (1 + 1e-6)).all()


@pytest.mark.parametrize("method", ADAPTERS)
def test_only_what_a_model_never_uses_is_left_out(pipeline, method, capsys):
    """Stable Diffusion 3's last block makes queries of the text, and nothing of what they find."""
    family, dead = find_family(pipeline), "transformer_blocks.1.attn.add_q_proj"
    if method == "all" and family.title in BARE:
        pytest.skip("what is bare is refused")
    adapt(pipeline, method)
    leave_out_unused(pipeline, SIDE)
    is_sd3, shown = family.title == "Stable Diffusion 3", capsys.readouterr().err
    if is_sd3:
        assert shown.startswith(f"left out, since this model never uses them: {dead}")
        training = [n for n, p in family.denoiser.named_parameters() if p.requires_grad]
        assert training and not any(name.startswith(dead) for name in training)
    else:
        assert shown == ""


def test_a_selection_ranks_no_layer_that_packs_rows(pipeline):
    family, packed = find_family(pipeline), {"Z-Image": {"cap_embedder.1", "all_x_embedder.2-1"}}
    layers = {
        name
        for name, module in family.denoiser.named_modules()
        if type(module) in (torch.nn.Linear, torch.nn.Conv2d) and getattr(module, "groups", 1) == 1
    }
    ranked = set(find_candidates(pipeline, "all"))
    assert layers - ranked == packed.get(family.title, set())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "attention"])
def test_bf16_rounds_no_worse_than_autograd(pipeline, method):
    adapt(pipeline, method)
    family = find_family(pipeline)
    engine = PerUnitGradients(family.denoiser, 2)
    ratios = []
    for seed in range(5):  # rounding is by chance
        _, exact, _ = measure_rows(family, engine, 2, autocast=False, seed=seed)
        ours, ordinary, _ = measure_rows(family, engine, 2, autocast=True, seed=seed)
        assert ours.dtype == torch.float32
        ratios.append(((ours - exact).norm() / (ordinary - exact).norm()).item())
    assert median(ratios) < 1.25


def test_the_added_unit_of_a_replay_has_the_longest_caption(pipeline):
    lengths = [len(caption) for caption in find_family(pipeline).public_captions]
    assert lengths == sorted(set(lengths)) and len(lengths) > 2


def test_nobody_elses_part_changes_because_of_one_unit(pipeline, accelerator):
    """Not by a bit, whatever the length of its caption, which is the longest; and what it adds to
    the clipped sum is at most C."""
    ADAPTERS["lora"](pipeline)
    engine = PerUnitGradients(find_family(pipeline).denoiser, 2)
    find_family(pipeline).text_length = 160
    privacy = PrivacyArguments(noise_multiplicity=2, max_grad_norm=1.0, clipping="automatic")
    training = TrainingArguments(output_dir="unused", learning_rate=1e-3)
    found = replay(SetUp(accelerator, pipeline, engine, SIDE), privacy, None, training)
    assert found["problems"] == [] and 0.9 < found["largest_move"] <= 1 + 1e-6
