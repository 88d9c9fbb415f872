"""The private parts of Lightning and its parser that are used, each with the reason.

A test of each fails clearly where an upgrade changes it.
"""

from __future__ import annotations

import functools
from typing import Any

from lit_diffusion.description import allowed_modules

__all__ = ["prefer_importable_classes"]


def prefer_importable_classes() -> None:
    """Let a bare name in a config mean the class that may be imported, where another has it too.

    jsonargparse resolves a bare name among all imported subclasses of the argument's type, and
    calls it ambiguous if two have it: diffusers has a FourierFeatures as well as we. Its setting
    `import_path_allowlist` is only asked afterwards, and there is no public way to choose the
    candidates (4.53). Two classes that may both be imported stay ambiguous.
    """
    from jsonargparse import _typehints

    find = _typehints.get_all_subclass_paths
    if hasattr(find, "__wrapped__"):  # done before
        return

    @functools.wraps(find)
    def paths(*args: Any, **kwargs: Any) -> list[str]:
        found = find(*args, **kwargs)
        allowed = tuple(f"{module}." for module in allowed_modules())
        taken = {path.rpartition(".")[2] for path in found if path.startswith(allowed)}
        return [
            path
            for path in found
            if path.startswith(allowed) or path.rpartition(".")[2] not in taken
        ]

    _typehints.get_all_subclass_paths = paths
