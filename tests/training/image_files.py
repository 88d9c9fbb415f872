"""What the tests of the data share: small images, data sets made of them, and how to read them."""

import io
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import datasets
import numpy as np
import torch
from PIL import Image

from lit_diffusion.training.data import DataModule

N = 60
PARDONS = [
    "ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning",
    "ignore:Total length of `list` across ranks is zero:UserWarning",
    r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated:FutureWarning",
]


def pixels(n, shape=(1, 8, 8), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def encode(array, kind="PNG"):
    array = array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def write_parquet(path, images, labels=None, group=7, **columns):
    labels = list(range(len(images))) if labels is None else labels
    stored = [{"bytes": image, "path": None} for image in images]
    table = datasets.Dataset.from_dict({"image": stored, "label": labels} | columns)
    table = table.cast_column("image", datasets.Image(decode=False))
    path.parent.mkdir(exist_ok=True)
    table.cast_column("image", datasets.Image()).to_parquet(path, batch_size=group)


MADE = []


def module(path, place=(0, 1), stage="fit", **arguments):
    data = DataModule(path=str(path), **({"batch_size": 8} | arguments))
    MADE.append(data)
    data._place = lambda: place
    data.setup(stage)
    return data


def stop_workers():
    """Of all modules made since: the next test's workers must not inherit them."""
    while MADE:
        MADE.pop().teardown("fit")


def take(loader, n):
    """The next n batches, over as many epochs of the loader as it needs."""
    batches = []
    while len(batches) < n:
        for batch in loader:
            batches.append(batch)
            if len(batches) == n:
                break
    return batches


def labels(batches):
    """Labels here are the examples' numbers, so they tell who is in a batch."""
    return [label for batch in batches for label in batch["label"].tolist()]


def same(batches, others):
    return len(batches) == len(others) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(batches, others, strict=True)
    )


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def picture(mode, size=(7, 5)):
    rgb = Image.fromarray(pixels(1, (size[1], size[0], 3))[0])
    return rgb.quantize(16) if mode == "P" else rgb.convert(mode)


def stored(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_sixty(folder):
    """Sixty images in three files of uneven length, row groups of seven; ten to validate on."""
    images = [encode(image) for image in pixels(N)]
    for number, (begin, end) in enumerate([(0, 30), (30, 50), (50, 60)]):
        write_parquet(
            folder / f"train-{number:05d}-of-00003.parquet",
            images[begin:end],
            labels=list(range(begin, end)),
        )
    write_parquet(folder / "test-00000-of-00001.parquet", images[:10])
    return folder


class Server(NamedTuple):
    process: subprocess.Popen
    url: str

    def drop(self, answers):
        """Let the next answers end in the middle."""
        urlopen(f"{self.url}/drop/{answers}").close()

    @property
    def drops(self):
        """How many answers are still to be cut."""
        with urlopen(f"{self.url}/drops") as answer:
            return int(answer.read())


@contextmanager
def serving(folder):
    """Serve a folder over HTTP, see range_server.py; yields a `Server`."""
    script = Path(__file__).with_name("range_server.py")
    command = [sys.executable, script, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Server(process, f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()
