"""What libraries say that helps nobody is dropped; what may help is not."""

import inspect
import logging
from importlib import import_module

import pytest

from utils.chatter import CHATTER, drop_chatter


@pytest.mark.parametrize("name", CHATTER)
def test_the_words_are_still_the_librarys(name):
    """After an update, another sentence would get through."""
    assert CHATTER[name] in inspect.getsource(import_module(name)).replace('" f"', "")


@pytest.mark.parametrize("name", CHATTER)
def test_it_is_dropped_and_nothing_else(name):
    heard = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(listener)
    try:
        for _ in range(2):
            drop_chatter()
        logger.error(f"the model {CHATTER[name]} something")
        logger.error("this may help")
    finally:
        logger.removeHandler(listener)
    assert heard == ["this may help"]
    assert [type(found).__name__ for found in logger.filters].count("_Without") == 1
