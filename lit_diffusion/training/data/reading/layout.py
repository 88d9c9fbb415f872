"""What a data set offers that nobody has described: its splits, its images, its labels.

A config names all of them. Here they are found by their types first, as a parquet file or a folder
of images declares them, and then by the names that are usual.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lit_diffusion.training.data.reading.columns import Columns
from lit_diffusion.training.data.reading.file_names import Files
from lit_diffusion.training.data.reading.parquet import ParquetSource, open_parquet
from lit_diffusion.training.data.reading.source import Source
from lit_diffusion.training.data.reading.sources import Splits, find_splits, open_source
from lit_diffusion.training.data.reading.table import TableSource

__all__ = ["Layout", "count_labels", "find_layout"]

FILES = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp", "pixels")
IMAGES = (*FILES, "data", "x", "series", "signal", "points", "values", "features")
LABELS = ("label", "labels", "class", "cls", "target", "category", "digit", "fine_label", "y")
HELD_OUT = ("validation", "valid", "val", "dev", "test")


class Layout(NamedTuple):
    """Where the examples of a data set are.

    Attributes:
        splits: All splits.
        train: Name of the split to train on.
        val: Name of the split to validate on, None if there is none.
        image: Column of the images, or of the arrays.
        label: Column of the integer labels, None if there is none.
        class_names: Names of the classes, if the data declare them.
    """

    splits: Splits
    train: str
    val: str | None
    image: str
    label: str | None
    class_names: tuple[str, ...]

    def open(self, split: str) -> Source:
        """Open a split.

        Args:
            split: Its name.
        """
        return open_source(self.splits, split, Columns(self.image, self.label), skip=True)


def find_layout(path: str, data_files: Files | None = None) -> Layout:
    """Find the splits and columns of a data set.

    Args:
        path: As `DataModule.path`.
        data_files: Files of each split, None to find them.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If it cannot be opened, or has no column of images.
    """
    splits = find_splits(path, data_files, None, streaming=True)
    names = list(splits)
    held_out = [name for name in HELD_OUT if name in names]
    train = (
        "train" if "train" in names else next((n for n in names if n not in held_out), names[0])
    )
    types = _types(splits[train])
    image = _image_column(types)
    if image is None:
        raise ValueError(
            f"expected a column of images, or of lists of numbers, in {path!r}, got "
            f"{', '.join(types) or 'none'}; store each image as the bytes of its file, and name "
            "the column `image`"
        )
    label = _label_column(types)
    val = next((name for name in held_out if name != train), None)
    if val is not None and not {image, label} - {None} <= set(_types(splits[val])):
        val = None  # a test split without the labels cannot validate
    names_of = getattr(types.get(label or ""), "names", None)
    return Layout(splits, train, val, image, label, tuple(names_of or ()))


def count_labels(source: Source, column: str) -> Counter[int] | None:
    """Count the labels of all examples of a split; None if only reading everything would.

    Args:
        source: The split.
        column: The column of the labels.
    """
    values: Iterable[Any]
    if isinstance(source, TableSource):
        values = source.dataset[column]
    elif isinstance(source, ParquetSource):
        values = _column(source, column)
    else:
        return None
    return Counter(label for label in values if isinstance(label, int))


def _column(source: ParquetSource, column: str) -> list[Any]:
    import fsspec  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    values: list[Any] = []
    for file in source.footers:
        with fsspec.open(file, "rb") as opened:
            values += parquet.read_table(opened, columns=[column]).column(column).to_pylist()
    return values


def _types(split: Any) -> dict[str, Any]:
    """The columns of a split and their types, as ``datasets`` names them."""
    import datasets  # type: ignore[import-untyped]

    if isinstance(split, list):
        footers = open_parquet(split, skip=True).footers
        schema = next(iter(footers.values())).schema.to_arrow_schema()
        return dict(datasets.Features.from_arrow_schema(schema))
    if split.features is not None:
        return dict(split.features)
    return dict.fromkeys(next(iter(split), {}))


def _image_column(types: Mapping[str, Any]) -> str | None:
    declared = [name for name, kind in types.items() if type(kind).__name__ == "Image"]
    stored = [name for name, kind in types.items() if _is_bytes(kind)]
    unknown = [name for name, kind in types.items() if kind is None]
    lists = [name for name, kind in types.items() if _is_list(kind)]
    found = [*_usual(declared, IMAGES), *declared, *_usual(stored, IMAGES), *stored]
    found += [*_usual(lists, IMAGES), *lists]
    return next(iter([*found, *_usual(unknown, IMAGES)]), None)


def _is_list(kind: Any) -> bool:
    """Whether a column holds lists of numbers, or lists of these."""
    if type(kind).__name__.startswith("Array"):  # of two axes or more
        return True
    if not hasattr(kind, "feature"):
        return False
    inner = kind.feature
    return _is_list(inner) or str(getattr(inner, "dtype", "")).startswith(("int", "uint", "float"))


def _is_bytes(kind: Any) -> bool:
    """Whether a column holds files: bytes, or bytes with a path."""
    if isinstance(kind, dict):
        return "bytes" in kind
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _label_column(types: Mapping[str, Any]) -> str | None:
    declared = [name for name, kind in types.items() if type(kind).__name__ == "ClassLabel"]
    whole = [
        name
        for name, kind in types.items()
        if str(getattr(kind, "dtype", "")).startswith(("int", "uint")) and name not in declared
    ]
    return next(iter([*_usual(declared, LABELS), *declared, *_usual(whole, LABELS)]), None)


def _usual(found: Iterable[str], usual: Iterable[str]) -> list[str]:
    """Those of some names that are usual, the most usual first."""
    by_name = {name.lower(): name for name in found}
    return [by_name[name] for name in usual if name in by_name]
