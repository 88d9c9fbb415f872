"""Throughput and memory of data loading.

    python benchmarks/data.py [--path FOLDER] [--examples 8000] [--rounds 5]

Streaming: JPEG images of 64 × 64 in parquet files, read, shuffled, decoded and batched by
`DataModule`, compared with a bare loop that only reads the same files with pyarrow and
decodes with torchvision. The two alternate in one run, so that a noisy machine affects them alike;
the results are medians over rounds. Memory is that of all processes together (their proportional
set sizes), from the first thousand examples to 200,000.

In memory: 32 × 32 PNG images, decoded once into a map, then batches of 256 in this process,
compared with indexing a tensor by random numbers.

The images to stream are those of a folder of parquet files, cropped and scaled down, or otherwise
smooth random ones of about as many bytes as photographs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from PIL import Image

from lit_diffusion.training import DataModule

SIZE, FILES, BATCH = 64, 8, 128


def pictures(path: str | None) -> Iterator[Image.Image]:
    """Photographs of 64 × 64 without end, from a folder of parquet files or from a generator."""
    while path is not None:
        for file in sorted(Path(path).glob("train*.parquet")):
            for stored in parquet.read_table(file, columns=["image"])["image"].to_pylist():
                with Image.open(io.BytesIO(stored["bytes"])) as picture:
                    side = min(picture.size)
                    box = (0, 0, side, side)
                    yield picture.convert("RGB").resize((SIZE, SIZE), Image.BICUBIC, box)
    random = np.random.default_rng(0)
    while True:
        coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIZE, SIZE), Image.BICUBIC)).astype(int)
        grain = random.integers(-6, 7, smooth.shape)
        yield Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path, path: str | None, examples: int) -> int:
    """Write 64-pixel JPEG images into parquet files; returns the mean bytes of an image."""
    source, sizes = pictures(path), []
    for number in range(FILES):
        rows = []
        for _ in range(examples // FILES):
            file = io.BytesIO()
            next(source).save(file, "JPEG", quality=90)
            rows.append({"bytes": file.getvalue(), "path": None})
            sizes.append(len(rows[-1]["bytes"]))
        image = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        table = pa.table({"image": image, "label": np.arange(len(rows)) % 10})
        name = folder / f"train-{number:05d}-of-{FILES:05d}.parquet"
        parquet.write_table(table, name, row_group_size=250)
    return round(statistics.mean(sizes))


def bare_loop(folder: Path) -> Callable[[], int]:
    """Read and decode, in order, in one process; nothing is shuffled and nothing put together."""
    import torchvision

    def once() -> int:
        count = 0
        for file in sorted(folder.glob("*.parquet")):
            for part in parquet.ParquetFile(file).iter_batches(64, columns=["image"]):
                for data in part.column("image").field("bytes").to_pylist():
                    image = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    assert torchvision.io.decode_image(image).shape == (3, SIZE, SIZE)
                    count += 1
        return count

    return once


def stream(folder: Path, workers: int, **arguments: Any) -> tuple[DataModule, Any]:
    """The data module, streaming, and its loader."""
    data = DataModule(
        str(folder),
        shape=(3, SIZE, SIZE),
        val_split=None,
        batch_size=BATCH,
        num_workers=workers,
        **arguments,
    )
    data.setup("fit")
    return data, data.train_dataloader()


def measure_streaming(folder: Path, rounds: int) -> dict[str, Any]:
    """Images a second of each way, all of them in each round."""
    ways: dict[str, Callable[[], int]] = {"bare loop": bare_loop(folder)}
    for workers in (0, 2):
        _, loader = stream(folder, workers)
        ways[f"{workers} workers"] = lambda loader=loader: sum(len(b["image"]) for b in loader)
    for once in ways.values():
        once()  # files into the page cache, workers up
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, once in ways.items():
            start = time.perf_counter()
            rates[name].append(once() / (time.perf_counter() - start))
    ratios = {
        f"{name} / bare loop": [
            a / b for a, b in zip(rates[name], rates["bare loop"], strict=True)
        ]
        for name in list(ways)[1:]
    }
    medians = {name: round(statistics.median(values)) for name, values in rates.items()}
    return medians | {name: round(statistics.median(v), 3) for name, v in ratios.items()}


def resident() -> float:
    """MiB of this process and its children: proportional sets, so that nothing counts twice."""
    me = os.getpid()
    family = [me, *map(int, Path(f"/proc/self/task/{me}/children").read_text().split())]
    lines = [Path(f"/proc/{one}/smaps_rollup").read_text().splitlines() for one in family]
    sizes = [int(line.split()[1]) for some in lines for line in some if line.startswith("Pss:")]
    return sum(sizes) / 1024


def measure_memory(folder: Path, examples: int, workers: int) -> dict[str, int]:
    """MiB after so many streamed examples, epoch after epoch."""
    _, loader = stream(folder, workers)
    marks = [n for n in (1_000, 5_000, 20_000, 50_000, 100_000, 200_000) if n <= examples]
    seen, found = 0, {}
    while marks:
        for batch in loader:
            seen += len(batch["image"])
            if marks and seen >= marks[0]:
                found[f"{marks.pop(0):,}"] = round(resident())
    return found


def write_thumbnails(folder: Path, examples: int) -> None:
    """Write 32-pixel PNG images, in numbers and bytes like CIFAR-10's, into one parquet file."""
    source, rows = pictures(None), []
    for _ in range(examples):
        file = io.BytesIO()
        next(source).resize((32, 32), Image.BICUBIC).save(file, "PNG", compress_level=1)
        rows.append({"bytes": file.getvalue(), "path": None})
    image = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({"image": image, "label": np.arange(examples) % 10})
    parquet.write_table(table, folder / "train.parquet", row_group_size=1000)


def in_memory(examples: int, rounds: int, batch_size: int = 256) -> dict[str, Any]:
    """Images a second from a memory map, in this process, against a plain index of a tensor."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_thumbnails(folder, examples)

        def module(**arguments: Any) -> DataModule:
            data = DataModule(
                str(folder),
                shape=(3, 32, 32),
                val_split=None,
                batch_size=batch_size,
                streaming=False,
                cache_dir=str(folder / "maps"),
                **arguments,
            )
            data.setup("fit")
            return data

        begin = time.perf_counter()
        data = module()
        made = time.perf_counter() - begin
        begin = time.perf_counter()
        module()
        found = time.perf_counter() - begin
        images = data._memory.images.clone()
        steps = examples // batch_size
        flipped = module(horizontal_flip=True).train_dataloader()

        def plain() -> int:
            return sum(len(images[torch.randint(examples, (batch_size,))]) for _ in range(steps))

        def batches(loader: Any) -> Callable[[], int]:
            return lambda: sum(len(batch["image"]) for batch in loader)

        ways = {
            "plain index": plain,
            "in memory": batches(data.train_dataloader()),
            "in memory, with flips": batches(flipped),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, once in ways.items():
                begin = time.perf_counter()
                rates[name].append(once() / (time.perf_counter() - begin))
    result: dict[str, Any] = {"setup that decodes, s": round(made, 1)}
    result["setup that finds the map, s"] = round(found, 2)
    for name, values in rates.items():
        result[name] = round(statistics.median(values[1:]))  # without the first, a warm-up
    for name in list(ways)[1:]:
        ratios = [a / b for a, b in zip(rates[name], rates["plain index"], strict=True)]
        result[f"{name} / plain index"] = round(statistics.median(ratios[1:]), 2)
    return result


def table(title: str, rows: dict[str, Any]) -> str:
    """Rows of Markdown."""
    return "\n".join(
        [f"| {title} | |", "|---|---|", *(f"| {k} | {v:,} |" for k, v in rows.items())]
    )


def main() -> None:
    """Print the tables, and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--path", help="Folder of parquet files with photographs.")
    parser.add_argument("--examples", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=200_000, help="Examples to stream for it.")
    parser.add_argument("--thumbnails", type=int, default=50_000, help="Examples in memory.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result["bytes an image"] = write_photographs(folder, args.path, args.examples)
        result["streaming, images/s"] = measure_streaming(folder, args.rounds)
        if args.memory:
            result["streaming with 2 workers, MiB after examples"] = measure_memory(
                folder, args.memory, workers=2
            )
    if args.thumbnails:
        result["32 × 32 in memory, one process, images/s"] = in_memory(
            args.thumbnails, args.rounds
        )
    for title, rows in result.items():
        if isinstance(rows, dict):
            print(table(title, rows) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
