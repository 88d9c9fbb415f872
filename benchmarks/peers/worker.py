"""A candidate in its own process: `python -m peers.worker MODULE TASK`, TASK as JSON.

It reports what it has built, then for each number that it reads trains that many steps and answers
with the seconds they took, and at the end of its input with its peak memory. Between two turns it
is blocked on the read. An answer is one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

from peers.task import Size, Task

MIB = 2**20


def memory(field: str) -> float:
    """MiB of this process by Linux's book: VmRSS now, VmHWM at most; elsewhere not known."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), 0.0)


class Turns:
    """The numbers of steps to train, as they are asked for, and the answers.

    Args:
        device: Waited for before and after each turn.
        asked: Where the numbers come from.
        answers: Where the answers go.
    """

    def __init__(self, device: str, asked: TextIO, answers: TextIO) -> None:
        self.device, self.asked, self.answers = device, asked, answers
        self.before = memory("VmRSS")  # with torch and the library, without the network

    def answer(self, **said: Any) -> None:
        """Tell the driver."""
        print(json.dumps(said), file=self.answers, flush=True)

    def introduce(self, package: str, size: Size, arguments: dict[str, Any]) -> None:
        """Say what will train.

        Args:
            package: The distribution whose version counts.
            size: Of the network.
            arguments: Of the network.
        """
        self.answer(
            version=f"{package} {version(package)}" if package else "",
            torch=torch.__version__,
            arguments={name: str(value) for name, value in arguments.items()},
            **size._asdict(),
        )

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __iter__(self) -> Iterator[int]:
        """Numbers of steps; a turn lasts until the next number is asked for."""
        while line := self.asked.readline():
            since = self._now()
            yield int(line)
            self.answer(seconds=self._now() - since)

    def peak(self) -> float:
        """MiB that training took at most: on CUDA of the GPU, else beyond the imports."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / MIB
        return memory("VmHWM") - self.before


def main() -> None:
    """Run one contestant."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints does not stand among the answers
    name, given = sys.argv[1:]
    words = json.loads(given)
    for field in ("shape", "channels", "attention"):
        words[field] = tuple(words[field])
    task = Task(**words)
    try:
        contestant = importlib.import_module(f"peers.{name}")
    except ModuleNotFoundError as error:
        print(json.dumps({"missing": error.name}), file=answers, flush=True)
        return
    # Optimizers load this at their first step; here, so that it does not count as their memory.
    importlib.import_module("torch._dynamo")
    turns = Turns(task.device, sys.stdin, answers)
    contestant.train(task, turns)
    turns.answer(peak_mib=turns.peak())


if __name__ == "__main__":
    main()
