"""Samples in files, written as they are made.

    out/000000.png …          one image each, named by its number; out/samples.json says of what
    out.npy                   an array, which is out.npy.part until it is complete

Any number of samples takes the memory of one batch, and a run that is killed keeps what it has
written: the same command goes on with the samples that are missing. Files of another command are
never continued or overwritten.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lit_diffusion.training.evaluation.generation import to_bytes
from lit_diffusion.training.run.whole_file import replacing, write_whole

__all__ = ["ArrayFile", "ImageFolder", "write_image"]

RECORD = "samples.json"


def write_image(image: Tensor, path: Path) -> None:
    """Write an image as a PNG file, whole or not at all.

    Args:
        image: In [−1, 1].
        path: The file.

    Shapes:
        image (C, H, W), C of 1 or 3.
    """
    from torchvision.transforms.functional import to_pil_image  # type: ignore[import-untyped]

    with replacing(path) as unfinished:
        to_pil_image(to_bytes(image)).save(unfinished, format="PNG")


def _text(about: dict[str, Any]) -> str:
    return json.dumps(about, indent=2, ensure_ascii=False) + "\n"


def _refuse_others(record: Path, about: dict[str, Any], out: Path) -> None:
    """Refuse to continue the samples of another command."""
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        different = [name for name in about if before.get(name) != about[name]]
    except (OSError, ValueError, AttributeError):
        different = ["samples, made by another program"]
    if different:
        raise ValueError(
            f"Expected {out} to be new, or to have samples of the same settings, got another "
            f"{different[0]}: give another --out, or remove it."
        )


class ImageFolder:
    """A folder of samples, one PNG file each.

    Args:
        out: The folder.
        about: All that the samples depend on besides their number, as plain data.
        folder_of: The subfolder of a sample, "" for the folder itself.

    Raises:
        ValueError: If the folder has samples of another command.
    """

    def __init__(
        self, out: Path, about: dict[str, Any], folder_of: Callable[[int], str] = lambda i: ""
    ) -> None:
        self.out, self._about, self._folder_of = out, about, folder_of
        images = itertools.chain(out.glob("[0-9]*.png"), out.glob("*/[0-9]*.png"))
        if (out / RECORD).is_file() or any(images):
            _refuse_others(out / RECORD, about, out)
        for orphan in out.rglob(".*.png.*.tmp"):  # of a command that was killed
            orphan.unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self.out / self._folder_of(index) / f"{index:06d}.png"

    def has(self, index: Iterable[int]) -> bool:
        """Whether all of these samples are there.

        Args:
            index: Their numbers.
        """
        return all(self._path(i).is_file() for i in index)

    def write(self, index: Sequence[int], images: Tensor) -> None:
        """Write a batch.

        Args:
            index: The numbers of the samples.
            images: The samples.

        Shapes:
            images (n, C, H, W), in [−1, 1].
        """
        if not (self.out / RECORD).is_file():
            write_whole(self.out / RECORD, _text(self._about))
        for i, image in zip(index, images, strict=True):
            write_image(image, self._path(i))

    def finish(self) -> None:
        """Nothing is left to do."""


class ArrayFile:
    """Samples in one .npy file, (n, C, H, W) float32, written in their order.

    Args:
        out: The file.
        about: All that the samples depend on besides their number, as plain data.
        shape: (n, C, H, W).

    Raises:
        ValueError: If there is the unfinished file of another command.
    """

    def __init__(self, out: Path, about: dict[str, Any], shape: tuple[int, ...]) -> None:
        self.out, self._shape = out, shape
        self._part = out.with_name(f"{out.name}.part")
        self._record = out.with_name(f"{out.name}.part.json")
        self._about = {**about, "shape": list(shape)}
        if self._part.is_file():
            _refuse_others(self._record, self._about, self._part)
        header = io.BytesIO()
        kind = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, kind)
        self._header = header.getvalue()

    @property
    def _each(self) -> int:
        return int(4 * np.prod(self._shape[1:]))

    def has(self, index: Iterable[int]) -> bool:
        """Whether all of these samples are there.

        Args:
            index: Their numbers.
        """
        size = self._part.stat().st_size if self._part.is_file() else 0
        return max(index) < (size - len(self._header)) // self._each

    def write(self, index: Sequence[int], images: Tensor) -> None:
        """Write the next batch.

        Args:
            index: The numbers of the samples.
            images: The samples.

        Shapes:
            images (n, C, H, W).
        """
        if not self._part.is_file():
            write_whole(self._record, _text(self._about))
            self._part.write_bytes(self._header)
        with self._part.open("r+b") as file:
            file.seek(len(self._header) + index[0] * self._each)
            file.write(images.float().contiguous().numpy().astype("<f4").tobytes())

    def finish(self) -> None:
        """Give the file its name."""
        self._part.replace(self.out)
        self._record.unlink(missing_ok=True)
