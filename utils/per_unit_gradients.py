"""One backward pass -> the gradient of every privacy unit.

While `PerUnitGradients.recording` is open, the forward pass of every trainable layer goes through
an autograd function of ours (`utils/unit_leaves.py`; for LoRA, `utils/unit_lora.py`) whose backward
pass notes the weight gradient of each unit. Frozen layers cost nothing extra, there are no hooks to
pair, and recomputed (checkpointed) or reused layers need no special care.

Shapes: U units, P trainable parameters in L tensors.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from utils.errors import UsageError
from utils.unit_leaves import (
    check_leaf,
    factor_matrices,
    leaf_forward,
    products,
    squared_norms_of_products,
    sum_of_products,
)
from utils.unit_lora import lora_forward, lora_layers

MIXES_ROWS = (nn.modules.batchnorm._BatchNorm,)
READS_DATA = ("eva", "corda", "lora_ga")  # adapter inits computed from the training data


class PerUnitGradients:
    """The trainable tensors of a model, and what a backward pass found for each unit.

    Attributes:
        names, parameters: the L trainable tensors, in the order of `model.named_parameters()`.
        num_parameters: P.

    Raises:
        UsageError: nothing is trainable; a trainable parameter belongs to a layer that is not in
            `unit_leaves.LEAVES`, is shared, or is not fp32; a layer mixes rows of the batch; an
            adapter is initialised from data.
    """

    def __init__(self, model: nn.Module):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise UsageError("no parameter is trainable, so there is nothing to train privately")
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.num_parameters = sum(p.numel() for p in self.parameters)
        self.device = self.parameters[0].device
        for name, parameter in named:
            if parameter.dtype != torch.float32:
                raise UsageError(
                    f"trainable parameter {name} is {parameter.dtype}; it must be fp32"
                )
        _check_adapters(model)
        leaves, loras = _find_leaves(model), lora_layers(model)
        within = {part for layer in loras.values() for part in (layer.a, layer.b)}
        self._forwards = {
            leaf: partial(leaf_forward, leaf) for leaf in leaves if leaf not in within
        }
        self._forwards |= {m: partial(lora_forward, layer) for m, layer in loras.items()}

    @contextmanager
    def recording(self, num_units: int, norms_only: bool = False) -> Iterator["Recording"]:
        """Run forward and backward inside; the recording is filled when the context is left.

        Call `backward()` on the SUM over units of each unit's own loss. With `norms_only` each
        gradient is measured as it comes, and let go.

        Raises:
            UsageError: on leaving, if a trainable parameter received no gradient.
        """
        record = (NormRecording if norms_only else Recording)(self.parameters, num_units)
        before = {module: vars(module).get("forward") for module in self._forwards}
        for module, forward in self._forwards.items():
            module.forward = partial(forward, record)
        try:
            yield record
        finally:
            for module, forward in before.items():
                del module.forward
                if forward is not None:
                    module.forward = forward
        silent = [n for n, p in zip(self.names, self.parameters, strict=True) if not record.has(p)]
        if silent:
            raise UsageError(
                f"no gradient reached {len(silent)} trainable parameter(s), such as {silent[0]}: "
                "this model does not use that layer"
            )

    def assign(self, flat: torch.Tensor) -> None:
        """Set every parameter's `.grad` from one flat vector [P]."""
        parts = flat.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))


class Recording:
    """The gradients of U units, as far as each was worth multiplying out.

    Each trainable tensor has either rows [U, size], or factors whose product they are.
    """

    def __init__(self, parameters: list[nn.Parameter], num_units: int):
        self.parameters, self.num_units = parameters, num_units
        self._rows: dict[nn.Parameter, torch.Tensor] = {}
        self._uses = defaultdict(list)  # weight -> (leaf, input, gradient of the output) a use

    def add_rows(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add [U, ...] per-unit gradients of `parameter`."""
        if self._uses.get(parameter):  # a layer used again at another size
            self._multiply_out(parameter)
        rows = gradient.reshape(self.num_units, -1).float()
        known = self._rows.get(parameter)
        self._rows[parameter] = rows if known is None else known + rows

    def add_factors(self, leaf: nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> None:
        """Note one use of a leaf; its weight gradient stays a product until it is asked for."""
        self._uses[leaf.weight].append((leaf, x.detach(), grad_output))
        if leaf.weight in self._rows:
            self._multiply_out(leaf.weight)

    def has(self, parameter: nn.Parameter) -> bool:
        return parameter in self._rows or parameter in self._uses

    def nbytes(self) -> int:
        """Memory that this recording holds."""
        kept = list(self._rows.values())
        kept += [tensor for uses in self._uses.values() for use in uses for tensor in use[1:]]
        return sum(tensor.nbytes for tensor in kept)

    def squared_norms(self) -> torch.Tensor:
        """The squared norm of each tensor's gradient, for each unit: [U, L], fp32.

        Never below the true one, but for the rounding of the rows themselves.
        """
        columns = []
        for parameter in self.parameters:
            if parameter in self._rows:
                columns.append(torch.linalg.vector_norm(self._rows[parameter], dim=1).square())
            else:
                columns.append(squared_norms_of_products(*self._matrices(parameter)))
        return torch.stack(columns, 1)

    def weighted_sum(self, scales: torch.Tensor) -> torch.Tensor:
        """The sum over units of scales[u, l] times the gradient of tensor l: [U, L] -> [P]."""
        parts = []
        for parameter, scale in zip(self.parameters, scales.unbind(1), strict=True):
            if parameter in self._rows:
                parts.append(scale @ self._rows[parameter])
            else:
                x, grads = self._matrices(parameter)
                part = sum_of_products(x, grads * scale[:, None, None], parameter)
                parts.append(part.flatten())
        return torch.cat(parts)

    def drop(self, units: torch.Tensor) -> None:
        """Make the gradient of the units in the mask [U] zero, whatever it was."""
        for parameter, rows in self._rows.items():
            self._rows[parameter] = rows.masked_fill(units[:, None], 0.0)
        for uses in self._uses.values():
            uses[:] = [(leaf, *(self._blank(t, units) for t in pair)) for leaf, *pair in uses]

    def rows(self) -> torch.Tensor:
        """Every unit's whole gradient, multiplied out: [U, P]. For small models and for tests."""
        for parameter in list(self._uses):
            self._multiply_out(parameter)
        return torch.cat([self._rows[parameter] for parameter in self.parameters], 1)

    def _matrices(self, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        """X [U, T, in] and G [U, T, out] over all uses of a weight."""
        pairs = [factor_matrices(*use, self.num_units) for use in self._uses[parameter]]
        x, grads = zip(*pairs, strict=True)
        return torch.cat(x, 1), torch.cat(grads, 1)

    def _multiply_out(self, parameter: nn.Parameter) -> None:
        x, grads = self._matrices(parameter)
        del self._uses[parameter]
        self.add_rows(parameter, products(x, grads, parameter))

    def _blank(self, tensor: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        mask = units.repeat_interleave(len(tensor) // self.num_units)
        return tensor.masked_fill(mask.view(-1, *[1] * (tensor.dim() - 1)), 0)


class NormRecording(Recording):
    """Only the squared norms, each taken as soon as the backward pass has made the gradient.

    Raises:
        UsageError: a layer is used twice, so that its gradient is a sum that nobody keeps.
    """

    def __init__(self, parameters: list[nn.Parameter], num_units: int):
        super().__init__(parameters, num_units)
        self._squared: dict[nn.Parameter, torch.Tensor] = {}

    def add_rows(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        rows = gradient.reshape(self.num_units, -1).float()
        self._note(parameter, torch.linalg.vector_norm(rows, dim=1).square())

    def add_factors(self, leaf: nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> None:
        factors = factor_matrices(leaf, x.detach(), grad_output, self.num_units)
        self._note(leaf.weight, squared_norms_of_products(*factors))

    def has(self, parameter: nn.Parameter) -> bool:
        return parameter in self._squared

    def nbytes(self) -> int:
        return sum(column.nbytes for column in self._squared.values())

    def squared_norms(self) -> torch.Tensor:
        return torch.stack([self._squared[parameter] for parameter in self.parameters], 1)

    def _note(self, parameter: nn.Parameter, squared: torch.Tensor) -> None:
        if parameter in self._squared:
            raise UsageError("a layer that is used twice in one pass cannot be ranked")
        self._squared[parameter] = squared


def _find_leaves(model: nn.Module) -> list[nn.Module]:
    leaves, owner = [], {}
    for name, module in model.named_modules():
        if isinstance(module, MIXES_ROWS):
            raise UsageError(f"{name} is a BatchNorm: it mixes the images of a batch")
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            check_leaf(name, module)
            leaves.append(module)
        for parameter in own:
            if owner.setdefault(parameter, name) != name:
                raise UsageError(f"{name} shares a trainable parameter with {owner[parameter]}")
    return leaves


def _check_adapters(model: nn.Module) -> None:
    """Refuse what peft offers that would read private data, or that clips do not cover."""
    configs = [getattr(module, "peft_config", {}) for module in model.modules()]
    for name, config in [item for found in configs for item in found.items()]:
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.lower() in READS_DATA:
            raise UsageError(
                f"adapter '{name}': init_lora_weights='{start}' is computed from the training "
                "images, which no epsilon would cover; use 'gaussian'"
            )
        if getattr(config, "use_dora", False):
            raise UsageError(f"adapter '{name}' uses DoRA, whose magnitudes are not supported")
