"""Private functions of other libraries, which any release may change: each is used by one module,
named here, and what would break without it is said."""

import ast

import pytest
import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig

from tests.conftest import ROOT
from tests.test_house import list_files
from utils.gradients.fast_linear import ONEDNN

# Where they are used. `operations.py` only names operators in a profile.
HOMES = {
    "_collate_lora_metadata": "utils/models/lora.py",
    "_fetch_remapped_cls_from_config": "utils/models/shapes.py",
    "_linear_pointwise": "utils/gradients/fast_linear.py",
    "_is_mkldnn_bf16_supported": "utils/arguments/values.py",
    "_is_avx512_bf16_supported": "utils/metrics/synthetic_accuracy/classifiers.py",
    "_is_amx_tile_supported": "utils/metrics/synthetic_accuracy/classifiers.py",
}
OF_OTHERS = ("diffusers", "transformers", "peft", "torch", "accelerate", "datasets", "opacus")
OF_OTHERS += ("huggingface_hub", "evaluate", "dp_accounting", "safetensors", "numpy", "PIL")
ALLOWED = {"_class_name", "_BatchNorm"}  # a key of configs; a class that is meant to be tested for


def find_private(text: str) -> set[str]:
    """Names with one underscore that are imported from another library, or are its attributes."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OF_OTHERS:
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.Attribute):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in (*OF_OTHERS, "nn", "np"):
                found.add(node.attr)
    private = {name for name in found if name.startswith("_") and not name.startswith("__")}
    return private - ALLOWED


def test_each_is_used_by_one_module_that_is_named_here():
    used = {}
    for path in list_files():
        where = path.relative_to(ROOT).as_posix()
        if where.startswith(("tests/", "benchmarks/")):
            continue
        for name in find_private(path.read_text()):
            used.setdefault(name, []).append(where)
    assert used == {name: [home] for name, home in HOMES.items()}


def test_a_loras_alpha_is_kept_in_its_file():
    """Without it an adapter whose alpha is not its rank reloads at another scale."""
    unet = UNet2DConditionModel(
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"]))
    kept = _collate_lora_metadata({"unet": unet})["unet_lora_adapter_metadata"]
    assert (kept["r"], kept["lora_alpha"]) == (2, 6)


def test_an_older_name_of_a_class_is_understood():
    """Without it a base whose config names `Transformer2DModel` cannot be planned for."""
    config = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    newer = _fetch_remapped_cls_from_config(config, Transformer2DModel)
    assert newer.__name__ == "DiTTransformer2DModel"


@pytest.mark.skipif(not ONEDNN, reason="this build of PyTorch has no oneDNN")
def test_a_product_by_onednn_is_the_product():
    """Without it training on a CPU loses a fifth of its speed, and `fast_linear` must go."""
    x, weight, bias = torch.randn(40, 32), torch.randn(24, 32), torch.randn(24)
    found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    assert torch.allclose(found, torch.nn.functional.linear(x, weight, bias), atol=1e-5)


def test_a_processor_says_whether_it_computes_in_bf16():
    """Without these the larger classifiers of an evaluation are in fp32 on a CPU."""
    answers = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    assert all(isinstance(answer, bool) for answer in answers)


@pytest.mark.skipif(not ONEDNN, reason="this build of PyTorch has no oneDNN")
def test_onednn_says_whether_it_has_bf16_here():
    """Without it nobody is told of a processor that is slow in bf16."""
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
