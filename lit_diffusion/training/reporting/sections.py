"""The sections of a report: each from the files that it is about, "" if there are none."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_diffusion.published import nearest_published
from lit_diffusion.training.evaluation.overview import overview
from lit_diffusion.training.evaluation.tables import TITLES
from lit_diffusion.training.reporting.chart import Line, chart
from lit_diffusion.training.reporting.objective import headline, objective_of, save_objective
from lit_diffusion.training.reporting.page import (
    code,
    fold,
    markdown,
    number,
    paragraph,
    picture,
    plain,
    table,
    text,
)
from lit_diffusion.training.reporting.run import Run
from lit_diffusion.training.run.measurements import Measurement
from lit_diffusion.training.run.noise_levels import NoiseLevels, read_table

__all__ = ["NAMES", "SECTIONS", "when"]

STAGES = {"val": "validation", "test": "test", "evaluate": "evaluation"}
CLOCKS = {
    "images_per_s": "Images per second",
    "step_ms": "Milliseconds for a step",
    "data_wait": "Share of the time that waits for data",
    "mfu": "Share of the device's arithmetic that is used",
    "peak_memory_gib": "Most memory so far, GiB",
}
GROUPS = 8  # of measurements, for each protocol one
GRIDS = 12  # of samples
FEW = 10  # lines of a list of problems
PARTS = ("schedule", "weighting", "prediction", "sampler", "num_timesteps", "decoder")
#: Names of measurements as people say them, the most important first.
NAMES = {"bpd": "bits per dimension", **TITLES}


def _charts(*charts: str) -> str:
    inner = "".join(charts)
    return f'<div class="charts">{inner}</div>' if inner else ""


def _samples(run: Run) -> str:
    grids = sorted((run.folder / "samples").glob("step-*.png"), key=_step)
    drawn = sorted((run.folder / "samples").glob("predict-*.png"))[:4]
    if not grids and not drawn:
        return ""
    shown = _evenly(grids, GRIDS)
    figures = [picture(g, f"Samples after {_step(g)} steps", f"step {_step(g)}") for g in shown]
    figures += [picture(g, f"Samples of {g.stem}", g.stem) for g in drawn]
    said = "Always from the same noise, so that only the model changes."
    if len(shown) < len(grids):
        said += f" Shown are {len(shown)} of {len(grids)} grids."
    strip = (
        f'<div class="strip" tabindex="0" role="region" aria-label="Samples">{"".join(figures)}'
    )
    return f"{paragraph(said, 'soft')}{strip}</div>"


def when(session: dict[str, Any]) -> str:
    """When a session started, to the minute.

    Args:
        session: Of environment.json.
    """
    return str(session.get("started") or "")[:16].replace("T", " ")


def _step(path: Path) -> int:
    digits = re.search(r"\d+", path.stem)
    return int(digits[0]) if digits else -1


def _evenly(items: list[Any], most: int) -> list[Any]:
    """The first, the last, and as many between as may be, at equal distances."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _loss(run: Run) -> str:
    loss = run.chosen(lambda name: name in ("train/loss", "val/loss"))
    error = run.chosen(lambda name: name in ("train/eps_mse", "val/eps_mse"))
    return _charts(
        chart("Loss, nats per dimension", loss, "steps"),
        chart("ε-error, mean (ε̂ − ε)²", error, "steps"),
    )


def _noise_levels(run: Run) -> str:
    path = run.folder / "noise_levels.csv"
    if not path.is_file():
        return ""
    records = read_table(path)
    last = {record.stage: record for record in records}
    judged = [
        record for record in records if record.stage == ("val" if "val" in last else "train")
    ]
    some = _evenly(judged, 4)

    def lines(name: str, chosen: dict[str, NoiseLevels]) -> list[Line]:
        found = []
        for key, record in chosen.items():
            values = getattr(record, name)
            seen = values.isfinite() & (values > 0)
            pairs = zip(record.centres[seen].tolist(), values[seen].tolist(), strict=True)
            found.append(Line(key, list(pairs)))
        return found

    x = "λ, from noise on the left to data on the right"
    along = {f"step {record.step}": record for record in some}
    train = {stage: record for stage, record in last.items() if stage == "train"}
    charts = _charts(
        chart("Loss per example, ½ w/p · ε-error", lines("loss", last), x, ends=False),
        chart("ε-error along the run", lines("eps_mse", along), x, ends=False),
        chart("Density of λ as drawn", lines("density", train or last), x, ends=False, zero=True),
        chart("Gradient of the ε-error", lines("gradient_norm", train), x, ends=False),
    )
    whole = run.folder / "noise_levels.png"
    if whole.is_file():
        alt = "ε-error, loss and density over λ, and heat maps over λ and steps"
        charts += fold("All of it in one picture", picture(whole, alt, "Last and over time."))
    return charts


def _objective(run: Run) -> str:
    path = run.folder / "objective.png"
    model = run.config.get("model")
    if not isinstance(model, dict):
        return picture(path, "The objective", "") if path.is_file() else ""
    found, decoder = objective_of(model)
    (name, distance), *_ = nearest_published(found, 1)
    near = (
        f"It is a published objective: {name}."
        if distance.total < 1e-3
        else f"The nearest published objective is {name}, at a distance of {distance.total:.2f}."
    )
    said = headline(found, decoder)
    alt = "Density of λ, weights on the errors, loss of a draw, and noise of the data, over λ"
    with tempfile.TemporaryDirectory() as scratch:
        if not path.is_file():
            path = Path(scratch) / "objective.png"
            save_objective(found, path)
        figure = picture(
            path, alt, "When training began; the loss of a draw is that of Gaussian data."
        )
    return paragraph(said) + paragraph(f"{found.meaning()} {near}") + figure


def _bound(run: Run) -> str:
    whole = run.chosen(lambda name: name == "val/bpd", "val/")
    terms = run.chosen(lambda name: name.startswith("val/bpd_"), "val/bpd_")
    return _charts(
        chart("Bits per dimension, at most", whole, "steps"),
        chart("Its terms, bits per dimension", terms, "steps"),
    )


def _quality(run: Run) -> str:
    """What was measured, along the run and afterwards."""
    lines = {line.name: line for line in run.chosen(_is_quality, "val/")}
    parts = [
        _charts(
            *(
                chart(NAMES.get(name, name), [one, *_floor(lines, name)], "steps")
                for name, one in lines.items()
                if not name.endswith("_floor") and len(one.points) > 1
            )
        )
    ]
    told = run.folder / "evaluation" / "evaluation.md"
    # What evaluate measured is in its own tables, if they are there.
    groups = _groups([m for m in run.measured if m.stage != "evaluate" or not told.is_file()])
    parts += [_measurements(group) for group in groups]
    if evaluated := [m for m in run.measured if m.stage == "evaluate"]:
        found = overview(evaluated[::-1])
        parts.append("<h3>All evaluations, the latest first</h3>")
        parts.append(table(found.heads, found.rows, "All evaluations"))
        parts.append(fold("protocols", code(plain(dict(enumerate(found.protocols, 1))))))
    if told.is_file():
        parts.append(markdown(told.read_text(encoding="utf-8")))
    if (drawn := told.with_suffix(".png")).is_file():
        title = "Fréchet distance against network calls"
        parts.append(picture(drawn, title, f"{title}, by sampler.", "small"))
    return "".join(parts)


def _floor(lines: dict[str, Line], name: str) -> list[Line]:
    floor = lines.get(f"{name}_floor")
    return [] if floor is None else [floor]


def _groups(measured: list[Measurement]) -> list[list[Measurement]]:
    """What was measured in the same way, by stage and protocol; the latest ways first."""
    found: dict[tuple[str, str], list[Measurement]] = {}
    for one in reversed(measured):
        if not one.name.endswith("_floor"):
            key = (one.stage, json.dumps(one.protocol, sort_keys=True))
            found.setdefault(key, []).append(one)
    return list(found.values())[:GROUPS]


def _measurements(group: list[Measurement]) -> str:
    """A line for each step, a column for each name, and the protocol that they share."""
    names = list(dict.fromkeys(one.name for one in reversed(group)))
    steps = sorted({one.step for one in group}, reverse=True)[:FEW]
    at = {(one.step, one.name): one for one in group}
    rows = [[step, *(_value(at.get((step, name))) for name in names)] for step in steps]
    heads = ["step", *(NAMES.get(name, name.replace("_", " ")) for name in names)]
    title = f"Measured in {STAGES.get(group[0].stage, group[0].stage)}"
    shared = fold("protocol", code(plain(group[0].protocol)))
    return f"<h3>{text(title)}</h3>{table(heads, rows, title)}{shared}"


def _value(one: Measurement | None) -> str:
    if one is None:
        return ""
    return number(one.value) + ("" if one.error is None else f" ± {number(one.error)}")


def _is_quality(name: str) -> bool:
    known = ("val/loss", "val/eps_mse", "val/bpd")
    return name.startswith("val/") and name not in known and not name.startswith("val/bpd_")


def _throughput(run: Run) -> str:
    lines = run.chosen(lambda name: name.startswith("throughput/"), "throughput/")
    return _charts(*(chart(CLOCKS.get(line.name, line.name), [line], "steps") for line in lines))


def _problems(run: Run) -> str:
    parts = []
    if (path := run.folder / "bad_examples.csv").is_file():
        with path.open(newline="", encoding="utf-8") as lines:
            heads, *rows = list(csv.reader(lines)) or [[]]
        if rows:
            parts.append(paragraph(f"Bad examples that were left out, in {len(rows)} places."))
            parts.append(table(heads, [list(row) for row in rows[:FEW]], "Bad examples"))
    steps = sorted((run.folder / "non_finite").glob("*.json"), key=_step)
    if steps:
        told = [json.loads(step.read_text(encoding="utf-8")) for step in steps[:FEW]]
        listed = ", ".join(f"{one['step']} ({one['not_finite']})" for one in told)
        more = f", and {len(steps) - FEW} more" if len(steps) > FEW else ""
        parts.append(paragraph(f"Steps with a loss or gradient not finite: {listed}{more}."))
    return "".join(parts) or paragraph("None recorded: no bad example, no step not finite.")


def _config(run: Run) -> str:
    files = _first_and_last(run.configs)
    return "".join(fold(p.name, code(p.read_text(encoding="utf-8"))) for p in reversed(files))


def _first_and_last(found: list[Any]) -> list[Any]:
    """The beginning, and the newest: a run that is resumed every hour has too many to show."""
    return [*found[:1], *found[1:][-3:]]


def _environment(run: Run) -> str:
    sessions = _first_and_last(run.sessions)
    names = list(dict.fromkeys(name for session in sessions for name in session))
    rows = [[name.replace("_", " "), *(one.get(name) for one in sessions)] for name in names]
    rows = [[str(cell or "") for cell in row] for row in rows if any(row[1:])]
    heads = ["", *map(when, sessions)]
    if not sessions:
        return paragraph("Not recorded.")
    left = len(run.sessions) - len(sessions)
    more = paragraph(f"{left} starts between are in environment.json.", "soft") if left else ""
    return table(heads, rows, "Environment") + more


def _others(run: Run) -> str:
    known = ("train/loss", "val/loss", "train/eps_mse", "val/eps_mse", "val/bpd")
    lines = run.chosen(
        lambda name: (
            not (
                name in known or _is_quality(name) or name.startswith(("val/bpd_", "throughput/"))
            )
        )
    )
    charts = _charts(*(chart(line.name, [line], "steps") for line in lines))
    return fold(f"{len(lines)} more columns of metrics.csv", charts) if charts else ""


SECTIONS: dict[str, Callable[[Run], str]] = {
    "Samples over time": _samples,
    "Loss": _loss,
    "Loss by noise level": _noise_levels,
    "Objective": _objective,
    "Bound": _bound,
    "Evaluation": _quality,
    "Throughput": _throughput,
    "Other numbers": _others,
    "Problems": _problems,
    "Config": _config,
    "Environment": _environment,
}
