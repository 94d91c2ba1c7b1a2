"""Loading what a training script published, to generate images with it."""

from pathlib import Path

import httpx2
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download

from utils.errors import UsageError
from utils.files import LORA_WEIGHTS, PUBLISHED
from utils.models.loda.loda import load_loda
from utils.models.pipelines import freeze

ADAPTER_PARTS = ["unet", "adapter_config.json", LORA_WEIGHTS]


def fetch_adapter(adapter: str, revision: str | None = None) -> Path:
    """The folder of what a training script published; what is on the Hub is downloaded, all of one
    commit.

    Raises:
        UsageError: there is no such folder or Hub id.
    """
    if Path(adapter).is_dir():
        return Path(adapter)
    try:
        return Path(snapshot_download(adapter, revision=revision, allow_patterns=PUBLISHED))
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise UsageError(f"--adapter '{adapter}' is not a folder or Hub id: {error}") from error


def load_adapter(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Load what a training script published: a LoRA, which is added to the weights; a LoDA; or a
    whole fine-tuned U-Net.

    Raises:
        UsageError: it is none of these, or it does not fit this model.
    """
    try:
        parts = [name for name in ADAPTER_PARTS if (folder / name).exists()]
        if not parts:
            raise ValueError("it holds no LoRA, no LoDA and no unet/")
        for name in parts:
            _load_part(pipeline, name, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UsageError(f"cannot load the adapter '{folder}' into this model: {error}") from error


def _load_part(pipeline: DiffusionPipeline, name: str, folder: str) -> None:
    if name == "unet":
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        if unet.config.cross_attention_dim != pipeline.unet.config.cross_attention_dim:
            raise ValueError("its U-Net takes text of another width")
        pipeline.unet = freeze(unet)
    elif name == "adapter_config.json":
        load_loda(pipeline.unet, folder)
    else:
        pipeline.load_lora_weights(folder)
        pipeline.fuse_lora()  # so that sampling with it costs no more than without
        pipeline.unload_lora_weights()
