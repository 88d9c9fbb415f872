"""Shared by the benchmarks of speed: alternating measurements, the machine, the table, the JSON.

No machine is ever quiet, so nothing is timed alone: the candidates alternate, in a new random
order in each round, and the result is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import lit_diffusion.nn

CONFIGS = Path(__file__).parents[1] / "configs"


def arguments(
    description: str | None, seconds: float = 60.0, device: bool = True
) -> argparse.ArgumentParser:
    """A parser with what all these scripts take.

    Args:
        description: The script's docstring.
        seconds: How long one case may take, unless said otherwise.
        device: Whether it matters where it runs.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    if device:
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=seconds, help="at most, for each case")
    parser.add_argument("--json", type=Path, default=None, help="also write the results here")
    return parser


def machine(device: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What the numbers depend on: the device, its threads and the versions."""
    found = {"device": _device_name(device), "python": platform.python_version()}
    if device == "cpu":
        found["threads"] = str(torch.get_num_threads())
    for package in ("torch", "lightning", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usual_config(device: str) -> Path:
    """The experiment whose network is measured if none is named, one made for the device."""
    return CONFIGS / ("cifar10.yaml" if device.startswith("cuda") else "digits.yaml")


def network_of(config: Path) -> nn.Module:
    """The network of an experiment, as large as there, with weights that say something.

    Args:
        config: An experiment in configs/, with a network of lit_diffusion.nn.
    """
    given = yaml.safe_load(config.read_text())
    network = given["model"]["network"]
    torch.manual_seed(0)
    made = getattr(lit_diffusion.nn, network["class_path"])(
        shape=tuple(given["data"]["shape"]), **network["init_args"]
    )
    for parameter in made.parameters():
        if not parameter.any():  # what starts at zero would answer zero
            nn.init.normal_(parameter, std=0.02)
    return made


class Echo(nn.Module):
    """Answers at once, in a network's place: what is left is what surrounds a network.

    Args:
        shape: The network's.
        num_classes: The network's.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int | None) -> None:
        super().__init__()
        self.shape = shape
        self.num_classes = num_classes
        self.one = nn.Parameter(torch.ones(()))  # by which it is known where the model is

    def forward(self, z: Tensor, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        """One multiplication."""
        return self.one * z


def count_calls(network: nn.Module, action: Callable[[], Any]) -> int:
    """How often an action calls the network, by a forward hook; before it is compiled."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = network.register_forward_hook(count)
    try:
        action()
    finally:
        hook.remove()
    return calls


def synchronize(device: str) -> None:
    """Wait until the device has finished."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def take_turns(
    candidates: Mapping[str, Callable[[], Any]],
    seconds: float,
    device: str = "cpu",
    warmup: int = 2,
    rounds: int = 1000,
    least: int = 3,
) -> dict[str, list[float]]:
    """Milliseconds of each candidate in each round, as many rounds as there is time for.

    Args:
        candidates: What is timed, by name.
        seconds: When to stop, warm-up included, unless there are fewer than `least` rounds.
        device: Waited for before and after each turn.
        warmup: Rounds that do not count.
        rounds: At most.
        least: At least, whatever the time.
    """
    start, order = time.perf_counter(), random.Random(0)
    names, found = list(candidates), {name: [] for name in candidates}
    for done in range(-warmup, rounds):
        if done >= least and time.perf_counter() - start > seconds:
            break
        order.shuffle(names)
        for name in names:
            synchronize(device)
            since = time.perf_counter()
            candidates[name]()
            synchronize(device)
            if done >= 0:
                found[name].append((time.perf_counter() - since) * 1e3)
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; the keys of the first row are the columns."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_text(row[c]) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)


def report(
    title: str, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path | None
) -> dict[str, Any]:
    """Print a title, the machine and the table; write all of it as JSON if a path is given."""
    print(f"\n{title}\n{', '.join(f'{k} {v}' for k, v in found.items())}\n")
    print(table(rows), flush=True)
    result = {"title": title, "machine": dict(found), "rows": [dict(row) for row in rows]}
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
    return result
