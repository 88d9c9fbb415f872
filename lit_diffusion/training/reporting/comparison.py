"""Compare runs: their numbers, their curves, and the settings in which their configs differ.

Only what may be compared shares a row: measurements of one name have a row for each protocol.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lit_diffusion.training.evaluation.tables import TITLES
from lit_diffusion.training.reporting.chart import Line, chart
from lit_diffusion.training.reporting.error_curves import LastRecords, error_lines, error_table
from lit_diffusion.training.reporting.page import number, page
from lit_diffusion.training.reporting.parts import (
    Charts,
    Code,
    Fold,
    Paragraph,
    Part,
    Table,
    protocol,
)
from lit_diffusion.training.reporting.run import Run
from lit_diffusion.training.run.measurements import Measurement

__all__ = ["MISSING", "comparison_page", "config_differences", "numbers"]

MISSING = "–"
NAMES = {"bpd": "bits per dimension", **TITLES}
LOSSES = ("val/loss", "train/loss", "val/eps_mse", "train/eps_mse")
CURVES = {
    "val/loss": "Loss in validation, nats per dimension",
    "train/loss": "Loss in training, nats per dimension",
    "val/eps_mse": "ε-error in validation",
    "val/bpd": "Bits per dimension (upper bound)",
    "val/fid": "Fréchet distance",
}
CAUTION = (
    "A loss may be compared only between runs with the same weighting and schedule, an ε-error "
    "only with the same schedule, and bits per dimension and scores of samples within a row, "
    "whose runs share a protocol."
)

Rows = list[list[str]]  # a name, and a cell for each run


def numbers(runs: Mapping[str, Run]) -> Rows:
    """The state and the latest numbers of runs; measurements have a row for each protocol.

    Args:
        runs: Runs by their names.
    """
    rows = [["steps", *(f"{run.steps:,}" for run in runs.values())]]
    known = [name for name in LOSSES if any(name in run.columns for run in runs.values())]
    rows += [[name, *(_latest(run, name) for run in runs.values())] for name in known]
    return [*rows, *_measured(runs)]


def _latest(run: Run, name: str) -> str:
    if name not in run.columns:
        return MISSING
    step, value = run.columns[name][-1]
    return f"{number(value)} at step {step:.0f}"


def _measured(runs: Mapping[str, Run]) -> Iterator[list[str]]:
    found: dict[tuple[str, str], dict[str, Measurement]] = {}
    for name, run in runs.items():
        for one in run.measured:  # in the order in which they were made
            found.setdefault((one.name, _protocol(one)), {})[name] = one
    for (name, _), by_run in sorted(found.items(), key=lambda item: item[0][0]):
        cells = [_cell(by_run[run]) if run in by_run else MISSING for run in runs]
        stage = next(iter(by_run.values())).stage
        yield [f"{NAMES.get(name, name.replace('_', ' '))}, {stage}", *cells]


def _protocol(one: Measurement) -> str:
    """What must agree for two numbers to be compared: all but the weights that were measured."""
    same = {key: value for key, value in one.protocol.items() if key != "weights"}
    return json.dumps([one.stage, same], sort_keys=True)


def _cell(one: Measurement) -> str:
    error = "" if one.error is None else f" ± {number(one.error)}"
    weights = one.protocol.get("weights")
    return f"{number(one.value)}{error} at step {one.step}" + (f", {weights}" if weights else "")


# Configs -----------------------------------------------------------------------------------------


def config_differences(configs: Mapping[str, Mapping[str, Any]]) -> Rows:
    """The settings in which configs differ: the name of each, and its value in each config.

    Args:
        configs: Configs by the names of their runs.

    Example:
        >>> one = {"model": {"weighting": {"class_path": "lit_diffusion.ELBOWeighting"}}}
        >>> edm = {"class_path": "lit_diffusion.EDMWeighting", "init_args": {"mean": 2.4}}
        >>> for row in config_differences({"a": one, "b": {"model": {"weighting": edm}}}):
        ...     print(row)
        ['model.weighting', 'ELBOWeighting', 'EDMWeighting']
        ['model.weighting.mean', '–', '2.4']
    """
    flat = {name: dict(_flat(config, "")) for name, config in configs.items()}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    rows = [[key, *(one.get(key, MISSING) for one in flat.values())] for key in keys]
    return sorted(row for row in rows if len(set(row[1:])) > 1)


def _flat(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """The settings below a key: (key, value as text); a class stands for its name."""
    if isinstance(value, dict) and "class_path" in value:
        yield key, str(value["class_path"]).rpartition(".")[2]
        yield from _flat(value.get("init_args") or {}, key)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(_is_class(one) for one in value):
        seen: dict[str, int] = {}
        for one in value:  # callbacks are known by their class, not by their place
            name = one["class_path"].rpartition(".")[2]
            seen[name] = seen.get(name, 0) + 1
            copy = f" ({seen[name]})" if seen[name] > 1 else ""
            yield from _flat(one, f"{key}.{name}{copy}")
    else:
        yield key, json.dumps(value, ensure_ascii=False, default=str).strip('"')


def _is_class(value: Any) -> bool:
    return isinstance(value, dict) and "class_path" in value


# The page ----------------------------------------------------------------------------------------


def comparison_page(
    runs: Mapping[str, Run], samples: list[Part], records: Mapping[str, LastRecords]
) -> str:
    """The whole page, as HTML.

    Args:
        runs: Runs by their names.
        samples: Pictures of their samples.
        records: The noise levels of those runs that have any.
    """
    heads = ["", *runs]

    def differences() -> list[Part]:
        rows = config_differences({name: run.config for name, run in runs.items()})
        if not rows:
            return [Paragraph("The configs do not differ.")]
        return [Table("Settings that differ", heads, rows)]

    sections: dict[str, list[Part]] = {
        "Numbers": [*_try(lambda: [Table("Numbers", heads, numbers(runs))]), *_protocols(runs)],
        "Samples": samples,
        "Settings that differ": _try(differences),
        "Curves": _try(lambda: _curves(runs)),
        "Loss by noise level": _try(lambda: _noise_levels(dict(records))),
    }
    return page("Comparison", [Paragraph(", ".join(runs), "soft")], sections)


def _try(make: Callable[[], list[Part]]) -> list[Part]:
    try:
        return make()
    except Exception as error:  # a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        return [Paragraph(f"This part could not be rendered: {reason[:300]}", "fault")]


def _protocols(runs: Mapping[str, Run]) -> list[Part]:
    def folds() -> list[Part]:
        found = {
            f"{name}: {one.name} at step {one.step}": one.protocol
            for name, run in runs.items()
            for one in run.measured
            if not one.name.startswith("bpd_")
        }
        return [protocol(found, "protocols")] if found else []

    return [Paragraph(CAUTION, "soft"), *_try(folds)]


def _curves(runs: Mapping[str, Run]) -> list[Part]:
    figures = []
    for column, title in CURVES.items():
        known = [
            Line(name, run.columns[column]) for name, run in runs.items() if column in run.columns
        ]
        figures.append(chart(title, known, "steps"))
    return [Charts(shown)] if (shown := [figure for figure in figures if figure]) else []


def _noise_levels(records: dict[str, LastRecords]) -> list[Part]:
    if not records:
        return []
    x = "λ, from noise (left) to data (right)"
    figure = chart("ε-error at each noise level", error_lines(records), x, ends=False)
    return [Charts([figure]), Fold("As a table", [Code(error_table(records))])]
