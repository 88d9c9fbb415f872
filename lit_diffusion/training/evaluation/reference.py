"""The reference: feature statistics of a split of real images.

They are computed once for each data set and feature network, by all ranks together, and cached
under a hash of both. The reported hash is that of the images, so equal hashes mean that two
numbers were computed against the same pixels.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_diffusion.training import ranks
from lit_diffusion.training.data.memory import cache_folder
from lit_diffusion.training.data.module import ImageDataModule
from lit_diffusion.training.evaluation.features import extract, fingerprint
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.whole_file import replacing

__all__ = ["Reference", "class_shares", "open_reference"]

FORMAT = 1  # raised whenever the file format or the measured statistics change
CHUNK = 256  # images per batch; the hash is computed from those of the chunks


class Reference(NamedTuple):
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
    data: ImageDataModule,
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
        "image_shape": list(data.image_shape),
        "image_key": data.image_key,
        "label_key": data.label_key,
        "features": fingerprint(network),
    }
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
    data: ImageDataModule, reference: Reference, network: nn.Module, device: torch.device
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


def _measure(
    data: ImageDataModule, split: str, network: nn.Module, device: torch.device, rows: bool
) -> Reference:
    """Compute the features of every example once, each rank for its part."""
    hashes: dict[int, str] = {}
    classes: dict[int, int] = {}
    total: Any = 0
    outer: Any = 0
    count = torch.zeros(1, dtype=torch.int64, device=device)
    numbers, kept = [], []
    for batch in data.examples(split, CHUNK):
        images = batch["image"]
        hashes[batch["batch"]] = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        for label in batch["label"].tolist() if "label" in batch else []:
            classes[label] = classes.get(label, 0) + 1
        features = extract(network, images.to(device)).features
        total, outer = total + features.sum(0), outer + features.T @ features
        count += len(images)
        if rows:
            numbers.append(batch["index"])
            kept.append(features.float())
    size = max(ranks.collect(len(total) if torch.is_tensor(total) else 0))
    if not size:
        raise ValueError(f"expected examples in split {split!r} to compare with, got none")
    if not torch.is_tensor(total):  # more ranks than chunks: this rank has no examples
        wide = torch.float32 if device.type == "mps" else torch.float64
        total = torch.zeros(size, dtype=wide, device=device)
        outer = torch.zeros(size, size, dtype=wide, device=device)
        numbers.append(torch.zeros(0, dtype=torch.int64))
        kept.append(torch.zeros(0, size, device=device))
    whole = {number: one for part in ranks.collect(hashes) for number, one in part.items()}
    content = hashlib.sha256(f"{list(data.image_shape)}".encode())
    for number in sorted(whole):
        content.update(whole[number].encode())
    shares: Tensor | None = None
    if data.label_key is not None:
        parts = ranks.collect(classes)
        counts = torch.zeros(max(max(part, default=0) for part in parts) + 1)
        for part in parts:
            for label, count_of_label in part.items():
                counts[label] += count_of_label
        shares = counts
    n = int(ranks.add_up(count))
    features: Tensor | None = None
    if rows:
        features = ranks.collect_rows(torch.cat(numbers), torch.cat(kept)).cpu()
    return Reference(
        n,
        ranks.add_up(total).cpu().double(),
        ranks.add_up(outer).cpu().double(),
        shares,
        features,
        {
            "data": Path(data.path).name,
            "split": split,
            "examples": n,
            "image shape": list(data.image_shape),
            "hash": content.hexdigest()[:16],
            "features": type(network).__name__,
            "features hash": fingerprint(network),
            "resize": getattr(network, "resize", "the network's own"),
        },
    )


def _write(path: Path, identity: dict[str, Any], reference: Reference) -> None:
    """Cache a reference atomically; a cache that cannot be written costs only time."""
    from safetensors.torch import save_file

    tensors = {"total": reference.total, "outer": reference.outer}
    tensors |= {} if reference.shares is None else {"shares": reference.shares}
    tensors |= {} if reference.features is None else {"features": reference.features}
    about = {"identity": json.dumps(identity), "protocol": json.dumps(reference.protocol)}
    try:
        with replacing(path) as unfinished:
            save_file(tensors, unfinished, metadata=about)
    except OSError as error:
        warn(f"the reference could not be cached in {path}: {error}")


def _read(path: Path, identity: dict[str, Any], rows: bool) -> Reference | None:
    """Read a cached reference; None if missing or without features, an error if invalid."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        kept, protocol = json.loads(about["identity"]), json.loads(about["protocol"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a reference ({error}): remove it to compute it again"
        ) from (error)
    if kept != identity:
        other = ", ".join(key for key in identity if kept.get(key) != identity[key])
        raise ValueError(
            f"{path} is the reference of something else ({other}): remove it to compute it again"
        )
    if rows and "features" not in names:
        return None
    return Reference(
        protocol["examples"],
        tensors["total"],
        tensors["outer"],
        tensors.get("shares"),
        tensors.get("features") if rows else None,
        protocol,
    )
