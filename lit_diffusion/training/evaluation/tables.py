"""The tables and the figure of `lit-diffusion evaluate`."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from lit_diffusion.training.evaluation.scores import Score
from lit_diffusion.training.run.measurements import Measurement

__all__ = ["Row", "draw", "markdown"]

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


class Row(NamedTuple):
    """The scores of one way of drawing samples.

    Args:
        sampler: Its class.
        steps: Its levels.
        calls: Network calls for one image.
        seeds: Of the sets of samples.
        scores: Each score, for every seed.
        protocol: What they depend on.
    """

    sampler: str
    steps: int
    calls: int
    seeds: list[int]
    scores: dict[str, list[Score]]
    protocol: dict[str, Any]

    def mean(self, name: str) -> tuple[float, float | None]:
        """Mean and standard deviation over the seeds; of one seed, the score and its own scatter.

        Args:
            name: Of the score.
        """
        found = self.scores[name]
        if len(found) == 1:
            return found[0].value, found[0].error
        values = [one.value for one in found]
        return statistics.fmean(values), statistics.stdev(values)

    def plain(self) -> dict[str, Any]:
        """All of it as plain data."""
        about = {"sampler": self.sampler, "steps": self.steps, "network calls": self.calls}
        found = {}
        for name, each in self.scores.items():
            mean, scatter = self.mean(name)
            found[name] = {
                "mean": mean,
                "error": scatter,
                "values": [one.value for one in each],
                "protocol": each[0].protocol,
            }
        return about | {"seeds": self.seeds, "scores": found, "protocol": self.protocol}


def markdown(
    rows: list[Row], bound: list[Measurement], floor: float | None, record: dict[str, Any]
) -> str:
    """The tables, with the protocol in words before them.

    Args:
        rows: The scores.
        bound: Bits per dimension, if they were measured.
        floor: Distance of another split of real images; None if it was not measured.
        record: What is written to evaluation.json.
    """
    reference, first = record["reference"], rows[0].protocol
    names = [name for name in TITLES if name in rows[0].scores]
    several = len(rows[0].seeds) > 1
    lines = [
        f"# {record['checkpoint']['file']}, step {record['checkpoint']['step']}",
        "",
        f"{first['samples']} samples for each of {len(rows[0].seeds)} seed(s), weights: "
        f"{record['weights']}, against the {reference['examples']} examples of "
        f"{reference['data']}, split {reference['split']} (hash {reference['hash']}), features of "
        f"{reference['features']} (hash {reference['features hash']}; images resized: "
        f"{reference['resize']}). "
        + ("± is the deviation over the seeds." if several else "± is over subsets or splits."),
        "",
        "| sampler | steps | network calls | " + " | ".join(TITLES[n] for n in names) + " |",
        "| --- " * (3 + len(names)) + "|",
    ]
    for row in rows:
        cells = [_number(*row.mean(name)) for name in names]
        lines.append(f"| {row.sampler} | {row.steps} | {row.calls} | {' | '.join(cells)} |")
    if floor is not None:
        ratio = min(row.mean("fid")[0] for row in rows) / floor
        which = "the best row above" if len(rows) > 1 else "the samples above"
        lines += [
            "",
            f"Real images of another split are {floor:.4g} away from the reference; {which} "
            f"{'is' if len(rows) > 1 else 'are'} {ratio:.2f} times as far.",
        ]
    if bound:
        bits, *terms = bound
        about = bits.protocol
        chain = (
            "continuous time"
            if about["num_timesteps"] is None
            else f"{about['num_timesteps']} steps"
        )
        parts = ", ".join(f"{t.name.removeprefix('bpd_')} {t.value:.4f}" for t in terms)
        low, high = about["λ"]
        lines += [
            "",
            f"Bits per dimension: at most {bits.value:.4f} ± {bits.error:.4f} ({parts}), over "
            f"{about['examples']} examples, {about['draws']} draw(s) each, {chain}, λ in "
            f"[{low:.4g}, {high:.4g}], {about['decoder']}.",
        ]
    return "\n".join(lines) + "\n"


def _number(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def draw(rows: list[Row], floor: float | None) -> Any:
    """The Fréchet distance against network calls, a line for each sampler.

    Args:
        rows: The scores.
        floor: Distance of another split of real images; None for no line.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=150)
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="network calls for one image", ylabel=TITLES["fid"]
    )
    for i, sampler in enumerate(dict.fromkeys(row.sampler for row in rows)):
        mine = sorted((row for row in rows if row.sampler == sampler), key=lambda row: row.calls)
        means = [row.mean("fid") for row in mine]
        axes.errorbar(
            [row.calls for row in mine],
            [mean for mean, _ in means],
            [scatter or 0.0 for _, scatter in means],
            label=sampler,
            color=_COLOURS[i % len(_COLOURS)],
            marker="o",
            markersize=4,
            capsize=2,
        )
    if floor is not None:
        axes.axhline(floor, color="0.5", linestyle=":", label="real images of another split")
    ticks = sorted({row.calls for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    return figure
