"""Folders of parquet files, which `datasets` divides into splits by their names."""

import os
from pathlib import Path

from datasets import get_dataset_config_names, load_dataset_builder

from utils.data.folders import PARQUET
from utils.listing import list_files


def require_all_parquet(folder: Path, cache: str | None) -> None:
    """Raises: ValueError if `datasets`, which goes by names, would pass over parquet files."""
    base = folder.expanduser().resolve()  # as it does
    files = {str(path) for path in list_files(base).files if path.suffix.lower() == PARQUET}
    for config in get_dataset_config_names(str(folder)):
        splits = load_dataset_builder(str(folder), config, cache_dir=cache).config.data_files
        files -= {str(path) for paths in splits.values() for path in paths}
    if files:
        raise ValueError(
            f"{len(files)} parquet file(s), such as {os.path.relpath(min(files), base)}, belong to "
            "no split: name the files alike (train-0.parquet, train-1.parquet), or move others out"
        )
