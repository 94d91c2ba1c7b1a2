"""Low-dimensional adaptation (LoDA) as a PEFT tuner, in one file that needs nothing but peft.

Beside a frozen layer runs B(activation(A(x))): A is like the layer, with r output channels; B goes
back to the layer's outputs (1 x 1 for a convolution) and starts at zero, so nothing changes yet.
Liu et al. 2023, "LoDA: low-dimensional adaptation of large language models"; for convolutions in
diffusion models, and with privacy, "Efficient differentially private fine-tuning of diffusion
models", section II (r = 4, LeakyReLU with slope 0.1). Importing this file registers it with peft:

    import loda
    model = PeftModel.from_pretrained(model, folder)
    unet.add_adapter(loda.LoDAConfig(r=4, target_modules=["conv1", "to_q"]))    # diffusers

Between A and B the activation bends, so the adapter cannot be merged into the frozen weights.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft import inject_adapter_in_model, mapping
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import nn

ACTIVATIONS = ("leaky_relu", "gelu", "identity")
# peft looks this up in its mappings; if this file was not imported, its KeyError shows this text.
PEFT_TYPE = "LODA: import loda, the file beside this adapter, before loading it"
NO_MERGE = "a LoDA adapter is not linear, so it cannot be merged into the weights beside it"


@dataclass
class LoDAConfig(PeftConfig):
    """What a LoDA adapter is.

    Args:
        r: output channels of A.
        target_modules: names, suffixes of names, or a regular expression, as for LoRA.
        activation: between A and B: leaky_relu, gelu or identity (then it is a LoRA of scale 1).
        negative_slope: of the leaky_relu.

    Raises:
        ValueError: r below 1, or an unknown activation.
    """

    r: int = field(default=4)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    activation: str = field(default="leaky_relu")
    negative_slope: float = field(default=0.1)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.r < 1:
            raise ValueError(f"LoDA's r must be at least 1, not {self.r}")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"LoDA's activation must be one of {known}, not '{self.activation}'")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


class LoDALayer(nn.Module, BaseTunerLayer):
    """A frozen Linear or Conv2d, with any number of LoDA adapters beside it."""

    adapter_layer_names = ("loda_A", "loda_B")
    other_param_names = ("r", "scale", "activation", "negative_slope")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoDAConfig):
        super().__init__()
        self.base_layer = base_layer
        self.loda_A, self.loda_B = nn.ModuleDict(), nn.ModuleDict()
        self.r, self.scale, self.activation, self.negative_slope = {}, {}, {}, {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: LoDAConfig) -> None:
        """Add an adapter that changes nothing yet."""
        base = self.get_base_layer()
        if isinstance(base, nn.Linear):
            a = nn.Linear(base.in_features, config.r, bias=False)
            b = nn.Linear(config.r, base.out_features, bias=False)
        else:
            a = nn.Conv2d(
                base.in_channels,
                config.r,
                base.kernel_size,
                base.stride,
                base.padding,
                base.dilation,
                bias=False,
                padding_mode=base.padding_mode,
            )
            b = nn.Conv2d(config.r, base.out_channels, 1, bias=False)
        nn.init.normal_(a.weight, std=1 / config.r)  # as peft's "gaussian" LoRA
        nn.init.zeros_(b.weight)  # nothing is added at the start
        self.loda_A[adapter_name], self.loda_B[adapter_name] = a, b
        self.r[adapter_name], self.scale[adapter_name] = config.r, 1.0
        self.activation[adapter_name] = config.activation
        self.negative_slope[adapter_name] = config.negative_slope
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.loda_A:
                a, b = self.loda_A[name], self.loda_B[name]
                hidden = a(self._cast_input_dtype(x, a.weight.dtype))
                addition = b(self._activate(hidden, name)) * self.scale[name]
                result = result + addition.to(result.dtype)
        return result

    def _activate(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        if self.activation[name] == "leaky_relu":
            return F.leaky_relu(hidden, self.negative_slope[name])
        return F.gelu(hidden) if self.activation[name] == "gelu" else hidden

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply what an adapter adds by `scale` (1.0 is as trained)."""
        if adapter in self.scale:
            self.scale[adapter] = scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        raise ValueError(NO_MERGE)


class LoDAModel(BaseTuner):
    """The tuner: puts a `LoDALayer` around every target module."""

    prefix = "loda_"
    tuner_layer_cls = LoDALayer
    target_module_mapping: dict = {}

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ):
        if isinstance(target, LoDALayer):
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, nn.Conv2d)):
            kind = type(base).__name__
            raise ValueError(f"LoDA adapts Linear and Conv2d layers; {current_key} is a {kind}")
        layer = LoDALayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self):
        raise ValueError(NO_MERGE)


def save_adapter(model: nn.Module, folder: str, adapter_name: str = "default") -> None:
    """Write adapter_config.json and adapter_model.safetensors of an adapter that was injected into
    a model, a LoDA or another, as peft does."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    contiguous = {f"base_model.model.{k}": v.contiguous().cpu() for k, v in state.items()}
    save_file(contiguous, os.path.join(folder, "adapter_model.safetensors"), {"format": "pt"})
    config = copy.copy(model.peft_config[adapter_name])
    config.inference_mode = True
    config.save_pretrained(folder)


def load_loda(model: nn.Module, name_or_path: str, adapter_name: str = "default") -> None:
    """Put a saved LoDA beside the layers of a model, such as a diffusers U-Net.

    Args:
        name_or_path: folder or Hub id with adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: it is not a LoDA, or was made for another model or with another r.
    """
    config = PeftConfig.from_pretrained(name_or_path)
    if not isinstance(config, LoDAConfig):
        raise ValueError(f"{name_or_path} holds no LoDA, but a {config.peft_type}")
    weights = load_peft_weights(name_or_path, device="cpu")
    try:
        inject_adapter_in_model(config, model, adapter_name)
        outcome = set_peft_model_state_dict(model, weights, adapter_name)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"the LoDA in {name_or_path} does not fit this model (r = {config.r}): {reason}"
        ) from error
    missing = [key for key in outcome.missing_keys if "loda_" in key]
    if missing or outcome.unexpected_keys:
        raise ValueError(
            f"the LoDA in {name_or_path} was made for another model: {len(missing)} of its layers "
            f"have no weights, {len(outcome.unexpected_keys)} weights have no layer"
        )
    model._hf_peft_config_loaded = True  # diffusers: there are adapters to enable and disable


# peft registers the methods in its enum only; these mappings take any name.
mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = LoDAConfig
mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = LoDAModel
mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = LoDAModel.prefix
