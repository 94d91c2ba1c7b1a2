"""Images as an autoencoder gives them back, so that synthetic ones do not stand out by its blur."""

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from accelerate import PartialState

from utils.data.images import scale_to_unit_range
from utils.errors import UsageError
from utils.evaluation.features import Extractor, hash_weights
from utils.ledger.bases import read_base_statement
from utils.memory import images_at_once
from utils.models.families import find_family
from utils.models.pipelines import load_pipeline


def see_rendered(extractor: Extractor, name: str | None, device: torch.device) -> Extractor:
    """`extractor`, of images that the autoencoder of a public pipeline has encoded and decoded.

    Args:
        name: of the pipeline: a folder or Hub id; None leaves the extractor as it is.

    Raises:
        UsageError: the pipeline is a private result; see `load_pipeline`.
    """
    if name is None:
        return extractor
    if read_base_statement(name, None)[0] is not None:
        raise UsageError(
            f"--autoencoder {name} is a private result itself: name the public model it began as"
        )
    pipeline = load_pipeline(name)
    autoencoder, side = pipeline.vae.to(device), find_family(pipeline).native_resolution

    def network(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        parts = scale_to_unit_range(pixels).split(images_at_once(side))
        # from the latents' mode, in fp32: a CPU cannot antialias bf16
        seen = torch.cat([autoencoder(part).sample.float() for part in parts])
        if side != extractor.resolution:
            size = (extractor.resolution, extractor.resolution)
            seen = F.interpolate(seen, size, mode="bilinear", antialias=True)
        return extractor.network(((seen.clamp(-1, 1) + 1) * 127.5).round().byte())

    return replace(
        extractor, resolution=side, network=network, rendered_by=hash_weights(autoencoder)
    )


def tell_of_blur(name: str | None, synthetic: str, settings: dict) -> None:
    """Without an autoencoder `name`, say whose blur the images of the set `synthetic` may have, by
    its sampling.json `settings`: that of the pipeline that drew them, if one did."""
    drawn_by = settings.get("pretrained_model_name_or_path")
    if name is None and drawn_by is not None and PartialState().is_main_process:
        print(
            f"the classifier learns from the private images as they are. If those of {synthetic} "
            f"look softer, it may misread them: --autoencoder {drawn_by} lets it see both alike",
            file=sys.stderr,
        )
