"""A run folder, read back: whatever of it is there."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lit_diffusion.training.reporting.chart import Line, Points
from lit_diffusion.training.run.environment import read_sessions
from lit_diffusion.training.run.measurements import Measurement, read_measurements

__all__ = ["TRACES", "Run"]

TRACES = ("config.yaml", "metrics.csv", "checkpoints", "environment.json")  # of any run


@dataclass
class Run:
    """A run folder, read as far as it is asked for."""

    folder: Path

    @cached_property
    def columns(self) -> dict[str, Points]:
        """Of metrics.csv: name → (optimizer steps so far, value)."""
        path, found = self.folder / "metrics.csv", {}
        if not path.is_file():
            return {}
        with path.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                # A row that a kill cut short, or that is being written.
                if None in (*row, *row.values()) or not str(row.get("step")).isdigit():
                    continue
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        # Lightning counts the step that a row was logged in, from 0.
                        found.setdefault(name, []).append((int(row["step"]) + 1, _float(value)))
        return found

    @cached_property
    def configs(self) -> list[Path]:
        """The config of each session that changed it, the first first."""
        first = self.folder / "config.yaml"
        return [*([first] if first.is_file() else []), *sorted(self.folder.glob("config-*.yaml"))]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The last of them; empty if it cannot be read."""
        try:
            found = yaml.safe_load(self.configs[-1].read_text(encoding="utf-8"))
        except (IndexError, OSError, ValueError, yaml.YAMLError):
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def sessions(self) -> list[dict[str, Any]]:
        """When it ran, and on what."""
        return read_sessions(self.folder)

    @cached_property
    def measured(self) -> list[Measurement]:
        """Its numbers with their protocols."""
        return read_measurements(self.folder)

    @property
    def seen(self) -> float:
        """When it last wrote a number."""
        files = [self.folder / name for name in ("metrics.csv", "environment.json", "config.yaml")]
        times = [file.stat().st_mtime for file in files if file.is_file()]
        return times[0] if times else self.folder.stat().st_mtime

    @property
    def steps(self) -> int:
        """Optimizer steps so far, as far as they are known."""
        told = [session.get("steps") or 0 for session in self.sessions]
        return int(max([0, *told, *(points[-1][0] for points in self.columns.values())]))

    def chosen(self, keep: Callable[[str], bool], drop: str = "") -> list[Line]:
        """Lines of the columns whose name is kept, without what it begins with."""
        names = sorted(filter(keep, self.columns))
        return [Line(name.removeprefix(drop), self.columns[name]) for name in names]


def _float(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan
