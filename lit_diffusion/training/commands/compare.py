"""The command `compare`: any runs side by side, as a page, or their ε-errors as a figure."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from lit_diffusion.training.callbacks.sample_grid import save_samples
from lit_diffusion.training.commands.shell.choices import (
    find_device,
    find_run,
    resolve_checkpoint,
)
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.commands.shell.load import load_model
from lit_diffusion.training.reporting.comparison import (
    comparison_page,
    config_differences,
    numbers,
)
from lit_diffusion.training.reporting.error_curves import (
    LastRecords,
    error_table,
    last_records,
    plot_errors,
)
from lit_diffusion.training.reporting.parts import Paragraph, Part, Picture, Strip, picture
from lit_diffusion.training.reporting.run import Run
from lit_diffusion.training.run.figures import save_figure
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.newest import LAST
from lit_diffusion.training.run.whole_file import write_whole
from lit_diffusion.training.step import randomness

__all__ = ["Comparison", "compare"]

FIGURES = (".png", ".pdf", ".svg")
COLUMNS = 4  # of the grid of samples
WIDE = 40  # characters of a cell in the terminal at most


class Comparison(NamedTuple):
    """The runs side by side as text, and the page or figure."""

    text: str
    path: Path

    def __str__(self) -> str:
        kind = "Figure" if self.path.suffix in FIGURES else "Page"
        return f"{self.text}\n{kind}: {self.path}"


def compare(
    runs: Sequence[str | Path],
    out: str | Path = "compare.html",
    num_samples: int = 16,
    seed: int = 0,
    device: str = "auto",
) -> Comparison:
    """Compare runs: losses, bits, scores, samples of the same noise, settings, ε-errors over λ.

    Args:
        runs: Runs, each as its folder, a checkpoint in it, or `last`.
        out: The page, an .html file; or a .png, .pdf or .svg for a figure of the ε-errors alone,
            which takes runs with the callback NoiseLevelLoss.
        num_samples: Samples of each model; 0 shows the last grid of each run instead.
        seed: Image i of each model starts from the noise of (seed, i).
        device: auto, cpu, cuda, cuda:1, mps.

    Raises:
        ValueError: If a run does not exist, or out has another suffix.
    """
    out = Path(out)
    if not runs:
        raise UsageError(
            "expected at least 1 run, got none: lit-diffusion compare RUN1 RUN2 --out FILE."
        )
    if out.suffix not in (".html", *FIGURES):
        raise UsageError(f"--out must end in .html, {', '.join(FIGURES)}, got {out}.")
    if num_samples < 0:
        raise UsageError(f"--num_samples must be at least 0, got {num_samples}.")
    folders = [find_run(run) for run in runs]
    named = dict(zip(_names(folders), folders, strict=True))
    if out.suffix in FIGURES:
        known = {name: last_records(folder) for name, folder in named.items()}
        save_figure(plot_errors(known), out)
        return Comparison(error_table(known), out)
    records = _records(named)
    read = {name: Run(folder) for name, folder in named.items()}
    samples = _samples(read, num_samples, seed, find_device(device))
    write_whole(out, comparison_page(read, samples, records))
    return Comparison(_text(read, records), out)


def _names(folders: list[Path]) -> list[str]:
    """<name>/<time> of each run, or the whole paths where that is ambiguous."""
    short = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UsageError(f"expected each run once, got {' '.join(names)}.")
    return names


def _records(folders: dict[str, Path]) -> dict[str, LastRecords]:
    """The noise levels of the runs that have recorded any."""
    found = {}
    for name, folder in folders.items():
        if (folder / "noise_levels.csv").is_file():
            try:
                found[name] = last_records(folder)
            except ValueError as error:
                warn(f"The noise levels of {name} are left out: {error}")
    return found


# Samples ---------------------------------------------------------------------------------------


def _samples(runs: dict[str, Run], n: int, seed: int, device: torch.device) -> list[Part]:
    """A grid for each run: of the same noise, or of its own if its model cannot be loaded."""
    pictures, notes = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for i, (name, run) in enumerate(runs.items()):
            reason = "no samples were asked for"
            grid = Path(scratch) / f"{i}.png"
            if n:
                try:
                    caption = f"{name}, {_sample(run.folder, n, seed, device, grid)}"
                except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
                    reason = " ".join(str(error).split())
            if not grid.is_file():
                own = sorted((run.folder / "samples").glob("step-*.png"))
                notes.append(f"{name} has no samples of this noise: {reason}")
                if not own:
                    continue
                grid, caption = own[-1], f"{name}, its own {own[-1].stem}"
            pictures.append(_shown(grid, caption, i))
    same = f"The noise of image i is that of ({seed}, i) for each model, and so is its class."
    parts: list[Part] = [Paragraph(same, "soft")] if n else []
    parts += [Paragraph(note, "soft") for note in notes]
    return [*parts, Strip("Samples", pictures)] if pictures else parts


def _shown(grid: Path, caption: str, i: int) -> Picture:
    return picture(grid, f"Samples of {caption}", caption, name=f"samples-{i}")


def _sample(folder: Path, n: int, seed: int, device: torch.device, out: Path) -> str:
    """Write a grid of samples of a run's checkpoint; return what it is of."""
    path = resolve_checkpoint(folder)
    model = load_model(path, device)
    if model.conditions:
        raise ValueError(f"it is conditioned on {', '.join(model.conditions)}")
    numbers = torch.arange(n)
    label = None if model.num_classes is None else numbers % COLUMNS % model.num_classes
    images = model.sample(
        n,
        randomness.generators(seed, "sample", numbers.tolist()),
        label,
        progress=partial(tqdm, desc=folder.name, disable=None),
    )
    save_samples(model, images.cpu(), out, COLUMNS)
    return f"{LAST.name}, {model.weights} weights"


# Text --------------------------------------------------------------------------------------------


def _text(runs: dict[str, Run], records: dict[str, LastRecords]) -> str:
    """The page without its pictures."""
    differ = config_differences({name: run.config for name, run in runs.items()})
    blocks = [_table(["", *runs], numbers(runs))]
    blocks.append(_table(["setting", *runs], differ) if differ else "The configs do not differ.")
    if records:
        blocks.append(error_table(records))
    return "\n\n".join(blocks)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    cells = [[_short(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def _short(cell: str) -> str:
    return cell if len(cell) <= WIDE else f"{cell[: WIDE - 1]}…"
