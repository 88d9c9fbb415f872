"""The command `evaluate`: FID and other scores of a checkpoint, and bits per dimension.

    checkpoint → samples, for each sampler, number of steps and seed → scores against the data
               → bits per dimension of the data

It writes evaluation.json with every value and its protocol, and evaluation.md with the tables.
The settings of the run's own `FID` and `Likelihood` are the defaults, so that without further
arguments it repeats the measurements of the training run.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from lit_diffusion.samplers import Sampler
from lit_diffusion.training.callbacks.likelihood import Likelihood
from lit_diffusion.training.commands.sample import NO_GUIDANCE
from lit_diffusion.training.commands.shell.choices import (
    find_device,
    resolve_checkpoint,
    run_of,
)
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.commands.shell.experiment import (
    callback_arguments,
    evaluation_defaults,
    own_data,
    read_experiment,
)
from lit_diffusion.training.commands.shell.load import load_model
from lit_diffusion.training.commands.shell.parsing import instantiate
from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.evaluation.comparison import (
    Comparison,
    SamplerScores,
    refuse_other_kinds,
)
from lit_diffusion.training.evaluation.features import InceptionFeatures, fingerprint
from lit_diffusion.training.evaluation.generation import Generation
from lit_diffusion.training.evaluation.record import make_record, write_record
from lit_diffusion.training.evaluation.row_conditions import check_enough
from lit_diffusion.training.evaluation.scores import all_scores
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.reporting.write import write_report
from lit_diffusion.training.run.measurements import Measurement, add_measurements
from lit_diffusion.training.step.compilation import compile_in_place

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    """Scores of the samples and bits per dimension of the data, and the folder that holds them."""

    rows: list[SamplerScores]
    bound: list[Measurement]
    baseline: float | None  # Fréchet distance of real images of the baseline split
    tables: str
    folder: Path

    def __str__(self) -> str:
        return f"{self.tables}\nWritten to {self.folder}"


class _Model(NamedTuple):
    """The model that is evaluated, and where it comes from."""

    model: LitDiffusion
    checkpoint: Path
    step: int
    weights: str
    run: Path | None  # the run folder, if the checkpoint lies in one


class _Settings(NamedTuple):
    """How samples are made and what they are compared with; see `evaluate`."""

    num_samples: int
    features: nn.Module | None
    split: str
    baseline_split: str | None
    reference_hash: str | None
    samplers: list[Sampler] | None
    steps: list[int] | None
    seeds: list[int]
    guidance: float
    guidance_interval: tuple[float, float] | None
    batch_size: int


def evaluate(
    ckpt_path: str | Path,
    name: str | None = None,
    root: str | Path | None = None,
    config: str | Path | None = None,
    num_samples: int | None = None,
    features: nn.Module | None = None,
    split: str | None = None,
    baseline_split: str | None = None,
    reference_hash: str | None = None,
    samplers: list[Sampler] | None = None,
    steps: list[int] | None = None,
    seeds: list[int] | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | Literal["none"] | None = None,
    batch_size: int | None = None,
    bound: bool = True,
    out: str | Path | None = None,
    device: str = "auto",
    compile: bool = False,
    likelihood: Likelihood | None = None,
    data: DataModule | None = None,
) -> Evaluation:
    """Evaluate a checkpoint: FID and other scores of its samples, and bits per dimension.

    Args:
        ckpt_path: The checkpoint: a file, a run folder, or `last` for that of the newest run.
        name: With `last`: only runs of this name.
        root: With `last`: the folder of all runs; runs/ by default.
        config: The config that describes the data; the run's own by default.
        num_samples: Number of samples per seed; by default that of the run's FID, or 50,000.
        features: Feature network; by default that of the run's FID, or Inception.
        split: Reference split; by default that of the run's FID, or train.
        baseline_split: Split of real images whose distance is reported as the baseline; by
            default that of the run's FID; "none" for none.
        reference_hash: Expected prefix of the reference's hash; by default that of the run's FID;
            "none" for no check.
        samplers: Samplers to compare, such as '[DDIMSampler, HeunSampler]'; the model's own by
            default.
        steps: Numbers of steps of each sampler, such as [5, 10, 50]; its own by default.
        seeds: One set of samples per seed; the standard deviation over them is reported. By
            default the seed of the run's FID.
        guidance: Scale of classifier-free guidance, 1 for none; by default that of the run's FID.
        guidance_interval: Guide only where low ≤ λ ≤ high; by default that of the run's FID;
            "none" for everywhere.
        batch_size: Images per batch; by default that of the run's FID, or 256.
        bound: Whether to measure bits per dimension of the validation split as well.
        out: A folder for the results; RUN/evaluation by default.
        device: auto, cpu, cuda, cuda:1, mps.
        compile: Whether to compile the network, which pays off for many samples on a GPU.
        likelihood: How the bound is measured; by default as by the run's Likelihood.
        data: The data; the run's own by default.

    Raises:
        ValueError: If the checkpoint or its data cannot be found, or an argument is invalid.
    """
    path = resolve_checkpoint(ckpt_path, name, root)
    run = run_of(path)
    experiment = read_experiment(config, run)
    settings = _settings(
        experiment,
        num_samples=num_samples,
        features=features,
        split=split,
        baseline_split=baseline_split,
        reference_hash=reference_hash,
        samplers=samplers,
        steps=steps,
        seeds=seeds,
        guidance=guidance,
        guidance_interval=guidance_interval,
        batch_size=batch_size,
    )
    _check(settings, out)
    data = data or own_data(experiment, path)
    refuse_other_kinds(data)
    measure = likelihood or instantiate(Likelihood, callback_arguments(experiment, "Likelihood"))
    subject = _load(path, run, device, data)
    if compile:
        compile_in_place(subject.model, subject.model.device)
    comparison, rows = _compare(subject, data, settings)
    bits = _bound(subject, data, measure) if bound else []
    hashed = fingerprint(subject.model.denoiser)
    record = make_record(_checkpoint(subject), subject.weights, hashed, comparison, rows, bits)
    folder = Path(out) if out else (run or Path()) / "evaluation"
    tables = write_record(folder, record)
    if run is not None:
        measured = (one for row in rows for one in row.measurements(subject.step))
        add_measurements(run, [*measured, *bits])
        if (run / "report.html").is_file():
            write_report(run)
    return Evaluation(rows, bits, comparison.baseline, tables, folder)


def _settings(experiment: dict[str, Any], **given: Any) -> _Settings:
    """The given settings; None stands for the experiment's own, "none" for none."""
    found = evaluation_defaults(experiment)
    found |= {name: value for name, value in given.items() if value is not None}
    found = {name: None if value == "none" else value for name, value in found.items()}
    if isinstance(found["features"], (str, dict)):
        found["features"] = instantiate(nn.Module, found["features"])
    return _Settings(**{"samplers": None, "steps": None} | found)


def _check(settings: _Settings, out: str | Path | None) -> None:
    """Reject arguments that are wrong for any checkpoint, before one is read."""
    if settings.num_samples < 2 or settings.batch_size < 1:
        raise UsageError(
            "--num_samples must be at least 2 and --batch_size 1, "
            f"got {settings.num_samples} and {settings.batch_size}."
        )
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        raise UsageError(f"--seeds must be different numbers, at least one, got {settings.seeds}.")
    if settings.steps is not None and (not settings.steps or min(settings.steps) < 1):
        raise UsageError(f"--steps must be numbers of at least 1, got {settings.steps}.")
    if settings.samplers is not None and not settings.samplers:
        raise UsageError("--samplers must name at least one, got none.")
    if settings.guidance_interval is not None and settings.guidance == 1:
        raise UsageError(NO_GUIDANCE)
    if out is not None and (Path(out).is_file() or Path(out).suffix):
        raise UsageError(f"--out must be a folder, got {out}.")


def _load(path: Path, run: Path | None, device: str, data: DataModule) -> _Model:
    """The model of a checkpoint, if it can be evaluated on these data."""
    model = load_model(path, find_device(device))
    model.keys = None  # the data are those of DataModule, whatever it was trained on
    if model.shape != tuple(data.shape):
        raise UsageError(
            f"expected data of the model's shape {model.shape}, got "
            f"{tuple(data.shape)}: give the --config or --data.shape of its run."
        )
    model.expect(data)
    return _Model(model, path, model.trained_steps, model.weights, run)


def _with_steps(sampler: Sampler, steps: int) -> Sampler:
    replaced: Sampler = dataclasses.replace(sampler, steps=steps)  # type: ignore[type-var]
    return replaced


def _generations(settings: _Settings, model: LitDiffusion) -> Iterator[Generation]:
    """One for each sampler and number of steps."""
    for sampler in settings.samplers or [model.sampler]:
        for steps in settings.steps or [sampler.steps]:
            yield Generation(
                settings.num_samples,
                sampler if steps == sampler.steps else _with_steps(sampler, steps),
                settings.guidance,
                settings.guidance_interval,
                batch_size=settings.batch_size,
            )


# Measuring ------------------------------------------------------------------------------------


def _compare(
    subject: _Model, data: DataModule, settings: _Settings
) -> tuple[Comparison, list[SamplerScores]]:
    """Compute all scores that the feature network allows, for every way of sampling."""
    subject.model.check_guidance(settings.guidance)
    if subject.model.conditions:
        check_enough(data, data.train_split, settings.num_samples)
    network = settings.features or InceptionFeatures()
    some = next(iter(data.examples(settings.split, batch_size=1)))["image"]
    comparison = Comparison.open(
        subject.model,
        data,
        network,
        settings.split,
        all_scores(network, some),
        settings.baseline_split,
        settings.reference_hash,
    )
    rows = [
        comparison.repeat(subject.model, generation, settings.seeds, subject.weights)
        for generation in _generations(settings, subject.model)
    ]
    return comparison, rows


@torch.inference_mode()
def _bound(subject: _Model, data: DataModule, likelihood: Likelihood) -> list[Measurement]:
    """Bits per dimension of the validation split, as the run's `Likelihood` measures them."""
    if data.val_split is None:
        return []
    data.setup("validate")
    data.settle_normalization(subject.model)
    total = torch.zeros(5, dtype=torch.float64)
    decoder = likelihood.settings(subject.model).decoder
    for i, batch in enumerate(
        tqdm(data.val_dataloader(), desc="bound", leave=False, disable=None)
    ):
        moved = {
            key: value.to(subject.model.device) if torch.is_tensor(value) else value
            for key, value in batch.items()
        }
        moved = data.on_after_batch_transfer(moved, 0)
        if i == 0:
            decoder.check(moved["image"])
        total += likelihood.sums(subject.model, moved).cpu()
    if total[-1] == 0:  # the data have no such split, as a warning has said
        return []
    return likelihood.measurements(
        subject.model, total, subject.step, "evaluate", subject.weights, data
    )


def _checkpoint(subject: _Model) -> dict[str, Any]:
    """Which file was evaluated, for the record."""
    with subject.checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # <name>/<time>/checkpoints/<file> of a run, and no folder of this machine
    name = "/".join(subject.checkpoint.parts[-4 if subject.run else -1 :])
    return {"file": name, "sha256": digest, "step": subject.step}
