"""What one backward pass found: the gradient of every trainable tensor, for every privacy unit.

The layers (`leaves`, `lora_leaf`) write into it during the backward pass; clipping reads norms and
weighted sums from it afterwards.

Shapes: U units, P trainable parameters in L tensors.
"""

import hashlib
from collections import defaultdict

import torch
from torch import nn

from utils.errors import UsageError
from utils.gradients.products import (
    by_unit,
    factor_matrices,
    product_is_smaller,
    products,
    squared_norms_of_products,
    squared_norms_of_rows,
    sum_of_products,
    unit_products,
    weighted_sum_of_rows,
)


class MixedRows(RuntimeError):
    """A trainable layer sees something else than the rows of the batch."""


class Recording:
    """The gradients of U units, as far as each was worth multiplying out.

    Each trainable tensor has either rows [U, size], or factors whose product they are.

    Args:
        num_rows: R = U * K, rows of the batch, a unit's draws side by side.
    """

    def __init__(self, parameters: list[nn.Parameter], num_units: int, num_rows: int):
        self.parameters, self.num_units, self.num_rows = parameters, num_units, num_rows
        self._rows: dict[nn.Parameter, torch.Tensor] = {}
        self._uses = defaultdict(list)  # weight -> (leaf, input, gradient of the output) a use
        self._factors: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]] = {}  # of all uses

    def check_rows(self, x: torch.Tensor) -> None:
        """The input of a leaf has a row for each row of the batch, or one for each unit.

        Raises:
            MixedRows: it has not, so that nobody can tell whose gradient is whose.
        """
        if len(x) not in (self.num_rows, self.num_units):
            raise MixedRows(
                f"a trainable layer saw {len(x)} rows for {self.num_units} units of "
                f"{self.num_rows // self.num_units} draws; it mixes rows of the batch"
            )

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
        self._factors.pop(leaf.weight, None)
        if leaf.weight in self._rows:
            self._multiply_out(leaf.weight)

    def add_products(self, leaf: nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> None:
        """Note one use of a Linear, or of a Conv2d of one pixel, in the smaller form.

        Args:
            x: [R, ..., in]. grad_output: [R, ..., out]; channels come last, also of a Conv2d.
        """
        grads = by_unit(grad_output, self.num_units)  # [U, T, out]
        if product_is_smaller(grads.shape[1], *leaf.weight.shape[:2]):
            inputs = by_unit(x, self.num_units).to(grads.dtype)
            self.add_rows(leaf.weight, unit_products(inputs, grads))
        elif type(leaf) is nn.Conv2d:
            self.add_factors(leaf, x.movedim(-1, 1), grad_output.movedim(-1, 1))
        else:
            self.add_factors(leaf, x, grad_output)

    def has(self, parameter: nn.Parameter) -> bool:
        return parameter in self._rows or parameter in self._uses

    def nbytes(self) -> int:
        """Memory that this recording holds."""
        kept = list(self._rows.values())
        kept += [tensor for uses in self._uses.values() for use in uses for tensor in use[1:]]
        known = {tensor.untyped_storage().data_ptr() for tensor in kept}
        made = [tensor for pair in self._factors.values() for tensor in pair]
        kept += [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in known]
        return sum(tensor.nbytes for tensor in kept)

    def squared_norms(self) -> torch.Tensor:
        """The squared norm of each tensor's gradient, for each unit: [U, L], fp64.

        Never below the true one; infinity or NaN for a unit that must not be used.
        """
        columns = {}
        if self._rows:
            squared = squared_norms_of_rows(list(self._rows.values()))
            columns = dict(zip(self._rows, squared.unbind(1), strict=True))
        for parameter in self.parameters:
            if parameter not in columns:
                columns[parameter] = squared_norms_of_products(*self._matrices(parameter))
        return torch.stack([columns[parameter] for parameter in self.parameters], 1)

    def weighted_sum(self, scales: torch.Tensor) -> torch.Tensor:
        """The sum over units of scales[u, l] times the gradient of tensor l: [U, L] -> [P], fp64.

        A unit moves it by no more than its own scaled gradient, whatever those of the others.
        """
        parts = []
        for parameter, scale in zip(self.parameters, scales.float().unbind(1), strict=True):
            if parameter in self._rows:
                parts.append(weighted_sum_of_rows(scale, self._rows[parameter]))
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
        self._factors.clear()

    def rows(self) -> torch.Tensor:
        """Every unit's whole gradient, multiplied out: [U, P]. For small models and for tests."""
        for parameter in list(self._uses):
            self._multiply_out(parameter)
        return torch.cat([self._rows[parameter] for parameter in self.parameters], 1)

    def digest_units(self) -> list[str]:
        """The SHA-256 of all that was recorded of each unit: [U]. For replays and tests."""
        kept = [self._rows[p] for p in self.parameters if p in self._rows]
        kept += [t for p in self.parameters for _, *pair in self._uses.get(p, []) for t in pair]
        hashes = [hashlib.sha256() for _ in range(self.num_units)]
        for tensor in kept:
            parts = tensor.detach().cpu().reshape(self.num_units, -1).contiguous()
            for unit_hash, part in zip(hashes, parts.view(torch.uint8).numpy(), strict=True):
                unit_hash.update(part)
        return [unit_hash.hexdigest() for unit_hash in hashes]

    def _matrices(self, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        """X [U, T, in] and G [U, T, out] over all uses of a weight."""
        if parameter not in self._factors:
            pairs = [factor_matrices(*use, self.num_units) for use in self._uses[parameter]]
            if len(pairs) > 1:
                x, grads = zip(*pairs, strict=True)
                pairs = [(torch.cat(x, 1), torch.cat(grads, 1))]
            self._factors[parameter] = pairs[0]
        return self._factors[parameter]

    def _multiply_out(self, parameter: nn.Parameter) -> None:
        x, grads = self._matrices(parameter)
        del self._uses[parameter], self._factors[parameter]
        self.add_rows(parameter, products(x, grads, parameter))

    def _blank(self, tensor: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        mask = units.repeat_interleave(len(tensor) // self.num_units)
        return tensor.masked_fill(mask.view(-1, *[1] * (tensor.dim() - 1)), 0)


class NormRecording(Recording):
    """Only the squared norms, each taken as soon as the backward pass has made the gradient.

    Raises:
        UsageError: a layer is used twice, so that its gradient is a sum that nobody keeps.
    """

    def __init__(self, parameters: list[nn.Parameter], num_units: int, num_rows: int):
        super().__init__(parameters, num_units, num_rows)
        self._squared: dict[nn.Parameter, torch.Tensor] = {}

    def add_rows(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        rows = gradient.reshape(self.num_units, -1).float()
        self._note(parameter, squared_norms_of_rows([rows]).squeeze(1))

    def add_factors(self, leaf: nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> None:
        factors = factor_matrices(leaf, x.detach(), grad_output, self.num_units)
        self._note(leaf.weight, squared_norms_of_products(*factors))

    def has(self, parameter: nn.Parameter) -> bool:
        return parameter in self._squared

    def nbytes(self) -> int:
        return sum(column.nbytes for column in self._squared.values())

    def drop(self, units: torch.Tensor) -> None:
        for parameter, squared in self._squared.items():
            self._squared[parameter] = squared.masked_fill(units, 0.0)

    def squared_norms(self) -> torch.Tensor:
        return torch.stack([self._squared[parameter] for parameter in self.parameters], 1)

    def _note(self, parameter: nn.Parameter, squared: torch.Tensor) -> None:
        if parameter in self._squared:
            raise UsageError("a layer that is used twice in one pass cannot be ranked")
        self._squared[parameter] = squared


class UseRecording(Recording):
    """Only which tensors received a gradient other than zeros: `used`."""

    def __init__(self, parameters: list[nn.Parameter], num_units: int, num_rows: int):
        super().__init__(parameters, num_units, num_rows)
        self.used: set[nn.Parameter] = set()

    def add_rows(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        if gradient.any():
            self.used.add(parameter)

    def add_factors(self, leaf: nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> None:
        self.add_rows(leaf.weight, grad_output)
