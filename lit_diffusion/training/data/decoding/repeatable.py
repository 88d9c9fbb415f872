"""Random transforms that a resumed run repeats: seeds for each example, and a check of one's own.

A random transform is repeated exactly because torch's, Python's and NumPy's generators are seeded
before it. One of the user's that has a generator of its own, counts its calls or reads a clock
escapes that, and one that calls itself fixed but uses random numbers is never seeded: after a
resumption, or with another number of workers, the images would silently differ. So generators in
attributes are refused, and the first pictures are transformed several times and compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_diffusion.training.data.decoding.transforms import Step

PICTURES = 8  # at the beginning of each process, so that rare changes are found as well
TIMES = 4  # that each of them is transformed
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
KNOWN = ("torchvision.", "lit_diffusion.")  # their transforms have been tested


class NotRepeatableError(ValueError):
    """A transform gives different pictures where it must not; the data are not at fault."""


def _parts(transform: Any) -> Iterator[Any]:
    """A transform and those among its arguments."""
    yield transform
    for value in vars(transform).values():
        several = list(value.values()) if isinstance(value, dict) else value
        for one in several if isinstance(several, list | tuple) else [several]:
            if isinstance(one, torch.nn.Module):
                yield from _parts(one)


def is_own(transform: Any) -> bool:
    """Whether a transform, or one inside it, is of a class that the user wrote.

    Args:
        transform: The transform.
    """
    return any(not type(one).__module__.startswith(KNOWN) for one in _parts(transform))


def own_generator(transform: Any) -> str | None:
    """The attribute in which a transform keeps a generator of its own; None if it has none.

    Args:
        transform: The transform.
    """
    for part in _parts(transform):
        for name, value in vars(part).items():
            if isinstance(value, GENERATORS):
                return f"{type(part).__name__}.{name}"
    return None


def check_repeatable(step: Step, picture: Tensor) -> None:
    """Transform a picture several times and compare the results.

    Args:
        step: The transform.
        picture: Bytes, which stay what they are.

    Shapes:
        picture (C, h, w).

    Raises:
        NotRepeatableError: If a random one differs for the same seed, or another for any.
    """
    found = []
    with restored_generators():
        for time in range(TIMES):
            seed_generators(0, 0, 0 if step.random else time)
            try:
                found.append(step.apply(picture.clone()))
            except Exception:  # it fails in earnest, too, and is reported there
                return
    if all(_same(found[0], other) for other in found[1:]):
        return
    if step.random:
        raise NotRepeatableError(
            f"expected {step.name} of data.transform to give the same picture for the same state "
            "of the generators of torch, random and NumPy, got different ones: take all random "
            "numbers from these, which are seeded for each example, and keep no state"
        )
    raise NotRepeatableError(
        f"expected {step.name} of data.transform, whose attribute random is False, to give the "
        "same picture each time, got different ones: set random = True, and take all its random "
        "numbers from the generators of torch, random or NumPy"
    )


def _same(one: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def fractions(*key: int) -> tuple[float, float]:
    """Two numbers in [0, 1) that are a hash of a key.

    Args:
        key: Seed, epoch, index of the example and number of the transform.

    Example:
        >>> fractions(0, 0, 7, 0) == fractions(0, 0, 7, 0) != fractions(0, 0, 8, 0)
        True
    """
    found = hashlib.blake2b(f"place {key}".encode(), digest_size=16).digest()
    # The upper 53 bits, so that rounding to a float never gives 1.
    one, other = (int.from_bytes(found[k : k + 8], "little") >> 11 for k in (0, 8))
    return one / 2**53, other / 2**53


def seed_generators(seed: int, epoch: int, index: int) -> None:
    """Seed torch's generator of the CPU, Python's and NumPy's by a hash.

    Args:
        seed: Of the run.
        epoch: In which the example is used.
        index: Of the example.
    """
    key = hashlib.blake2b(f"transform {seed} {epoch} {index}".encode(), digest_size=8).digest()
    number = int.from_bytes(key, "little")
    torch.default_generator.manual_seed(number)  # not those of devices, which the model uses
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)  # of a list it would take ten times as long


@contextlib.contextmanager
def restored_generators() -> Iterator[None]:
    """Restore afterwards what `seed_generators` seeds."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
