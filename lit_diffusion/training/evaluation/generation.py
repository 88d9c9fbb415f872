"""Generation: any number of samples, each image the same on one device or many.

Image i is a function of (weights, seed, i, sampling settings) alone. The indices are cut into
batches of a fixed size, and whole batches are assigned to the ranks, so even results that depend
on the batch size in their last bits are the same for any number of ranks. To keep all ranks busy,
choose a batch size well below num_samples / ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.models import SamplingModel
from lit_diffusion.samplers import Sampler
from lit_diffusion.training.step import randomness

__all__ = ["Generation", "SampleBatch", "to_bytes"]


def to_bytes(x: Tensor) -> Tensor:
    """Round images in [−1, 1] to bytes, k = (x + 1) · 127.5; values outside are clamped.

    Args:
        x: Images in [−1, 1].

    Shapes:
        x and result (B, C, H, W).

    Example:
        >>> to_bytes(torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0]))
        tensor([  0,   0, 128, 255, 255], dtype=torch.uint8)
    """
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclasses.dataclass(frozen=True)
class SampleBatch:
    """A batch of generated images with their indices.

    Shapes:
        index (B,), int64; images (B, C, H, W), uint8.
    """

    index: Tensor
    images: Tensor


@dataclasses.dataclass(frozen=True)
class Generation:
    """How many images to generate, and with which sampler, guidance and seed.

    Args:
        num_samples: Number of images, at least 1.
        sampler: The sampler; None for the model's own.
        guidance: Scale of classifier-free guidance, 1 for none.
        guidance_interval: Guide only where low ≤ λ ≤ high; None for everywhere.
        seed: Image i is a function of (seed, i).
        batch_size: Images per batch, at least 1.

    Raises:
        ValueError: If a number is below 1.
    """

    num_samples: int
    sampler: Sampler | None = None
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1:
            raise ValueError(
                "num_samples and batch_size must be at least 1, "
                f"got {self.num_samples} and {self.batch_size}."
            )

    def sample(
        self,
        model: SamplingModel,
        shares: Tensor | None = None,
        rank: int = 0,
        world: int = 1,
        rows: Callable[[int, int], dict[str, Tensor]] | None = None,
    ) -> Iterator[SampleBatch]:
        """Generate the batches of this rank, as images.

        Args:
            model: The model.
            shares: Relative frequency of each class; None for equal frequencies.
            rank: This process, from 0.
            world: Number of processes.
            rows: The conditions of a batch, as for `floats`.

        Shapes:
            shares (K,).
        """
        for index, x in self.floats(model, shares, rank, world, rows):
            yield SampleBatch(index, to_bytes(x))

    def floats(
        self,
        model: SamplingModel,
        shares: Tensor | None = None,
        rank: int = 0,
        world: int = 1,
        rows: Callable[[int, int], dict[str, Tensor]] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Generate the batches of this rank, as the indices and what the model samples.

        Args:
            model: The model.
            shares: Relative frequency of each class; None for equal frequencies.
            rank: This process, from 0.
            world: Number of processes.
            rows: The conditions of a batch, from its number and size, such as `RowConditions`, for
                a model that has more than classes.

        Shapes:
            shares (K,); index (B,); x (B, C, *).
        """
        for number, index in enumerate(torch.arange(self.num_samples).split(self.batch_size)):
            if number % world != rank:
                continue
            classes = model.num_classes
            cond = {} if rows is None else rows(number, len(index))
            label = cond.pop("label", None)
            if label is None and classes is not None:
                label = labels(index, classes, shares, self.seed)
            x = model.sample(
                len(index),
                randomness.generators(self.seed, "sample", index.tolist()),
                label,
                sampler=self.sampler,
                guidance=self.guidance,
                guidance_interval=self.guidance_interval,
                cond=cond,
            )
            yield index, x

    def protocol(self, model: SamplingModel) -> dict[str, Any]:
        """The sampling settings that a score depends on, as plain data.

        Args:
            model: The model.
        """
        sampler = model.sampler_in_range(self.sampler)
        guided = self.guidance != 1
        precision = next(model.parameters()).dtype
        classes = "none" if model.num_classes is None else "shares of the training split"
        if model.conditions:
            classes = f"of the training examples, as {', '.join(model.conditions)}"
        return {
            "samples": self.num_samples,
            "sampler": repr(sampler),
            "steps": sampler.steps,
            # A guided denoiser evaluates the network with and without the condition, everywhere.
            "network calls": sampler.calls * (2 if guided else 1),
            "guidance": self.guidance if guided else None,
            "guidance interval": list(self.guidance_interval)
            if guided and self.guidance_interval
            else None,
            "classes": classes,
            "seed": self.seed,
            "batch size": self.batch_size,
            "precision": str(precision).removeprefix("torch."),
            "bytes": "clamped and rounded" if model.clip_denoised else "rounded, then clamped",
        }


def labels(index: Tensor, classes: int, shares: Tensor | None, seed: int) -> Tensor:
    """The class of each image, from its index, with the given class frequencies for any number.

    The golden-ratio sequence, a low-discrepancy sequence on [0, 1), meets the frequencies evenly.

    Args:
        index: Indices of the images.
        classes: Number of classes of the model.
        shares: Relative frequency of each class; None for equal frequencies.
        seed: Determines where the sequence starts.

    Shapes:
        index (B,); shares (K,) with K ≤ classes; result (B,), int64.

    Example:
        >>> labels(torch.arange(1000), 3, torch.tensor([1.0, 0.0, 3.0]), seed=0).bincount()
        tensor([251,   0, 749])
    """
    if shares is None or len(shares) > classes:
        shares = torch.ones(classes)
    edges = shares.double().cumsum(0) / shares.double().sum()
    start = randomness.fraction(seed, "labels")
    place = (start + index.double() * ((5**0.5 - 1) / 2)) % 1
    found = torch.searchsorted(edges, place, right=True)
    return found.clamp(max=int(shares.nonzero().max()))
