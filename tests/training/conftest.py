"""What the tests of the training wing share."""

import sys

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from lit_diffusion.training.cli import main

ATTRIBUTES = ("__init__", "__setattr__", "__delattr__")


@pytest.fixture(autouse=True)
def loaders_as_they_were():
    """Undo what Lightning leaves of its patch of DataLoader if a `*_dataloader` hook raises.

    It has no `finally` there, so that in the same process every later one would be patched twice.
    """
    classes = DataLoader, BatchSampler
    before = {cls: {name: vars(cls).get(name) for name in ATTRIBUTES} for cls in classes}
    yield
    for cls, attributes in before.items():
        for name, value in attributes.items():
            if vars(cls).get(name) is value:
                continue
            if value is None:
                delattr(cls, name)
            else:
                setattr(cls, name, value)
            if f"__old{name}" in vars(cls):
                delattr(cls, f"__old{name}")


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lit-diffusion", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def write_images(folder, image_key, shape):
    """A small data set in the hub's own layout: random images and ten classes."""
    import datasets
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    features = datasets.Features(
        {image_key: datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    for split, n in (("train", 24), ("test", 8)):
        pixels = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
        rows = {
            image_key: [Image.fromarray(p.numpy()) for p in pixels],
            "label": [i % 10 for i in range(n)],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def rgb(tmp_path_factory):
    """A small data set that looks like CIFAR-10."""
    return write_images(tmp_path_factory.mktemp("rgb"), "img", (32, 32, 3))


@pytest.fixture(scope="session")
def rgb64(tmp_path_factory):
    """A small data set that looks like ImageNet at 64x64."""
    return write_images(tmp_path_factory.mktemp("rgb64"), "image", (64, 64, 3))


@pytest.fixture(scope="session")
def grey(tmp_path_factory):
    """A small data set that looks like MNIST."""
    return write_images(tmp_path_factory.mktemp("grey"), "image", (28, 28))


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A cache of the test's own, and no worker left behind."""
    import datasets
    from image_files import stop_workers

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    stop_workers()
