"""What a run can do without: a figure or table that cannot be written costs a warning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lit_diffusion.training.run.messages import warn

__all__ = ["may_fail", "thinned"]

#: What could not be written the last time.
_failing: set[Path] = set()


@contextlib.contextmanager
def may_fail(path: Path) -> Iterator[None]:
    """Write a file without which the run continues; a warning when it fails, and no second one.

    Args:
        path: The file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "figure.png"
        >>> with may_fail(path):
        ...     _ = path.write_bytes(b"")
        >>> path.exists()
        True
    """
    try:
        yield
    except OSError as error:
        if path not in _failing:
            _failing.add(path)
            warn(f"{path} cannot be written: {error}. The run continues without it.")
    else:
        _failing.discard(path)


def thinned(steps: list[int], most: int) -> list[int]:
    """At most so many steps of a history that grows: of more, every second of the older half goes.

    Applied after each addition, it keeps the first and the newest, and the older the sparser.

    Args:
        steps: In their order.
        most: The bound, at least 2.

    Example:
        >>> thinned([1, 2, 3, 4, 5, 6], 5)
        [1, 3, 4, 5, 6]
    """
    half = len(steps) // 2
    return steps if len(steps) <= most else steps[:half:2] + steps[half:]
