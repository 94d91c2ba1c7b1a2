"""The column that holds the images."""

from datasets import Dataset, Image

from utils.data.rows import require_column
from utils.errors import UsageError


def check_image_column(rows: Dataset, column: str) -> None:
    """Raises: UsageError if there is no such column, or it holds no images; it says what to do."""
    require_column(rows, column, "--image_column")
    feature = rows.features[column]
    if isinstance(feature, dict):  # pyarrow's struct of bytes and path
        readable = getattr(feature.get("bytes"), "dtype", "").endswith("binary")
    else:  # datasets' own; or the bytes alone
        readable = isinstance(feature, Image) or getattr(feature, "dtype", "").endswith("binary")
    if not readable:
        raise UsageError(
            f"--image_column {column} does not hold images, but {_name_feature(feature)}"
        )


def find_image_column(rows: Dataset, asked: str | None, argument: str) -> str:
    """The column of the images: as asked; or `image`; or the only one that holds images.

    Raises:
        UsageError: several do, or none.
    """
    if asked is not None:
        require_column(rows, asked, argument)
        return asked
    found = [name for name in rows.column_names if isinstance(rows.features[name], Image)]
    found = found or [name for name in rows.column_names if name == "image"]
    if "image" in found or len(found) == 1:
        return "image" if "image" in found else found[0]
    raise UsageError(f"give {argument}: the columns are {', '.join(rows.column_names)}")


def _name_feature(feature: object) -> str:
    kind = getattr(feature, "dtype", None) or type(feature).__name__
    if kind in ("string", "large_string"):
        return "texts; for paths or addresses, make an image folder"
    return f"{kind}; write them as datasets does: of a column that is cast to its Image()"
