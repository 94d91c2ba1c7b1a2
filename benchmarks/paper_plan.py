"""What Stable Diffusion 1.5 would take on GPUs, from counted operations and bytes.

    python benchmarks/paper_plan.py --gpus 8
    python benchmarks/paper_plan.py --gpus 64 --expected_batch_size 16384 --json

Nothing is computed: the U-Net runs forward and backward through the engine on tensors without
values, under bf16 autocast, and what it would do is counted: floating-point operations, the tensors
kept for the backward pass, and the per-unit gradients. Assumed, not counted: the speed of a GPU
(`--peak_tflops`, an H100's dense bf16 by its data sheet), the share of it that training reaches
(`--utilisation`), and the wire's. Not in the memory: the autoencoder and the text encoder, and what
a GPU's autocast keeps in fp32 for normalisation, which a CPU's keeps in bf16.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import UNet2DConditionModel
from operations import COUNTED
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from utils.arguments.methods import LoraArguments
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.models.lora import add_lora

GIB = 2**30


def unet_without_values(rank: int) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's U-Net with a LoRA; needs an active `FakeTensorMode` to run."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        unet.requires_grad_(False)
        add_lora(SimpleNamespace(unet=unet), LoraArguments(rank=rank))
    for module in unet.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape)
            setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
    return unet


def counted(unet: UNet2DConditionModel, units: int, side: int) -> dict[str, int]:
    """Operations, bytes kept for the backward pass, and bytes of per-unit gradients of a step."""
    engine, kept = PerUnitGradients(unet), {}
    own = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its address stays its own
        return tensor

    latents, words = torch.randn(units, 4, side, side), torch.randn(units, 77, 768)
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with counter, hooks, engine.recording(units) as record:
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(latents, torch.zeros(units, dtype=torch.long), words).sample
        predicted.float().square().flatten(1).mean(1).sum().backward()
    return {
        "operations": counter.get_total_flops(),
        "kept": sum(storage.nbytes() for storage in kept.values()),
        "gradients": record.nbytes(),
        "trained": engine.num_parameters,
        "weights": sum(parameter.numel() for parameter in unet.parameters()),
    }


def plan(args) -> dict[str, float]:
    """The figures of one plan; bytes and seconds are those of one GPU."""
    with FakeTensorMode():
        unet = unet_without_values(args.rank)
        one, two = (counted(unet, units, args.resolution // 8) for units in (1, 2))
    each = {name: two[name] - one[name] for name in one}  # of a draw; what is left over is fixed
    fixed = one["kept"] - each["kept"]
    trained, micro, gpus = one["trained"], args.train_batch_size, args.gpus
    weights, optimizer = 4 * one["weights"], 3 * 4 * trained
    kept = args.noise_multiplicity * each["kept"] + each["gradients"]  # of a unit
    memory = weights + optimizer + fixed + micro * kept
    draws = args.expected_batch_size * args.noise_multiplicity
    speed = args.peak_tflops * 1e12 * args.utilisation / each["operations"]
    reduced = 2 * (gpus - 1) / gpus * 4 * trained  # a ring's share, sent by each
    wire = reduced + 4 * trained + args.num_units  # and the noisy sum, and who is in the batch
    compute, transfer = draws / gpus / speed, wire / (args.gigabytes_per_second * 1e9)
    return {
        "gpus": gpus,
        "operations_per_draw": each["operations"],
        "trained_parameters": trained,
        "weights_bytes": weights,
        "fixed_bytes": fixed,
        "bytes_per_draw": each["kept"],
        "gradient_bytes_per_unit": each["gradients"],
        "memory_bytes": memory,
        "wire_bytes_per_step": wire,
        "compute_seconds_per_step": compute,
        "wire_seconds_per_step": transfer,
        "draws_per_second": draws / (compute + transfer),
        "hours": args.max_train_steps * (compute + transfer) / 3600,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--num_units", type=int, default=1_000_000, help="N")
    parser.add_argument("--expected_batch_size", type=int, default=4096, help="B")
    parser.add_argument("--noise_multiplicity", type=int, default=4, help="K")
    parser.add_argument("--train_batch_size", type=int, default=4, help="units in a forward pass")
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--peak_tflops", type=float, default=989, help="of a GPU; assumed")
    parser.add_argument("--utilisation", type=float, default=0.3, help="of the peak; assumed")
    parser.add_argument(
        "--gigabytes_per_second", type=float, default=25, help="between GPUs; assumed"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    found = plan(args)
    gib = {name: f"{found[name] / GIB:.2f} GiB" for name in found if "bytes" in name}
    rows = {
        "operations of a draw, both ways": f"{found['operations_per_draw'] / 1e12:.2f} TFLOP",
        "trained parameters": f"{found['trained_parameters']:,}",
        "weights, fp32": gib["weights_bytes"],
        "kept for the backward pass: copies of weights": gib["fixed_bytes"],
        "and for each draw": gib["bytes_per_draw"],
        "gradient of one unit": f"{found['gradient_bytes_per_unit'] / 2**20:.1f} MiB",
        f"memory of a GPU at {args.train_batch_size} units": gib["memory_bytes"],
        "over the wire of a GPU each step": f"{found['wire_bytes_per_step'] / 2**20:.1f} MiB",
        "seconds of a step: computing": f"{found['compute_seconds_per_step']:.2f}",
        "and sending": f"{found['wire_seconds_per_step']:.4f}",
        "draws per second, all GPUs": f"{found['draws_per_second']:,.0f}",
        f"{args.max_train_steps:,} steps": f"{found['hours']:.1f} hours",
    }
    print(f"| {args.gpus} GPUs | |\n| --- | --- |")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
