"""Retry a read when the network fails, and never mistake a network failure for bad data.

A read over the network may fail for a moment; it is then repeated after 1, 2, 4, … seconds. If it
keeps failing, the run ends with an error, even where bad examples may be skipped: to skip what
cannot be reached would silently train on other data.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec  # type: ignore[import-untyped]
import fsspec.asyn  # type: ignore[import-untyped]
import fsspec.config  # type: ignore[import-untyped]

from lit_diffusion.registry import subclasses
from lit_diffusion.training.run.secrets import without_secrets

T = TypeVar("T")

ATTEMPTS = 5  # reads before the network counts as down
SILENCE = 30.0  # seconds without a byte after which an attempt has failed
FIRST_WAIT = 1.0  # seconds before the second attempt; doubled before each further one

CLIENTS = {"aiohttp", "httpx", "httpcore", "requests", "urllib3"}
GONE = (404, 410)  # the server answers that there is no such file


class NetworkError(ConnectionError):
    """The network kept failing."""


def patiently(where: str, action: Callable[[], T]) -> T:
    """Return action(), repeated while the network fails.

    Args:
        where: What is read, for the message.
        action: Reads it; must do the same each time it is called after a failure.

    Raises:
        NetworkError: If the last attempt fails too.
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
    reason = without_secrets(" ".join(f"{type(failure).__name__}: {failure}".split()))[:200]
    raise NetworkError(
        f"expected to read {without_secrets(where)} over the network, got {ATTEMPTS} failures in "
        f"a row ({reason}); check the network, then resume from the last checkpoint"
    ) from failure


def server_options() -> dict[str, Any]:
    """Return the options with which ``fsspec`` and ``datasets`` read from servers."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    return {"client_kwargs": {"timeout": timeout}}


def limit_silence() -> None:
    """Let every read over HTTP fail if the server falls silent, and leave repetitions to us.

    By default a read may take five minutes in all, which ends slow ones, and ``datasets`` repeats
    each twenty times.
    """
    import datasets  # type: ignore[import-untyped]

    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
    datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
    options = fsspec.config.conf.setdefault("http", {})  # a user's own come first
    options.setdefault("client_kwargs", {}).setdefault(
        "timeout", server_options()["client_kwargs"]["timeout"]
    )


def is_of_the_network(error: BaseException) -> bool:
    """Whether an error or its cause is a network failure, so that another attempt may succeed.

    Args:
        error: The error.
    """
    chain = list(_causes(error))
    if any(_status(cause) in GONE for cause in chain):
        return False
    return any(
        isinstance(cause, ConnectionError | TimeoutError)
        or any(base.__module__.partition(".")[0] in CLIENTS for base in type(cause).__mro__)
        for cause in chain
    )


def close_connections() -> None:
    """Close this process's connections, before it is forked; the next read opens new ones.

    fsspec caches its file systems, and drops the inherited ones in a forked child. The child
    would close their connections; but both processes watch these through one queue of the kernel,
    and the parent would then wait for ever for its next answer.
    """
    if fsspec.asyn.iothread[0] is None:
        return  # fsspec has used no network
    base = fsspec.AbstractFileSystem
    for kind in (base, *subclasses(base)):
        kind.clear_instance_cache()
    # The network thread holds the last request for a moment; let it come round once.
    fsspec.asyn.sync(fsspec.asyn.get_loop(), asyncio.sleep, 0)
    gc.collect()  # file systems are reference cycles, which the child must not collect


def begin_after_fork() -> None:
    """In a forked process: do not wait for the network thread, which lives in the parent only."""
    fsspec.asyn.reset_lock()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    # Libraries wrap: a refused connection arrives as a FileNotFoundError with a cause.
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of any of the clients."""
    response = getattr(error, "response", None)
    return getattr(error, "status", None) or getattr(response, "status_code", None)
