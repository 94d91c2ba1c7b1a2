"""DP-SAPF: what selection releases is bounded, noised, paid for, and what training then trains."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import build_tiny_pipeline
from tests.families import build_family
from tests.worlds import HOSTILE, LinearWorld, UNetWorld, build_plan
from utils.arguments.methods import LoraArguments, SaliencyArguments
from utils.arguments.training import PrivacyArguments
from utils.gradients.leaves import check_leaf
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.methods.choice import Keep, build_keep, conclude
from utils.methods.saliency import (
    Scoring,
    build_scoring,
    find_candidates,
    find_layer,
    sum_scores,
)
from utils.methods.selection import plan_selection
from utils.models.lora import add_lora

MECHANISMS = ["squared_norm", "voting", "layer"]


def scoring_for(names: list[str], mechanism: str, votes: int = 2, clip: float = 0.5) -> Scoring:
    """`layer` puts a weight and its bias together."""
    groups = [name.rsplit(".", 1)[0] if mechanism == "layer" else name for name in names]
    return Scoring(mechanism, tuple(names), tuple(groups), votes, clip)


def largest_move(accelerator, mechanism: str, kinds: list[str]) -> tuple[float, float]:
    """How far leaving out one unit moves the summed scores, and the sensitivity stated."""
    world = LinearWorld(kinds, draws=3, wide=True)
    scoring = scoring_for(world.engine.names, mechanism)

    def total(units):
        indices = torch.tensor(units)
        return sum_scores(accelerator, world.engine, world.losses, indices, scoring, 4)

    everyone = list(range(len(kinds)))
    whole = total(everyone)
    assert whole.isfinite().all()
    moves = [(whole - total([u for u in everyone if u != unit])).norm() for unit in everyone]
    return max(moves).item(), scoring.sensitivity


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_one_unit_moves_the_scores_by_at_most_the_sensitivity(accelerator, mechanism):
    """Ordinary, huge, overflowing, NaN, infinite and zero units."""
    move, sensitivity = largest_move(accelerator, mechanism, HOSTILE * 2)
    assert 0.3 * sensitivity < move <= sensitivity * (1 + 1e-9)


def test_scores_without_the_clip_are_caught(accelerator, monkeypatch):
    def unclipped(self, squared):
        finite = squared.double().nan_to_num(0.0, 0.0, 0.0)
        return finite.clamp_max(1e12) / self.clip**2

    monkeypatch.setattr(Scoring, "scores", unclipped)
    with pytest.raises(AssertionError, match="<="):
        test_one_unit_moves_the_scores_by_at_most_the_sensitivity(accelerator, "squared_norm")


def test_one_vote_too_many_is_caught(accelerator, monkeypatch):
    whole = Scoring.scores
    monkeypatch.setattr(
        Scoring, "scores", lambda self, squared: whole(replace(self, votes=self.votes + 2), squared)
    )
    with pytest.raises(AssertionError):
        test_one_unit_moves_the_scores_by_at_most_the_sensitivity(accelerator, "voting")


def test_a_unit_without_a_gradient_gives_no_vote(accelerator):
    world = LinearWorld(["zero"] * 3, wide=True)
    scoring = scoring_for(world.engine.names, "voting")
    units = torch.arange(3)
    assert not sum_scores(accelerator, world.engine, world.losses, units, scoring, 2).any()


def test_the_noise_is_that_of_the_sensitivity():
    """sigma times sqrt(k) for k votes, sigma otherwise."""
    privacy = PrivacyArguments(target_epsilon=8.0, target_delta=1e-4, noise_multiplicity=1)
    args = SaliencyArguments(selection_noise_multiplier=5.0, sampling_rate=0.5)
    for mechanism, std in [("squared_norm", 5.0), ("layer", 5.0), ("voting", 5.0 * 3**0.5)]:
        scoring = scoring_for(["a", "b", "c", "d"], mechanism, votes=3)
        plan = plan_selection(200, privacy, args, scoring.sensitivity, None)
        assert plan.noise_std == pytest.approx(std) and plan.expected_batch_size == 100
        assert plan.event()["purpose"] == "selection" and plan.steps == 1


def test_norms_taken_on_the_fly_are_those_of_the_gradients(accelerator):
    world = UNetWorld("all")
    units = torch.arange(6)  # without the unit that is huge
    squared = []
    for norms_only in (False, True):
        with world.engine.recording(6, norms_only=norms_only) as record:
            world.losses(units).sum().backward()
        squared.append(record.squared_norms())
        assert not norms_only or record.nbytes() == 6 * 8 * len(world.engine.names)
    torch.testing.assert_close(squared[0], squared[1], rtol=1e-4, atol=1e-12)


def test_layers_whose_gradients_are_not_known_are_no_candidates():
    """Sana's convolutions of every channel by itself."""
    pipeline = build_family("sana")
    grouped = [m for m in pipeline.transformer.modules() if getattr(m, "groups", 1) > 1]
    candidates = find_candidates(pipeline, "all")
    assert grouped and not set(grouped) & set(candidates.values())
    for name, module in candidates.items():
        check_leaf(name, module)


@pytest.mark.parametrize("scope", ["attention", "convolution", "all"])
def test_the_ranking_is_that_of_float64_gradients_one_unit_at_a_time(accelerator, scope):
    """Noise off, K = 3: squared norms of the clipped gradients of the weights themselves."""
    world = UNetWorld("all")
    candidates = find_candidates(world.pipeline, scope)
    world.unet.requires_grad_(False)
    for module in candidates.values():
        module.weight.requires_grad_(True)
    engine, units = PerUnitGradients(world.unet, world.draws), torch.arange(6)
    assert engine.names == [f"{name}.weight" for name in candidates]
    args = SaliencyArguments(scope=scope, selection_clip=0.5)
    scoring = build_scoring(list(candidates), args)
    found = sum_scores(accelerator, engine, world.losses, units, scoring, 2)

    world.unet.double()
    world.tensors = [t.double() if t.is_floating_point() else t for t in world.tensors]
    expected = torch.zeros(len(candidates), dtype=torch.float64)
    for unit in units:
        latents, embeddings, noise, timesteps = (t[unit] for t in world.tensors)
        noisy = world.scheduler.add_noise(latents, noise, timesteps)
        target = world.scheduler.get_velocity(latents, noise, timesteps)
        loss = (world.unet(noisy, timesteps, embeddings).sample - target).square().mean()
        weights = [module.weight for module in candidates.values()]
        squared = torch.stack([g.square().sum() for g in torch.autograd.grad(loss, weights)])
        expected += squared * min(1.0, 0.25 / squared.sum().item()) / 0.25
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)
    size = len(candidates) // 3
    assert set(found.argsort()[-size:].tolist()) == set(expected.argsort()[-size:].tolist())


def test_candidates_and_layers():
    pipeline = build_tiny_pipeline()
    attention, convolution, both = (
        find_candidates(pipeline, scope) for scope in ("attention", "convolution", "all")
    )
    assert any(name.endswith("to_out.0") for name in attention)
    assert all(".attentions." in name for name in attention)
    assert "conv_in" in convolution and not set(attention) & set(convolution)
    assert set(attention) | set(convolution) < set(both)  # and time embeddings
    name = "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"
    assert find_layer(name).endswith("transformer_blocks.0.attn2")
    assert find_layer("mid_block.resnets.1.conv2") == "mid_block.resnets.1"


def kept(scores, **args) -> list[int]:
    count = len(scores)
    sizes, plan = np.arange(1.0, count + 1), args.pop("plan", None)
    keep = Keep(sizes, 1000 * np.ones(count), plan)
    return keep.choose(np.array(scores), SaliencyArguments(**args)).tolist()


def test_what_is_kept():
    scores = [0.1, 0.4, -0.2, 0.3, 0.2]
    assert kept(scores, top_ratio="0.4") == [1, 3]
    assert kept(scores, top_count=3) == [1, 3, 4]
    assert kept(scores, top_mass=0.69) == [1, 3] and kept(scores, top_mass=0.71) == [1, 3, 4]
    assert kept(scores, top_mass=1.0) == [1, 3, 4, 0]
    assert kept(scores, top_count=2, normalise="per_parameter") == [1, 0]


def test_auto_keeps_more_when_noise_is_less_and_drops_what_holds_nothing():
    scores = [0.4, 0.2, 0.1, 0.05, 0.02, 0.0]
    counts = []
    for sigma in (0.3, 10.0, 60.0, 1e4):
        plan = build_plan(noise_multiplier=sigma, expected_batch_size=100.0, steps=10)
        counts.append(len(kept(scores, top_ratio="auto", plan=plan)))
    assert counts == sorted(counts, reverse=True) and counts[0] == 5 and counts[-1] < 4


def test_to_out_0_is_trained_when_it_is_selected():
    pipeline = build_tiny_pipeline()
    pipeline.unet.requires_grad_(False)
    candidates = find_candidates(pipeline, "attention")
    args = SaliencyArguments(scope="attention", top_count=2)
    scoring = build_scoring(list(candidates), args)
    scores = np.array([float(name.endswith("to_out.0")) for name in candidates])
    found = conclude(
        scores,
        scoring,
        build_keep(candidates, scoring, LoraArguments(rank=4)),
        args,
        0,
        build_plan(),
    )
    assert len(found.selected) == 2 and all(n.endswith("to_out.0") for n in found.selected)
    add_lora(pipeline, LoraArguments(rank=4, target_modules=found.selected))
    engine = PerUnitGradients(pipeline.unet)
    trained = {name.split(".lora_")[0] for name in engine.names}
    assert trained == set(found.selected) and len(engine.names) == 4
