"""The command `report`: write a run folder as one HTML page."""

from __future__ import annotations

from pathlib import Path

from lit_diffusion.training.commands.shell.choices import find_run
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.reporting.write import FILE, write_report

__all__ = ["report"]


def report(
    run: str | Path,
    out: str | Path | None = None,
    name: str | None = None,
    root: str | Path | None = None,
) -> Path:
    """Write the report of a run as one HTML file; return its path.

    Args:
        run: A run folder, a checkpoint in it, or `last` for the newest run.
        out: An .html file; report.html in the run folder by default.
        name: With `last`: only runs of this name.
        root: With `last`: the folder of all runs; runs/ by default.

    Raises:
        ValueError: If there is no such run, or out is not an .html file.
    """
    folder = find_run(run, name, root)
    out = folder / FILE if out is None else Path(out)
    if out.suffix != ".html" or out.is_dir():
        raise UsageError(f"--out must be an .html file, got {out}.")
    return write_report(folder, out)
