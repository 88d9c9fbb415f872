"""Training data that are sorted by class are said to be so, once, and others are not."""

import logging
import warnings

import pytest
from image_files import encode, module, pixels, stop_workers, take, write_parquet

from lit_diffusion.training.run.messages import logger

CLASSES, EACH = 8, 200


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same images sorted by class, in one row group and in many, and in an order without."""
    root = tmp_path_factory.mktemp("sorted")
    images = [encode(one) for one in pixels(CLASSES)]
    labels = [c for c in range(CLASSES) for _ in range(EACH)]
    mixed = [(7 * i) % CLASSES for i in range(len(labels))]
    for name, order, group in (
        ("sorted", labels, 10_000),
        ("groups", labels, 50),
        ("mixed", mixed, 10_000),
    ):
        write_parquet(root / name / "train.parquet", [images[c] for c in order], order, group)
    return root


def said(path, **arguments):
    """The warnings while 70 batches are read."""
    records = []
    logger.addHandler(handler := _Keep(records))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = module(path, batch_size=16, shuffle_window=128, val_split=None, **arguments)
            take(data.train_dataloader(), 70)
    finally:
        logger.removeHandler(handler)
        stop_workers()
    return [one for one in records if "sorted by class" in one]


class _Keep(logging.Handler):
    def __init__(self, records):
        super().__init__()
        self.records = records

    def emit(self, record):
        self.records.append(record.getMessage())


def test_sorted_data_in_one_shard_are_reported_once(folders):
    (one,) = said(folders / "sorted", open_shards=1)
    assert "a batch of 16 has " in one
    assert "data.shuffle_window" in one


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("mixed", {}),
        ("groups", {"open_shards": 8}),  # a window of several shards mixes them
        ("sorted", {"streaming": False}),
        ("sorted", {"label_key": None}),
    ],
)
def test_mixed_data_are_not(folders, name, arguments, tmp_path):
    assert not said(folders / name, cache_dir=str(tmp_path), **arguments)
