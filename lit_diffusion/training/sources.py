"""Where examples come from: finding a data set, opening one of its splits, reading its shards.

A data set is looked for among local paths, then among those shipped with lit_diffusion, then on
the Hugging Face hub. ``datasets`` does the opening and reading; what goes wrong there comes out as
one sentence that says what was expected, what was found and what to do.

Nothing is decoded here: an `Example` holds the image as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from lit_diffusion.training.stream import (
    ORDER,
    Example,
    Piece,
    Position,
    Source,
    deal,
    permutation,
)

SHIPPED = Path(__file__).parents[1] / "data"
READ_SIZE = 64  # rows turned into Python objects at a time
UNKNOWN_SHARD = 1 << 32  # index = shard · 2³² + row, where row counts cannot say better


def find_splits(
    path: str, data_files: dict[str, str] | None, config_name: str | None, streaming: bool
) -> dict[str, Any]:
    """Return the splits of a data set by name, opened but not read.

    Args:
        path: Local folder or parquet file, name of a shipped data set, or name on the hub.
        data_files: Files of each split, None to find them.
        config_name: Configuration of the data set, None for its default.
        streaming: As ``datasets.IterableDataset``, or else as ``datasets.Dataset``.
    """
    import datasets

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # 5 s at each end of a pass otherwise
    local, shipped = Path(path).expanduser(), SHIPPED / path
    target, where = path, f"{path!r}"
    if local.is_file() and data_files is None:
        if local.suffix != ".parquet":
            raise ValueError(
                f"expected a parquet file or a folder, got {path!r}; for other formats set "
                "data.path to json, webdataset or csv and name the files in data.data_files"
            )
        target, data_files = "parquet", {"train": str(local.resolve())}
    elif local.is_dir():
        target = str(local.resolve())
    elif path.isidentifier() and shipped.is_dir():
        target = "parquet"
        data_files = {file.stem: str(file) for file in sorted(shipped.glob("*.parquet"))}
    elif local.is_absolute() or path.startswith((".", "~")) or local.suffix == ".parquet":
        raise FileNotFoundError(
            f"expected a file or folder at {path!r}, found none; set data.path"
        )
    elif data_files is None:
        names = ", ".join(sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir()))
        where = f"{path!r} is neither a local path nor shipped ({names}), and on the hub it"
    try:
        found = datasets.load_dataset(
            target, name=config_name, data_files=data_files, streaming=streaming
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{where} cannot be opened: {reason}; check data.path, data.data_files, "
            "data.config_name and, for hub names, the network"
        ) from error
    return dict(found)


def open_split(
    splits: dict[str, Any], split: str, image_key: str, label_key: str | None
) -> Source:
    """Return one split, ready to be read, after checking its columns.

    Args:
        splits: What `find_splits` found.
        split: Name of the split.
        image_key: Column of the images.
        label_key: Column of the labels, None for none.
    """
    import datasets

    if split not in splits:
        raise ValueError(
            f"expected a split {split!r}, got {', '.join(splits)}; "
            "set data.train_split and data.val_split"
        )
    dataset = splits[split]
    streamed = isinstance(dataset, datasets.IterableDataset)
    features = dataset.features
    if features is not None and isinstance(features.get(image_key), datasets.Image):
        dataset = dataset.cast_column(image_key, datasets.Image(decode=False))
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"expected examples in split {split!r}, got none; check the files")
    columns = {"data.image_key": image_key, "data.label_key": label_key}
    for argument, column in columns.items():
        if column is not None and column not in first:
            hint = "; null for no labels" if argument == "data.label_key" else ""
            raise ValueError(
                f"expected a column {column!r} in split {split!r}, got {', '.join(first)}; "
                f"set {argument}{hint}"
            )
    dataset = dataset.select_columns([*{column: 0 for column in columns.values() if column}])
    if not streamed:
        return TableSource(dataset, image_key, label_key)

    rows = _row_groups(splits[split].reshard())
    if rows is None and isinstance(first[image_key], dict) and not first[image_key].get("bytes"):
        # A folder of images streams as a list of paths, class by class: better shuffled whole.
        listed = datasets.Dataset.from_list(list(dataset), features=dataset.features)
        return TableSource(listed, image_key, label_key)
    return ShardSource(dataset.reshard(), rows, image_key, label_key)


def _row_groups(dataset: Any) -> list[int] | None:
    """Return the rows of each shard from the footers of parquet files, None for other formats."""
    import fsspec
    import pyarrow.parquet as parquet

    sources = getattr(dataset._ex_iterable, "kwargs", {})
    if not {"files", "row_groups_list"} <= sources.keys():
        return None

    def footer(file: str) -> Any:
        with fsspec.open(file, "rb") as opened:
            return parquet.read_metadata(opened)

    files = list(dict.fromkeys(sources["files"]))
    with ThreadPoolExecutor(max_workers=16) as pool:
        footers = dict(zip(files, pool.map(footer, files), strict=True))
    return [
        sum(footers[file].row_group(group).num_rows for group in groups)
        for file, groups in zip(sources["files"], sources["row_groups_list"], strict=True)
    ]


class ShardSource(Source):
    """A streamed data set: shards that can only be read from their beginning.

    Args:
        dataset: A streaming ``datasets.IterableDataset``, undecoded.
        rows: Examples in each shard, None where they are not known.
        image_key: Column of the images.
        label_key: Column of the labels, None for none.
    """

    def __init__(
        self, dataset: Any, rows: list[int] | None, image_key: str, label_key: str | None
    ) -> None:
        self.dataset = dataset
        self.rows = rows
        self.keys = (image_key, label_key)
        self.shards = dataset.num_shards if rows is None else len(rows)
        self.total = None if rows is None else sum(rows)
        lengths = [UNKNOWN_SHARD] * self.shards if rows is None else rows
        self.offsets = [0, *np.cumsum(lengths).tolist()]

    def windows(
        self, lane: int, lanes: int, seed: int, size: int, start: Position
    ) -> Iterator[tuple[list[Any], int, int]]:
        """Read the lane's part of the shards, in this epoch's order, window by window."""
        order = permutation(self.shards, seed, ORDER, start.epoch).tolist()
        pieces = deal(self.rows, order, lane, lanes)
        window: list[Example] = []
        row = start.row
        for number in range(start.piece, len(pieces)):
            for example in self._read(pieces[number], skip=row):
                row += 1
                window.append(example)
                if len(window) == size:
                    yield window, number, row
                    window = []
            row = 0
        if window:
            yield window, len(pieces), 0

    def fetch(self, items: list[Any]) -> list[Example]:
        """Return the items: they are the examples."""
        return items

    def head(self, n: int | None) -> Iterator[Example]:
        """Yield the first n examples (None: all) in their own order."""
        whole = (self._read(Piece(shard, 0, None, 1)) for shard in range(self.shards))
        return islice(chain.from_iterable(whole), n)

    def name(self, index: int) -> str:
        """Say which example an index is, for messages."""
        if self.rows is None and self.shards > 1:
            return f"example {index % UNKNOWN_SHARD} of shard {index // UNKNOWN_SHARD}"
        return f"example {index}"

    def _read(self, piece: Piece, skip: int = 0) -> Iterator[Example]:
        image_key, label_key = self.keys
        first = piece.start + skip * piece.step
        # `iter(batch_size)` leaves torch's workers alone; plain iteration would deal shards again.
        shard = self.dataset.shard(num_shards=self.shards, index=piece.shard)
        row = 0
        for table in shard.iter(batch_size=READ_SIZE):
            images = table[image_key]
            labels = [None] * len(images) if label_key is None else table[label_key]
            for image, label in zip(images, labels, strict=True):
                if piece.stop is not None and row >= piece.stop:
                    return
                if row >= first and (row - first) % piece.step == 0:
                    yield Example(self.offsets[piece.shard] + row, image, label)
                row += 1


class TableSource(Source):
    """A data set with random access: a window is then the lane's whole part of the epoch.

    Args:
        dataset: A map-style ``datasets.Dataset``, undecoded.
        image_key: Column of the images.
        label_key: Column of the labels, None for none.
    """

    shards = 1

    def __init__(self, dataset: Any, image_key: str, label_key: str | None) -> None:
        self.dataset = dataset
        self.keys = (image_key, label_key)
        self.total = len(dataset)

    def windows(
        self, lane: int, lanes: int, seed: int, size: int, start: Position
    ) -> Iterator[tuple[list[Any], int, int]]:
        """Yield the lane's part of a permutation of all examples, as one window."""
        if start.piece == 0:
            order = permutation(self.total, seed, ORDER, start.epoch)
            begin, end = self.total * lane // lanes, self.total * (lane + 1) // lanes
            yield order[begin:end].tolist(), 1, 0

    def fetch(self, items: list[Any]) -> list[Example]:
        """Look the examples up by their indices."""
        image_key, label_key = self.keys
        table = self.dataset[items]
        labels = [None] * len(items) if label_key is None else table[label_key]
        return [Example(*row) for row in zip(items, table[image_key], labels, strict=True)]

    def head(self, n: int | None) -> Iterator[Example]:
        """Yield the first n examples (None: all) in their own order."""
        n = self.total if n is None else min(n, self.total)
        for begin in range(0, n, READ_SIZE):
            yield from self.fetch(list(range(begin, min(begin + READ_SIZE, n))))
