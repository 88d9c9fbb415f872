"""Tournament: weightings × schedules × predictions, evaluated alike, paired over seeds.

    python benchmarks/objectives.py digits --out OUT
    python benchmarks/objectives.py mnist --path DATA --out OUT

Each run is a command of `lit-diffusion fit`, which is stored with its result. Runs of one seed
have the same initial weights, the same order of the data and, at each step, the same times and
noise; only the objective differs. At each validation the average weights are evaluated by ½ ∫ w(λ)
E mean (ε̂ − ε)² dλ for every weighting of the tournament, at the same λ and ε in every run; the
final network also by the Fréchet distance between the features, of a classifier trained here, of
its samples and of test images.

OUT has one file per run. An interrupted command continues with the missing runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from digits import frechet, train_classifier

import lit_diffusion as ld
from lit_diffusion.gaussian import noise_like
from lit_diffusion.likelihood import variational_bound
from lit_diffusion.loss import weighted_error
from lit_diffusion.times import fixed_times
from lit_diffusion.training import DataModule, LitDiffusion
from lit_diffusion.training.cli import main as lit_diffusion
from lit_diffusion.training.step.randomness import generators

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
ENDS = (-10.0, 13.3)
JUDGED: dict[str, ld.Weighting] = {
    "ELBO": ld.ELBOWeighting(),
    "sigmoid": ld.SigmoidWeighting(2.0),
    "EDM": ld.EDMWeighting(),
}
WEIGHTINGS = {
    "ELBO": ["--model.weighting", "ELBOWeighting"],
    "sigmoid": ["--model.weighting", "SigmoidWeighting", "--model.weighting.bias", "2.0"],
    "EDM": ["--model.weighting", "EDMWeighting"],
}
RANGE = [
    f"--model.schedule.logsnr_{end}={value}"
    for end, value in zip(("min", "max"), ENDS, strict=True)
]
SCHEDULES = {
    "cosine": ["--model.schedule", "CosineSchedule", *RANGE],
    "uniform": ["--model.schedule", "LinearSchedule", *RANGE],
    "adaptive": [
        *("--model.schedule", "LinearSchedule", *RANGE),
        *("--config", str(CONFIGS / "with" / "adaptive.yaml")),
    ],
}
PREDICTIONS = {name: ["--model.prediction", f"{name}Prediction"] for name in ("Eps", "V", "EDM")}
DATA = {
    "digits": ["--data.steps_per_epoch", "100", "--trainer.max_steps", "1000"],
    "mnist": [
        *("--data.steps_per_epoch", "50", "--trainer.max_steps", "500"),
        *("--data.batch_size", "32", "--data.val_examples", "250"),
        *("--model.network.channels", "[8, 16, 16]", "--model.network.fourier", "[6, 7]"),
    ],
}
LEVELS = {"digits": 17, "mnist": 256}
SAMPLES = {"digits": 500, "mnist": 250}


class Judge(L.Callback):
    """Judges the average weights by the loss under every weighting of the tournament.

    Args:
        samples: Noise levels for each example, the same ones in every run.
    """

    def __init__(self, samples: int = 2) -> None:
        self.samples = samples
        self.curve: list[dict[str, float]] = []
        self._sums: dict[str, float] = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the sums."""
        self._sums = dict.fromkeys([*JUDGED, "examples"], 0.0)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Add a batch, in a hook where the average weights are in place."""
        x, index, total = batch["image"], batch["index"], int(batch["total"])
        for sample in range(self.samples):
            t = fixed_times(index, total, sample, self.samples)
            eps = noise_like(x, generators(0, f"judge {sample}", index.tolist()))
            terms = weighted_error(
                *(pl_module.denoiser, x, ld.LinearSchedule(*ENDS), ld.ELBOWeighting(), None),
                *(t, eps),
                **pl_module.condition(batch),
            )
            for name, weighting in JUDGED.items():
                self._sums[name] += float((weighting(terms.logsnr) * terms.loss).sum())
        self._sums["examples"] += len(x) * self.samples

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the curve so far."""
        n = self._sums.pop("examples")
        losses = {name: value / n for name, value in self._sums.items()}
        self.curve.append({"step": trainer.global_step, **losses})
        (Path(trainer.log_dir or ".") / "judge.json").write_text(json.dumps(self.curve))


def images(data: str, path: str, split: str, n: int) -> dict[str, torch.Tensor]:
    """The first images of a split, in [−1, 1], and their labels."""
    shape = (1, 8, 8) if data == "digits" else (1, 28, 28)
    module = DataModule(path, shape=shape, val_split=split, val_examples=n, batch_size=n)
    module.setup("validate")
    return module.on_after_batch_transfer(next(iter(module.val_dataloader())), 0)


def command(data: str, path: str, cell: tuple[str, str, str], seed: int) -> list[str]:
    """What to call `lit-diffusion` with for a run."""
    weighting, schedule, prediction = cell
    return [
        *("fit", "--config", str(CONFIGS / f"{data}.yaml")),
        *("--config", str(HERE / "objectives.yaml"), *DATA[data]),
        *WEIGHTINGS[weighting],
        *SCHEDULES[schedule],
        *PREDICTIONS[prediction],
        *("--data.path", path),
        *(f"--seed_everything={seed}", f"--model.seed={seed}", f"--data.seed={seed}"),
    ]


def run(job: tuple[str, str, tuple[str, str, str], int, Path]) -> None:
    """Train and judge one cell with one seed, unless that was done before."""
    data, path, cell, seed, out = job
    file = out / f"{data}_{'_'.join(cell)}_{seed}.json"
    if file.exists():
        return
    torch.set_num_threads(1)
    words = command(data, path, cell, seed)
    with tempfile.TemporaryDirectory() as root, (out / "log.txt").open("a") as log:
        sys.argv = ["lit-diffusion", *words, "--trainer.default_root_dir", root]
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            lit_diffusion()
        (folder,) = Path(root).glob("*/*")
        curve = json.loads((folder / "judge.json").read_text())
        model = LitDiffusion.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    test = images(data, path, "test", 500)
    judge = torch.load(out / f"{data}.pt", weights_only=False)
    with torch.no_grad():
        noise = generators(0, "sample", list(range(SAMPLES[data])))
        label = torch.arange(SAMPLES[data]) % 10
        samples = model.sample(len(noise), noise, label=label)
        right = float((judge(samples).argmax(1) == label).float().mean())
        distance = frechet(judge.features(samples), judge.features(test["image"]))
        batch = {"x": test["image"], "decoder": ld.SoftmaxDecoder(LEVELS[data])}
        schedule = ld.LinearSchedule(*ENDS)
        terms = variational_bound(ld.GaussianDenoiser(0.5), **batch, schedule=schedule)
    # No network changes these two.
    ends = float((terms.prior + terms.reconstruction).mean())
    result = {
        **{"data": data, "cell": cell, "seed": seed, "curve": curve, "ends": ends},
        **{"right": right, "Fréchet": distance, "command": " ".join(words)},
    }
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, ensure_ascii=False))
    unfinished.replace(file)
    print(data, *cell, seed, f"{curve[-1]['ELBO']:.4f} {distance:.3f} {right:.3f}", flush=True)


# The table ---------------------------------------------------------------------------------------


def ratio(a: list[float], b: list[float]) -> str:
    """Geometric mean of a over b, with its paired 95 % interval over seeds (Student's t)."""
    logs = torch.tensor([math.log(x / y) for x, y in zip(a, b, strict=True)], dtype=torch.float64)
    mean, n = float(logs.mean()), len(logs)
    if n < 2:
        return f"{math.exp(mean):.2f}"
    half = student(n - 1) * float(logs.std()) / math.sqrt(n)
    return f"{math.exp(mean):.2f} ({math.exp(mean - half):.2f}–{math.exp(mean + half):.2f})"


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution, to a percent."""
    few = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
    return few[freedom - 1] if freedom <= len(few) else 1.96 * (1 + 1.21 / freedom)


def steps_needed(curve: list[dict[str, float]], name: str, target: float) -> float | None:
    """Steps until a loss is as low as the target, straight between validations."""
    before = None
    for point in curve:
        if point[name] <= target:
            if before is None:
                return point["step"]
            share = (before[name] - target) / (before[name] - point[name])
            return before["step"] + share * (point["step"] - before["step"])
        before = point
    return None


def table(data: str, out: Path, seeds: int, baseline: float) -> str:
    """All cells as Markdown: what they reach, and how they compare."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for file in sorted(out.glob(f"{data}_*.json")):
        result = json.loads(file.read_text())
        if result["seed"] < seeds:
            found.setdefault(tuple(result["cell"]), []).append(result)

    def last(cell: tuple[str, ...], name: str) -> list[float]:
        return [result["curve"][-1][name] for result in found[cell]]

    lines = [
        "| weighting | prediction | schedule | bits/dim | loss under its weighting "
        "| over cosine's | over v's | steps to cosine's last "
        "| Fréchet over baseline | labels correct |",
        "|" + " --- |" * 10,
    ]
    for cell in sorted(found, key=lambda c: (c[0], c[2], list(SCHEDULES).index(c[1]))):
        weighting, schedule, prediction = cell
        results, own = found[cell], last(cell, cell[0])
        cosine, v = (weighting, "cosine", prediction), (weighting, schedule, "V")
        bits = [
            (x + r["ends"]) / math.log(2) for x, r in zip(last(cell, "ELBO"), results, strict=True)
        ]
        needed = [
            steps_needed(result["curve"], weighting, target)
            for result, target in zip(results, last(cosine, weighting), strict=True)
        ]
        reached = [n for n in needed if n is not None]
        whole = [results[0]["curve"][-1]["step"]] * len(results)
        many = f"reached in {len(reached)} of {len(needed)}"
        cells = [
            *(weighting, prediction, schedule),
            f"{torch.tensor(bits).mean():.3f}",
            f"{torch.tensor(own).mean():.4f}",
            "1" if schedule == "cosine" else ratio(own, last(cosine, weighting)),
            "1" if prediction == "V" or v not in found else ratio(own, last(v, weighting)),
            "1"
            if schedule == "cosine"
            else (ratio(reached, whole) if len(reached) == len(whole) else many),
            ratio([result["Fréchet"] for result in results], [baseline] * len(results)),
            f"{100 * sum(result['right'] for result in results) / len(results):.1f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", choices=list(DATA))
    parser.add_argument("--path", help="Of the data, where they are not shipped.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="Folder of results.")
    parser.add_argument("--workers", type=int, default=2, help="Runs at a time, a thread each.")
    for name, kinds in (("weighting", WEIGHTINGS), ("schedule", SCHEDULES)):
        parser.add_argument(f"--{name}s", nargs="+", choices=list(kinds), default=list(kinds))
    parser.add_argument("--predictions", nargs="+", default=list(PREDICTIONS))
    args = parser.parse_args()
    path = args.path or {"digits": "digits8x8", "mnist": "ylecun/mnist"}[args.data]
    out = Path(tempfile.mkdtemp()) if args.out is None else args.out
    out.mkdir(parents=True, exist_ok=True)
    train, test = (
        images(args.data, path, split, n) for split, n in (("train", 5000), ("test", 500))
    )
    classifier = out / f"{args.data}.pt"
    if not classifier.exists():
        torch.save(train_classifier(train["image"], train["label"]), classifier)
    judge = torch.load(classifier, weights_only=False)
    with torch.no_grad():
        baseline = frechet(judge.features(train["image"]), judge.features(test["image"]))
        right = float((judge(test["image"]).argmax(1) == test["label"]).float().mean())
    cells = list(product(args.weightings, args.schedules, args.predictions))
    jobs = [(args.data, path, cell, seed, out) for seed in range(args.seeds) for cell in cells]
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, fresh) as pool:
        list(pool.map(run, jobs))
    print(table(args.data, out, args.seeds, baseline))
    print(
        f"The classifier is correct on {100 * right:.1f} % of the test images; "
        f"baseline {baseline:.4f}."
    )


if __name__ == "__main__":
    main()
