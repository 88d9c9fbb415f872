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
SILENCE = 30.0  # seconds without one after which a worker counts as stopped
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
        # Plain memory: a process that is stopped or killed would keep a lock for ever.
        self._end = multiprocessing.RawValue("b", 0)
        self._beats = multiprocessing.RawArray("Q", number)
        self._silent: set[int] = set()  # workers that were ended for being so
        # Workers are ended before multiprocessing waits for them, which it does without limit.
        self._at_exit = Finalize(None, self.end, exitpriority=0)

    def start(self, **arguments: Any) -> Iterator[Any]:
        """Start the workers and return the iterator over what they deliver.

        Args:
            arguments: Those of the ``DataLoader``.
        """
        begin = functools.partial(_begin, self._end, self._beats)
        loader: DataLoader[Any] = DataLoader(
            num_workers=len(self._beats), worker_init_fn=begin, **arguments
        )
        before = set(multiprocessing.active_children())
        with _held(SIGNALS), _no_other_handler():  # until the workers ignore them
            stream = iter(loader)
        self.processes = [one for one in multiprocessing.active_children() if one not in before]
        self.processes.sort(key=lambda process: process.pid or 0)
        threading.Thread(target=self._listen, daemon=True).start()
        return stream

    def next(self, stream: Iterator[Any]) -> Any:
        """Return what the workers deliver next, however long that takes, if all are alive.

        Args:
            stream: From `start`.

        Raises:
            OSError: If one of them has ended, or has given no sign of life for a while.
        """
        try:
            return next(stream)
        except (RuntimeError, OSError, EOFError) as error:  # torch's and multiprocessing's
            self._raise_if_dead(error)
            raise

    def _raise_if_dead(self, error: Exception) -> None:
        # A worker that is killed closes its connections a moment before it has ended.
        deadline = time.monotonic() + BEAT
        while all(one.is_alive() for one in self.processes) and time.monotonic() < deadline:
            time.sleep(0.01)
        for number, process in enumerate(self.processes):
            process.join(BEAT if number in self._silent else 0)
            if process.is_alive():
                continue
            why = f"which has ended with code {process.exitcode}; if it was killed, memory may "
            why += "have run out: lower data.num_workers, and"
            if number in self._silent:
                why = f"got no sign of life for {SILENCE:g} seconds: it has been stopped, or its "
                why += "machine hangs;"
            raise OSError(
                f"expected a batch from data worker {number} (process {process.pid}), {why} "
                "resume from the last checkpoint"
            ) from error

    def ask_to_end(self) -> None:
        """Let workers end that do not read what the loader tells them, after some seconds."""
        self._end.value = 1

    def end(self) -> None:
        """Ask the workers to end, and end those that do not, such as stopped ones."""
        self.ask_to_end()
        deadline = time.monotonic() + BEAT + GRACE + 1
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        left = [process for process in self.processes if process.is_alive()]
        for process in left:
            process.kill()
        for process in left:
            process.join()
        self.processes = []
        self._at_exit.cancel()

    def _listen(self) -> None:
        """End workers that give no sign of life: the parent may wait for one without limit."""
        begun = time.monotonic()
        while not self._end.value:
            starting = {k for k, beat in enumerate(self._beats) if not beat}
            if time.monotonic() - begun > START:
                starting = set()
            silent = self._silent_for(SILENCE) - starting
            # Once more: a job that was stopped as a whole, and goes on, has to find its pulse.
            silent &= self._silent_for(5 * BEAT) if silent else set()
            for number in silent:
                if not self._end.value and number < len(self.processes):
                    self._silent.add(number)
                    self.processes[number].kill()

    def _silent_for(self, seconds: float) -> set[int]:
        """Wait, and return the workers that gave no sign of life meanwhile."""
        before, begun = list(self._beats), time.monotonic()
        while time.monotonic() - begun < seconds and not self._end.value:
            time.sleep(min(BEAT, seconds))
        if time.monotonic() - begun > seconds + 2 * BEAT:
            return set()  # this process was stopped as well
        return {k for k, beat in enumerate(self._beats) if beat == before[k]}


def _begin(end: Any, beats: Any, number: int) -> None:
    """Begin a worker: in its main thread, before it reads anything."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_watch, args=(end, beats, number), daemon=True).start()


def _watch(end: Any, beats: Any, number: int) -> None:
    parent = multiprocessing.parent_process()
    while not end.value:
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
def _no_other_handler() -> Iterator[None]:
    """Keep torch from raising an error at the death of a worker wherever the parent is just then.

    It could be writing a checkpoint. The death is found with the next batch.
    """
    main = threading.current_thread() is threading.main_thread()
    if not (main and hasattr(signal, "SIGCHLD")):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
