"""Greys of more than 8 bits: which of their levels are black and white."""

import numpy as np
from PIL import Image as PILImage

MORE_BITS = "of more than 8 bits, without --intensity_range"
Window = tuple[float, float] | None
J2K_START, J2K_BITS = b"\xff\x4f\xff\x51", 42  # the marker, and how far behind it the depth stands
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # of TIFF


class MoreBitsError(ValueError):
    """A grey image has more than 8 bits, and nobody said which levels are black and white."""


class GreyLevels:
    """How the levels of a wide grey file became those that Pillow reads.

    Pillow spreads the levels of a PGM, or of a JPEG 2000, over all 16 bits, whatever number of them
    the file has; and leaves a TIFF whose zero is white a negative.

    Args:
        image: opened, but not decoded. content: its file.

    Raises:
        MoreBitsError: Pillow drops the lower bits of such a file, beside transparency.
    """

    def __init__(self, image: PILImage.Image, content: bytes):
        self.wide = image.mode.startswith(("I", "F"))
        self.scale, self.offset, self.negative = 1.0, 0.0, False
        if any(str(tile.args).startswith(("L;16", "LA;16")) for tile in image.tile):
            raise MoreBitsError
        if not self.wide:
            return
        if image.format == "JPEG2000":
            depth = content[content.index(J2K_START) + J2K_BITS]
            self.scale = 2.0 ** (15 - depth % 128)  # of which it holds one less
            self.offset = -(2.0**15) if depth >= 128 else 0.0  # it has levels below 0
        elif image.format == "PPM" and image.tile[0].codec_name.startswith("ppm"):
            self.scale = 65535 / image.tile[0].args[1]
        elif image.format == "TIFF":
            self.negative = image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO

    def see_through(self, window: tuple[float, float], image: PILImage.Image) -> PILImage.Image:
        """The decoded image in 8 bits, with the file's levels of `window` as black and white; what
        is no number is black."""
        low, high = window
        levels = (np.asarray(image).astype(np.float64) + self.offset) / self.scale
        greys = ((levels - low) / (high - low)).clip(0, 1)
        greys = np.nan_to_num(1 - greys if self.negative else greys)
        return PILImage.fromarray((255 * greys).round().astype(np.uint8))
