"""One backward pass -> the gradient of every privacy unit.

While `PerUnitGradients.recording` is open, the forward pass of every trainable layer goes through
an autograd function (`leaves`; for LoRA, `lora_leaf`) whose backward pass records the gradient of
each unit. Frozen layers cost nothing extra, there are no hooks to pair, and recomputed
(checkpointed) or reused layers need no special care.

Shapes: U units, P trainable parameters in L tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from utils.errors import UsageError
from utils.gradients.leaves import check_leaf, run_leaf
from utils.gradients.lora_leaf import find_lora_layers, run_lora
from utils.gradients.recording import NormRecording, Recording, UseRecording

MIXES_ROWS = (nn.modules.batchnorm._BatchNorm,)
READS_DATA = ("eva", "corda", "lora_ga")  # adapter inits computed from the training data


class PerUnitGradients:
    """The trainable tensors of a model, and what a backward pass found for each unit.

    Attributes:
        names, parameters: the L trainable tensors, in the order of `model.named_parameters()`.
        num_parameters: P.
        num_draws: K, rows of a batch that belong to each unit.

    Raises:
        UsageError: nothing is trainable; a trainable parameter belongs to a layer that is not in
            `leaves.LEAVES`, is shared, or is not fp32; a layer mixes rows of the batch; an
            adapter is initialised from data.
    """

    def __init__(self, model: nn.Module, num_draws: int = 1):
        self.num_draws = num_draws
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
        leaves, loras = _find_leaves(model), find_lora_layers(model)
        within = {part for layer in loras.values() for part in (layer.a, layer.b)}
        self._forwards = {leaf: partial(run_leaf, leaf) for leaf in leaves if leaf not in within}
        self._forwards |= {m: partial(run_lora, layer) for m, layer in loras.items()}

    @contextmanager
    def recording(
        self, num_units: int, norms_only: bool = False, num_draws: int | None = None
    ) -> Iterator[Recording]:
        """Run forward and backward inside; the recording is filled when the context is left.

        Call `backward()` on the SUM over units of each unit's own loss. With `norms_only` each
        gradient is measured as it comes, and let go.

        Args:
            num_draws: K in this pass; default: that of the engine.

        Raises:
            UsageError: on leaving, if a trainable parameter received no gradient.
        """
        num_rows = num_units * (self.num_draws if num_draws is None else num_draws)
        record = (NormRecording if norms_only else Recording)(self.parameters, num_units, num_rows)
        with self._through_leaves(record):
            yield record
        silent = [n for n, p in zip(self.names, self.parameters, strict=True) if not record.has(p)]
        if silent:
            raise UsageError(
                f"no gradient reached {len(silent)} trainable parameter(s), such as {silent[0]}: "
                "this model does not use that layer"
            )

    @contextmanager
    def watching(self) -> Iterator[set[nn.Parameter]]:
        """Run forward and backward of one row inside; the set has, when the context is left, the
        parameters that received a gradient other than zeros."""
        record = UseRecording(self.parameters, 1, 1)
        with self._through_leaves(record):
            yield record.used

    @contextmanager
    def _through_leaves(self, record: Recording) -> Iterator[None]:
        """Within this context the trainable layers hand their gradients to `record`."""
        before = {module: vars(module).get("forward") for module in self._forwards}
        for module, forward in self._forwards.items():
            module.forward = partial(forward, record)
        try:
            yield
        finally:
            for module, forward in before.items():
                del module.forward
                if forward is not None:
                    module.forward = forward

    def assign(self, flat: torch.Tensor) -> None:
        """Set every parameter's `.grad` from one flat vector [P]."""
        parts = flat.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))


def _find_leaves(model: nn.Module) -> list[nn.Module]:
    leaves, owner = [], {}
    for name, module in model.named_modules():
        if isinstance(module, MIXES_ROWS):
            raise UsageError(f"{name} is a BatchNorm: it mixes the images of a batch")
        own = module.named_parameters(recurse=False)
        trained = {part: parameter for part, parameter in own if parameter.requires_grad}
        if trained:
            check_leaf(name or next(iter(trained)), module)
            leaves.append(module)
        for parameter in trained.values():
            if owner.setdefault(parameter, name) != name:
                raise UsageError(f"{name} shares a trainable parameter with {owner[parameter]}")
    return leaves


def _check_adapters(model: nn.Module) -> None:
    """Refuse peft options that read private data, or whose gradients would not be clipped."""
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
