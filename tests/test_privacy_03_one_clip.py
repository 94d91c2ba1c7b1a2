"""Clause 3: one unit, one clip. By replay: the clipped sum over D and over D minus one unit, with
every unit's draws frozen."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import utils.privacy.training
from tests.conftest import ROOT
from tests.worlds import HOSTILE, LinearWorld, Rounding, UNetWorld, build_plan
from utils.arguments.training import CLIPPING_MODES
from utils.audit.mutants import break_loop
from utils.errors import UsageError
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.privacy.dp_sgd import clipped_sum
from utils.privacy.precision import check_products
from utils.privacy.training import clipped_gradient_sum, reduce_micro_batches, split_units


@settings(max_examples=120, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(HOSTILE), min_size=2, max_size=7),
    draws=st.integers(1, 4),
    micro=st.integers(1, 8),
    bound=st.sampled_from([1e-3, 0.15, 1.0, 50.0]),
    world=st.fixed_dictionaries({"seed": st.integers(0, 100), "wide": st.booleans()}),
    clipping=st.sampled_from(CLIPPING_MODES),
)
def test_one_unit_moves_the_sum_by_at_most_C(
    accelerator, kinds, draws, micro, bound, world, clipping
):
    world = LinearWorld(kinds, draws, **world)
    move = world.largest_move(accelerator, micro, max_grad_norm=bound, clipping=clipping)
    assert move <= bound * (1 + 1e-5) * (1 + 1e-6 * len(kinds))


@pytest.mark.parametrize("clipping", CLIPPING_MODES)
@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_one_unit_moves_the_sum_of_a_unet_by_at_most_C(accelerator, trainable, clipping):
    world = UNetWorld(trainable)
    everyone = torch.arange(world.units)
    whole = world.total(accelerator, everyone, 7, clipping=clipping)
    for unit in range(world.units):
        rest = everyone[everyone != unit]
        move = (whole - world.total(accelerator, rest, 7, clipping=clipping)).norm()
        assert move <= 0.05 * (1 + 1e-5)
        if unit == world.huge_unit:  # the bound is used, not merely kept
            assert move > 0.99 * 0.05 * (0.2 if clipping == "per_layer" else 1.0)


@pytest.mark.parametrize("micro", [1, 2, 3, 100])
@pytest.mark.parametrize("clipping", CLIPPING_MODES)
def test_the_micro_batch_changes_nothing(accelerator, micro, clipping):
    kinds = ["ordinary", "huge", "zero", "nan", "ordinary", "huge", "ordinary"]
    world = LinearWorld(kinds, 3, 5)
    plan = {"max_grad_norm": 0.15, "clipping": clipping}
    at_once = world.total(accelerator, range(7), 7, **plan)
    in_parts = world.total(accelerator, range(7), micro, **plan)
    torch.testing.assert_close(in_parts, at_once, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def unet_worlds():
    return {trainable: UNetWorld(trainable) for trainable in ("lora", "all")}


@pytest.mark.parametrize("micro", [1, 2, 100])
@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_the_micro_batch_changes_nothing_but_rounding_in_a_unet(
    accelerator, unet_worlds, trainable, micro
):
    world = unet_worlds[trainable]
    ordinary = torch.arange(world.huge_unit)  # the huge unit's own gradient is mostly rounding
    at_once = world.total(accelerator, ordinary, 7)
    in_parts = world.total(accelerator, ordinary, micro)
    assert (in_parts - at_once).norm() < 2e-3 * at_once.norm()


def test_automatic_clipping_makes_units_count_alike(accelerator):
    """However large or small their gradients: each unit moves the sum by nearly C."""
    world = LinearWorld(["ordinary", "huge", "small"], seed=3)
    small = world.total(accelerator, [2], max_grad_norm=1e9, clipping="flat").norm()
    assert 1e-5 < small < 1e-3  # as of a large model
    for unit in range(3):
        total = world.total(accelerator, [unit], clipping="automatic", max_grad_norm=0.5)
        assert 0.99 * 0.5 < total.norm() <= 0.5


def test_per_layer_clipping_bounds_each_tensor(accelerator):
    world = LinearWorld(["huge"], seed=3)
    total = world.total(accelerator, [0], clipping="per_layer", max_grad_norm=1.0)
    sizes = [p.numel() for p in world.engine.parameters]
    norms = torch.stack([part.norm() for part in total.split(sizes)])
    assert (norms <= (1 + 1e-5) / len(sizes) ** 0.5).all() and norms.max() > 0.99 / len(
        sizes
    ) ** 0.5


def _not_clipped(record, plan):
    return record.weighted_sum(torch.ones_like(record.squared_norms()))


def _clipped_at_k_times_c(record, plan):
    bound = plan.max_grad_norm * plan.noise_multiplicity
    return clipped_sum(record, replace(plan, max_grad_norm=bound))


def _every_tensor_gets_the_whole_bound(record, plan):
    layers = record.squared_norms().shape[1]
    whole = replace(plan, clipping="per_layer", max_grad_norm=plan.max_grad_norm * layers**0.5)
    return clipped_sum(record, whole)


@pytest.mark.parametrize(
    "mutant", [_not_clipped, _clipped_at_k_times_c, _every_tensor_gets_the_whole_bound]
)
def test_the_replay_catches_broken_clipping(accelerator, monkeypatch, mutant):
    world = LinearWorld(["huge", "huge", "ordinary"], draws=4)
    assert world.largest_move(accelerator, max_grad_norm=0.15) <= 0.15 * (1 + 1e-5)
    monkeypatch.setattr(utils.privacy.training, "clipped_sum", mutant)
    assert not world.largest_move(accelerator, max_grad_norm=0.15) <= 0.15 * (1 + 1e-5)


def test_the_replay_catches_double_bounds(accelerator):
    """The same mutant that the audit runs."""
    world = LinearWorld(["huge", "huge", "ordinary"], draws=4)
    with break_loop("double_clip_bound"):
        assert world.largest_move(accelerator, max_grad_norm=0.15) > 0.29


def test_the_replay_catches_copies_clipped_one_by_one(accelerator):
    """The published DP-LoRA bug: one image contributes up to K * C."""
    world = LinearWorld(["huge", "huge", "ordinary"], draws=4)
    everyone, rest = torch.arange(3), torch.arange(1, 3)
    plan = build_plan(noise_multiplicity=4, max_grad_norm=0.15)
    with break_loop("copies_clipped_one_by_one"):
        whole, without = (
            utils.privacy.training.clipped_gradient_sum(
                accelerator, world.engine, world.losses, units, plan, 8
            )
            for units in (everyone, rest)
        )
    assert (whole - without).norm() > 3.9 * 0.15


def collect_rows(accelerator, world, units: list[int], size: int, autocast: bool) -> dict:
    """By unit, its row: what the private loop would clip."""
    rows = []

    def losses(indices):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return world.losses(indices)

    parts = split_units(torch.tensor(units), size)
    for part in reduce_micro_batches(
        accelerator, world.engine.recording, losses, parts, lambda record: record.rows().clone()
    ):
        rows.append(part)
    return dict(zip(units, torch.cat(rows), strict=False))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trainable", ["lora", "all"])
@pytest.mark.parametrize("added", [0, 3, 5])
def test_adding_a_unit_changes_nobody_elses_row_by_a_bit(accelerator, trainable, autocast, added):
    world = UNetWorld(trainable)
    everyone = list(range(6))  # without the huge one
    rest = [unit for unit in everyone if unit != added]
    whole = collect_rows(accelerator, world, everyone, 4, autocast)
    without = collect_rows(accelerator, world, rest, 4, autocast)
    assert all(torch.equal(whole[unit], without[unit]) for unit in rest)


def test_the_shape_of_a_micro_batch_does_change_rounding(accelerator):
    """So that a last one of another shape would not go unseen."""
    world, changed = UNetWorld("all"), False
    whole = collect_rows(accelerator, world, list(range(6)), 4, False)
    for size in (1, 2, 3, 5, 6):
        other = collect_rows(accelerator, world, list(range(6)), size, False)
        changed |= any(not torch.equal(whole[unit], other[unit]) for unit in range(6))
    assert changed


def test_blank_places_give_zero_whatever_the_first_unit_is(accelerator):
    world = LinearWorld(["nan", "ordinary", "huge"])
    alone = world.total(accelerator, [1], micro=1)
    for units in ([0, 1], [1]):  # another place in the batch rounds otherwise in fp32, by processor
        total = world.total(accelerator, units, micro=8)
        torch.testing.assert_close(total, alone, rtol=0, atol=2e-6)
    same_place = world.total(accelerator, [1], micro=8)
    assert torch.equal(world.total(accelerator, [1, 0], micro=8), same_place)
    assert world.total(accelerator, [2], micro=8).norm() <= 1 + 1e-5


def test_products_are_never_computed_in_tf32(accelerator, monkeypatch):
    """Whatever a library or an image set globally; and it is as before afterwards."""
    world, found = LinearWorld(["ordinary"] * 3), []
    backends = torch.backends

    def losses(units):
        found.append((backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision))
        found.append((backends.mkldnn.matmul.fp32_precision, backends.mkldnn.conv.fp32_precision))
        return world.losses(units)

    before = backends.cuda.matmul.fp32_precision
    backends.cuda.matmul.fp32_precision = "tf32"
    try:
        units = torch.arange(3)
        total = clipped_gradient_sum(accelerator, world.engine, losses, units, build_plan(), 2)
        assert backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        backends.cuda.matmul.fp32_precision = before
    assert found == [("ieee", "ieee")] * 4 and total.dtype == torch.float64


@pytest.mark.parametrize("bits", [7, 10])  # of bf16, and of TF32
@pytest.mark.parametrize("names", ["__matmul__ matmul", "conv2d", "_linear_pointwise linear"])
def test_a_library_that_rounds_behind_pytorchs_back_is_refused(names, bits):
    """As oneDNN does under ONEDNN_DEFAULT_FPMATH_MODE=BF16."""
    with Rounding(names, 23):
        check_products(torch.device("cpu"))
    with Rounding(names, bits), pytest.raises(UsageError, match="lower precision"):
        check_products(torch.device("cpu"))


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(),
    reason="oneDNN computes fp32 products in bf16 only where the processor has tiles for it",
)
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("variable", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_onednn_that_was_told_to_round_is_refused(variable, threads):
    check = "from utils.privacy.precision import *; check_products(torch.device('cpu'))"
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    for told, said in [({}, ""), ({variable: "BF16"}, "(linear, conv2d) are computed at a lower")]:
        command = [sys.executable, "-c", check]
        run = subprocess.run(
            command, cwd=ROOT, env=environment | told, capture_output=True, text=True
        )
        assert said in run.stderr and bool(run.returncode) == bool(told), run.stderr


@pytest.mark.parametrize("bound", [5.0e-15, 1.5e-15, 1.4e-15])
def test_a_scale_that_fp32_cannot_hold_lets_nobody_count_for_more_than_C(accelerator, bound):
    """Huge gradients and a tiny bound: fp32 would round the scale by more than is allowed."""
    layer = nn.Linear(40, 40, bias=False)
    engine = PerUnitGradients(nn.Sequential(layer))
    x = 1.5e14 * torch.ones(1, 2, 40)  # just short of what is not used at all
    losses = lambda units: (1.5e14 * layer(x)).sum((1, 2))  # noqa: E731
    with engine.recording(1) as record:
        losses(None).backward()
    assert record.squared_norms().isfinite().all()
    plan = build_plan(max_grad_norm=bound)
    total = clipped_gradient_sum(accelerator, engine, losses, torch.tensor([0]), plan, 1)
    assert total.norm() <= bound * (1 + 1e-5)
