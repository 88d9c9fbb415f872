"""Files of named tensors, safetensors, which are checked as they are read.

The format has no checksum of its own, so a flipped bit would change a number without a word. Here
the header holds what the tensors are about, as JSON, and the first 16 digits of the SHA-256 of
that and of each tensor with its name, type and shape. A tensor is checked when it is read, and the
others are not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_diffusion.training.run.whole_file import replacing

__all__ = ["TensorFile", "open_tensors", "write_tensors"]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Any, durable: bool = False
) -> None:
    """Write named tensors, whole or not at all.

    Args:
        path: The file.
        tensors: On the CPU and contiguous.
        about: Plain data that describes them.
        durable: As for `replacing`.

    Raises:
        OSError: If it cannot be written.
    """
    text = json.dumps(about)
    sums = {name: _sha256(name, value) for name, value in tensors.items()}
    sums[""] = hashlib.sha256(text.encode()).hexdigest()[:16]
    # One entry, since the order of several is not the same in every file.
    header = {"about": json.dumps({"about": text, "sha256": sums})}
    try:
        with replacing(path, durable) as unfinished:
            save_file(dict(tensors), unfinished, header)
    except SafetensorError as error:
        raise OSError(str(error)) from error


class TensorFile:
    """An opened file of tensors.

    Args:
        opened: As `safe_open` returns it.

    Attributes:
        about: What the tensors are about.
        names: Their names.
    """

    def __init__(self, opened: Any) -> None:
        header = json.loads(opened.metadata()["about"])
        self._opened, self._sums = opened, header["sha256"]
        self.names = set(opened.keys())
        if hashlib.sha256(header["about"].encode()).hexdigest()[:16] != self._sums.pop(""):
            raise ValueError("its description does not have the checksum it was written with")
        if self.names != set(self._sums):
            raise ValueError("it does not hold the tensors that it was written with")
        self.about: Any = json.loads(header["about"])

    def read(self, name: str) -> Tensor:
        """A tensor, checked.

        Args:
            name: Its name.

        Raises:
            ValueError: If it is not what was written.
        """
        tensor: Tensor = self._opened.get_tensor(name)
        if _sha256(name, tensor) != self._sums[name]:
            raise ValueError(f"{name} does not have the checksum it was written with")
        return tensor


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a file that `write_tensors` wrote.

    Args:
        path: The file.

    Yields:
        The opened file.

    Raises:
        ValueError: If it is not such a file, or is damaged, also when a tensor of it is read.
    """
    try:
        with safe_open(path, "pt") as opened:
            yield TensorFile(opened)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or another kind of file: {error}") from error


def _sha256(name: str, value: Tensor) -> str:
    digest = hashlib.sha256(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    if value.numel():
        plain: Any = value.flatten().view(torch.uint8)
        digest.update(plain.numpy())
    return digest.hexdigest()[:16]
