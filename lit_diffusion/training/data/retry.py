"""A network that fails: known by its errors, given time to come back, never taken for bad data.

What is read over a network can fail for a moment, and then the same reading is tried again, after
1, 2, 4, … seconds. If it goes on failing, the run ends with one sentence, whatever is said about
bad examples: to skip what a broken line hides would train on other data without a word.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec.asyn

T = TypeVar("T")

ATTEMPTS = 5  # how often something is tried before the network counts as down
FIRST_WAIT = 1.0  # seconds before the second attempt; doubled before each further one

CLIENTS = {"aiohttp", "httpx", "httpcore", "requests", "urllib3"}
GONE = (404, 410)  # the server answers, and says that there is no such file


_held: list[Any] = []


class NetworkError(ConnectionError):
    """The network was down for longer than anybody wants to wait."""


def patiently(where: str, action: Callable[[], T]) -> T:
    """Return action(), tried again while the network fails.

    Args:
        where: What is read, for the message.
        action: Must do the same thing each time it is called after a failure.

    Raises:
        NetworkError: When the last attempt has failed too.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        try:
            return action()
        except Exception as error:
            if not is_of_the_network(error):
                raise
            failure = error
    reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
    raise NetworkError(
        f"expected to read {where} over the network, got {ATTEMPTS} failures in a row ({reason}); "
        "check the network, then resume from the last checkpoint"
    ) from failure


def is_of_the_network(error: BaseException) -> bool:
    """Whether an error, or what caused it, is the network's: another attempt may succeed."""
    chain = list(_causes(error))
    if any(_status(cause) in GONE for cause in chain):
        return False
    return any(
        isinstance(cause, ConnectionError | TimeoutError)
        or any(base.__module__.partition(".")[0] in CLIENTS for base in type(cause).__mro__)
        for cause in chain
    )


def prepare_to_fork() -> None:
    """Keep the processes that are forked next from closing the connections of this one.

    fsspec would close in a child what it inherits. But both processes watch their connections
    through one queue of the kernel's, and the parent would wait for its next answer for ever. So
    the open file systems are held here, and with that in the children too.
    """
    everything = gc.get_objects()
    _held[:] = [one for one in everything if issubclass(type(one), fsspec.AbstractFileSystem)]


def begin_after_fork() -> None:
    """In a process that was forked: do not wait for the parent's network thread."""
    fsspec.asyn.reset_lock()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    # Libraries wrap: a refused connection arrives as a FileNotFoundError with a cause.
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of any of the clients carries."""
    response = getattr(error, "response", None)
    return getattr(error, "status", None) or getattr(response, "status_code", None)
