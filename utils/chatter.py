"""What libraries say that helps nobody here, dropped where they say it."""

import logging

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


class _Without(logging.Filter):
    """Lets through what does not contain some words."""

    def __init__(self, words: str):
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()
