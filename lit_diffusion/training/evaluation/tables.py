"""The tables, sentences and figure of an evaluation, all made from its evaluation.json.

That file holds every number with its protocol. Since nothing else is asked, evaluation.md and the
report of a run cannot disagree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_diffusion.training.run.figures import PALETTE, figure_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "TITLES",
    "baseline_sentence",
    "bound_sentence",
    "has_curve",
    "markdown",
    "plot_scores",
    "protocol_sentence",
    "score_table",
    "title_of",
]

TITLES = {
    "fid": "Fréchet distance",
    "kid": "KID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}


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
    baseline, rows = record.get("baseline"), record["scores"]
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
        f"{about['examples']} examples, {about['samples per example']} noise level(s) each, "
        f"{time}, λ in [{low:.4g}, {high:.4g}], {about['decoder']}."
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


def has_curve(record: dict[str, Any]) -> bool:
    """Whether there is a curve to plot: rows with different numbers of network calls.

    Args:
        record: The contents of evaluation.json.
    """
    return len({row["network calls"] for row in record["scores"]}) > 1


def plot_scores(record: dict[str, Any]) -> Figure:
    """Plot the Fréchet distance against network calls, a line for each sampler.

    Args:
        record: The contents of evaluation.json.
    """
    with figure_style():
        return _plot_scores(record)


def _plot_scores(record: dict[str, Any]) -> Figure:
    from matplotlib.ticker import LogLocator

    rows, baseline = record["scores"], record.get("baseline")
    figure = new_figure(6.4, 4.2, dpi=150)
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="network calls per image", ylabel=TITLES["fid"]
    )
    for i, sampler in enumerate(dict.fromkeys(row["sampler"] for row in rows)):
        mine = [row for row in rows if row["sampler"] == sampler]
        mine.sort(key=lambda row: row["network calls"])
        axes.errorbar(
            [row["network calls"] for row in mine],
            [row["scores"]["fid"]["mean"] for row in mine],
            [row["scores"]["fid"]["error"] or 0.0 for row in mine],
            label=sampler,
            color=PALETTE[i % len(PALETTE)],
            marker="o",
            markersize=4,
            capsize=2,
        )
    if baseline is not None:
        axes.axhline(baseline, color="0.5", linestyle=":", label="real images of another split")
    ticks = sorted({row["network calls"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.minorticks_off()
    axes.legend()
    return figure
