"""A LoRA layer as one autograd function, y = W x + b + s B A x, with per-unit gradients of A and B.

What peft computes in five operations over full-size tensors takes two here, and an update in
place: the adapter is added where the frozen product already lies, forward and backward.

Source: Hu et al. 2021, section 4.1.
"""

from dataclasses import dataclass

import torch
from peft.tuners import lora
from torch import nn
from torch.autograd.function import once_differentiable

from utils.errors import UsageError
from utils.gradients.fast_linear import is_pixelwise, is_plain, linear
from utils.gradients.recording import Recording


@dataclass(frozen=True)
class LoraLayer:
    """A peft layer: a frozen Linear (or Conv2d of one pixel), and the one adapter beside it."""

    module: lora.Linear | lora.Conv2d
    name: str

    @property
    def base(self) -> nn.Module:
        return self.module.get_base_layer()

    @property
    def a(self) -> nn.Module:
        return self.module.lora_A[self.name]

    @property
    def b(self) -> nn.Module:
        return self.module.lora_B[self.name]

    @property
    def scaling(self) -> float:
        return self.module.scaling[self.name]

    def features_last(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(1, -1) if type(self.base) is nn.Conv2d else x

    def features_first(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(-1, 1) if type(self.base) is nn.Conv2d else x


def find_lora_layers(model: nn.Module) -> dict[nn.Module, LoraLayer]:
    """By module, the LoRA layers that `run_lora` runs; `run_leaf` runs the parts of the others."""
    found = {m: _find_parts(m) for m in model.modules() if type(m) in (lora.Linear, lora.Conv2d)}
    return {module: parts for module, parts in found.items() if parts is not None}


def _find_parts(module: lora.Linear | lora.Conv2d) -> LoraLayer | None:
    if len(module.active_adapters) != 1 or module.disable_adapters or module.merged:
        return None
    name = module.active_adapters[0]
    if name not in module.lora_A or name in module.lora_variant:
        return None
    layer = LoraLayer(module, name)
    if module.base_layer is not layer.base:  # another adapter lies between
        return None
    kinds = {type(part) for part in (layer.base, layer.a, layer.b)}
    plain = kinds == {nn.Linear} or kinds == {nn.Conv2d} and is_pixelwise(layer.base)
    frozen = not any(parameter.requires_grad for parameter in layer.base.parameters())
    without_bias = layer.a.bias is None and layer.b.bias is None
    straight = isinstance(module.lora_dropout[name], nn.Identity)
    return layer if plain and frozen and without_bias and straight else None


def run_lora(layer: LoraLayer, record: Recording, x: torch.Tensor) -> torch.Tensor:
    """What peft's layer gives for x, whose backward pass hands `record` each unit's gradients."""
    if layer.module.merged:
        raise UsageError("a LoRA was merged into the weights while it is being trained")
    record.check_rows(x)
    return _UnitLora.apply(x, layer.base.weight, layer.a.weight, layer.b.weight, layer, record)


class _UnitLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, a, b, layer, record):
        ctx.layer, ctx.record, ctx.scaling = layer, record, layer.scaling
        x = layer.features_last(x)
        inner = ctx.scaling * linear(x, a.flatten(1))
        ctx.save_for_backward(x if a.requires_grad else None, inner, weight, a, b)
        y = linear(x, weight.flatten(1), layer.base.bias)
        _add_product(y, inner, b.flatten(1))
        return layer.features_first(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        layer, record = ctx.layer, ctx.record
        x, inner, weight, a, b = ctx.saved_tensors
        grad_output = layer.features_last(grad_output)
        dtype = grad_output.dtype
        grad_inner = ctx.scaling * linear(grad_output, b.flatten(1).t().contiguous().to(dtype))
        # Not the saved weights: under checkpointing those are copies.
        if layer.b.weight.requires_grad:
            record.add_products(layer.b, inner, grad_output)
        if layer.a.weight.requires_grad:
            record.add_products(layer.a, x, grad_inner)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad_output, weight.flatten(1).t().to(dtype))
            _add_product(grad_x, grad_inner, a.flatten(1).t())
            grad_x = layer.features_first(grad_x)
        return grad_x, None, None, None, None, None


def _add_product(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Add x [..., in] times weight [out, in] to `total` [..., out], where it lies."""
    if is_plain(x, weight):
        total += linear(x, weight)
        return
    rows = total.view(-1, total.shape[-1])
    rows.addmm_(x.reshape(-1, x.shape[-1]).to(total.dtype), weight.t().to(total.dtype))
