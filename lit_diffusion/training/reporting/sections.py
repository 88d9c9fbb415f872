"""The sections of a report, each a function from a run to parts; none if it has no files."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lit_diffusion.published import nearest_published
from lit_diffusion.training.evaluation.measurement_table import measurement_table
from lit_diffusion.training.evaluation.record import read_record
from lit_diffusion.training.evaluation.tables import (
    TITLES,
    baseline_sentence,
    bound_sentence,
    protocol_sentence,
    score_table,
    title_of,
)
from lit_diffusion.training.reporting.chart import Line, chart
from lit_diffusion.training.reporting.heat_map import heat_map
from lit_diffusion.training.reporting.objective import headline, objective_of
from lit_diffusion.training.reporting.objective_charts import AXIS as LOGSNR_AXIS
from lit_diffusion.training.reporting.objective_charts import objective_charts
from lit_diffusion.training.reporting.page import number
from lit_diffusion.training.reporting.parts import (
    Charts,
    Code,
    Fold,
    Heading,
    Paragraph,
    Part,
    Picture,
    Strip,
    Table,
    picture,
    protocol,
)
from lit_diffusion.training.reporting.run import Run
from lit_diffusion.training.run.grid_texts import texts_of
from lit_diffusion.training.run.measurements import Measurement
from lit_diffusion.training.run.noise_levels import NoiseLevels, read_table

__all__ = ["NAMES", "SECTIONS", "when"]

STAGES = {"val": "validation", "test": "test", "evaluate": "evaluation"}
CLOCKS = {
    "images_per_s": "Images per second",
    "step_ms": "Milliseconds per step",
    "data_wait": "Fraction of time waiting for data",
    "mfu": "Model FLOPs utilisation",
    "peak_memory_gib": "Peak memory so far, GiB",
}
GROUPS = 8  # of measurements at most, one for each protocol
GRIDS = 12  # of samples at most
FEW = 10  # rows of a list at most
# The usual names of measurements, the most important first.
NAMES = {"bpd": "bits per dimension", **TITLES}


def _charts(*charts: str) -> list[Part]:
    found = [one for one in charts if one]
    return [Charts(found)] if found else []


def _samples(run: Run) -> list[Part]:
    """The newest grid, large, and below it earlier ones; each fills the window on a click."""
    grids = sorted((run.folder / "samples").glob("step-*.png"), key=_step)
    predicted = sorted((run.folder / "samples").glob("predict-*.png"))[:4]
    parts: list[Part] = []
    if grids:
        newest, *earlier = reversed(_evenly(grids, GRIDS))
        parts += [_grid(newest, "newest"), *_texts(newest)]
        note = "All grids start from the same noise, so that only the model changes."
        if len(grids) > GRIDS:
            note += f" Shown are {GRIDS} of {len(grids)} grids."
        parts.append(Paragraph(note, "soft"))
        if earlier:
            parts.append(Strip("Earlier samples", [_grid(grid) for grid in earlier]))
    if predicted:
        shown = [picture(g, f"Samples of {g.stem}", g.stem, name=g.stem) for g in predicted]
        parts.append(Strip("Predicted samples", shown))
    return parts


def _grid(path: Path, kind: str = "") -> Picture:
    step = _step(path)
    return picture(path, f"Samples after {step} steps", f"step {step:,}", kind, path.stem)


def _texts(grid: Path) -> list[Part]:
    """The texts of a grid, in its form."""
    rows = texts_of(grid)
    heads = [str(k) for k in range(1, len(rows[0]) + 1)] if rows else []
    rows = [row + [""] * (len(heads) - len(row)) for row in rows]
    title = "Captions, by row and column"
    return [Fold(title, [Table(title, heads, rows)])] if rows else []


def when(session: dict[str, Any]) -> str:
    """The start of a session, to the minute.

    Args:
        session: An entry of environment.json.
    """
    return str(session.get("started") or "")[:16].replace("T", " ")


def _step(path: Path) -> int:
    digits = re.search(r"\d+", path.stem)
    return int(digits[0]) if digits else -1


def _evenly(items: list[Any], most: int) -> list[Any]:
    """At most so many items, equally spaced, with the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _loss(run: Run) -> list[Part]:
    loss = run.chosen(lambda name: name in ("train/loss", "val/loss"))
    error = run.chosen(lambda name: name in ("train/eps_mse", "val/eps_mse"))
    return _charts(
        chart("Loss, nats per dimension", loss, "steps", logarithmic=True),
        chart("ε-error, mean (ε̂ − ε)²", error, "steps", logarithmic=True),
    )


def _noise_levels(run: Run) -> list[Part]:
    path = run.folder / "noise_levels.csv"
    if not path.is_file():
        return []
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

    x = LOGSNR_AXIS
    along = {f"step {record.step}": record for record in some}
    train = {stage: record for stage, record in last.items() if stage == "train"}
    parts = _charts(
        chart("Loss per example, ½ w/p · ε-error", lines("loss", last), x, ends=False),
        chart("ε-error along the run", lines("eps_mse", along), x, ends=False),
        chart(
            "Density of the sampled λ", lines("density", train or last), x, ends=False, zero=True
        ),
        chart("Gradient norm of the ε-error", lines("gradient_norm", train), x, ends=False),
    )
    maps = _charts(
        _heat_map("ε-error in validation", records, "val", "eps_mse"),
        _heat_map("ε-error in training", records, "train", "eps_mse"),
        _heat_map("Gradient norm of the ε-error", records, "train", "gradient_norm"),
    )
    return [*parts, Fold("All records, over λ and steps", maps)] if maps else parts


def _heat_map(title: str, records: list[NoiseLevels], stage: str, name: str) -> str:
    """A statistic over λ and steps; each record fills the steps since the previous one."""
    chosen = [record for record in records if record.stage == stage]
    # A file may contain records of other bins, from a run with another schedule.
    chosen = [r for r in chosen if len(r.edges) == len(chosen[-1].edges)]
    chosen = [r for r in chosen if torch.allclose(r.edges, chosen[-1].edges, atol=1e-3)]
    if not chosen:
        return ""
    steps = [float(record.step) for record in chosen]
    first = max(0.0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0.0
    values = [getattr(record, name).tolist() for record in chosen]
    edges = chosen[-1].edges.tolist()
    return heat_map(title, edges, [first, *steps], values, LOGSNR_AXIS, "steps")


def _objective(run: Run) -> list[Part]:
    model = run.config.get("model")
    if not isinstance(model, dict):
        path = run.folder / "objective.png"
        return [picture(path, "The objective", "")] if path.is_file() else []
    found, decoder = objective_of(model)
    (name, distance), *_ = nearest_published(found, 1)
    near = (
        f"It is a published objective: {name}."
        if distance.total < 1e-3
        else f"The nearest published objective is {name}, at a distance of {distance.total:.2f}."
    )
    return [
        Paragraph(headline(found, decoder)),
        Paragraph(f"{found.meaning()} {near}"),
        *_charts(*objective_charts(found)),
        Paragraph(
            "At the start of training. The optimal denoiser is that of Gaussian data.", "soft"
        ),
    ]


def _bound(run: Run) -> list[Part]:
    whole = run.chosen(lambda name: name == "val/bpd", "val/")
    terms = run.chosen(lambda name: name.startswith("val/bpd_"), "val/bpd_")
    return _charts(
        chart("Bits per dimension (upper bound)", whole, "steps"),
        chart("Its terms, bits per dimension", terms, "steps"),
    )


def _quality(run: Run) -> list[Part]:
    """What was measured during training and afterwards."""
    lines = {line.name: line for line in run.chosen(_is_quality, "val/")}
    parts = _charts(
        *(
            chart(NAMES.get(name, name), [one, *_baseline(lines, name)], "steps")
            for name, one in lines.items()
            if not name.endswith("_baseline") and len(one.points) > 1
        )
    )
    record = run.folder / "evaluation" / "evaluation.json"
    # The measurements of `evaluate` are in its own tables, if there are any.
    groups = _groups([m for m in run.measured if m.stage != "evaluate" or not record.is_file()])
    parts += [part for group in groups for part in _measurements(group)]
    if evaluated := [m for m in run.measured if m.stage == "evaluate"]:
        found = measurement_table(evaluated[::-1])
        parts.append(Heading("All evaluations, latest first"))
        parts.append(Table("All evaluations", found.heads, found.rows))
        parts.append(protocol(dict(enumerate(found.protocols, 1)), "protocols"))
    if record.is_file():
        parts += _evaluation(record)
    if (plotted := record.with_suffix(".png")).is_file():
        title = "Fréchet distance against network calls"
        parts.append(picture(plotted, title, f"{title}, by sampler.", "small"))
    return parts


def _evaluation(path: Path) -> list[Part]:
    """The latest evaluation, from evaluation.json."""
    record = read_record(path)
    heads, rows = score_table(record)
    sentences = [baseline_sentence(record), bound_sentence(record)]
    return [
        Heading(title_of(record)),
        Paragraph(protocol_sentence(record)),
        Table("Scores of the latest evaluation", heads, rows),
        *(Paragraph(sentence) for sentence in sentences if sentence),
    ]


def _baseline(lines: dict[str, Line], name: str) -> list[Line]:
    baseline = lines.get(f"{name}_baseline")
    return [] if baseline is None else [Line("baseline", baseline.points)]


def _groups(measured: list[Measurement]) -> list[list[Measurement]]:
    """Measurements grouped by stage and protocol, the latest group first."""
    found: dict[tuple[str, str], list[Measurement]] = {}
    for one in reversed(measured):
        if not one.name.endswith("_baseline"):
            key = (one.stage, json.dumps(one.protocol, sort_keys=True))
            found.setdefault(key, []).append(one)
    return list(found.values())[:GROUPS]


def _measurements(group: list[Measurement]) -> list[Part]:
    """A row for each step, a column for each name, and the protocol that they share."""
    names = list(dict.fromkeys(one.name for one in reversed(group)))
    steps = sorted({one.step for one in group}, reverse=True)[:FEW]
    at = {(one.step, one.name): one for one in group}
    rows = [[step, *(_value(at.get((step, name))) for name in names)] for step in steps]
    heads = ["step", *(NAMES.get(name, name.replace("_", " ")) for name in names)]
    stage = STAGES.get(group[0].stage, group[0].stage)
    title = f"{_capital(heads[1])}, measured in {stage}"
    return [Heading(title), Table(title, heads, rows), protocol(group[0].protocol)]


def _capital(title: str) -> str:
    return title[:1].upper() + title[1:]


def _value(one: Measurement | None) -> str:
    if one is None:
        return ""
    return number(one.value) + ("" if one.error is None else f" ± {number(one.error)}")


def _is_quality(name: str) -> bool:
    known = ("val/loss", "val/eps_mse", "val/bpd")
    return name.startswith("val/") and name not in known and not name.startswith("val/bpd_")


def _throughput(run: Run) -> list[Part]:
    lines = run.chosen(lambda name: name.startswith("throughput/"), "throughput/")
    return _charts(
        *(chart(CLOCKS.get(line.name, line.name), [line], "steps", zero=True) for line in lines)
    )


def _problems(run: Run) -> list[Part]:
    parts: list[Part] = []
    if (path := run.folder / "bad_examples.csv").is_file():
        with path.open(newline="", encoding="utf-8") as lines:
            heads, *rows = list(csv.reader(lines)) or [[]]
        if rows:
            parts.append(Paragraph(f"{len(rows)} bad examples were skipped."))
            parts.append(Table("Bad examples", heads, rows[:FEW]))
    steps = sorted((run.folder / "non_finite").glob("*.json"), key=_step)
    if steps:
        records = [json.loads(step.read_text(encoding="utf-8")) for step in steps[:FEW]]
        listed = ", ".join(f"{one['step']} ({one['not_finite']})" for one in records)
        more = f", and {len(steps) - FEW} more" if len(steps) > FEW else ""
        parts.append(Paragraph(f"Steps with a non-finite loss or gradient: {listed}{more}."))
    return parts or [Paragraph("None recorded: no bad example, no non-finite step.")]


def _config(run: Run) -> list[Part]:
    files = [*reversed(_first_and_last(run.configs)), *run.folder.glob("class_names.json")]
    return [Fold(p.name, [Code(p.read_text(encoding="utf-8"))]) for p in files]


def _first_and_last(found: list[Any]) -> list[Any]:
    """The first and the three newest; a run that is resumed every hour has too many to show."""
    return [*found[:1], *found[1:][-3:]]


def _environment(run: Run) -> list[Part]:
    sessions = _first_and_last(run.sessions)
    if not sessions:
        return [Paragraph("Not recorded.")]
    names = list(dict.fromkeys(name for session in sessions for name in session))
    rows = [[name.replace("_", " "), *(one.get(name) for one in sessions)] for name in names]
    rows = [[str(cell or "") for cell in row] for row in rows if any(row[1:])]
    parts: list[Part] = [Table("Environment", ["", *map(when, sessions)], rows)]
    if left := len(run.sessions) - len(sessions):
        parts.append(Paragraph(f"{left} more sessions are in environment.json.", "soft"))
    return parts


def _others(run: Run) -> list[Part]:
    known = ("train/loss", "val/loss", "train/eps_mse", "val/eps_mse", "val/bpd")
    shown = ("val/bpd_", "throughput/")
    lines = run.chosen(
        lambda name: not (name in known or _is_quality(name) or name.startswith(shown))
    )
    charts = _charts(*(chart(line.name, [line], "steps") for line in lines))
    return [Fold(f"{len(lines)} more columns of metrics.csv", charts)] if charts else []


SECTIONS: dict[str, Callable[[Run], list[Part]]] = {
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
