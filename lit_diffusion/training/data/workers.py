"""Worker processes: what they leave to their parent, and when they end.

A job is told to leave by a signal, and whoever sends it (a terminal, `timeout`, systemd, SLURM)
often sends it to every process of the job. The parent then finishes its step and saves, for which
it needs its workers: so these ignore the signal. In return they must never outlive their parent.
A thread of each worker watches it, and ends the worker once the parent is gone, however that came
about, or once it has asked the workers to end and the worker is busy with something else.

The same thread counts, as a sign of life: a worker that was stopped counts no further.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader

BEAT = 1.0  # seconds between two signs of life
SILENCE = 30  # seconds without one after which a worker counts as stopped
START = 300.0  # seconds in which a worker may begin, for which it may have to import everything
GRACE = 1.0  # seconds in which a worker that was asked to end may do so by itself

#: Left to the parent: what ends a job early, see `LastCheckpoint`, and Ctrl-C.
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]


class Workers:
    """The worker processes of one loader.

    Args:
        number: How many.
    """

    def __init__(self, number: int) -> None:
        self.processes: list[BaseProcess] = []
        self._end = multiprocessing.Event()
        self._beats = multiprocessing.RawArray("Q", number)
        # Workers are ended before multiprocessing waits for them, which it does without limit.
        self._at_exit = Finalize(None, self.end, exitpriority=0)

    def start(self, **arguments: Any) -> Iterator[Any]:
        """Start the workers and return the iterator over what they deliver.

        Args:
            arguments: Those of the ``DataLoader``.
        """
        begin = functools.partial(_begin, self._end, self._beats)
        loader: DataLoader[Any] = DataLoader(
            num_workers=len(self._beats), worker_init_fn=begin, timeout=SILENCE, **arguments
        )
        before = set(multiprocessing.active_children())
        with _held(SIGNALS):  # until the workers ignore them
            stream = iter(loader)
        self.processes = [one for one in multiprocessing.active_children() if one not in before]
        return stream

    def ask_to_end(self) -> None:
        """Let workers end that do not read what the loader tells them, after some seconds."""
        self._end.set()

    def end(self) -> None:
        """Ask the workers to end, and end those that do not, such as stopped ones."""
        self.ask_to_end()
        deadline = time.monotonic() + BEAT + GRACE + 1
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        left = [process for process in self.processes if process.is_alive()]
        with _unreported_deaths(bool(left)):
            for process in left:
                process.kill()
            for process in left:
                process.join()
        self.processes = []
        self._at_exit.cancel()

    def next(self, stream: Iterator[Any]) -> Any:
        """Return what the workers deliver next, however long that takes, if all are alive.

        Args:
            stream: From `start`.

        Raises:
            OSError: If one of them has ended, or has given no sign of life for a while.
        """
        begun = time.monotonic()
        while True:
            before = list(self._beats)
            try:
                return next(stream)
            except RuntimeError as error:  # torch's, after so long a time or if one has ended
                late = "timed out" in str(error)
                starts = time.monotonic() - begun < START
                self._raise_if_silent([starts and not one for one in before], before, late, error)
                if not late:
                    raise

    def _raise_if_silent(
        self, starting: list[bool], before: list[int], late: bool, error: RuntimeError
    ) -> None:
        for number, process in enumerate(self.processes):
            name = f"data worker {number} (process {process.pid})"
            if not process.is_alive():
                raise OSError(
                    f"expected a batch from {name}, which has ended with code {process.exitcode}; "
                    "if it was killed, memory may have run out: lower data.num_workers, and "
                    "resume from the last checkpoint"
                ) from error
            if late and not starting[number] and before[number] == self._beats[number]:
                raise OSError(
                    f"expected a batch from {name}, got no sign of life for {SILENCE} seconds: "
                    "it has been stopped, or its machine hangs; resume from the last checkpoint"
                ) from error


def _begin(end: Any, beats: Any, number: int) -> None:
    """Begin a worker: in its main thread, before it reads anything."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_watch, args=(end, beats, number), daemon=True).start()


def _watch(end: Any, beats: Any, number: int) -> None:
    parent = multiprocessing.parent_process()
    while not end.is_set():
        beats[number] += 1
        if parent is not None:
            parent.join(BEAT)
            if not parent.is_alive():
                os._exit(1)
    time.sleep(GRACE)
    os._exit(0)


@contextlib.contextmanager
def _held(signals: list[Any]) -> Iterator[None]:
    """Hold signals back; processes that are started inside inherit this."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _unreported_deaths(some: bool) -> Iterator[None]:
    """Keep torch from reporting the death of a worker that is killed here as an accident."""
    main = threading.current_thread() is threading.main_thread()
    if not (some and main and hasattr(signal, "SIGCHLD")):
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
