"""Processes that work at once, one thread each."""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch


def end_with(parent: int) -> None:
    """End this process soon after the one that started it, however that ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def open_pool(workers: int | None) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each; a single one where there is a GPU to share."""
    gpu = torch.accelerator.is_available()
    count = workers or (1 if gpu else os.cpu_count() or 1)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process starts
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            count, mp_context=context, initializer=end_with, initargs=(os.getpid(),)
        ) as pool:
            yield pool
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
