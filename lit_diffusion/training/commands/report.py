"""The command `report`: write a run folder as one HTML page."""

from __future__ import annotations

from pathlib import Path

from lit_diffusion.training.commands.parsing import DiffusionParser, fail
from lit_diffusion.training.reporting.run import TRACES, Run
from lit_diffusion.training.reporting.write import FILE, write_report

__all__ = ["report"]


def report(argv: list[str]) -> Path:
    """Write the report of a run; return where it is.

    Args:
        argv: The command line after `report`.
    """
    parser = DiffusionParser(
        prog="lit-diffusion report", description="Write a run folder as one HTML file."
    )
    parser.add_argument(
        "run", type=str, nargs="*", help="A run folder; `last` is the newest in runs/."
    )
    parser.add_argument(
        "--out", type=str | None, default=None, help="An .html file; RUN/report.html by default."
    )
    parser.add_argument("--plugins", type=list[str] | str, default=[], help="As for fit.")
    config = parser.parse_args(argv)
    if len(config.run) != 1:
        fail(f"report is of 1 run, got {len(config.run)}: lit-diffusion report RUN --out FILE.")
    folder = Path(config.run[0])
    if config.run[0] == "last" and not folder.is_dir():
        folder = _last_run(Path("runs"))
    if not any((folder / name).exists() for name in TRACES):
        fail(f"{folder} is no run folder: expected one with {', '.join(TRACES)}, or `last`.")
    out = folder / FILE if config.out is None else Path(config.out)
    if out.suffix != ".html" or out.is_dir():
        fail(f"--out must be an .html file, got {out}.")
    return write_report(folder, out)


def _last_run(root: Path) -> Path:
    """The run that was trained last."""
    trained = [
        p.parent for n in ("checkpoints", "environment.json") for p in root.glob(f"*/*/{n}")
    ]
    if not trained:
        fail(f"there is no run below {root}; train first, or give a run folder.")
    return max(trained, key=lambda folder: Run(folder).seen)
