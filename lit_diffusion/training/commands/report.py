"""The command `report`: write a run folder as one HTML page."""

from __future__ import annotations

from pathlib import Path

from lit_diffusion.training.commands.errors import UsageError
from lit_diffusion.training.reporting.run import TRACES, Run
from lit_diffusion.training.reporting.write import FILE, write_report

__all__ = ["report"]


def report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run as one HTML file; return its path.

    Args:
        run: A run folder; `last` for the newest in runs/.
        out: An .html file; report.html in the run folder by default.

    Raises:
        ValueError: If there is no such run, or out is not an .html file.
    """
    folder = Path(run)
    if run == "last" and not folder.is_dir():
        folder = _last_run(Path("runs"))
    if not any((folder / name).exists() for name in TRACES):
        raise UsageError(
            f"{folder} is not a run folder: expected one with {', '.join(TRACES)}, or `last`."
        )
    out = folder / FILE if out is None else Path(out)
    if out.suffix != ".html" or out.is_dir():
        raise UsageError(f"--out must be an .html file, got {out}.")
    return write_report(folder, out)


def _last_run(root: Path) -> Path:
    """The most recently trained run, by its newest file."""
    trained = [
        p.parent for n in ("checkpoints", "environment.json") for p in root.glob(f"*/*/{n}")
    ]
    if not trained:
        raise UsageError(f"there is no run below {root}; train first, or give a run folder.")
    return max(trained, key=lambda folder: Run(folder).seen)
