"""Clause 12: whatever the engine does not cover, or does not train, is an error."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from tests.conftest import ROOT, build_tiny_pipeline
from tests.test_house import find_imports
from tests.worlds import Rounding, build_plan, measure_update, train
from utils.arguments.training import TrainingArguments
from utils.errors import UsageError
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.methods.public_passes import leave_out_unused, rehearse
from utils.methods.stages import start
from utils.models.targets import resolve_targets
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import TrainingState


class OwnWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.magnitude = nn.Parameter(torch.ones(3))


class Inherited(nn.Linear):
    """A subclass may do anything in its forward pass."""


@pytest.mark.parametrize(
    "model, word",
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "BatchNorm"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm2d(2).requires_grad_(False)), "BatchNorm"),
        (nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm2d(2, affine=True)), "InstanceNorm2d"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "grouped"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding="same")), "named-padding"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), "non-zero-padded"),
        (nn.Conv1d(2, 2, 1), "Conv1d"),
        (nn.ConvTranspose2d(2, 2, 1), "ConvTranspose2d"),
        (nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Sequential(nn.Linear(2, 2), OwnWeight()), "OwnWeight"),
        (nn.Sequential(Inherited(2, 2)), "Inherited"),
        (nn.Linear(2, 2).requires_grad_(False), "no parameter"),
        (nn.Linear(2, 2).half(), "fp32"),
        (nn.Linear(2, 2).bfloat16(), "fp32"),
    ],
)
def test_uncovered_parameters_are_refused(model, word):
    with pytest.raises(UsageError, match=word):
        PerUnitGradients(model)


def test_shared_parameters_are_refused():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    with pytest.raises(UsageError, match="shares a trainable parameter"):
        PerUnitGradients(nn.Sequential(first, second))


def unet_with(**config):
    unet = build_tiny_pipeline().unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], **config))
    return unet


def test_dora_is_refused():
    with pytest.raises(UsageError, match="DoRA"):
        PerUnitGradients(unet_with(use_dora=True))


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_adapters_that_start_from_the_data_are_refused(start):
    unet = unet_with()
    PerUnitGradients(unet)
    unet.peft_config["default"].init_lora_weights = start
    with pytest.raises(UsageError, match="computed from the training images"):
        PerUnitGradients(unet)


def test_modules_to_save_outside_known_leaves_are_refused():
    from peft.utils import ModulesToSaveWrapper

    class Holder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.first, self.inner = nn.Linear(2, 2), inner.requires_grad_(False)

    known, unknown = Holder(nn.LayerNorm(2)), Holder(nn.PReLU())
    for holder in (known, unknown):
        holder.inner = ModulesToSaveWrapper(holder.inner, "default")
        holder.inner.modules_to_save["default"].requires_grad_(True)
    assert len(PerUnitGradients(known).names) == 4
    with pytest.raises(UsageError, match="PReLU"):
        PerUnitGradients(unknown)


def test_a_layer_that_recorded_nothing_is_an_error():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    engine = PerUnitGradients(model)
    with pytest.raises(UsageError, match=r"no gradient reached 2 .* such as 1\.weight"):
        with engine.recording(1):
            model[0](torch.ones(1, 2)).sum().backward()
    single = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])
    with pytest.raises(UsageError, match=r"no gradient reached 1 .* such as 1\.weight"):
        with PerUnitGradients(single).recording(1):
            single[0](torch.ones(1, 2)).sum().backward()


def test_a_layer_that_mixes_rows_is_an_error():
    model = nn.Linear(2, 2)
    engine = PerUnitGradients(model)
    with pytest.raises(RuntimeError, match="mixes rows"):
        with engine.recording(2):
            model(torch.ones(3, 2)).sum().backward()


class Packed(nn.Module):
    """Lays the tokens of all units end to end, as a model that saves padding does."""

    def __init__(self, used: int):
        super().__init__()
        self.inner, self.used = nn.Linear(4, 4), used

    def forward(self, x):
        return self.inner(x[:, : self.used].flatten(0, 1)).unflatten(0, (len(x), -1))


@pytest.mark.parametrize("used", [2, 3, 4])
def test_a_layer_that_packs_tokens_is_an_error(used):
    """Also where the number of its rows can be divided by that of the units."""
    model = Packed(used)
    with pytest.raises(RuntimeError, match="mixes rows"):
        with PerUnitGradients(model, num_draws=3).recording(2):
            model(torch.ones(6, 4, 4)).sum().backward()


def test_a_lora_whose_layer_packs_tokens_is_an_error():
    model = Packed(2).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["inner"]), model)
    with pytest.raises(RuntimeError, match="mixes rows"):
        with PerUnitGradients(model, num_draws=3).recording(2):
            model(torch.ones(6, 4, 4)).sum().backward()


@pytest.mark.parametrize("faint", [1.0, 1e-6])  # as the gradients of large models are
@pytest.mark.parametrize("mixed", ["images", "captions"])
def test_a_model_that_mixes_rows_is_found_before_any_image_is_read(mixed, faint):
    pipeline = build_tiny_pipeline()
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    engine, whole = PerUnitGradients(unet), unet.forward
    rehearse(pipeline, engine, 16)

    def mix(sample, timesteps, words, **more):
        if mixed == "images":
            sample = sample - sample.mean(0, keepdim=True) / 2
        else:
            words = words.flip(0)
        found = whole(sample, timesteps, words, **more)
        found.sample = faint * found.sample
        return found

    unet.forward = mix
    with pytest.raises(UsageError, match="mixes the rows"):
        rehearse(pipeline, engine, 16)


def test_rounded_products_are_found_before_any_image_is_read(tmp_path):
    with Rounding("conv2d", 7), pytest.raises(UsageError, match="ONEDNN_DEFAULT_FPMATH_MODE"):
        start(TrainingArguments(output_dir=str(tmp_path)))


def test_rounded_products_are_found_before_the_first_private_step(accelerator):
    with Rounding("conv2d", 7), pytest.raises(UsageError, match="ONEDNN_DEFAULT_FPMATH_MODE"):
        measure_update(accelerator, build_plan())


def test_a_lower_precision_that_is_set_globally_does_not_look_like_mixed_rows():
    pipeline = build_tiny_pipeline(channels=(16, 32))
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    conv = torch.backends.mkldnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "bf16"
    try:
        rehearse(pipeline, PerUnitGradients(unet), 16)
    finally:
        conv.fp32_precision = before


def test_damaged_weights_do_not_look_like_mixed_rows():
    pipeline = build_tiny_pipeline()
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    unet.conv_in.weight.data[0] = float("nan")
    with pytest.raises(UsageError, match="gradients are not finite, on public noise"):
        rehearse(pipeline, PerUnitGradients(unet), 16)


def test_an_unused_layer_is_found_before_any_image_is_read():
    pipeline = build_tiny_pipeline()
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    unet.never_called = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="never_called"):
        rehearse(pipeline, PerUnitGradients(unet, num_draws=2), resolution=16)


def test_what_a_model_never_uses_is_left_out_with_a_sentence(capsys):
    """Here a LoRA beside a layer that nothing calls; the engine then covers all that trains."""
    pipeline = build_tiny_pipeline()
    pipeline.text_encoder.requires_grad_(False)
    unet = pipeline.unet.requires_grad_(False)
    unet.spare = nn.ModuleDict({"to_q": nn.Linear(2, 2)}).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    before = {name for name, p in unet.named_parameters() if p.requires_grad}
    leave_out_unused(pipeline, 16)
    shown = capsys.readouterr().err
    assert shown == "left out, since this model never uses them: spare.to_q\n"
    after = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert after == {name for name in before if not name.startswith("spare")} != before
    rehearse(pipeline, PerUnitGradients(unet, num_draws=2), resolution=16)
    leave_out_unused(pipeline, 16)
    assert capsys.readouterr().err == ""
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name.startswith("spare"))
    with pytest.raises(UsageError, match="uses none of what is to train, such as spare"):
        leave_out_unused(pipeline, 16)


def test_targets_match_by_suffix_and_a_miss_names_its_neighbours():
    unet = build_tiny_pipeline().unet
    assert all(name.endswith(".to_out.0") for name in resolve_targets(unet, ["to_out.0"]))
    for wrong, near in [("to_out", "to_out.0"), ("to_out.Linear", "to_out.0"), ("toq", "to_q")]:
        with pytest.raises(UsageError, match=near):
            resolve_targets(unet, [wrong])


def train_linear(accelerator, model, trained):
    engine = PerUnitGradients(model)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    losses = lambda units: model(torch.ones(len(units), 3)).sum(1)  # noqa: E731
    randomness = SecretRandomness()
    train(
        accelerator, TrainingState(engine, optimizer, constant), losses, build_plan(), randomness, 8
    )


def test_weights_that_do_not_move_are_an_error(accelerator):
    model = nn.Linear(3, 2)
    train_linear(accelerator, model, model.parameters())
    with pytest.raises(RuntimeError, match="did not move"):
        train_linear(accelerator, model, [nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize("rates", [(1, 1e-30, 0), (0, 1, 1e-30)])
def test_weights_must_move_once_at_the_first_step_with_a_rate(accelerator, rates):
    """Later a rate may be too small for fp32."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (*rates, 0)[step])
    state = TrainingState(PerUnitGradients(model), optimizer, schedule)
    losses = lambda units: model(torch.ones(len(units), 3)).sum(1)  # noqa: E731
    train(accelerator, state, losses, build_plan(steps=3), SecretRandomness(), 8)
    assert state.step == 3


def test_fp16_is_refused(accelerator, monkeypatch):
    monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
    model = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="fp16"):
        train_linear(accelerator, model, model.parameters())


def test_no_script_that_trains_can_reach_the_mutants():
    """They live in their own file, and no import leads there but from the audit's script."""
    texts = {"utils.audit.mutants": "", **read_modules()}
    assert len(texts) > 60
    assert find_importers(texts, "utils.audit.mutants") == ["audit_privacy"]
    reached = {**texts, "utils.privacy.training": "from utils.audit import mutants"}
    assert "train_dp_lora" in find_importers(reached, "utils.audit.mutants")  # from anywhere


def read_modules() -> dict[str, str]:
    paths = [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text() for p in paths}


def find_importers(texts: dict[str, str], target: str) -> list[str]:
    """The scripts from which imports lead to `target`, over any number of modules."""
    imports = {module: find_imports(text) for module, text in texts.items()}
    reaching = {target}
    while more := {m for m, found in imports.items() if found & reaching} - reaching:
        reaching |= more
    return sorted(module for module in reaching if "." not in module)
