"""Data sets of arrays in numpy's files: one array of all examples, or one file for each.

    x.npy                            the column image of split train
    x.npz                            columns and splits by the names of its arrays
    train.npy, test.npy              the column image of each split, in a folder
    images.npy, labels.npy           columns, in a folder
    cat/1.npy, dog/2.npy, …          an example in each file, of the class of its folder

The first axis of an array counts the examples. Names such as `x`, `data` or `images` stand for the
column `image`, and `y` or `labels` for `label`; `x_train` and `train_images` are in split train.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lit_diffusion.training.data.reading.stored_array import ArrayTable, StoredArray

__all__ = ["ARRAYS", "IMAGES", "LABELS", "ArraySplits", "find_arrays"]

ARRAYS = (".npy", ".npz")
IMAGES = ("image", "images", "x", "data", "samples", "arr_0")
LABELS = ("label", "labels", "y", "target", "targets", "arr_1")
SPLITS = {"train": "train", "test": "test", "val": "validation", "valid": "validation"}
SPLITS |= {"validation": "validation"}
OTHERS = (".parquet", ".arrow", ".tar", ".zip", ".csv", ".json", ".jsonl")  # of data


class ArraySplits(NamedTuple):
    """The splits of a data set of arrays.

    Attributes:
        splits: A table for each.
        files: Of each split.
        listed: Whether each example is a file of its own.
        folder: In which they lie.
    """

    splits: dict[str, Any]
    files: dict[str, tuple[str, ...]]
    listed: bool
    folder: str


def find_arrays(path: str) -> ArraySplits | None:
    """Find the splits of a data set of arrays; None if it is of something else.

    Args:
        path: A local file or folder, or any other name.

    Raises:
        ValueError: If the arrays cannot be read, or do not fit together.
    """
    local = Path(path).expanduser()
    if local.is_file() and local.suffix in ARRAYS:
        root, files = local.resolve().parent, [local.resolve()]
    elif local.is_dir() and (found := _array_files(local.resolve())):
        root, files = local.resolve(), found
    else:
        return None
    if len(files) > 1 and not all(_is_part(file) for file in files):
        if any(file.suffix == ".npz" for file in files):
            raise ValueError(
                f"expected one .npz file in {path!r}, one for each split (train.npz, test.npz), "
                f"or a .npy file for each example, got {len(files):,} files, such as "
                f"{files[0].name!r}; save them as one"
            )
        return _one_file_each(root, files)
    named = {name: array for file in files for name, array in _members(file).items()}
    splits = _tables(named, str(path))
    return ArraySplits(
        {split: ArrayTable(columns) for split, columns in splits.items()},
        {
            split: tuple({array.file: 0 for array in columns.values()})
            for split, columns in splits.items()
        },
        False,
        str(root),
    )


def _array_files(folder: Path) -> list[Path] | None:
    """Return the files of a folder if they are arrays; None if there are images or tables."""
    from datasets.packaged_modules.imagefolder.imagefolder import (  # type: ignore[import-untyped]
        ImageFolder,
    )

    other = {*ImageFolder.EXTENSIONS, *OTHERS}
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in other:
                return None
            if suffix in ARRAYS and not name.startswith("."):
                found.append(Path(place, name))
    return found or None


def _is_part(file: Path) -> bool:
    """Whether a file holds a column or a split of all examples, by its name."""
    if file.suffix == ".npz":
        return file.stem.lower() in SPLITS
    return _split_and_column(file.stem)[1] in ("image", "label")


def _split_and_column(name: str) -> tuple[str, str]:
    """What an array is, by its name.

    >>> [_split_and_column(name) for name in ("x_train", "test_labels", "val", "arr_0", "mask")]
    [('train', 'image'), ('test', 'label'), ('validation', 'image'), ('train', 'image'), \
('train', 'mask')]
    """
    if name.lower() in SPLITS:
        return SPLITS[name.lower()], "image"
    either = "|".join(SPLITS)
    before = re.fullmatch(rf"({either})[_-](.+)", name, re.IGNORECASE)
    after = re.fullmatch(rf"(.+)[_-]({either})", name, re.IGNORECASE)
    split = "train"
    if before:
        split, name = before[1], before[2]
    elif after:
        name, split = after[1], after[2]
    column = name
    if name.lower() in IMAGES:
        column = "image"
    elif name.lower() in LABELS:
        column = "label"
    return SPLITS[split.lower()], column


def _members(file: Path) -> dict[str, StoredArray]:
    """Return the arrays of a file by their names."""
    try:
        if file.suffix == ".npy":
            return {file.stem: StoredArray(str(file))}
        with zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
        arrays = {name.removesuffix(".npy"): StoredArray(str(file), name) for name in members}
    except Exception as error:  # a damaged file raises anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"{file} cannot be opened: {reason}; check data.path") from error
    split = SPLITS.get(file.stem.lower())
    whole = split is None or any(_split_and_column(name)[0] != "train" for name in arrays)
    return arrays if whole else {f"{split}_{name}": one for name, one in arrays.items()}


def _tables(named: Mapping[str, StoredArray], path: str) -> dict[str, dict[str, StoredArray]]:
    """Sort arrays into splits and columns.

    Raises:
        ValueError: If there are none, or those of a split have different lengths.
    """
    splits: dict[str, dict[str, StoredArray]] = {}
    for name, array in named.items():
        split, column = _split_and_column(name) if len(named) > 1 else ("train", "image")
        columns = splits.setdefault(split, {})
        columns[name if column in columns else column] = array
    if not splits:
        raise ValueError(f"expected arrays in {path!r}, got none; check data.path")
    for split, columns in splits.items():
        if "image" not in columns and len(others := [*columns.keys() - {"label"}]) == 1:
            columns["image"] = columns.pop(others[0])
        lengths = {name: array.shape[0] for name, array in columns.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
            raise ValueError(
                f"expected arrays of one length in split {split!r} of {path!r}, whose first axis "
                f"counts the examples, got {counts}; leave out what belongs to no example"
            )
    return dict(sorted(splits.items(), key=lambda item: item[0] != "train"))


def _one_file_each(root: Path, files: list[Path]) -> ArraySplits:
    """Return the splits of a folder with a file for each example."""
    import datasets  # type: ignore[import-untyped]

    of_split: dict[str, list[Path]] = {}
    below = [file.relative_to(root) for file in files]
    divided = all(len(file.parts) > 1 and file.parts[0].lower() in SPLITS for file in below)
    for file in below:
        split = SPLITS[file.parts[0].lower()] if divided else "train"
        of_split.setdefault(split, []).append(file)
    depth = 3 if divided else 2
    classes = sorted({file.parts[-2] for file in below if len(file.parts) == depth})
    labelled = len(classes) > 1 and all(len(file.parts) == depth for file in below)
    splits, listed = {}, {}
    for split, some in of_split.items():
        listed[split] = tuple(str(root / file) for file in some)
        columns: dict[str, Any] = {"image": [{"path": f, "bytes": None} for f in listed[split]]}
        features = {"image": datasets.Image(decode=False)}
        if labelled:
            columns["label"] = [classes.index(file.parts[-2]) for file in some]
            features["label"] = datasets.ClassLabel(names=classes)
        splits[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return ArraySplits(splits, listed, True, str(root))
