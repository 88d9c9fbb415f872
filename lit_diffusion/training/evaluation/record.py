"""The record of an evaluation: evaluation.json, and the files that are made from it.

    Comparison, SamplerScores, bound → evaluation.json → evaluation.md, evaluation.png

Tables and figure are made from the record alone; see `tables`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_diffusion.training.evaluation.comparison import Comparison, SamplerScores
from lit_diffusion.training.evaluation.tables import has_curve, markdown, plot_scores
from lit_diffusion.training.run.figures import save_figure
from lit_diffusion.training.run.measurements import Measurement
from lit_diffusion.training.run.whole_file import write_whole

__all__ = ["VERSION", "make_record", "read_record", "write_record"]

VERSION = 1  # of evaluation.json; raised whenever a key changes its meaning


def make_record(
    checkpoint: dict[str, Any],
    weights: str,
    weights_hash: str,
    comparison: Comparison,
    rows: Sequence[SamplerScores],
    bound: Sequence[Measurement],
) -> dict[str, Any]:
    """Every number of an evaluation with its protocol, as plain data.

    Args:
        checkpoint: The evaluated file, its SHA-256 and its step.
        weights: The name of the weights.
        weights_hash: A hash of their values.
        comparison: What the samples were compared with.
        rows: The scores of each way of sampling.
        bound: Bits per dimension and their terms; empty if they were not measured.
    """
    return {
        "version": VERSION,
        "checkpoint": checkpoint,
        "weights": weights,
        "weights hash": weights_hash,
        "reference": comparison.reference.protocol,
        "baseline": comparison.baseline,
        "scores": [row.plain() for row in rows],
        "bound": [one._asdict() for one in bound],
    }


def read_record(path: Path) -> dict[str, Any]:
    """Read an evaluation.json.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not such a file, or was written by a later version.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    needed = {"checkpoint", "weights", "reference", "scores"}
    if not isinstance(record, dict) or not needed <= record.keys():
        raise ValueError(f"expected {path} with {', '.join(sorted(needed))}: evaluate again")
    version = record.get("version", 1)  # files without a version differ in one name
    if version > VERSION:
        raise ValueError(
            f"expected {path} in version {VERSION} at most, got {version}: update lit-diffusion"
        )
    return record


def write_record(folder: Path, record: dict[str, Any]) -> str:
    """Write evaluation.json, .md and, if there is a curve to plot, .png; return the tables.

    Args:
        folder: The folder, created if necessary.
        record: As `make_record` returns it.
    """
    text = markdown(record)
    folder.mkdir(parents=True, exist_ok=True)
    whole = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / "evaluation.json", whole)
    if has_curve(record):
        save_figure(plot_scores(record), folder / "evaluation.png")
        text += "\n![Fréchet distance against network calls](evaluation.png)\n"
    else:
        (folder / "evaluation.png").unlink(missing_ok=True)  # of an earlier sweep
    write_whole(folder / "evaluation.md", text)
    return text
