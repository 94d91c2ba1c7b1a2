"""Row u of the buffer is the gradient of unit u: against batch-size-1 autograd, and Opacus."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from utils.errors import UsageError
from utils.gradients.lora_leaf import find_lora_layers
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.gradients.products import squared_norms_of_products


def reference_rows(model, x, units):
    """Gradients of the mean loss of each unit's rows, one ordinary backward pass a unit."""
    rows = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for part in x.chunk(units):
        loss = model(part).square().flatten(1).mean(1).mean()
        grads = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def engine_rows(model, x, units):
    engine = PerUnitGradients(model, len(x) // units)
    with engine.recording(units) as record:
        losses = model(x).square().flatten(1).mean(1)
        losses.view(units, -1).mean(1).sum().backward()
    return consistent_rows(record)


def consistent_rows(record):
    """The rows, after checking that norms and weighted sums agree with them."""
    norms, scales = record.squared_norms(), torch.rand(record.num_units, len(record.parameters))
    total = record.weighted_sum(scales)
    rows = record.rows()
    sizes = [p.numel() for p in record.parameters]
    parts = rows.split(sizes, 1)
    exact = torch.stack([part.double().square().sum(1) for part in parts], 1)
    torch.testing.assert_close(norms.double(), exact, rtol=2e-3, atol=1e-9)
    assert (norms >= exact * (1 - 1e-5)).all()
    sums = torch.cat([scales[:, i] @ part for i, part in enumerate(parts)])
    torch.testing.assert_close(total.float(), sums, rtol=1e-3, atol=1e-5)
    return rows


@settings(max_examples=60, deadline=None)
@given(
    units=st.integers(1, 4),
    draws=st.integers(1, 3),
    positions=st.integers(0, 5),
    bias=st.booleans(),
    frozen_input=st.booleans(),
)
def test_linear_rows_equal_one_unit_autograd(units, draws, positions, bias, frozen_input):
    torch.manual_seed(1)
    first = nn.Linear(5, 4, bias=bias).requires_grad_(not frozen_input)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3, bias=bias))
    shape = (units * draws, positions, 5) if positions else (units * draws, 5)
    x = torch.randn(shape)
    torch.testing.assert_close(
        engine_rows(model, x, units), reference_rows(model, x, units), rtol=1e-4, atol=1e-6
    )


@settings(max_examples=120, deadline=None)
@given(
    units=st.integers(1, 3),
    draws=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    geometry=st.fixed_dictionaries(
        {
            "kernel_size": st.tuples(st.integers(1, 4), st.integers(1, 4)),
            "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
            "padding": st.tuples(st.integers(0, 4), st.integers(0, 4)),
            "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
            "bias": st.booleans(),
        }
    ),
)
def test_conv2d_rows_equal_one_unit_autograd(units, draws, channels, geometry):
    torch.manual_seed(2)
    conv = nn.Conv2d(*channels, **geometry)
    model = nn.Sequential(nn.Conv2d(2, channels[0], 1), nn.Tanh(), conv)
    x = torch.randn(units * draws, 2, 9, 8)
    torch.testing.assert_close(
        engine_rows(model, x, units), reference_rows(model, x, units), rtol=1e-4, atol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(
    units=st.integers(1, 4),
    draws=st.integers(1, 3),
    positions=st.integers(1, 4),
    features=st.tuples(st.integers(10, 40), st.integers(10, 40)),
)
def test_wide_layers_that_stay_in_factors_equal_one_unit_autograd(
    units, draws, positions, features
):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, features[0]), nn.Tanh(), nn.Linear(*features))
    x = torch.randn(units * draws, positions, 5)
    torch.testing.assert_close(
        engine_rows(model, x, units), reference_rows(model, x, units), rtol=1e-4, atol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(
    units=st.integers(1, 3),
    draws=st.integers(1, 3),
    bias=st.booleans(),
    frozen=st.sampled_from(["nothing", "weight", "bias"]),
    shape=st.sampled_from([(6,), (6, 1, 5), (6, 3, 5)]),
)
def test_norm_layers_equal_one_unit_autograd(units, draws, bias, frozen, shape):
    torch.manual_seed(2)
    last = nn.LayerNorm(shape[-1], bias=bias) if len(shape) > 1 else nn.LayerNorm(6, bias=bias)
    model = nn.Sequential(nn.GroupNorm(3, 6), nn.Tanh(), last, nn.LayerNorm(shape))
    for layer in model:
        if hasattr(layer, "weight"):
            nn.init.normal_(layer.weight)
    if frozen != "nothing" and getattr(model[0], frozen) is not None:
        getattr(model[0], frozen).requires_grad_(False)
    x = torch.randn(units * draws, *shape)
    torch.testing.assert_close(
        engine_rows(model, x, units), reference_rows(model, x, units), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("units, draws", [(1, 1), (3, 2)])
def test_embeddings_equal_one_unit_autograd(units, draws, padding):
    """Words that repeat within a unit, across units, and the padding word."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(7, 5, padding_idx=padding), nn.Tanh(), nn.Linear(5, 2))
    words = torch.randint(7, (units * draws, 6))
    torch.testing.assert_close(
        engine_rows(model, words, units), reference_rows(model, words, units), rtol=1e-4, atol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(
    units=st.integers(1, 4),
    draws=st.integers(1, 3),
    positions=st.integers(1, 5),
    features=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    rank=st.integers(1, 6),
    kernel=st.sampled_from([0, 1, 3]),
    frozen=st.sampled_from(["", "lora_A", "lora_B"]),
)
def test_lora_layers_equal_one_unit_autograd_through_peft(
    units, draws, positions, features, rank, kernel, frozen
):
    torch.manual_seed(4)
    middle = nn.Conv2d(*features, kernel) if kernel else nn.Linear(*features)
    first = nn.Conv2d(5, features[0], 1) if kernel else nn.Linear(5, features[0])
    last = nn.Conv2d(features[1], 4, 1) if kernel else nn.Linear(features[1], 4)
    model = nn.Sequential(first, nn.Tanh(), middle, nn.Tanh(), last).requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=3, target_modules=["0", "2", "4"], init_lora_weights=False
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and (not frozen or frozen not in name))
    assert len(find_lora_layers(model)) == (2 if kernel == 3 else 3)
    shape = (5, positions + 2, 4) if kernel else (positions, 5)
    x = torch.randn(units * draws, *shape)
    engine = PerUnitGradients(model)
    with pytest.raises(UsageError, match="no gradient"), engine.recording(len(x)), torch.no_grad():
        torch.testing.assert_close(model(x), peft_output(model, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        engine_rows(model, x, units), reference_rows(model, x, units), rtol=1e-3, atol=1e-5
    )


def test_lora_layers_that_are_more_than_plain_go_leaf_by_leaf():
    """Or else what lies between, or is added, would be left out of what is trained."""

    def adapted(**more):
        model = nn.Sequential(nn.Linear(20, 20))
        targets = {"target_modules": ["0"], "init_lora_weights": False, **more}
        return inject_adapter_in_model(LoraConfig(r=2, **targets), model)

    assert len(find_lora_layers(adapted())) == 1
    assert not find_lora_layers(adapted(lora_dropout=0.1))
    assert not find_lora_layers(adapted(lora_bias=True, bias="none"))
    trained_base = adapted()
    trained_base[0].base_layer.weight.requires_grad_()
    assert not find_lora_layers(trained_base)
    nested = adapted()
    nested[0].base_layer = adapted()[0]
    assert nested[0] not in find_lora_layers(nested)
    two = adapted()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), two, adapter_name="second")
    two[0].set_adapter(["default", "second"])
    assert not find_lora_layers(two)


def test_a_lora_that_is_merged_while_it_trains_is_refused():
    model = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(20, 20))
    )
    engine = PerUnitGradients(model)
    model[0].merge()
    with pytest.raises(UsageError, match="merged"), engine.recording(3):
        model(torch.randn(3, 20)).sum().backward()


def peft_output(model, x):
    """What the model gives outside of a recording, asked for within one."""
    replaced = {m: vars(m).pop("forward") for m in model.modules() if "forward" in vars(m)}
    y = model(x)
    for module, forward in replaced.items():
        module.forward = forward
    return y


def test_a_reused_layer_adds_up_both_uses():
    torch.manual_seed(3)
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(6, 4)
    torch.testing.assert_close(engine_rows(model, x, 3), reference_rows(model, x, 3))


class Twice(nn.Module):
    """One wide layer used at two sizes: many positions (rows) and few (factors)."""

    def __init__(self, long_first: bool):
        super().__init__()
        self.layer, self.long_first = nn.Linear(30, 30), long_first

    def forward(self, x):
        uses = [self.layer(x).mean(1), self.layer(x[:, :1]).mean(1)]
        return sum((uses if self.long_first else uses[::-1]), 0.0)


@pytest.mark.parametrize("long_first", [True, False])
def test_a_layer_reused_at_another_size_adds_up_both_uses(long_first):
    torch.manual_seed(3)
    model, x = Twice(long_first), torch.randn(6, 40, 30)
    torch.testing.assert_close(
        engine_rows(model, x, 3), reference_rows(model, x, 3), rtol=1e-4, atol=1e-6
    )


def test_cancelling_positions_cannot_hide_a_norm():
    """Two positions whose huge gradients nearly cancel: the norm is never understated."""
    torch.manual_seed(4)
    for scale in (1.0, 1e2, 1e4):
        x, grads = torch.randn(50, 2, 40), torch.randn(50, 2, 40)
        x[:, 1], grads[:, 1] = x[:, 0], -grads[:, 0]
        x[:, 0] *= scale
        x[:, 1] *= scale
        grads[:, 1] += 1e-4 * torch.randn(50, 40)
        exact = (grads.double().transpose(1, 2) @ x.double()).square().sum((1, 2))
        assert (squared_norms_of_products(x, grads) >= exact * (1 - 1e-5)).all()


@pytest.mark.parametrize(
    "model, shape",
    [
        (nn.Linear(4, 4), (2, 4)),
        (nn.Conv2d(4, 4, 1), (2, 4, 3, 3)),
        (nn.GroupNorm(2, 4), (2, 4, 3, 3)),
        (nn.LayerNorm(4), (2, 4)),
        (
            inject_adapter_in_model(
                LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 4))
            ),
            (2, 4),
        ),
    ],
    ids=["linear", "conv", "group_norm", "layer_norm", "lora"],
)
def test_a_gradient_of_a_gradient_is_an_error_not_a_wrong_number(model, shape):
    x = torch.randn(shape, requires_grad=True)
    with PerUnitGradients(model).recording(2):
        loss = model(x).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
