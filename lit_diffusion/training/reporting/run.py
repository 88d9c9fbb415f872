"""Read a run folder: its columns, configs, sessions and measurements, as far as they exist."""

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

__all__ = ["Run"]


@dataclass
class Run:
    """A run folder; each file is read when it is first used."""

    folder: Path

    @cached_property
    def columns(self) -> dict[str, Points]:
        """The columns of metrics.csv: name → (optimizer steps so far, value)."""
        path = self.folder / "metrics.csv"
        found: dict[str, Points] = {}
        if not path.is_file():
            return {}
        with path.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                # A row cut short by a kill, or still being written.
                if None in (*row, *row.values()) or not str(row.get("step")).isdigit():
                    continue
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        # Lightning counts the step that a row was logged in, from 0.
                        found.setdefault(name, []).append((int(row["step"]) + 1, _float(value)))
        return found

    @cached_property
    def configs(self) -> list[Path]:
        """The config of each session that changed it, oldest first."""
        first = self.folder / "config.yaml"
        return [*([first] if first.is_file() else []), *sorted(self.folder.glob("config-*.yaml"))]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The latest config; empty if it cannot be read."""
        try:
            found = yaml.safe_load(self.configs[-1].read_text(encoding="utf-8"))
        except (IndexError, OSError, ValueError, yaml.YAMLError):
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def sessions(self) -> list[dict[str, Any]]:
        """The sessions of the run: when, and on which machine."""
        return read_sessions(self.folder)

    @cached_property
    def measured(self) -> list[Measurement]:
        """The measurements with their protocols."""
        return read_measurements(self.folder)

    @property
    def seen(self) -> float:
        """When metrics.csv (or else the next file) was last written, as a Unix time."""
        files = [self.folder / name for name in ("metrics.csv", "environment.json", "config.yaml")]
        times = [file.stat().st_mtime for file in files if file.is_file()]
        return times[0] if times else self.folder.stat().st_mtime

    @property
    def steps(self) -> int:
        """Optimizer steps so far, 0 if unknown."""
        known = [session.get("steps") or 0 for session in self.sessions]
        return int(max([0, *known, *(points[-1][0] for points in self.columns.values())]))

    def chosen(self, keep: Callable[[str], bool], drop: str = "") -> list[Line]:
        """The columns whose names `keep` accepts, as lines; the prefix `drop` is removed."""
        names = sorted(filter(keep, self.columns))
        return [Line(name.removeprefix(drop), self.columns[name]) for name in names]


def _float(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan
