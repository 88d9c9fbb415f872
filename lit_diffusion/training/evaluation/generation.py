"""Generation: samples in any number, image by image the same on one device or many.

Image i is a function of (weights, seed, i, how it is drawn) alone. The images are cut into batches
of a fixed size, by their numbers, and whole batches are dealt to the ranks: so even what depends
on the size of a batch in its last bits is the same whatever the number of ranks. Who wants all
ranks busy chooses a batch size well below num_samples / ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_diffusion.samplers import Sampler
from lit_diffusion.training import randomness

__all__ = ["Drawn", "Generation", "refuse_conditions", "to_bytes"]


def to_bytes(x: Tensor) -> Tensor:
    """The nearest byte of each number in [−1, 1]; what lies outside is clamped.

    Args:
        x: Images.

    Example:
        >>> to_bytes(torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0]))
        tensor([  0,   0, 128, 255, 255], dtype=torch.uint8)
    """
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Drawn(NamedTuple):
    """A batch of samples: which they are, and their bytes.

    Shapes:
        index (B,), int64; images (B, C, H, W), uint8.
    """

    index: Tensor
    images: Tensor


@dataclasses.dataclass(frozen=True)
class Generation:
    """How many images are drawn, and how.

    Args:
        num_samples: How many, at least 1.
        sampler: None means the model's own.
        guidance: Strength of classifier-free guidance, 1 for none.
        guidance_interval: Guide only for λ within; None means everywhere.
        seed: Image i is a function of (seed, i).
        batch_size: Images at a time, at least 1.

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

    def draw(
        self, model: Any, shares: Tensor | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Drawn]:
        """Draw this rank's batches.

        Args:
            model: The LitDiffusion.
            shares: How often each class is to come, in any unit; None means alike.
            rank: Which of the ranks.
            world: How many there are.

        Shapes:
            shares (K,).
        """
        for number, index in enumerate(torch.arange(self.num_samples).split(self.batch_size)):
            if number % world != rank:
                continue
            classes = model.num_classes
            x = model.sample(
                len(index),
                randomness.generators(self.seed, "sample", index.tolist()),
                None if classes is None else labels(index, classes, shares, self.seed),
                sampler=self.sampler,
                guidance=1.0 if classes is None else self.guidance,
                guidance_interval=self.guidance_interval,
            )
            yield Drawn(index, to_bytes(x))

    def protocol(self, model: Any) -> dict[str, Any]:
        """What of this a number depends on, as plain data.

        Args:
            model: The LitDiffusion.
        """
        sampler = model.walk(self.sampler)
        guided = model.num_classes is not None and self.guidance != 1
        precision = next(model.parameters()).dtype
        return {
            "samples": self.num_samples,
            "sampler": repr(sampler),
            "steps": sampler.steps,
            "network calls": count_calls(model, self),
            "guidance": self.guidance if guided else None,
            "guidance interval": list(self.guidance_interval)
            if guided and self.guidance_interval
            else None,
            "classes": "none" if model.num_classes is None else "shares of the training split",
            "seed": self.seed,
            "batch size": self.batch_size,
            "precision": str(precision).removeprefix("torch."),
            "bytes": "clamped and rounded" if model.clip_denoised else "rounded, then clamped",
        }


def labels(index: Tensor, classes: int, shares: Tensor | None, seed: int) -> Tensor:
    """The class of each image: a function of its number, in the given shares for any how-many.

    The shares are met as evenly as can be by the golden ratio's sequence, which falls into every
    part of [0, 1) in turn.

    Args:
        index: Numbers of the images.
        classes: How many classes the model knows.
        shares: How often each is to come; None means alike.
        seed: Where the sequence begins.

    Shapes:
        index (B,); shares (K,) with K ≤ classes; result (B,), int64.

    Example:
        >>> labels(torch.arange(1000), 3, torch.tensor([1.0, 0.0, 3.0]), seed=0).bincount()
        tensor([250,   0, 750])
    """
    if shares is None or len(shares) > classes:
        shares = torch.ones(classes)
    edges = shares.double().cumsum(0) / shares.double().sum()
    start = randomness.fraction(seed, "labels")
    place = (start + index.double() * ((5**0.5 - 1) / 2)) % 1
    found = torch.searchsorted(edges, place, right=True)
    return found.clamp(max=int(shares.nonzero().max()))


def refuse_conditions(model: Any) -> None:
    """Samples of a model are measured by their classes only: other conditions come from data.

    Args:
        model: The LitDiffusion.

    Raises:
        ValueError: If the model is told anything else.
    """
    if model.conditions:
        raise ValueError(
            f"Samples of a model that is told {', '.join(model.conditions)} are not measured: "
            "nothing says which of these go with sample i. Draw by `lit-diffusion predict`, and "
            "give the images to torch-fidelity."
        )


class _Zero(nn.Module):
    """Answers zero at once, in a network's place, and counts how often it was asked."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.num_classes = getattr(network, "num_classes", None)
        self.calls = 0

    def forward(self, z: Tensor, logsnr: Tensor, **cond: Any) -> Tensor:
        self.calls += 1
        return torch.zeros_like(z)


def count_calls(model: Any, generation: Generation) -> int:
    """How often the network is called for one image, guidance and all.

    Counted, not computed: on a walk of one image with a network that answers at once.

    Args:
        model: The LitDiffusion.
        generation: How images are drawn.
    """
    network = model.denoiser.network
    model.denoiser.network = zero = _Zero(network)
    try:
        one = dataclasses.replace(generation, num_samples=1, batch_size=1)
        for _ in one.draw(model):
            pass
    finally:
        model.denoiser.network = network
    return zero.calls
