"""What libraries say that helps nobody here, or tells what is private: dropped at its source."""

import ctypes
import logging
import warnings
from contextlib import suppress

# The logger of a library, and what its message contains.
CHATTER = {
    # Image processors of Pillow are meant: torchvision is not needed.
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back",
    # An adapter of the denoiser has nothing for the text encoders.
    "diffusers.loaders.lora_base": "No LoRA keys associated to",
}


def drop_chatter() -> None:
    """Before the libraries are imported, or after."""
    for name, words in CHATTER.items():
        logger = logging.getLogger(name)
        if not any(isinstance(found, _Without) for found in logger.filters):
            logger.addFilter(_Without(words))


def hush_pillow() -> None:
    """Its warnings say what is in a private image; and libtiff prints a line whenever it decodes a
    damaged one, which tells whose batch that is in. For the whole process: `catch_warnings` is not
    thread-safe, and libtiff writes to the file descriptor itself."""
    from PIL import Image

    warnings.filterwarnings("ignore", module=r"PIL\.")
    codecs = ctypes.CDLL(Image.core.__file__)  # also finds what that is linked with
    for setter in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with suppress(AttributeError):  # built without libtiff
            getattr(codecs, setter)(None)


class _Without(logging.Filter):
    """Lets through what does not contain some words."""

    def __init__(self, words: str):
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()
