"""Randomness without state: every random number is a pure function of what it is for.

A step's noise is keyed by (seed, step, micro-batch, rank), validation noise by the example's
index, a sample's noise by its global index. A checkpoint then needs no random state, a killed
run continues bit for bit, no two ranks share noise, and neither the batch size nor the number
of devices changes a validation loss or a picture.
"""

from __future__ import annotations

import functools
import hashlib

import torch

__all__ = ["fraction", "generators", "mix", "reseed"]

_MASK = (1 << 64) - 1


def mix(*keys: int | str) -> int:
    """A well-mixed 64-bit number from keys: SplitMix64, chained.

    Args:
        *keys: Integers, and words that keep one purpose apart from another.

    References:
        Steele, Lea & Flood (2014), Fast Splittable Pseudorandom Number Generators, OOPSLA.

    Example:
        >>> mix(0, "noise", 1) == mix(0, "noise", 1), mix(0, "noise", 1) == mix(0, "noise", 2)
        (True, False)
    """
    state = 0
    for key in keys:
        number = _number(key) if isinstance(key, str) else key
        state = (state ^ number) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


@functools.cache
def _number(word: str) -> int:
    """64 bits of the whole word: "bound 10" and "bound 100" share no noise."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def fraction(*keys: int | str) -> float:
    """A uniform number in [0, 1) from keys.

    Args:
        *keys: As for `mix`.

    Example:
        >>> 0 <= fraction(0, "offset", 7) < 1
        True
    """
    return (mix(*keys) >> 11) / (1 << 53)


def reseed(device: torch.device, *keys: int | str) -> None:
    """Seed the global generators of the CPU and of `device`, at the cost of a microsecond.

    Args:
        device: Where the step's noise, label drops and dropout are sampled.
        *keys: As for `mix`.

    Example:
        >>> reseed(torch.device("cpu"), 0, "step", 3)
        >>> a = torch.rand(2)
        >>> reseed(torch.device("cpu"), 0, "step", 3)
        >>> torch.equal(a, torch.rand(2))
        True
    """
    seed = mix(*keys) >> 1  # torch takes 63 bits on every device
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def generators(seed: int, purpose: str, indices: list[int]) -> list[torch.Generator]:
    """One CPU generator for each example, seeded by its index.

    Args:
        seed: The run's seed.
        purpose: A word that separates these random numbers from others.
        indices: Global index of each example.

    Example:
        >>> [g.initial_seed() for g in generators(0, "sample", [5])] == [
        ...     g.initial_seed() for g in generators(0, "sample", [4, 5])
        ... ][1:]
        True
    """
    return [torch.Generator().manual_seed(mix(seed, purpose, i) >> 1) for i in indices]
