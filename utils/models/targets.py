"""Target modules: which layers of a model a pattern names."""

import difflib
import re
from dataclasses import replace
from typing import TypeVar

from diffusers import DiffusionPipeline
from peft import PeftConfig, inject_adapter_in_model
from torch import nn

from utils.arguments.methods import LoDAArguments, LoraArguments
from utils.errors import UsageError
from utils.models.families import find_family

Adapter = TypeVar("Adapter", LoraArguments, LoDAArguments)


def choose_targets(args: Adapter, pipeline: DiffusionPipeline) -> Adapter:
    """The arguments with the family's default targets, if none are given."""
    if args.target_modules is not None:
        return args
    family = find_family(pipeline)
    is_loda = isinstance(args, LoDAArguments)
    return replace(args, target_modules=family.all_targets if is_loda else family.default_targets)


def resolve_targets(model: nn.Module, patterns: list[str]) -> list[str]:
    """Full names of the Linear and Conv2d modules that each pattern names by suffix (as peft does).

    Raises:
        UsageError: a pattern matches nothing; near misses are named.
    """
    leaves = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    chosen = set()
    for pattern in patterns:
        matched = [n for n in leaves if n == pattern or n.endswith("." + pattern)]
        if not matched:
            raise UsageError(_explain_no_match(pattern, leaves))
        chosen.update(matched)
    return [name for name in leaves if name in chosen]


def inject_adapter(model: nn.Module, config: PeftConfig) -> None:
    """Put an adapter into a model; also into those that diffusers has no `add_adapter` for."""
    inject_adapter_in_model(config, model)
    model._hf_peft_config_loaded = True  # diffusers: there are adapters to enable and disable


def _explain_no_match(pattern: str, leaves: list[str]) -> str:
    suffixes = sorted({re.sub(r"^.*?\.(?=[a-z_]+(\.\d+)?$)", "", name) for name in leaves})
    near = [s for s in suffixes if s.startswith(pattern.split(".")[0])]
    near += difflib.get_close_matches(pattern, suffixes, n=3, cutoff=0.5)
    near = list(dict.fromkeys(near)) or suffixes
    return (
        f"target module '{pattern}' matches no Linear or Conv2d layer; "
        f"did you mean {', '.join(near)}?"
    )
