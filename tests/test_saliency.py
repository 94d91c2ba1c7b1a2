"""DP-SAPF: what selection releases is bounded, noised, paid for, and what training then trains."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import build_tiny_pipeline, read_json, train_arguments, train_here
from tests.worlds import HOSTILE, LinearWorld, UNetWorld, plan_of
from utils import selection
from utils.accounting import pld_epsilon
from utils.arguments import PrivacyArguments
from utils.errors import UsageError
from utils.lora import LoraArguments, add_lora
from utils.per_unit_gradients import PerUnitGradients
from utils.saliency import (
    SaliencyArguments,
    Scoring,
    candidates_of,
    layer_of,
    scoring_of,
    summed_scores,
)
from utils.selection import Keep, conclude, keep_of, read_saliency
from utils.verification import problems_of, read_source

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
        return summed_scores(accelerator, world.engine, world.losses, indices, scoring, 4)

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


def test_the_noise_is_that_of_the_sensitivity():
    """sigma times sqrt(k) for k votes, sigma otherwise."""
    from select_saliency import selection_plan

    privacy = PrivacyArguments(target_epsilon=8.0, target_delta=1e-4)
    args = SaliencyArguments(selection_noise_multiplier=5.0, sampling_rate=0.5)
    for mechanism, std in [("squared_norm", 5.0), ("layer", 5.0), ("voting", 5.0 * 3**0.5)]:
        sensitivity = scoring_for(["a", "b", "c", "d"], mechanism, votes=3).sensitivity
        plan = selection_plan(200, privacy, args, sensitivity, None)
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
        assert not norms_only or record.nbytes() == 6 * 4 * len(world.engine.names)
    torch.testing.assert_close(squared[0], squared[1], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("scope", ["attention", "convolution", "all"])
def test_the_ranking_is_that_of_float64_gradients_one_unit_at_a_time(accelerator, scope):
    """Noise off, K = 3: squared norms of the clipped gradients of the weights themselves."""
    world = UNetWorld("all")
    candidates = candidates_of(world.unet, scope)
    world.unet.requires_grad_(False)
    for module in candidates.values():
        module.weight.requires_grad_(True)
    engine, units = PerUnitGradients(world.unet), torch.arange(6)
    assert engine.names == [f"{name}.weight" for name in candidates]
    args = SaliencyArguments(scope=scope, selection_clip=0.5)
    scoring = scoring_of(list(candidates), args)
    found = summed_scores(accelerator, engine, world.losses, units, scoring, 2)

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
    unet = build_tiny_pipeline().unet
    attention, convolution, both = (
        candidates_of(unet, scope) for scope in ("attention", "convolution", "all")
    )
    assert any(name.endswith("to_out.0") for name in attention)
    assert all(".attentions." in name for name in attention)
    assert "conv_in" in convolution and not set(attention) & set(convolution)
    assert set(attention) | set(convolution) < set(both)  # and time embeddings
    name = "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"
    assert layer_of(name).endswith("transformer_blocks.0.attn2")
    assert layer_of("mid_block.resnets.1.conv2") == "mid_block.resnets.1"


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
        plan = plan_of(noise_multiplier=sigma, expected_batch_size=100.0, steps=10)
        counts.append(len(kept(scores, top_ratio="auto", plan=plan)))
    assert counts == sorted(counts, reverse=True) and counts[0] == 5 and counts[-1] < 4


def test_to_out_0_is_trained_when_it_is_selected():
    pipeline = build_tiny_pipeline()
    pipeline.unet.requires_grad_(False)
    candidates = candidates_of(pipeline.unet, "attention")
    args = SaliencyArguments(scope="attention", top_count=2)
    scoring = scoring_of(list(candidates), args)
    scores = np.array([float(name.endswith("to_out.0")) for name in candidates])
    found = conclude(
        scores, scoring, keep_of(candidates, scoring, LoraArguments(rank=4)), args, 0, plan_of()
    )
    assert len(found.selected) == 2 and all(n.endswith("to_out.0") for n in found.selected)
    add_lora(pipeline, LoraArguments(rank=4, target_modules=found.selected))
    engine = PerUnitGradients(pipeline.unet)
    trained = {name.split(".lora_")[0] for name in engine.names}
    assert trained == set(found.selected) and len(engine.names) == 4


FEW = ["--num_validation_images", 1]
LATE = ["--train_batch_size", 8]


@pytest.fixture(scope="module")
def selected(tiny_base, image_folder, tmp_path_factory):
    """A selection at a twentieth of epsilon 8, in a ledger of its own."""
    output = tmp_path_factory.mktemp("runs") / "selection"
    arguments = train_arguments(tiny_base, image_folder, output, "--scope", "attention")
    train_here(arguments, "select_saliency")
    return output


def test_a_selection_publishes_noisy_scores_and_a_statement(selected):
    found = read_saliency(selected / "saliency.json")
    assert len(found.selected) == round(0.3 * len(found.candidates))
    assert set(found.noisy_scores) == set(found.candidates) and found.noise_std > 0
    assert min(found.noisy_scores.values()) < 0  # an un-noised squared norm never is
    assert (selected / "saliency.png").stat().st_size > 10_000
    statement = read_json(selected / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["selection"]
    assert statement["epsilon"]["add_or_remove_one"] <= 0.4
    assert not problems_of(read_source(str(selected), None))


def test_selection_and_training_come_to_the_target_together(
    selected, tiny_base, image_folder, tmp_path
):
    import shutil

    shutil.copytree(selected, tmp_path / "selection")
    file = tmp_path / "selection" / "saliency.json"
    output = tmp_path / "run"
    more = ["--saliency_file", file, *FEW]
    train_here(train_arguments(tiny_base, image_folder, output, *more))
    statement = read_json(output / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["selection", "training"]
    spent = statement["epsilon"]["add_or_remove_one"]
    assert 7.9 < spent <= 8 and spent == pld_epsilon(statement["events"], statement["delta"])
    assert "everything" not in statement["ledger"]
    assert not problems_of(read_source(str(output), None))
    from safetensors import safe_open

    with safe_open(output / "pytorch_lora_weights.safetensors", "pt") as weights:
        trained = {key.removeprefix("unet.").split(".lora")[0] for key in weights.keys()}  # noqa: SIM118
    assert trained == set(read_saliency(file).selected)

    # An edited file, another base model, and a ledger that did not pay are refused.
    edited = json.loads(file.read_text())
    edited["selected"] = edited["candidates"][:3]
    other = tmp_path / "selection" / "edited.json"
    other.write_text(json.dumps(edited))
    for path, ledger, sentence in [
        (other, [], "did not pay for"),
        (file, ["--privacy_ledger", tmp_path / "new.jsonl"], "did not pay for"),
    ]:
        more = ["--saliency_file", path, *ledger, *FEW]
        said = train_here(train_arguments(tiny_base, image_folder, tmp_path / "no", *more))
        assert sentence in said, said
        shutil.rmtree(tmp_path / "no")
    from diffusers import StableDiffusionPipeline

    changed = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    changed.unet.conv_in.bias.data[0] += 1e-3
    changed.save_pretrained(tmp_path / "base")
    more = ["--saliency_file", file, *FEW]
    said = train_here(train_arguments(tmp_path / "base", image_folder, tmp_path / "no", *more))
    assert "another base model" in said


@pytest.mark.parametrize(
    "script, more", [("train_dp_loda", ["--rank", 2]), ("train_dp_ldm", ["--ema_decay", 0.5])]
)
def test_the_other_methods_train_what_was_selected(
    selected, tiny_base, image_folder, tmp_path, script, more
):
    import shutil

    shutil.copytree(selected, tmp_path / "selection")
    file = tmp_path / "selection" / "saliency.json"
    more = [*more, "--saliency_file", file, *FEW]
    said = train_here(train_arguments(tiny_base, image_folder, tmp_path / "run", *more), script)
    assert "saved the weights" in said, said
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["selection", "training"]
    assert not problems_of(read_source(str(tmp_path / "run"), None))


def test_both_stages_with_one_command_and_an_interruption(tiny_base, image_folder, tmp_path):
    output = tmp_path / "run"
    more = ["--select_saliency", "--mechanism", "voting", "--top_count", 5, *FEW]
    arguments = train_arguments(tiny_base, image_folder, output, *more)
    assert "saved the weights" in train_here(arguments)
    statement = read_json(output / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["selection", "training"]
    assert statement["events"][0]["sensitivity"] == 5**0.5
    found = read_saliency(output / "selection" / "saliency.json")
    sigma, expected = found.event["noise_multiplier"], found.event["sampling_rate"] * 40
    assert found.noise_std == pytest.approx(sigma * 5**0.5 / expected)
    assert 7.9 < statement["epsilon"]["add_or_remove_one"] <= 8
    assert not problems_of(read_source(str(output), None))
    said = train_here([*arguments, "--resume_from_checkpoint", "latest"])
    assert "saved the weights" in said and "ranking" not in said
    assert read_json(output / "privacy.json")["epsilon"] == statement["epsilon"]
    said = train_here([*arguments, "--resume_from_checkpoint", "latest", "--top_count", 4])
    assert "other settings: top_count was 5, is 4" in said


def test_a_selection_that_was_interrupted_is_not_paid_for_twice(
    tiny_base, image_folder, tmp_path, monkeypatch
):
    """A full disk between the release of the noisy scores and their file; then once more."""
    import select_saliency

    output = tmp_path / "run"
    arguments = train_arguments(tiny_base, image_folder, output, "--select_saliency", *FEW)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(select_saliency, "draw_saliency", full)
        assert "No space left" in train_here(arguments)
        assert not (output / "selection" / "saliency.json").exists()
        assert "No space left" in train_here(arguments)
    calls = []
    whole = select_saliency.summed_scores
    monkeypatch.setattr(
        select_saliency, "summed_scores", lambda *a, **k: calls.append(1) or whole(*a, **k)
    )
    assert "saved the weights" in train_here(arguments) and not calls
    statement = read_json(output / "privacy.json")
    assert [e["steps"] for e in statement["events"]] == [1, 3]
    assert 7.9 < statement["epsilon"]["add_or_remove_one"] <= 8
    assert not problems_of(read_source(str(output), None))


def test_nothing_is_selected_where_training_could_not_follow(tiny_base, image_folder, tmp_path):
    for more, sentence in [
        (["--total_epsilon", 7.9], "both stages would bring"),
        (["--selection_epsilon", 9], "is spent already"),
        (["--expected_batch_size", 41], "number of units"),
        (["--resume_from_checkpoint", "latest"], "holds no run to resume"),
    ]:
        output = tmp_path / sentence.split()[0]
        arguments = train_arguments(tiny_base, image_folder, output, "--select_saliency", *more)
        said = train_here(arguments)
        assert said.startswith("error: ") and sentence in said, said
        assert not (output / "private" / "ledger.jsonl").exists()


def test_a_dry_run_shows_both_plans_and_spends_nothing(tiny_base, image_folder, tmp_path):
    arguments = train_arguments(
        tiny_base, image_folder, tmp_path / "run", "--select_saliency", "--dry_run"
    )
    said = train_here(arguments)
    assert '"purpose": "selection"' in said and "training, after it" in said, said
    assert not (tmp_path / "run" / "private" / "ledger.jsonl").exists()


def test_reproducible_noise_stamps_both_stages(tiny_base, image_folder, tmp_path):
    output = tmp_path / "run"
    more = ["--select_saliency", "--debug_noise_seed", 1, *FEW]
    assert "saved the weights" in train_here(
        train_arguments(tiny_base, image_folder, output, *more)
    )
    assert read_json(output / "privacy.json")["private"] is False
    assert read_saliency(output / "selection" / "saliency.json").private is False


def test_the_length_of_the_bar_does_not_tell_the_batch(accelerator, capsys):
    world = LinearWorld(["ordinary"] * 6)
    scoring = scoring_for(world.engine.names, "squared_norm")
    summed_scores(accelerator, world.engine, world.losses, torch.arange(6), scoring, 1)
    assert "scoring" not in capsys.readouterr().err


def test_a_selection_draws_the_batch_that_it_accounts_for(
    tiny_base, image_folder, tmp_path, monkeypatch, capsys
):
    """At rate 1/2 all 40 units are drawn with probability 2^-40; and no bar tells how many were."""
    import select_saliency

    drawn, whole = [], select_saliency.summed_scores

    def spy(accelerator, engine, losses, indices, *rest, **named):
        drawn.append(indices)
        return whole(accelerator, engine, losses, indices, *rest, **named)

    monkeypatch.setattr(select_saliency, "summed_scores", spy)
    more = ["--sampling_rate", 0.5, "--train_batch_size", 1, "--scope", "attention"]
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *more)
    assert "selected" in train_here(arguments, "select_saliency")
    assert len(drawn) == 1 and len(drawn[0].unique()) == len(drawn[0]) < 40
    assert "scoring" not in capsys.readouterr().err
    event = read_json(tmp_path / "run" / "privacy.json")["events"][0]
    assert event["sampling_rate"] == 0.5 and event["steps"] == 1


def test_a_layer_used_twice_is_refused():
    layer = torch.nn.Linear(3, 3)
    engine = PerUnitGradients(layer)
    with pytest.raises(UsageError, match="used twice"):
        with engine.recording(2, norms_only=True):
            layer(layer(torch.ones(2, 3))).sum().backward()


def test_pure_noise_looks_less_stable_than_what_stands_out():
    keep, args = Keep(np.ones(50), np.ones(50)), SaliencyArguments(top_ratio="0.2")
    luck = selection.of_pure_noise(1.0, keep, args)
    scores = np.arange(50) > 39
    again = selection.stability(20.0 * scores, 1.0, keep, args)
    assert 0.3 < luck < 0.8 and again[40:].min() > 0.999 and again[:40].max() == 0


def test_a_random_choice_reads_nothing_and_costs_nothing(tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, tmp_path / "nowhere", tmp_path / "selection")
    train_here([*arguments, "--mechanism", "random", "--seed", 3], "select_saliency")
    found = read_saliency(tmp_path / "selection" / "saliency.json")
    assert found.event is None and found.noisy_scores is None and found.selected
    more = ["--saliency_file", tmp_path / "selection" / "saliency.json", *FEW]
    train_here(train_arguments(tiny_base, image_folder, tmp_path / "run", *more))
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["training"]


MISTAKES = [
    (["--sampling_rate", 0], "must be in (0, 1]"),
    (["--top_ratio", "some"], "must be auto or in (0, 1]"),
    (["--top_ratio", "auto", "--mechanism", "voting"], "reads squared norms"),
    (["--top_count", 3, "--top_mass", 0.5], "not both"),
    (["--selection_epsilon", 1, "--selection_noise_multiplier", 1], "not both"),
    (["--selection_noise_multiplier", 0.1], "must be between"),
    (["--selection_clip", "inf"], "must be positive and finite"),
    (["--select_saliency", "--saliency_file", "x"], "not both"),
    (["--saliency_file", "nowhere.json"], "cannot be read"),
]


@pytest.mark.parametrize("more, sentence", MISTAKES)
def test_mistakes_get_a_sentence(tiny_base, image_folder, tmp_path, more, sentence):
    if not any("saliency_file" in str(argument) for argument in more):
        more = [*more, "--select_saliency"]
    said = train_here(train_arguments(tiny_base, image_folder, tmp_path / "run", *more))
    assert said.startswith("error: ") and sentence in said


def test_a_damaged_file_is_a_sentence(tmp_path):
    for content, sentence in [("{", "no selection"), ('{"schema_version": 9}', "newer version")]:
        (tmp_path / "saliency.json").write_text(content)
        with pytest.raises(UsageError, match=sentence):
            read_saliency(tmp_path / "saliency.json")
    assert selection.SCHEMA_VERSION == 1
