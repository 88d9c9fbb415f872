"""The domains of arguments: which numbers a plug-in accepts.

A NaN passes every comparison such as `std <= 0`, and an infinite standard deviation is above 0;
both train for hours and show only in the results. So a plug-in asks here before it compares.
"""

from __future__ import annotations

import math
from numbers import Integral

__all__ = ["check_count", "check_finite"]


def check_finite(owner: object, **numbers: float | None) -> None:
    """Refuse a number that is NaN or infinite.

    Args:
        owner: The object that was given the numbers; its class is named in the message.
        **numbers: The numbers by their names; None is accepted.

    Raises:
        ValueError: If a number is not finite.

    Example:
        >>> check_finite(SigmoidWeighting(), bias=math.nan)
        Traceback (most recent call last):
        ValueError: SigmoidWeighting: bias must be a finite number, got nan.
    """
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(
                f"{type(owner).__name__}: {name} must be a finite number, got {value}."
            )


def check_count(owner: object, least: int, **numbers: int | None) -> None:
    """Refuse a number that is not an integer, or too small.

    Args:
        owner: The object that was given the numbers; its class is named in the message.
        least: The smallest value accepted.
        **numbers: The numbers by their names; None is accepted.

    Raises:
        ValueError: If a number is not an integer of at least `least`.

    Example:
        >>> check_count(SigmoidWeighting(), 1, num_timesteps=2.5)
        Traceback (most recent call last):
        ValueError: SigmoidWeighting: num_timesteps must be at least 1 and an integer, got 2.5.
    """
    for name, value in numbers.items():
        if value is not None and not (isinstance(value, Integral) and value >= least):
            raise ValueError(
                f"{type(owner).__name__}: {name} must be at least {least} and an integer, "
                f"got {value}."
            )
