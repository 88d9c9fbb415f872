"""What `fit` does without a config: a run that ends, averages its weights and shows samples."""

from __future__ import annotations

import sys

__all__ = ["MAX_STEPS", "with_default_words"]

MAX_STEPS = 1500
_CALLBACKS = (
    "--trainer.callbacks+=EMA",
    "--trainer.callbacks.decay=0.999",
    "--trainer.callbacks+=SampleGrid",
)


def with_default_words(words: list[str] | None = None) -> list[str]:
    """Add the defaults of a `fit` without `--config`, before the words that override them.

    A config says how long it trains and with which callbacks; without one, nothing would stop the
    run or sample from it. The number of steps is added unless another end is given.

    Args:
        words: The words of the command line; None means those of the process.

    Example:
        >>> with_default_words(["fit", "--trainer.max_epochs=2"])[1]
        '--trainer.callbacks+=EMA'
        >>> with_default_words(["fit", "--config", "digits.yaml"])
        ['fit', '--config', 'digits.yaml']
    """
    words = sys.argv[1:] if words is None else words
    if words[:1] != ["fit"] or any(_is(word, "--config", "-c") for word in words):
        return words
    ends = ("--trainer.max_steps", "--trainer.max_epochs", "--trainer.max_time", "--trainer")
    end = () if any(_is(word, *ends) for word in words) else (f"--trainer.max_steps={MAX_STEPS}",)
    return ["fit", *end, *_CALLBACKS, *words[1:]]


def _is(word: str, *names: str) -> bool:
    return word.split("=", 1)[0] in names
