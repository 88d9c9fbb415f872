"""The start-up time of each command: wall clock and processor time, alternating, and the imports.

    python benchmarks/startup.py [--rounds 5] [--only pass "import torch"] [--seconds 300]
        [--json FILE]

Our commands are compared with what they cannot avoid: Python, torch, Lightning, and the command
line of Lightning's own demo, a LightningCLI with one layer and random data; ratios are to the last
one's `fit --help` in the same round. Each is a separate process; files are in the system's cache,
as in the second run of a command. Then the ten most expensive packages that `lit-diffusion fit`
imports, by `python -X importtime`: including all they import themselves, their own files alone,
and the package that imported them first.
"""

from __future__ import annotations

import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measuring import CONFIGS, arguments, machine, ratio, report, table, take_turns

DEMO = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

LightningCLI(BoringModel, BoringDataModule)
"""
LIGHTNING = "LightningCLI fit --help"
FIT = "import lit_diffusion.training.commands.fit"  # what `lit-diffusion fit` imports
CONFIG = str(CONFIGS / "digits.yaml")


def commands(demo: str) -> dict[str, list[str]]:
    """What is timed, by name: the words after `python`."""
    ours = ["-m", "lit_diffusion"]
    statements = ("pass", "import torch", "import lightning.pytorch", "import lit_diffusion")
    maths = "from lit_diffusion import *"
    return {
        **{statement: ["-c", statement] for statement in statements},
        maths: ["-c", maths],
        FIT: ["-c", FIT],
        "LightningCLI --help": [demo, "--help"],
        LIGHTNING: [demo, "fit", "--help"],
        "lit-diffusion --version": [*ours, "--version"],
        "lit-diffusion --help": [*ours, "--help"],
        "lit-diffusion plugins": [*ours, "plugins"],
        "lit-diffusion objective --help": [*ours, "objective", "--help"],
        "lit-diffusion objective": [*ours, "objective", "--config", CONFIG],
        "lit-diffusion sample --help": [*ours, "sample", "--help"],
        "lit-diffusion fit --help": [*ours, "fit", "--help"],
    }


def waiting(words: Sequence[str], used: list[tuple[float, float]]) -> Callable[[], None]:
    """Run a process to its end, and note its time on the processor, user's and system's, in s."""

    def run() -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append((after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime))

    return run


def imports(statement: str) -> list[dict[str, Any]]:
    """The packages that a statement imports, the most expensive first.

    Args:
        statement: Python code, run under `-X importtime`.
    """
    words = [sys.executable, "-X", "importtime", "-c", statement]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    lines = re.findall(r"^import time: +(\d+) \| +(\d+) \|( +)(\S+)$", done.stderr, re.MULTILINE)
    found: dict[str, dict[str, Any]] = {}
    above: list[tuple[int, str]] = []  # who is importing, from the outside in
    for own, whole, indent, module in reversed(lines):  # a module is listed after its imports
        depth, package = len(indent), module.partition(".")[0]
        while above and above[-1][0] >= depth:
            above.pop()
        row = found.setdefault(package, {"package": package, "ms": 0.0, "own ms": 0.0, "by": ""})
        row["own ms"] += int(own) / 1e3
        if all(name.partition(".")[0] != package for _, name in above):
            row["ms"] += int(whole) / 1e3
            row["by"] = above[-1][1] if above else "–"  # the last one read is the first imported
        above.append((depth, module))
    return sorted(found.values(), key=lambda row: -row["ms"])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, and print two tables."""
    parser = arguments(__doc__, seconds=300, device=False)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each command, at most")
    parser.add_argument("--only", nargs="+", choices=list(commands("")), help="not all of them")
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo.py"
        demo.write_text(DEMO)
        timed = commands(str(demo))
        if chosen.only is not None:
            timed = {name: timed[name] for name in chosen.only}
        used: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
        runs = {name: waiting(words, used[name]) for name, words in timed.items()}
        wall = take_turns(
            runs, chosen.seconds, warmup=1, rounds=chosen.rounds, least=min(3, chosen.rounds)
        )
    rows = [
        {
            "command": name,
            "seconds": statistics.median(wall[name]) / 1e3,
            "min": min(wall[name]) / 1e3,
            "max": max(wall[name]) / 1e3,
            "relative to Lightning's": ratio(wall[name], wall[LIGHTNING])
            if LIGHTNING in wall
            else None,
            "user": statistics.median(user for user, _ in used[name][-len(wall[name]) :]),
            "system": statistics.median(system for _, system in used[name][-len(wall[name]) :]),
            "rounds": len(wall[name]),
        }
        for name in timed
    ]
    result = report("Start-up", machine("cpu"), rows, None)
    result["imports"] = imports(FIT)
    print(f"\n`{FIT}`, the ten most expensive packages\n\n{table(result['imports'][:10])}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
