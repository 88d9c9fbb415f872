"""The reference: feature statistics of a split of real images.

They are computed once for each data set and feature network, by all ranks together, and cached
under a hash of both. The reported hash is that of the images, so equal hashes mean that two
numbers were computed against the same pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_diffusion.training.data.batching.memory import cache_folder
from lit_diffusion.training.data.decoding.transforms import library_versions, protocol_of
from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.evaluation.features import extract, fingerprint
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.secrets import without_secrets
from lit_diffusion.training.run.tensor_file import open_tensors, write_tensors
from lit_diffusion.training.step import ranks

__all__ = ["Reference", "class_shares", "open_reference"]

FORMAT = 2  # raised whenever the file format or the measured statistics change
CHUNK = 256  # images per batch; the hash is computed from those of the chunks


@dataclass(frozen=True)
class Reference:
    """Moments of the features of a split, its class counts, and its protocol.

    Shapes:
        total (F,) and outer (F, F), float64, the sums of f and f fᵀ; shares (K,), how many
        examples each class has, or None; features (n, F), float32, or None.
    """

    count: int
    total: Tensor
    outer: Tensor
    shares: Tensor | None
    features: Tensor | None
    protocol: dict[str, Any]


def open_reference(
    data: DataModule,
    split: str,
    network: nn.Module,
    device: torch.device,
    rows: bool = False,
    expected: str | None = None,
) -> Reference:
    """Read the reference of a split from the cache, or compute it now and cache it.

    Args:
        data: The data; a collective: every rank must call this.
        split: The name of the split.
        network: A feature network, on `device`.
        device: The device of the network.
        rows: Whether the features are needed, and not only their moments.
        expected: A prefix of the expected hash; None accepts any.

    Raises:
        ValueError: If the hash differs, or the cached file is invalid.
    """
    identity = {
        "format": FORMAT,
        "split": split,
        "fingerprint": data.open_split(split).source.fingerprint,
        "shape": list(data.shape),
        "image_key": data.image_key,
        "label_key": data.label_key,
        "features": fingerprint(network),
    }
    if changes := protocol_of(data):
        identity |= {"changes": changes, "by": library_versions()}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder(data.cache_dir) / "references"
    path = folder / f"{digest}.safetensors"
    found = None if identity["fingerprint"] is None else _read(path, identity, rows)
    # Every rank asks the others first: what one rank has, another may lack.
    everywhere = all(ranks.collect(found is not None))
    if found is None or not everywhere:
        found = _measure(data, split, network, device, rows)
        if ranks.place()[0] == 0 and identity["fingerprint"] is not None:
            _write(path, identity, found)
    if expected is not None and not found.protocol["hash"].startswith(expected.lower()):
        content = found.protocol["hash"]
        raise ValueError(
            f"expected a reference whose hash begins with {expected}, got {content} for "
            f"split {split!r} ({found.count} examples): these are not the data of the number to "
            "compare with"
        )
    return found


def class_shares(
    data: DataModule, reference: Reference, network: nn.Module, device: torch.device
) -> Tensor | None:
    """Class frequencies of the training split, which the samples are to have as well.

    Not those of the reference: from a small one they would leak information into the samples.

    Args:
        data: The data.
        reference: The reference of any split.
        network: The feature network, on `device`.
        device: The device of the network.

    Shapes:
        result (K,), or None if there are no labels.
    """
    if data.label_key is None or reference.protocol["split"] == data.train_split:
        return reference.shares
    return open_reference(data, data.train_split, network, device).shares


# Measuring ------------------------------------------------------------------------------------


def _measure(
    data: DataModule, split: str, network: nn.Module, device: torch.device, rows: bool
) -> Reference:
    """Compute the features of every example once, each rank for its part."""
    moments = _Moments(rows)
    hashes: dict[int, str] = {}  # of each chunk of images, by its global index
    classes: Counter[int] = Counter()
    for batch in data.examples(split, CHUNK):
        images = batch["image"]
        hashes[batch["batch"]] = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        classes.update(batch["label"].tolist() if "label" in batch else [])
        moments.add(batch["index"], extract(network, images.to(device)).features)
    if not moments.gather(device):
        raise ValueError(f"expected examples in split {split!r} to compare with, got none")
    protocol = {
        "data": Path(without_secrets(data.path)).name,
        "split": split,
        "examples": moments.count,
        "image shape": list(data.shape),
        **protocol_of(data),
        "hash": _content_hash(data.shape, hashes),
        "features": type(network).__name__,
        "features hash": fingerprint(network),
        "resize": getattr(network, "resize", "the network's own"),
    }
    return Reference(
        moments.count,
        moments.total.cpu().double(),
        moments.outer.cpu().double(),
        None if data.label_key is None else _class_counts(classes),
        moments.features.cpu() if rows else None,
        protocol,
    )


class _Moments:
    """The sums of f and f fᵀ over features f, first of this rank and then of all.

    Args:
        rows: Whether the features themselves are kept as well.
    """

    def __init__(self, rows: bool) -> None:
        self.rows = rows
        self.count = 0
        self.total = self.outer = self.features = torch.zeros(0)
        self._index: list[Tensor] = []
        self._features: list[Tensor] = []

    def add(self, index: Tensor, features: Tensor) -> None:
        """Add a batch of features, with the index of each example."""
        total, outer = features.sum(0), features.T @ features
        first = self.count == 0
        self.total = total if first else self.total + total
        self.outer = outer if first else self.outer + outer
        self.count += len(features)
        if self.rows:
            self._index.append(index)
            self._features.append(features.float())

    def gather(self, device: torch.device) -> bool:
        """Add up the moments of all ranks, a collective; return whether there are any examples."""
        size = max(ranks.collect(len(self.total)))
        if size and not self.count:  # more ranks than chunks: this rank has no examples
            wide = torch.float32 if device.type == "mps" else torch.float64
            self.total = torch.zeros(size, dtype=wide, device=device)
            self.outer = torch.zeros(size, size, dtype=wide, device=device)
        self.count = sum(ranks.collect(self.count))
        if self.count:
            self.total, self.outer = ranks.add_up(self.total), ranks.add_up(self.outer)
        if self.count and self.rows:
            index = torch.cat([torch.zeros(0, dtype=torch.int64), *self._index])
            none = torch.zeros(0, size, device=device)
            self.features = ranks.collect_rows(index, torch.cat([none, *self._features]))
        return self.count > 0


def _content_hash(shape: Sequence[int], hashes: dict[int, str]) -> str:
    """The hash of all images, from those of the chunks that each rank has read; a collective."""
    whole = {number: one for part in ranks.collect(hashes) for number, one in part.items()}
    content = hashlib.sha256(f"{list(shape)}".encode())
    for number in sorted(whole):
        content.update(whole[number].encode())
    return content.hexdigest()[:16]


def _class_counts(classes: Counter[int]) -> Tensor:
    """The number of examples of each class on all ranks, (K,); a collective."""
    whole = sum(ranks.collect(classes), Counter[int]())
    return torch.tensor([float(whole[label]) for label in range(max(whole, default=0) + 1)])


# The cache ------------------------------------------------------------------------------------


def _write(path: Path, identity: dict[str, Any], reference: Reference) -> None:
    """Cache a reference atomically; a cache that cannot be written costs only time."""
    tensors = {"total": reference.total, "outer": reference.outer}
    tensors |= {} if reference.shares is None else {"shares": reference.shares}
    tensors |= {} if reference.features is None else {"features": reference.features}
    try:
        write_tensors(path, tensors, {"identity": identity, "protocol": reference.protocol})
    except OSError as error:
        warn(f"the reference could not be cached in {path}: {error}")


def _read(path: Path, identity: dict[str, Any], rows: bool) -> Reference | None:
    """Read a cached reference; None if missing or without features, an error if invalid."""
    if not path.is_file():
        return None
    try:
        with open_tensors(path) as file:
            tensors = {name: file.read(name) for name in file.names}
        kept, protocol = file.about["identity"], file.about["protocol"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{error}: remove {path} to compute the reference again") from error
    if kept != identity:
        other = ", ".join(key for key in identity if kept.get(key) != identity[key])
        raise ValueError(
            f"{path} is the reference of something else ({other}): remove it to compute it again"
        )
    if rows and "features" not in tensors:
        return None
    return Reference(
        protocol["examples"],
        tensors["total"],
        tensors["outer"],
        tensors.get("shares"),
        tensors.get("features") if rows else None,
        protocol,
    )
