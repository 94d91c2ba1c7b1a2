"""What every private stage does on a public model: its opening and its end.

A stage (selection, training) is a run in the ledger. Both stories, `selection.run_selection` and
`fine_tuning.run_method`, open here, on public data alone; plan in `planning`; and end here.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env, set_seed
from diffusers import DiffusionPipeline
from filelock import FileLock
from huggingface_hub.constants import HF_HUB_CACHE

from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.data.folders import refuse_among_images
from utils.data.latent_files import discard_copies
from utils.data.latents import choose_objective
from utils.data.rows import refuse_unfilled
from utils.errors import PATIENCE, UsageError, on_main_process
from utils.files import (
    LOGS,
    check_takes_files,
    private_folder,
    resolve_if_there,
)
from utils.ledger.bases import read_base_statement
from utils.ledger.runs import claim_output_dir
from utils.ledger.statement import Circumstances
from utils.models.drawing import adopt_reading, choose_settings, read_base_settings
from utils.models.families import find_family
from utils.models.pipelines import choose_resolution, list_parts, load_pipeline
from utils.models.shapes import load_shape
from utils.privacy.plan import name_unit
from utils.privacy.precision import check_products, name_precision
from utils.privacy.randomness import SecretRandomness, make_randomness
from utils.privacy.training import avoid_devices_without_fp64, checksum

SHARDS_WEIGHTS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
# What may change when a run is resumed: where, how fast, and what is shown.
FREE_TO_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit"),
    *(
        "train_batch_size",
        "mixed_precision",
        "base_precision",
        "gradient_checkpointing",
        "strict_images",
        "seed",
    ),
    *("negative_prompt", "guidance_scale", "num_inference_steps"),
    *("validation_prompt", "num_validation_images", "report_to", "latents_dir", "discard_latents"),
    *("dry_run", "num_units", "validation_steps", "publish_now"),
}


@dataclass(frozen=True)
class Stage:
    """A stage whose public model is loaded; it has read no private image.

    Attributes:
        accelerator, randomness: its processes and devices, and its secret random numbers.
        pipeline: frozen, on its device. resolution: of its images, in pixels.
        public: all weights of the pipeline, before an adapter joins them.
        base_checksum: of those weights. model: where it came from.
        base_settings: how images are drawn from it, as far as it says (`read_settings`).
        base_statement: verified, of a base model that is a private result itself; else None.
        is_base_known: whether anyone could tell whether it is.
        audit: what a replay of this very set-up proved; None if there was none.
    """

    accelerator: Accelerator
    randomness: SecretRandomness
    pipeline: DiffusionPipeline
    resolution: int
    public: list[torch.nn.Parameter]
    base_checksum: int
    model: ModelArguments
    base_settings: dict
    base_statement: dict | None = None
    is_base_known: bool = True
    audit: dict | None = None

    def describe_circumstances(self) -> Circumstances:
        """What its statement says beside its mechanisms."""
        return Circumstances(
            is_private=self.randomness.is_private,
            randomness=self.randomness.source,
            precision=name_precision(self.accelerator),
            audit=self.audit,
            base=self.base_statement,
            base_checksum=self.base_checksum,
            is_base_known=self.is_base_known,
        )


def start(training: TrainingArguments, *sets: str | None) -> tuple[Accelerator, list[FileLock]]:
    """Claim the output folder, seed what is not private, and set up the devices.

    Nobody else can claim the folder while what is returned lives.

    Args:
        sets: folders of images that are to be read.

    Raises:
        UsageError: see `refuse_among_images`, `claim_output_dir` and `check_products`; or there is
            no such tracker; or `--latents_dir` cannot be written; or a run was told how many units
            there are; or it was launched with DeepSpeed, FSDP or Megatron.
    """
    refuse_among_images(training.output_dir, *sets)
    if training.num_units is not None and not training.dry_run:
        raise UsageError("--num_units is for --dry_run: a run counts the units itself")
    sharing = [name for variable, name in SHARDS_WEIGHTS.items() if parse_flag_from_env(variable)]
    if sharing:
        raise UsageError(
            f"{sharing[0]} shares the weights out among the processes, so that no process sees a "
            "unit's whole gradient, whose norm must be bounded: start with MULTI_GPU, or plain "
            "accelerate launch"
        )
    avoid_devices_without_fp64()
    try:
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            log_with=training.report_to,
            project_dir=private_folder(training.output_dir) / LOGS,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except (ValueError, ImportError) as error:
        if training.report_to is None:
            raise
        raise UsageError(f"--report_to {training.report_to}: {error}") from error
    if training.report_to is not None and not accelerator.log_with:
        raise UsageError(
            f"--report_to {training.report_to}: its package is not installed here; install it, or "
            "leave the option out"
        )
    check_products(accelerator.device)
    if training.seed is not None:
        set_seed(training.seed)
    lock = []
    on_main_process(lambda: lock.append(claim_output_dir(training)))
    if training.latents_dir is not None:
        on_main_process(lambda: _check_latents_dir(Path(training.latents_dir), training.output_dir))
    return accelerator, lock


def _check_latents_dir(folder: Path, output_dir: str) -> None:
    """Raises: UsageError if it takes no files, or may be published with the weights."""
    inside, private = Path(output_dir).resolve(), private_folder(output_dir).resolve()
    if folder.resolve().is_relative_to(inside) and not folder.resolve().is_relative_to(private):
        raise UsageError(
            f"--latents_dir {folder} lies in --output_dir, of which all but private/ may be "
            "published: leave the option out, which keeps the encoded images there, or name a "
            "folder elsewhere"
        )
    check_takes_files(folder, "--latents_dir")


def load_stage(
    accelerator: Accelerator,
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
) -> Stage:
    """Load the public model, and make the secret random numbers.

    Raises:
        UsageError: see `make_randomness`, `load_pipeline`, `choose_resolution`,
            `choose_objective`, `choose_settings` and `find_base_statement`.
    """
    randomness = make_randomness(privacy.secure_noise, privacy.debug_noise_seed)
    (base_statement, is_base_known), base_settings = on_main_process(
        lambda: (find_base_statement(model, data), read_base_settings(model))
    )
    load = load_pipeline if training.num_units is None else load_shape
    pipeline = load(*model.source)
    resolution = choose_resolution(pipeline, data.resolution)
    choose_objective(pipeline, training, num_draws=1)  # refuses options that do not fit the model
    refuse_unfilled(data)
    choose_settings(pipeline, training, resolution, base_settings)  # refuses what it cannot draw
    adopt_reading(pipeline, training, base_settings)
    pipeline.to(accelerator.device)
    if training.gradient_checkpointing:
        find_family(pipeline).denoiser.enable_gradient_checkpointing()
    public = [parameter for part in list_parts(pipeline) for parameter in part.parameters()]
    return Stage(
        accelerator=accelerator,
        randomness=randomness,
        pipeline=pipeline,
        resolution=resolution,
        public=public,
        base_checksum=checksum(public).item(),
        model=model,
        base_settings=base_settings,
        base_statement=base_statement,
        is_base_known=is_base_known,
    )


def find_base_statement(model: ModelArguments, data: DataArguments) -> tuple[dict | None, bool]:
    """The statement of a base model that is a private result itself, verified; else None. And
    whether anyone could tell.

    Raises:
        UsageError: it does not hold, is stamped NOT PRIVATE, or protects another unit.
    """
    name, unit = model.pretrained_model_name_or_path, name_unit(data.privacy_unit_column)
    statement, is_known = read_base_statement(name, model.revision)
    if statement is None:
        return None, is_known
    if statement["private"] is not True:
        raise UsageError(f"the base model {name} is stamped NOT PRIVATE: nothing covers it")
    if statement["privacy_unit"] != unit:
        raise UsageError(
            f"the base model {name} is a private result, which protects "
            f"'{statement['privacy_unit']}', and this run protects '{unit}': their epsilons cannot "
            "be added up"
        )
    return statement, True


def collect_settings(
    name: str, settings: object, data: DataArguments, training: TrainingArguments
) -> dict:
    """The arguments that a checkpoint must agree with, as they come back from JSON; `settings` are
    those of the method."""
    groups = {"method": settings, "data": data, "training": training}
    kept = {
        group: {k: v for k, v in asdict(values).items() if k not in FREE_TO_CHANGE}
        for group, values in groups.items()
    }
    for source in ("dataset_name", "train_data_dir"):  # the same folder, however it is written
        if kept["data"][source] is not None:
            kept["data"][source] = resolve_if_there(kept["data"][source])
    return json.loads(json.dumps(kept | {"name": name}))


def finish(
    stage: Stage,
    data: DataArguments,
    training: TrainingArguments,
    encoded_dir: Path | None,
    sentence: str,
) -> None:
    """After all is published: delete the copies of private images if asked to, and say so."""
    if training.discard_latents:
        discard_copies(Path(training.output_dir), encoded_dir)
        if data.dataset_name is not None and not Path(data.dataset_name).exists():
            stage.accelerator.print(
                f"the download of {data.dataset_name} stays in {HF_HUB_CACHE}; to delete it, too: "
                f"hf cache rm dataset/{data.dataset_name}"
            )
    stage.accelerator.print(sentence)
