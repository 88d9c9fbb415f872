"""Where examples come from: finding a data set and opening one of its splits.

A data set is looked for among local paths, then among those shipped with lit_diffusion, then on
the Hugging Face hub; or it is named by URLs. ``datasets`` finds the files and knows their formats;
what goes wrong there comes out as one sentence that says what was expected, what was found and
what to do. How shards are read is told in `lit_diffusion.training.data.shards`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lit_diffusion.training.data.columns import Columns
from lit_diffusion.training.data.shards import (
    READ_SIZE,
    ParquetSource,
    SequentialSource,
    open_parquet,
)
from lit_diffusion.training.data.stream import (
    ORDER,
    Example,
    Position,
    Source,
    Window,
    permutation,
)

SHIPPED = Path(__file__).parents[2] / "data"


def find_splits(
    path: str,
    data_files: dict[str, Any] | None,
    config_name: str | None,
    streaming: bool,
    skip: bool = False,
) -> dict[str, Any]:
    """Return the splits of a data set by name, opened but not read.

    Args:
        path: Local folder or parquet file, name of a shipped data set, name on the hub, or URL of
            a parquet file.
        data_files: Files of each split, None to find them.
        config_name: Configuration of the data set, None for its default.
        streaming: As ``datasets.IterableDataset``, or else as ``datasets.Dataset``.
        skip: Look past a parquet file that cannot be opened, when streaming.
    """
    import datasets
    from pyarrow import ArrowInvalid

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
    elif "://" in path and urlparse(path).path.endswith(".parquet") and data_files is None:
        target, data_files = "parquet", {"train": path}
    elif "://" in path:
        raise ValueError(
            f"expected the URL of a parquet file, got {path!r}; for other formats set data.path "
            "to json, webdataset or csv and name the URLs in data.data_files"
        )
    elif local.is_absolute() or path.startswith((".", "~")) or local.suffix == ".parquet":
        raise FileNotFoundError(
            f"expected a file or folder at {path!r}, found none; set data.path"
        )
    elif data_files is None:
        names = ", ".join(sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir()))
        where = f"{path!r} is neither a local path nor shipped ({names}), and on the hub it"

    def load(**options: Any) -> Any:
        return datasets.load_dataset(
            target, name=config_name, data_files=data_files, streaming=streaming, **options
        )

    try:
        try:
            found = load()
        except ArrowInvalid:
            if not (skip and streaming):
                raise
            found = load(on_bad_files="skip")  # the first file is broken: read another's schema
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{where} cannot be opened: {reason}; check data.path, data.data_files, "
            "data.config_name and, for hub names, the network"
        ) from error
    return dict(found)


def open_split(
    splits: dict[str, Any],
    split: str,
    image_key: str,
    label_key: str | None,
    open_shards: int = 4,
    skip: bool = False,
    condition_keys: tuple[str, ...] = (),
) -> Source:
    """Return one split, ready to be read, after checking its columns.

    Args:
        splits: What `find_splits` found.
        split: Name of the split.
        image_key: Column of the images.
        label_key: Column of the labels, None for none.
        open_shards: Shards that each lane of a stream reads at once.
        skip: Leave out files that cannot be opened, see `Source.lost`.
        condition_keys: Columns of the further conditions.
    """
    import datasets

    columns = Columns(image_key, label_key, tuple(condition_keys))
    if split not in splits:
        raise ValueError(
            f"expected a split {split!r}, got {', '.join(splits)}; "
            "set data.train_split and data.val_split"
        )
    dataset = splits[split]
    streamed = isinstance(dataset, datasets.IterableDataset)
    files = getattr(dataset._ex_iterable, "kwargs", {}) if streamed else {}
    if {"files", "row_groups_list"} <= files.keys():
        parquet = open_parquet(list(files["files"]), skip)
        columns.check(split, parquet.columns)
        source: Source = ParquetSource(parquet, columns, open_shards)
        if not source.total:
            raise ValueError(f"expected examples in split {split!r}, got none; check the files")
        return source
    features = dataset.features
    if features is not None and isinstance(features.get(image_key), datasets.Image):
        dataset = dataset.cast_column(image_key, datasets.Image(decode=False))
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"expected examples in split {split!r}, got none; check the files")
    columns.check(split, list(first))
    dataset = dataset.select_columns(columns.names)
    if not streamed:
        return TableSource(dataset, columns)
    if isinstance(first[image_key], dict) and not first[image_key].get("bytes"):
        # A folder of images streams as a list of paths, class by class: better shuffled whole.
        listed = datasets.Dataset.from_list(list(dataset), features=dataset.features)
        return TableSource(listed, columns)
    return SequentialSource(dataset.reshard(), columns, open_shards)


class TableSource(Source):
    """A data set with random access: a window is then the lane's whole part of the epoch.

    Args:
        dataset: A map-style ``datasets.Dataset``, undecoded.
        columns: What is read of it.
    """

    shards = 1

    def __init__(self, dataset: Any, columns: Columns) -> None:
        self.dataset = dataset
        self.columns = columns
        self.total = len(dataset)
        # Made from the files' names and times (on the hub: their commit) and the split's name.
        self.fingerprint = dataset._fingerprint

    def windows(
        self, lane: int, lanes: int, seed: int, size: int, start: Position
    ) -> Iterator[Window]:
        """Yield the lane's part of a permutation of all examples, as one window."""
        if not start.cursors:
            order = permutation(self.total, seed, ORDER, start.epoch)
            begin, end = self.total * lane // lanes, self.total * (lane + 1) // lanes
            yield Window(order[begin:end].tolist(), ((1, 0),), [])

    def fetch(self, items: list[Any]) -> list[Example]:
        """Look the examples up by their indices."""
        rows = self.columns.rows(self.dataset[items])
        return [Example(item, *row) for item, row in zip(items, rows, strict=True)]

    def head(self, n: int | None) -> Iterator[Example]:
        """Yield the first n examples (None: all) in their own order."""
        n = self.total if n is None else min(n, self.total)
        for begin in range(0, n, READ_SIZE):
            yield from self.fetch(list(range(begin, min(begin + READ_SIZE, n))))
