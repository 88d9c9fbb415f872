"""Messages to the user: what happens during a run, through the logger "lit_diffusion".

A program handles them as it handles those of any other library. Without a handler Python's
defaults hold: warnings appear on stderr and information does not. The command line shows both.
What a command was asked for goes to stdout instead.
"""

from __future__ import annotations

import logging

from lightning.pytorch.utilities import rank_zero_only

from lit_diffusion.training.run.secrets import without_secrets

__all__ = ["inform", "logger", "warn"]

#: For what each rank has to say; `inform` and `warn` are for what concerns the whole job.
logger = logging.getLogger("lit_diffusion")


def _mask(record: logging.LogRecord) -> bool:
    """Mask the secrets of addresses in a message."""
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


logger.addFilter(_mask)

_CALLER = 3  # a record names the line that calls `inform` or `warn`, not one of this file


@rank_zero_only
def inform(message: str) -> None:
    """Log information, once for all ranks of the job.

    Args:
        message: A sentence.
    """
    logger.info(message, stacklevel=_CALLER)


@rank_zero_only
def warn(message: str) -> None:
    """Log a warning, once for all ranks of the job.

    For what happens and no change of the calling code would avoid; for a mistake in that code,
    Python's `warnings` are right.

    Args:
        message: A sentence: what happened, and what follows from it.
    """
    logger.warning(message, stacklevel=_CALLER)
