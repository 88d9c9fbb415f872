"""Finding a data set by its name, and opening the source of one of its splits.

A data set is looked for among local paths, then among those shipped with lit_diffusion, then on
the Hugging Face hub; or it is given by URLs. ``datasets`` finds the files and knows their formats.
Errors are reported in one line: what was expected, what was found, and what to do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import lit_diffusion
from lit_diffusion.training.data.reading.arrays import find_arrays
from lit_diffusion.training.data.reading.columns import Columns
from lit_diffusion.training.data.reading.content import digests
from lit_diffusion.training.data.reading.file_names import Files, files_of_folder, named_files
from lit_diffusion.training.data.reading.image_paths import ImagePaths, folders_of
from lit_diffusion.training.data.reading.parquet import ParquetSource, open_parquet
from lit_diffusion.training.data.reading.retry import limit_silence, server_options
from lit_diffusion.training.data.reading.shards import SequentialSource
from lit_diffusion.training.data.reading.source import Source
from lit_diffusion.training.data.reading.table import TableSource
from lit_diffusion.training.run.secrets import refuse_masked, without_secrets

SHIPPED = Path(lit_diffusion.__file__).parent / "data"


class Place(NamedTuple):
    """Where a data set was found.

    Attributes:
        target: What ``datasets`` is asked to load: a format, a folder, or a name on the hub.
        files: Files of each split, None to let ``datasets`` find them.
        name: Of the data set, for messages.
    """

    target: str
    files: Files | None
    name: str


class Splits(dict[str, Any]):
    """The splits of a data set by name.

    A split is a list of parquet files or a ``datasets.IterableDataset`` if it is streamed, and a
    ``datasets.Dataset`` if not. Of arrays it is an `ArrayTable` in either case.

    Args:
        splits: By name.
        files: Paths and URLs of the files of each split.
        listed: Whether the files are the images, and their names and folders part of the data.
        paths: Reads the images that rows of the data set name by paths.
    """

    def __init__(
        self,
        splits: Mapping[Any, Any],
        files: Mapping[str, tuple[str, ...]],
        listed: bool,
        paths: ImagePaths,
    ) -> None:
        super().__init__({str(name): split for name, split in splits.items()})
        self.files = files
        self.listed = listed
        self.paths = paths


def locate(path: str, data_files: Files | None) -> Place:
    """Return where a data set is.

    Args:
        path: Local folder or parquet file, name of a shipped data set, name on the hub, or URL of
            a parquet file.
        data_files: Files of each split, None to find them.

    Raises:
        FileNotFoundError: If the path is local and there is nothing.
        ValueError: If the path is empty, a single file is not parquet, or an address was masked.

    Example:
        >>> locate("someone/something", {"train": "train.parquet"}).target
        'someone/something'
    """
    if not path.strip():  # which would be the current folder
        raise ValueError(
            f"expected a folder, a file or the name of a data set, got {path!r}; set data.path"
        )
    refuse_masked("data.path", path)
    refuse_masked("data.data_files", data_files)
    local, shipped = Path(path).expanduser(), SHIPPED / path
    name = f"{without_secrets(path)!r}"
    formats = "for other formats set data.path to json, webdataset or csv and name the"
    if local.is_file() and data_files is None:
        if local.suffix != ".parquet":
            raise ValueError(
                f"expected a parquet, .npy or .npz file or a folder, got {path!r}; {formats} "
                "files in data.data_files"
            )
        return Place("parquet", {"train": str(local.resolve())}, name)
    if local.is_dir():
        return Place(str(local.resolve()), data_files, name)
    if path.isidentifier() and shipped.is_dir():
        files = {file.stem: str(file) for file in sorted(shipped.glob("*.parquet"))}
        return Place("parquet", files, name)
    if "://" in path:
        if not urlparse(path).path.endswith(".parquet") or data_files is not None:
            raise ValueError(
                f"expected the URL of a parquet file, got {name}; {formats} URLs in "
                "data.data_files"
            )
        return Place("parquet", {"train": path}, name)
    if local.is_absolute() or path.startswith((".", "~")) or local.suffix == ".parquet":
        raise FileNotFoundError(
            f"expected a file or folder at {path!r}, found none; set data.path"
        )
    if data_files is None:
        names = ", ".join(sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir()))
        name = f"{path!r} is neither a local path nor shipped ({names}), and on the hub it"
    return Place(path, data_files, name)


def find_splits(
    path: str, data_files: Files | None, config_name: str | None, streaming: bool
) -> Splits:
    """Return the splits of a data set by name, found but not read.

    Args:
        path: See `locate`.
        data_files: Files of each split, None to find them.
        config_name: Configuration of the data set, None for its default.
        streaming: Read row by row, without a copy in the cache of ``datasets``.

    Raises:
        FileNotFoundError: If there is no such data set, or it cannot be reached.
        ValueError: If ``datasets`` cannot open it.
    """
    import datasets  # type: ignore[import-untyped]
    from datasets.packaged_modules.folder_based_builder.folder_based_builder import (  # type: ignore[import-untyped]
        FolderBasedBuilder,
    )
    from datasets.packaged_modules.parquet.parquet import Parquet  # type: ignore[import-untyped]

    if data_files is None and (arrays := find_arrays(path)) is not None:
        paths = ImagePaths((arrays.folder,))
        return Splits(arrays.splits, arrays.files, arrays.listed, paths)
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # or each pass ends with 5 idle seconds
    limit_silence()
    place = locate(path, data_files)
    try:
        options: dict[str, Any] = {"name": config_name, "data_files": _files(place)}
        options["storage_options"] = {kind: server_options() for kind in ("http", "https")}
        builder = datasets.load_dataset_builder(place.target, **options)
        files, listed = _files_of(builder), isinstance(builder, FolderBasedBuilder)
        paths = _image_paths(place, files, listed)
        if not streaming:
            if folder := _table_folder(files, listed):
                builder = datasets.load_dataset_builder(
                    place.target, **options, cache_dir=str(folder)
                )
            builder.download_and_prepare()
            return Splits(builder.as_dataset(), files, listed, paths)
        if isinstance(builder, Parquet):
            lists = {split: list(names) for split, names in files.items()}
            return Splits(lists, files, listed, paths)
        return Splits(builder.as_streaming_dataset(), files, listed, paths)
    except Exception as error:  # libraries raise anything here
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
        reason = without_secrets(" ".join(str(cause or error).split()))[:300]
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{place.name} cannot be opened: {reason}; check data.path, data.data_files, "
            "data.config_name and, for hub names, the network"
        ) from error


def _files(place: Place) -> Any:
    """Return the files to be asked for, None to let ``datasets`` find them."""
    local = Path(place.target).is_absolute()
    if place.files is None:
        return files_of_folder(Path(place.target)) if local else None
    if not local and "/" in place.target:  # on the hub, and so are the files
        return place.files
    return named_files(place.files, Path(place.target) if local else Path.cwd())


def _files_of(builder: Any) -> dict[str, tuple[str, ...]]:
    found = builder.config.data_files or {}
    return {str(split): tuple(map(str, names)) for split, names in found.items()}


def _image_paths(place: Place, files: Mapping[str, tuple[str, ...]], listed: bool) -> ImagePaths:
    """Return what reads the images of a data set that are files of their own."""
    import datasets
    from huggingface_hub import constants

    folders = [place.target] if Path(place.target).is_absolute() else []
    folders += folders_of(name for names in files.values() for name in names)
    if listed:  # files and archives of images may be downloaded
        folders += [str(datasets.config.DOWNLOADED_DATASETS_PATH), constants.HF_HUB_CACHE]
    return ImagePaths(tuple(folders))


def _table_folder(files: Mapping[str, tuple[str, ...]], listed: bool) -> Path | None:
    """Return the cache of the tables that ``datasets`` makes of files on disk.

    Its own would be in use again after a change that keeps a file's time.
    """
    import datasets

    found = {split: digests(names, listed) for split, names in files.items()}
    if not all("content" in one for one in found.values()):
        return None
    name = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]
    return Path(datasets.config.HF_DATASETS_CACHE) / f"content-{name}"


def open_source(
    splits: Splits,
    split: str,
    columns: Columns,
    open_shards: int = 4,
    skip: bool = False,
) -> Source:
    """Return the source of one split, after checking its columns.

    Args:
        splits: The result of `find_splits`.
        split: Name of the split.
        columns: The columns to read.
        open_shards: Shards that each lane of a stream reads at once.
        skip: Leave out files that cannot be opened, see `Source.lost`.

    Raises:
        ValueError: If there is no such split or column, or no example.
    """
    if split not in splits:
        part = "; for a part of a split set data.val_share" if "[" in split else ""
        raise ValueError(
            f"expected a split {split!r}, got {', '.join(splits)}; "
            f"set data.train_split and data.val_split{part}"
        )
    dataset, empty = splits[split], f"expected examples in split {split!r}, got none"
    source: Source
    if isinstance(dataset, list):
        parquet = open_parquet(dataset, skip)
        columns.check(split, parquet.columns)
        source = ParquetSource(parquet, columns, open_shards)
        if not source.total:
            raise ValueError(f"{empty}; check the files")
        source.files = tuple(parquet.footers)
    else:
        source = _open_dataset(dataset, split, columns, open_shards, empty)
        source.files, source.named = splits.files.get(split, ()), splits.listed
    return source


def _open_dataset(
    dataset: Any, split: str, columns: Columns, open_shards: int, empty: str
) -> Source:
    """Return the source of what ``datasets`` has opened."""
    import datasets

    if dataset.features is not None:
        # First of all, so that no other column is read, and nothing is decoded on the way.
        columns.check(split, list(dataset.features))
        dataset = dataset.select_columns(columns.names)
        for name, feature in dataset.features.items():
            if getattr(feature, "decode", False):
                dataset = dataset.cast_column(name, type(feature)(decode=False))
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{empty}; check the files")
    columns.check(split, list(first))
    dataset = dataset.select_columns(columns.names)
    if not isinstance(dataset, datasets.IterableDataset):
        return TableSource(dataset, columns)
    image = first[columns.image]
    if isinstance(image, dict) and not image.get("bytes"):
        # A folder of images is streamed as a list of paths, class by class: shuffle it as a whole.
        listed = datasets.Dataset.from_list(list(dataset), features=dataset.features)
        return TableSource(listed, columns)
    return SequentialSource(dataset.reshard(), columns, open_shards)
