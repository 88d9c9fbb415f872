"""How floats are normalised: as the model was trained, or by what the training split says.

The statistics are those of a whole pass over the training split, in float64, per channel over all
examples and positions. They are measured once, when a run begins, and from then on are part of the
model: a resumed run, samples and evaluations take them from there, whatever data they are given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_diffusion.normalization import Normalization
from lit_diffusion.training.data.batching.memory import MemoryMap
from lit_diffusion.training.data.decoding.split import Split, chunks, sift
from lit_diffusion.training.run.messages import inform, warn

if TYPE_CHECKING:
    from lit_diffusion.training.data.module import DataModule

CHUNK = 1024  # examples that are looked at together


class Moments:
    """Mean, sum of squared deviations and range of each channel, of examples in any portions.

    Portions are merged by their means (Chan et al. 1979), so that a mean far from 0 costs no
    digits.

    Args:
        channels: Number of channels.

    Example:
        >>> moments = Moments(1)
        >>> moments.add(torch.tensor([[[1.0, 2.0]]]))
        >>> moments.add(torch.tensor([[[3.0, 6.0]]]))
        >>> moments.mean, (moments.squares / moments.count).sqrt()
        (tensor([3.], dtype=torch.float64), tensor([1.8708], dtype=torch.float64))
    """

    def __init__(self, channels: int) -> None:
        self.examples = self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)
        self.low = torch.full((channels,), torch.inf, dtype=torch.float64)
        self.high = -self.low

    def add(self, x: Tensor) -> None:
        """Add examples.

        Args:
            x: Some examples.

        Shapes:
            x (B, C, *).
        """
        values = x.double().transpose(0, 1).flatten(1)
        other = Moments(len(values))
        other.examples, other.count = len(x), values.shape[1]
        other.mean = values.mean(1)
        other.squares = (values - other.mean[:, None]).square().sum(1)
        other.low, other.high = values.amin(1), values.amax(1)
        self.merge(other)

    def merge(self, other: Moments) -> None:
        """Add the examples of another.

        Args:
            other: Of the same channels.
        """
        if other.count == 0:
            return
        count, apart = self.count + other.count, other.mean - self.mean
        self.squares += other.squares + apart.square() * (self.count * other.count / count)
        self.mean += apart * (other.count / count)
        self.low, self.high = self.low.minimum(other.low), self.high.maximum(other.high)
        self.examples, self.count = self.examples + other.examples, count


def settle(
    data: DataModule,
    model: Any,
    split: Split | None,
    memory: MemoryMap | None,
    rank: int,
    world: int,
) -> Normalization | None:
    """The normalisation of a model, which is measured for one that has none; a collective.

    Args:
        data: The data.
        model: A `LitDiffusion`, any other module, or None.
        split: The training split; None if the model is evaluated.
        memory: The same in memory, None if it is streamed.
        rank: This rank.
        world: Number of ranks.

    Raises:
        ValueError: If the model has been trained with another kind of data, or has a normalisation
            and the data ask for none, or the reverse.
    """
    found: Normalization | None = getattr(model, "normalization", None)
    if getattr(model, "kind", data.kind) != data.kind:
        raise ValueError(
            f"expected data of kind {model.kind}, with which the model was trained, got data.kind "
            f"{data.kind}; set data.kind to {model.kind}, or use a model that was trained on such "
            "data"
        )
    if found is not None and data.normalize is None:
        raise ValueError(
            "expected data to normalise, as the model was trained, got data.normalize null; leave "
            "it out, or start a new run"
        )
    if found is None and data.normalize is not None:
        if split is None:
            raise ValueError(
                f"expected a model that keeps how its data were normalised, for data.normalize "
                f"{data.normalize}, got one without; set data.normalize to null, or train it on "
                "such data"
            )
        found = measure(data.normalize, split, memory, rank, world)
        if hasattr(model, "normalization"):
            model.normalization = found
    return found


def measure(
    method: str, split: Split, memory: MemoryMap | None, rank: int, world: int
) -> Normalization:
    """Measure what normalises the examples of a split; a collective.

    Bad examples are left out; they are reported where they are read for training.

    Args:
        method: `mean_std` or `min_max`.
        split: The training split.
        memory: The same in memory, None if it is streamed.
        rank: This rank, which reads its share of a stream.
        world: Number of ranks.

    Raises:
        ValueError: If no example can be used.
    """
    moments = Moments(split.decoder.shape[0])
    if memory is not None:
        (examples_in_memory,) = memory.images  # one array: only pictures have buckets
        for part in examples_in_memory.split(CHUNK):
            moments.add(part)
    else:
        for number, examples in enumerate(chunks(split.source.head(None), CHUNK)):
            if number % world == rank:
                kept, _ = sift(split.decode(examples))
                if kept:
                    moments.add(split.decoder.collate(kept)["image"])
        if world > 1:
            moments = _together(moments, world)
    if method == "mean_std":
        shift, scale = moments.mean, (moments.squares / max(1, moments.count)).sqrt()
    else:
        shift, scale = (moments.low + moments.high) / 2, (moments.high - moments.low) / 2
    # Rounding leaves a little of what is constant.
    constant = scale <= 1e-12 * moments.low.abs().maximum(moments.high.abs())
    if constant.any():
        warn(
            f"channel {', '.join(map(str, constant.nonzero()[:, 0].tolist()))} of the data is "
            f"constant in split {split.name!r}: it is shifted to 0 and not scaled."
        )
        scale = torch.where(constant, torch.ones_like(scale), scale)
    names = ("mean", "std") if method == "mean_std" else ("centre", "half range")
    told = "; ".join(
        f"{name} {_short(values)}" for name, values in zip(names, (shift, scale), strict=True)
    )
    inform(f"Data are normalised by {moments.examples:,} training examples: {told}.")
    return Normalization(shift.tolist(), scale.tolist())


def _together(mine: Moments, world: int) -> Moments:
    """The moments of all ranks, merged in their order, so that all of them get the same."""
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, mine)
    total = Moments(len(mine.mean))
    for one in found:
        total.merge(one)
    return total


def _short(values: Tensor) -> str:
    """A few numbers, in words."""
    some = [f"{value:.4g}" for value in values[:8].tolist()]
    return ", ".join(some) + (" …" if len(values) > 8 else "")
