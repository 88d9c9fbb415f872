"""The command `lit-diffusion evaluate`: what a checkpoint is worth, measured as papers do.

    checkpoint → samples, for each sampler, number of steps and seed → scores against the data
               → bits per dimension of the data

Two files come of it: evaluation.json with every value and its protocol, and evaluation.md with
the tables. The settings of the run's own `FID` and `Likelihood` are the defaults, so that without
further words the command repeats what training logged.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from lit_diffusion.samplers import Sampler
from lit_diffusion.training.callbacks.likelihood import Likelihood
from lit_diffusion.training.commands.parsing import (
    DiffusionParser,
    fail,
    find_checkpoint,
    find_device,
)
from lit_diffusion.training.compilation import compile_in_place
from lit_diffusion.training.data.module import ImageDataModule
from lit_diffusion.training.evaluation import scores
from lit_diffusion.training.evaluation.features import InceptionFeatures, fingerprint
from lit_diffusion.training.evaluation.generation import Generation, refuse_conditions
from lit_diffusion.training.evaluation.reference import Reference, class_shares, open_reference
from lit_diffusion.training.evaluation.tables import VERSION, SamplerScores, markdown, plot_scores
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.reporting.write import write_report
from lit_diffusion.training.run.checkpoints import load_checkpoint, write_whole
from lit_diffusion.training.run.figures import save_figure
from lit_diffusion.training.run.measurements import Measurement, add_measurements, versions
from lit_diffusion.training.run.weights import weights_name

__all__ = ["evaluate"]

SCORES = (
    scores.kernel_distance,
    scores.inception_score,
    scores.precision_recall,
    scores.density_coverage,
)


class _Model(NamedTuple):
    """What is evaluated, and where it comes from."""

    model: LitDiffusion
    checkpoint: Path
    step: int
    weights: str
    run: Path | None  # the run folder, if the checkpoint lies in one


def evaluate(argv: list[str], data_class: type[ImageDataModule] = ImageDataModule) -> str:
    """Measure a checkpoint; return the tables as text.

    Args:
        argv: The command line after `evaluate`.
        data_class: The data, ImageDataModule or a subclass of it.
    """
    # The run's own settings are the defaults, so the run must be known before the rest is parsed.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for word, otherwise in (("--ckpt_path", None), ("--name", "*"), ("--config", None)):
        first.add_argument(word, default=otherwise)
    known, _ = first.parse_known_args(argv)
    path = None if known.ckpt_path is None else find_checkpoint(known.ckpt_path, known.name)
    run = None if path is None else _run_folder(path)
    experiment = _experiment(known.config, run)
    if (
        path is not None
        and path.is_file()
        and not experiment
        and not any(w.startswith("--data.p") for w in argv)
    ):
        fail(
            f"{path} does not lie in a run folder, and does not say which data it was trained on: "
            "give --config with that of its run, or --data.path."
        )

    parser = _parser(data_class, experiment)
    config = parser.parse_args(argv)
    if path is None:
        fail("evaluate needs a checkpoint: give --ckpt_path, which may be `last`.")
    _check(config)
    data = data_class(**vars(config.data))
    parts = parser.instantiate_classes(config)
    subject = _load(path, run, config.device)
    refuse_conditions(subject.model)
    if config.compile:
        compile_in_place(subject.model, subject.model.device)
    if subject.model.image_shape != tuple(data.image_shape):
        fail(
            f"expected data of the model's shape {subject.model.image_shape}, got "
            f"{tuple(data.image_shape)}: is --config, or --data.image_shape, that of its run?"
        )
    network = (parts.features or InceptionFeatures()).to(subject.model.device).eval()

    reference = open_reference(
        data, config.split, network, subject.model.device, True, config.reference_hash
    )
    shares = None
    if subject.model.num_classes is not None:
        shares = class_shares(data, reference, network, subject.model.device)
    floor = None
    if config.baseline_split is not None:
        other = open_reference(data, config.baseline_split, network, subject.model.device)
        floor = scores.frechet_distance(other, reference)
    others = SCORES if _names_classes(network, data) else (SCORES[0], *SCORES[2:])
    rows = [
        _row(subject, network, reference, shares, others, generation, config.seeds)
        for generation in _generations(config, parts.samplers, subject.model)
    ]
    bound = _bound(subject, data, parts.likelihood) if config.bound else []

    out = Path(config.out) if config.out else (run or Path()) / "evaluation"
    text = _write(out, subject, reference, floor, rows, bound)
    if run is not None:
        add_measurements(run, [*_measurements(rows, subject), *bound])
        if (run / "report.html").is_file():
            write_report(run)
    return f"{text}\nWritten to {out}"


# What is asked --------------------------------------------------------------------------------


def _parser(data_class: type[ImageDataModule], experiment: dict[str, Any]) -> DiffusionParser:
    """The arguments, with the run's own settings as their defaults."""
    parser = DiffusionParser(
        prog="lit-diffusion evaluate",
        description="Measure a checkpoint: distances from the data, and bits per dimension.",
    )
    fid = _callback(experiment, "FID")
    parser.add_argument("--ckpt_path", type=str, help="The checkpoint; `last`: newest in runs/.")
    parser.add_argument("--name", type=str, default="*", help="With `last`: runs of this name.")
    parser.add_argument(
        "--config", type=str, help="Where the data are described; the run's own by default."
    )
    parser.add_argument(
        "--num_samples",
        type=int,
        default=fid.get("num_samples", 50_000),
        help="How many images, for each seed; the run's FID's, else 50,000.",
    )
    parser.add_subclass_arguments(
        nn.Module,
        "features",
        required=False,
        default=fid.get("features"),
        help="Network that images are compared by; the run's FID's, else Inception.",
    )
    parser.add_argument(
        "--split", type=str, default=fid.get("split", "train"), help="Split to compare with."
    )
    parser.add_argument(
        "--baseline_split",
        type=str | None,
        default=fid.get("baseline_split"),
        help="Split of real images whose own distance is shown beside.",
    )
    parser.add_argument(
        "--reference_hash",
        type=str | None,
        default=fid.get("reference_hash"),
        help="What the reference's hash must begin with.",
    )
    parser.add_argument(
        "--samplers",
        type=list[Sampler] | None,
        default=None,
        help="Samplers to compare, such as '[DDIMSampler, HeunSampler]'; the model's own.",
    )
    parser.add_argument(
        "--steps", type=list[int] | None, default=None, help="Their steps, such as [5, 10, 50]."
    )
    parser.add_argument(
        "--seeds",
        type=list[int],
        default=[fid.get("seed", 0)],
        help="A set of samples for each; the scatter over them is shown.",
    )
    parser.add_argument(
        "--guidance", type=float, default=fid.get("guidance", 1.0), help="Strength; 1 for none."
    )
    parser.add_argument(
        "--guidance_interval",
        type=tuple[float, float] | None,
        default=fid.get("guidance_interval"),
        help="Guide only for λ within.",
    )
    parser.add_argument(
        "--batch_size", type=int, default=fid.get("batch_size", 256), help="Images at a time."
    )
    parser.add_argument(
        "--bound", type=bool, default=True, help="Also bits per dimension of data.val_split."
    )
    parser.add_argument("--out", type=str | None, help="A folder; RUN/evaluation by default.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps.")
    parser.add_argument(
        "--compile", type=bool, default=False, help="Compile the network: for many, on a GPU."
    )
    parser.add_argument("--plugins", type=list[str] | str, default=[], help="As for fit.")
    parser.add_class_arguments(Likelihood, "likelihood")
    parser.add_lightning_class_args(data_class, "data")
    own = {"data": experiment.get("data") or {}, "likelihood": _callback(experiment, "Likelihood")}
    for group, values in own.items():
        parser.set_defaults({f"{group}.{key}": value for key, value in values.items()})
    return parser


def _check(config: Any) -> None:
    """Refuse what cannot be measured before anything is read."""
    if config.num_samples < 2 or config.batch_size < 1:
        fail(
            "--num_samples must be at least 2 and --batch_size 1, "
            f"got {config.num_samples} and {config.batch_size}."
        )
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        fail(f"--seeds must be different numbers, at least one, got {config.seeds}.")
    if config.steps is not None and (not config.steps or min(config.steps) < 1):
        fail(f"--steps must be numbers of at least 1, got {config.steps}.")
    if config.samplers is not None and not config.samplers:
        fail("--samplers must name at least one, got none.")
    if config.guidance_interval is not None and config.guidance == 1:
        fail("--guidance_interval says where to guide, and --guidance 1 is none: give --guidance.")
    out = None if config.out is None else Path(config.out)
    if out is not None and (out.is_file() or out.suffix):
        fail(f"--out must be a folder, got {out}.")


def _run_folder(path: Path) -> Path | None:
    folder = path.parent.parent
    return folder if path.parent.name == "checkpoints" and folder.is_dir() else None


def _experiment(given: str | None, run: Path | None) -> dict[str, Any]:
    """The config of the experiment: the one that is named, else the run's own, else none."""
    path = Path(given) if given else None if run is None else run / "config.yaml"
    if path is None or (not given and not path.is_file()):
        return {}
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        fail(f"--config {path} cannot be read: {error}")
    if not isinstance(found, dict):
        fail(f"--config {path} holds no config.")
    return found


def _callback(experiment: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments of one of the run's callbacks, empty if it has none of that name."""
    trainer = experiment.get("trainer") or {}
    for entry in [*(trainer.get("callbacks") or []), *(trainer.get("callbacks+") or [])]:
        entry = {"class_path": entry} if isinstance(entry, str) else entry
        if entry["class_path"].rpartition(".")[2] == name:
            return dict(entry.get("init_args") or {})
    return {}


def _load(path: Path, run: Path | None, device: str) -> _Model:
    checkpoint = load_checkpoint(path)
    model = LitDiffusion.load_from_checkpoint(path).to(find_device(device))
    return _Model(model, path, checkpoint["global_step"], weights_name(checkpoint), run)


def _names_classes(network: nn.Module, data: ImageDataModule) -> bool:
    """Whether the feature network also returns logits, which the Inception Score needs."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    blank = torch.zeros(1, *data.image_shape, dtype=torch.uint8, device=device)
    return scores.extract(network, blank).logits is not None


def _generations(
    config: Any, samplers: list[Sampler] | None, model: LitDiffusion
) -> Iterator[Generation]:
    """One for each sampler and number of steps."""
    own = samplers or [model.sampler]
    for sampler in own:
        for steps in config.steps or [sampler.steps]:
            walk = sampler if steps == sampler.steps else dataclasses.replace(sampler, steps=steps)
            yield Generation(
                config.num_samples,
                walk,
                config.guidance,
                config.guidance_interval,
                batch_size=config.batch_size,
            )


# What is measured -----------------------------------------------------------------------------


def _row(
    subject: _Model,
    network: nn.Module,
    reference: Reference,
    shares: Tensor | None,
    others: Any,
    generation: Generation,
    seeds: list[int],
) -> SamplerScores:
    """The scores of one way of drawing, for each seed."""
    sampler = subject.model.walk(generation.sampler)
    found = []
    for seed in seeds:
        judge = scores.Scores(network, reference, others)
        what = f"{type(sampler).__name__} {sampler.steps}, seed {seed}"
        batches = dataclasses.replace(generation, seed=seed).sample(subject.model, shares)
        with tqdm(total=generation.num_samples, desc=what, leave=False, disable=None) as bar:
            for batch in batches:
                judge.add(batch)
                bar.update(len(batch.index))
        found.append(judge.compute())
    protocol = {
        "reference": reference.protocol,
        **generation.protocol(subject.model),
        "weights": subject.weights,
        "versions": versions(),
    }
    del protocol["seed"]  # one of several, which the row has
    return SamplerScores(
        sampler=type(sampler).__name__,
        steps=sampler.steps,
        calls=protocol["network calls"],
        seeds=seeds,
        scores={name: [one[name] for one in found] for name in found[0]},
        protocol=protocol,
    )


@torch.inference_mode()
def _bound(subject: _Model, data: ImageDataModule, likelihood: Likelihood) -> list[Measurement]:
    """Bits per dimension of the validation split, as the run's `Likelihood` measures them."""
    if data.val_split is None:
        return []
    data.setup("validate")
    total = torch.zeros(5, dtype=torch.float64)
    decoder = likelihood.protocol(subject.model)["decoder"]
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
    return likelihood.measurements(subject.model, total, subject.step, "evaluate", subject.weights)


def _measurements(rows: list[SamplerScores], subject: _Model) -> Iterator[Measurement]:
    for row in rows:
        for name, one in row.scores.items():
            mean, scatter = row.mean(name)
            protocol = row.protocol | one[0].protocol | {"seed": row.seeds[0]}
            if len(one) > 1:
                del protocol["seed"]
                protocol |= {"seeds": row.seeds, "error": "deviation over the seeds"}
            yield Measurement(name, mean, scatter, subject.step, "evaluate", protocol)


# What is written ------------------------------------------------------------------------------


def _write(
    out: Path,
    subject: _Model,
    reference: Reference,
    floor: float | None,
    rows: list[SamplerScores],
    bound: list[Measurement],
) -> str:
    """evaluation.json, .md and, if there is a curve to draw, .png; returns the tables."""
    with subject.checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = {
        "version": VERSION,
        "checkpoint": {
            # <name>/<time>/checkpoints/<file> of a run, and no folder of this machine
            "file": "/".join(subject.checkpoint.parts[-4 if subject.run else -1 :]),
            "sha256": digest,
            "step": subject.step,
        },
        "weights": subject.weights,
        "weights hash": fingerprint(subject.model.denoiser),
        "reference": reference.protocol,
        "floor": floor,
        "scores": [row.plain() for row in rows],
        "bound": [one._asdict() for one in bound],
    }
    text = markdown(record)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "evaluation.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if len({row.calls for row in rows}) > 1:
        save_figure(plot_scores(rows, floor), out / "evaluation.png")
        text += "\n![Fréchet distance against network calls](evaluation.png)\n"
    else:
        (out / "evaluation.png").unlink(missing_ok=True)  # of an earlier sweep
    write_whole(out / "evaluation.md", text)
    return text
