"""Write the report of a run: its folder as one HTML page.

    run folder → sections, each made from its own files → report.html

The run may be in progress or killed, and any file may be missing. A section without files is left
out, and a file that cannot be read affects only its section.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from lit_diffusion.training.reporting.page import number, page
from lit_diffusion.training.reporting.parts import Card, Cards, Facts, Paragraph, Part, protocol
from lit_diffusion.training.reporting.run import Run
from lit_diffusion.training.reporting.sections import NAMES, SECTIONS, when
from lit_diffusion.training.run.measurements import Measurement
from lit_diffusion.training.run.whole_file import write_whole

__all__ = ["FILE", "write_report"]

FILE = "report.html"
HEADLINES = ("bpd", "fid")  # shown as cards beside the losses


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run, whole or not at all; return its path.

    Args:
        folder: The run folder.
        out: The file to write; None for report.html in the folder.

    Raises:
        OSError: If it cannot be written.
    """
    out = folder / FILE if out is None else out
    run = Run(folder)
    name = str(run.config.get("name") or "run")
    stamp = Paragraph(folder.resolve().name, "soft")
    head = [stamp, *_try(_facts, run), *_try(_cards, run)]
    whole = page(name, head, {title: _try(make, run) for title, make in SECTIONS.items()})
    write_whole(out, whole)
    return out


def _try(make: Callable[[Run], list[Part]], run: Run) -> list[Part]:
    try:
        return make(run)
    except Exception as error:  # a damaged file, or a class that is not installed here
        reason = " ".join(str(error).split()) or type(error).__name__
        return [Paragraph(f"This part could not be rendered: {reason[:300]}", "fault")]


# The head ----------------------------------------------------------------------------------------


def _facts(run: Run) -> list[Part]:
    last = run.sessions[-1] if run.sessions else {}
    rate = run.columns.get("throughput/images_per_s")
    facts = {
        "started": when(run.sessions[0]) if run.sessions else "",
        "steps": f"{run.steps:,}",
        "wall time": _wall_time(run),
        "state": last.get("outcome") or ("running, or killed" if last else ""),
        "resumed": f"{len(run.sessions) - 1} ×" if len(run.sessions) > 1 else "",
        "images per second": number(rate[-1][1]) if rate else "",
        "device": last.get("device") or "",
    }
    return [Facts({name: value for name, value in facts.items() if value})]


def _wall_time(run: Run) -> str:
    """The sum over sessions; one without a recorded end lasted at least until its last row."""
    total, least = timedelta(), False
    for i, session in enumerate(run.sessions):
        begin = datetime.fromisoformat(session["started"])
        if session.get("ended"):
            total += datetime.fromisoformat(session["ended"]) - begin
        else:
            least = True
            if i == len(run.sessions) - 1:
                seen = datetime.fromtimestamp(run.seen).astimezone()
                total += max(timedelta(), seen - begin)
    if not run.sessions:
        return ""
    hours, rest = divmod(round(total.total_seconds()), 3600)
    duration = f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
    return f"at least {duration}" if least else duration


def _cards(run: Run) -> list[Part]:
    """The most important numbers of a run, each with its meaning."""
    newest = {}
    # The run's own validation, which has a history, takes precedence over later measurements.
    for one in sorted(_measured(run), key=lambda one: (one.step, one.stage == "val")):
        newest[one.name] = one
    cards = [
        Card(
            NAMES[name],
            one.value,
            _notes(one, newest),
            [protocol(one.protocol)] if one.protocol else [],
        )
        for name, one in ((name, newest.get(name)) for name in HEADLINES)
        if one is not None
    ]
    for name in ("val/loss", "train/loss"):
        if name in run.columns:
            step, value = run.columns[name][-1]
            note = "nats per dimension, under the weighting of this run"
            cards.append(Card(name, value, [f"step {step}", note]))
    return [Cards(cards)] if cards else []


def _measured(run: Run) -> list[Measurement]:
    """The measurements; for an older run at least its bound, without a protocol."""
    bound = [name for name in run.columns if name.startswith("val/bpd")]
    if run.measured or not bound:
        return run.measured
    last = {name: run.columns[name][-1] for name in bound}
    return [
        Measurement(name.removeprefix("val/"), value, None, int(step), "val", {})
        for name, (step, value) in last.items()
    ]


def _notes(one: Measurement, newest: dict[str, Measurement]) -> list[str]:
    """When and how it was measured; the terms of a bound, or the baseline of a distance."""
    error = "" if one.error is None else f"± {number(one.error)}, "
    notes = [f"{error}{one.stage} at step {one.step}"]
    parts = [
        f"{name.removeprefix(one.name)[1:]} {number(part.value)}"
        for name, part in newest.items()
        if name.startswith(f"{one.name}_") and _belongs(part, one)
    ]
    reference = one.protocol.get("reference")
    if isinstance(reference, dict):
        known = (one.protocol.get("samples"), reference.get("features"), reference.get("split"))
        notes.append("{} samples, {}, against split {}".format(*known))
    return [note for note in [*notes, ", ".join(parts)] if note]


def _belongs(part: Measurement, one: Measurement) -> bool:
    """Whether two were measured at the same time, against the same data."""
    this, that = ((x.step, x.stage, x.protocol.get("reference")) for x in (part, one))
    return this == that
