"""Measurements as a table: a row for each protocol, and the settings that rows share below it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from lit_diffusion.training.run.measurements import Measurement

__all__ = ["MeasurementTable", "measurement_table"]

# Settings of a single score; and settings that have a place in the row itself.
_OWN = ("neighbours", "subsets", "subset size", "splits", "error")
_SHOWN = (
    "sampler", "steps", "num_timesteps", "network calls", "samples", "guidance",
    "guidance interval", "seed", "seeds", "samples per example", "examples", "weights", "split",
    "decoder", "λ",
)  # fmt: skip


class MeasurementTable(NamedTuple):
    """A table of measurements.

    Args:
        heads: The names of the columns; the last column is the number of a protocol, from 1.
        rows: A cell for each column.
        protocols: The settings that are not in the rows.
    """

    heads: list[str]
    rows: list[list[str]]
    protocols: list[dict[str, Any]]


def measurement_table(measured: list[Measurement]) -> MeasurementTable:
    """Arrange measurements in a table, with one row for scores measured together.

    Args:
        measured: In any order; the terms of a bound are left out.

    Example:
        >>> one = Measurement("fid", 3.456, None, 10, "val", {"samples": 9, "weights": "raw"})
        >>> measurement_table([one, one._replace(name="kid", value=2.0)]).rows
        [['10', 'val', 'raw', '9 samples', '', '3.456', '2', '1']]
    """
    groups: dict[str, dict[str, Measurement]] = {}
    for one in measured:
        if not one.name.startswith("bpd_"):
            same = {key: value for key, value in one.protocol.items() if key not in _OWN}
            key = json.dumps([one.step, one.stage, same], sort_keys=True)
            groups.setdefault(key, {})[one.name] = one
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    protocols: list[dict[str, Any]] = []
    rows = []
    for group in groups.values():
        first = next(iter(group.values()))
        rest = {
            key: value
            for key, value in first.protocol.items()
            if key not in (*_OWN, *_SHOWN) and value is not None
        }
        if rest not in protocols:
            protocols.append(rest)
        rows.append(
            [
                str(first.step),
                first.stage,
                str(first.protocol.get("weights", "")),
                _how(first.protocol),
                _seeds(first.protocol),
                *(_cell(group.get(name)) for name in names),
                str(1 + protocols.index(rest)),
            ]
        )
    heads = ["step", "stage", "weights", "of", "seeds", *(n.replace("_", " ") for n in names)]
    return MeasurementTable([*heads, "protocol"], rows, protocols)


def _how(protocol: dict[str, Any]) -> str:
    """What was measured, in a few words."""
    if "samples per example" in protocol:
        chain = (
            "" if protocol.get("num_timesteps") is None else f", {protocol['num_timesteps']} steps"
        )
        low, high = protocol["λ"]
        levels = "noise level" if protocol["samples per example"] == 1 else "noise levels"
        return (
            f"{protocol['examples']} examples, {protocol['samples per example']} {levels} "
            f"each{chain}, λ in [{low:.4g}, {high:.4g}], {protocol['decoder']}"
        )
    if "split" in protocol:
        return f"split {protocol['split']}"
    found = f"{protocol['samples']} samples" if "samples" in protocol else ""
    if "sampler" in protocol:
        name = protocol["sampler"].partition("(")[0]
        calls = protocol.get("network calls")
        found += f", {name} {protocol.get('steps')}" + (f", {calls} calls" if calls else "")
    if protocol.get("guidance") is not None:
        interval = protocol.get("guidance interval")
        found += f", guidance {protocol['guidance']:g}" + (f" in λ {interval}" if interval else "")
    return found


def _seeds(protocol: dict[str, Any]) -> str:
    seeds = protocol.get("seeds", protocol.get("seed"))
    return "" if seeds is None else str(seeds).strip("[]")


def _cell(one: Measurement | None) -> str:
    if one is None:
        return ""
    return f"{one.value:.4g}" + ("" if one.error is None else f" ± {one.error:.2g}")
