"""The record, the tables and the figure of `lit-diffusion evaluate`.

    SamplerScores, bound, reference → evaluation.json → evaluation.md, and a section of the report

evaluation.json holds every number with its protocol. Tables and sentences are made from it alone,
so that Markdown and report cannot disagree.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_diffusion.training.evaluation.scores import Score
from lit_diffusion.training.run.measurements import Measurement

__all__ = [
    "TITLES",
    "VERSION",
    "SamplerScores",
    "baseline_sentence",
    "bound_sentence",
    "markdown",
    "plot_scores",
    "protocol_sentence",
    "read_record",
    "score_table",
    "title_of",
]

VERSION = 1  # of evaluation.json; raised whenever a key changes its meaning
TITLES = {
    "fid": "Fréchet distance",
    "kid": "KID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}
_COLOURS = ("#17407a", "#c2571a", "#3c8d5a", "#8a4fa3", "#6b6b6b")


class SamplerScores(NamedTuple):
    """The scores of one sampler at one number of steps.

    Args:
        sampler: The name of its class.
        steps: Its number of noise levels.
        calls: Network calls per image.
        seeds: The seed of each set of samples.
        scores: Each score by name, one for every seed.
        protocol: Everything they depend on.
    """

    sampler: str
    steps: int
    calls: int
    seeds: list[int]
    scores: dict[str, list[Score]]
    protocol: dict[str, Any]

    def mean(self, name: str) -> tuple[float, float | None]:
        """Mean and standard deviation over the seeds; for one seed, the score and its own error.

        Args:
            name: The name of the score.
        """
        found = self.scores[name]
        if len(found) == 1:
            return found[0].value, found[0].error
        values = [one.value for one in found]
        return statistics.fmean(values), statistics.stdev(values)

    def plain(self) -> dict[str, Any]:
        """The scores as plain data, an entry of `scores` in evaluation.json."""
        about = {"sampler": self.sampler, "steps": self.steps, "network calls": self.calls}
        found = {}
        for name, each in self.scores.items():
            mean, error = self.mean(name)
            found[name] = {
                "mean": mean,
                "error": error,
                "values": [one.value for one in each],
                "protocol": each[0].protocol,
            }
        return about | {"seeds": self.seeds, "scores": found, "protocol": self.protocol}

    def measurements(self, step: int) -> Iterator[Measurement]:
        """The scores as records of metrics.json, each the mean over the seeds.

        Args:
            step: Optimizer steps of the evaluated checkpoint.
        """
        for name, each in self.scores.items():
            mean, error = self.mean(name)
            protocol = self.protocol | each[0].protocol | {"seed": self.seeds[0]}
            if len(each) > 1:
                del protocol["seed"]
                protocol |= {"seeds": self.seeds, "error": "deviation over the seeds"}
            yield Measurement(name, mean, error, step, "evaluate", protocol)


# The record -----------------------------------------------------------------------------------


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


def title_of(record: dict[str, Any]) -> str:
    """The evaluated checkpoint and its step.

    Args:
        record: The contents of evaluation.json.
    """
    return f"{record['checkpoint']['file']}, step {record['checkpoint']['step']}"


def protocol_sentence(record: dict[str, Any]) -> str:
    """The protocol of the scores in words.

    Args:
        record: The contents of evaluation.json.
    """
    reference, first = record["reference"], record["scores"][0]
    several = len(first["seeds"]) > 1
    return (
        f"{first['protocol']['samples']} samples for each of {len(first['seeds'])} seed(s), "
        f"weights: {record['weights']}, against the {reference['examples']} examples of "
        f"{reference['data']}, split {reference['split']} (hash {reference['hash']}), features of "
        f"{reference['features']} (hash {reference['features hash']}; images resized: "
        f"{reference['resize']}). ± is the standard deviation over "
        + ("the seeds." if several else "subsets or splits.")
    )


def score_table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the scores, a row for each sampler and number of steps.

    Args:
        record: The contents of evaluation.json.
    """
    rows = record["scores"]
    names = [name for name in TITLES if name in rows[0]["scores"]]
    heads = ["sampler", "steps", "network calls", *(TITLES[name] for name in names)]
    return heads, [
        [
            *(str(row[key]) for key in ("sampler", "steps", "network calls")),
            *(_number(row["scores"][n]["mean"], row["scores"][n]["error"]) for n in names),
        ]
        for row in rows
    ]


def baseline_sentence(record: dict[str, Any]) -> str:
    """The distance of the baseline, real images of another split; "" if it was not measured.

    Args:
        record: The contents of evaluation.json.
    """
    baseline, rows = record.get("floor"), record["scores"]
    if baseline is None:
        return ""
    ratio = min(row["scores"]["fid"]["mean"] for row in rows) / baseline
    best = "the best row is" if len(rows) > 1 else "the samples are"
    return (
        f"Baseline: real images of another split have a Fréchet distance of {baseline:.4g} from "
        f"the reference; {best} at {ratio:.2f} times that distance."
    )


def bound_sentence(record: dict[str, Any]) -> str:
    """Bits per dimension with their terms and protocol; "" if they were not measured.

    Args:
        record: The contents of evaluation.json.
    """
    if not record.get("bound"):
        return ""
    bits, *terms = record["bound"]
    about = bits["protocol"]
    chain = about.get("num_timesteps", about.get("steps"))  # the name before version 1
    time = "continuous time" if chain is None else f"{chain} steps"
    parts = ", ".join(f"{t['name'].removeprefix('bpd_')} {t['value']:.4f}" for t in terms)
    low, high = about["λ"]
    return (
        f"Bits per dimension: at most {bits['value']:.4f} ± {bits['error']:.4f} ({parts}), over "
        f"{about['examples']} examples, {about['draws']} noise level(s) each, {time}, λ in "
        f"[{low:.4g}, {high:.4g}], {about['decoder']}."
    )


def markdown(record: dict[str, Any]) -> str:
    """An evaluation as Markdown: the protocol, the scores, the baseline and the bound.

    Args:
        record: The contents of evaluation.json.
    """
    heads, rows = score_table(record)
    lines = [heads, ["---"] * len(heads), *rows]
    blocks = [
        f"# {title_of(record)}",
        protocol_sentence(record),
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        baseline_sentence(record),
        bound_sentence(record),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _number(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def plot_scores(rows: list[SamplerScores], baseline: float | None) -> Any:
    """Plot the Fréchet distance against network calls, a line for each sampler.

    Args:
        rows: The scores.
        baseline: Distance of another split of real images; None for no line.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=150)
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="network calls per image", ylabel=TITLES["fid"]
    )
    for i, sampler in enumerate(dict.fromkeys(row.sampler for row in rows)):
        mine = sorted((row for row in rows if row.sampler == sampler), key=lambda row: row.calls)
        means = [row.mean("fid") for row in mine]
        axes.errorbar(
            [row.calls for row in mine],
            [mean for mean, _ in means],
            [error or 0.0 for _, error in means],
            label=sampler,
            color=_COLOURS[i % len(_COLOURS)],
            marker="o",
            markersize=4,
            capsize=2,
        )
    if baseline is not None:
        axes.axhline(baseline, color="0.5", linestyle=":", label="real images of another split")
    ticks = sorted({row.calls for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    return figure
