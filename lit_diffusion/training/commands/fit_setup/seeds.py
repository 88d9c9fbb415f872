"""One seed for a run: what has no seed of its own follows `--seed_everything`."""

from __future__ import annotations

from typing import Any

__all__ = ["follow_seed"]


def follow_seed(config: Any) -> None:
    """Give model and data the seed of the run, unless they state their own.

    Lightning seeds with it only the first weights. The numbers are written into the config, so
    that the saved one has what was in force, and a run that is resumed or replayed from it has
    the same.

    Args:
        config: That of a command, with the seed in force; changed in place. Without one, as with
            `seed_everything: false`, the seeds are 0.

    Example:
        >>> from jsonargparse import Namespace
        >>> model, data = Namespace(seed=None), Namespace(seed=0)
        >>> follow_seed(Namespace(seed_everything=3, model=model, data=data))
        >>> model.seed, data.seed
        (3, 0)
    """
    given = config.get("seed_everything")
    seed = given if isinstance(given, int) and not isinstance(given, bool) else 0
    for group in (config.get("model"), config.get("data"), config.get("loader")):
        if group is not None and "seed" in group and group.seed is None:
            group.seed = seed
