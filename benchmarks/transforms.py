"""Throughput of streaming with images resized and cropped on the way.

    python benchmarks/transforms.py --path FLOWERS [--size 64] [--rounds 7]

JPEG photographs in parquet files are read, shuffled, decoded, fitted to a smaller size, a part at
random, and batched by `DataModule` in this process. The bare loop does the same work with the
same libraries, and nothing else: it reads the same files with pyarrow, decodes with torchvision,
resizes with torch, crops, and stacks batches; it shuffles nothing and records nothing. The two
alternate in one run, so that a noisy machine affects them alike; the results are medians over
rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
import torchvision
from torch.nn.functional import interpolate

from lit_diffusion.training import DataModule

BATCH = 128


def bare_loop(folder: Path, size: int) -> Callable[[], int]:
    """Read, decode, resize, crop at random and stack, in stored order."""

    def image(data: bytes) -> torch.Tensor:
        stored = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        picture = torchvision.io.decode_jpeg(stored)
        h, w = picture.shape[1:]
        scale = size / min(h, w)
        new = max(size, round(scale * h)), max(size, round(scale * w))
        if new != (h, w):
            picture = interpolate(picture[None], new, mode="bilinear", antialias=True)[0]
        top, left = (int(torch.randint(n - size + 1, ())) for n in new)
        return picture[:, top : top + size, left : left + size]

    def once() -> int:
        count, some = 0, []
        for file in sorted(folder.glob("train*.parquet")):
            for part in parquet.ParquetFile(file).iter_batches(64, columns=["image"]):
                for data in part.column("image").field("bytes").to_pylist():
                    some.append(image(data))
                    if len(some) == BATCH:
                        count += len(torch.stack(some))
                        some = []
        return count

    return once


def streamed(folder: Path, size: int, mode: str) -> Callable[[], int]:
    """One epoch of the data module."""
    data = DataModule(
        str(folder),
        shape=(3, size, size),
        label_key=None,
        val_split=None,
        batch_size=BATCH,
        transform=[{"class_path": "Fit", "init_args": {"mode": mode}}],
    )
    data.setup("fit")
    loader = data.train_dataloader()
    return lambda: sum(len(batch["image"]) for batch in loader)


def measure(folder: Path, size: int, rounds: int) -> dict[str, Any]:
    """Images per second of each way, and the ratios to the bare loop."""
    ways = {"bare loop": bare_loop(folder, size)}
    ways |= {mode: streamed(folder, size, mode) for mode in ("center_crop", "random_crop")}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, once in ways.items():
            begin = time.perf_counter()
            rates[name].append(once() / (time.perf_counter() - begin))
    rates = {name: found[1:] for name, found in rates.items()}  # without the first, a warm-up
    result: dict[str, Any] = {name: round(statistics.median(v)) for name, v in rates.items()}
    for name in list(ways)[1:]:
        ratios = [a / b for a, b in zip(rates[name], rates["bare loop"], strict=True)]
        result[f"{name} / bare loop"] = round(statistics.median(ratios), 3)
    return result


def main() -> None:
    """Print the rates as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--path", required=True, help="Folder of parquet files of JPEG images.")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)
    print(json.dumps(measure(Path(args.path), args.size, args.rounds)))


if __name__ == "__main__":
    main()
