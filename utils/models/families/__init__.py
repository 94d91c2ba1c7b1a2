"""One object a family of models: `Family` is what all others know of them."""

from diffusers import DiffusionPipeline

from utils.models.families.dit import DiT
from utils.models.families.family import Family
from utils.models.families.flux import Flux, Flux2Klein
from utils.models.families.pixart import PixArtSigma
from utils.models.families.sana import Sana
from utils.models.families.sd3 import StableDiffusion3
from utils.models.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from utils.models.families.z_image import ZImage

KNOWN = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Sana, Flux, Flux2Klein, ZImage)
KNOWN += (PixArtSigma, DiT)
FAMILIES = {name: family for family in KNOWN for name in family.pipelines}


def find_family(pipeline: DiffusionPipeline) -> Family:
    """The pipeline, as one of its family."""
    return FAMILIES[type(pipeline).__name__](pipeline)
