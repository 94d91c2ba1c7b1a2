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
from utils.methods.kept_sets import find_origin
from utils.models.families import find_family
from utils.models.pipelines import load_pipeline

AS_THEY_ARE = "none"  # in place of a pipeline's name
# Of a pipeline: folder or Hub id, revision, variant; and a side in pixels, if not its native one.
Source = tuple[str, str | None, str | None, int | None]


def choose_autoencoder(name: str | None, settings: dict) -> Source | None:
    """Whose autoencoder private and synthetic images are seen through, at the size that they were
    drawn: of the pipeline `name`; by default, of the one that drew the set whose sampling.json is
    `settings`, and say so. None, for the name none or if no pipeline drew the set: as they are."""
    origin = find_origin(settings)
    side, drawn_by = (origin.get(k) for k in ("resolution", "pretrained_model_name_or_path"))
    if name is not None:
        return None if name == AS_THEY_ARE else (name, None, None, side)
    if drawn_by is None:
        return None
    if PartialState().is_main_process:
        print(
            f"private and synthetic images are seen as the autoencoder of {drawn_by}, which drew "
            f"the latter, gives them back (--autoencoder {AS_THEY_ARE}: as they are)",
            file=sys.stderr,
        )
    return drawn_by, origin.get("revision"), origin.get("variant"), side


def see_rendered(extractor: Extractor, source: Source | None, device: torch.device) -> Extractor:
    """`extractor`, of images that the autoencoder of a public pipeline has encoded and decoded.

    Args:
        source: of the pipeline; None leaves the extractor as it is.

    Raises:
        UsageError: the pipeline is a private result; see `load_pipeline`.
    """
    if source is None:
        return extractor
    name, revision, variant, side = source
    if read_base_statement(name, revision)[0] is not None:
        raise UsageError(
            f"--autoencoder {name} is a private result itself: name the public model it began as; "
            f"or {AS_THEY_ARE}, to see images as they are"
        )
    # Nothing of it is trained, so it may be distilled.
    pipeline = load_pipeline(name, revision, variant, allow_distilled=True)
    autoencoder = pipeline.vae.to(device)
    side = side or find_family(pipeline).native_resolution

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
