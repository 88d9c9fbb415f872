"""The command `replay`: repeat a step whose loss or gradient was not finite.

    non_finite/step-N.json     the step: its examples, λ's, losses             written by `Guard`
               step-N.yaml     the config of the run
               start-S.ckpt    the last checkpoint before it, if there was one

Every step is a pure function of (seed, step, micro-batch, rank), and a run resumes from a
checkpoint bit for bit. So training from S, or from the beginning, reaches the same step N again,
where the output of every module and every gradient is checked. Nothing is written into the run's
folder.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar, Timer
from torch import Tensor, nn

from lit_diffusion.registry import subclasses
from lit_diffusion.training.callbacks.guard import Guard, account, gather, plain
from lit_diffusion.training.callbacks.likelihood import Likelihood
from lit_diffusion.training.commands.fit import DiffusionCLI
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.last_weights import Measures
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.folder import is_first_rank

__all__ = ["Replay", "Witness", "replay"]

ROWS = 24  # examples in the table, non-finite ones first
NAMES = 5  # parameters that are named


class Reached(Exception):  # noqa: N818
    """Raised when the step is reached, with what was recorded there."""

    def __init__(self, seen: dict[str, Any]) -> None:
        super().__init__("The step is reached.")
        self.seen = seen


class Witness(L.Callback):
    """Checks every module and gradient in one step, then raises `Reached` to end the run.

    Args:
        step: The step, counted from 0.
        world_size: Number of ranks of the run.

    Raises:
        ValueError: If the number of ranks differs.
    """

    def __init__(self, step: int, world_size: int) -> None:
        self.step = step
        self.world_size = world_size
        self._module: dict[str, Any] | None = None
        self._batches: list[dict[str, Any]] = []
        self._images: list[int] = []
        self._gradients: list[str] = []
        self._parameters = 0
        self._hooks: list[Any] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reject another number of ranks, since the noise depends on the rank."""
        if trainer.world_size != self.world_size:
            raise ValueError(
                f"Expected {self.world_size} rank(s), as in the run, for the replay, got "
                f"{trainer.world_size}: start it like the run, for example with `torchrun "
                f"--nproc-per-node {self.world_size} -m lit_diffusion replay FILE`."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From the step on, check the data and watch every module."""
        if trainer.global_step < self.step:
            return
        batch = pl_module.standard(batch)  # type: ignore[operator]
        bad = ~batch["image"].flatten(1).isfinite().all(1)
        index = batch.get("index", torch.arange(len(bad), device=bad.device))
        self._images += index[bad].tolist()
        if self._hooks:
            return
        self._hooks = [
            module.register_forward_hook(self._hook(name))
            for name, module in pl_module.named_modules()
            if name
        ]

    def _hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            # Hooks run from the inside out, so the first one is the origin.
            if self._module is None and not all(map(_finite, _tensors(output))):
                kind = type(module).__name__
                fed = all(map(_finite, _tensors(inputs)))
                self._module = {"name": name, "kind": kind, "finite_inputs": fed}

        return look

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check every gradient, before it is clipped or dropped."""
        if trainer.global_step == self.step:
            gradients = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
            self._parameters = len(gradients)
            self._gradients = [name for name, g in gradients.items() if not _finite(g)]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Record the micro-batch; end the run after the last one of the step."""
        if not self._hooks:
            return
        self._batches.append(plain(account(outputs, batch)))
        if trainer.global_step > self.step:
            for hook in self._hooks:
                hook.remove()
            mine = {
                "batches": self._batches,
                "images": self._images,
                "module": self._module,
                "gradients": self._gradients,
                "parameters": self._parameters,
            }
            ranks = gather(trainer, mine)
            batches = [
                {"rank": rank, "micro_batch": micro, **batch}
                for rank, seen in enumerate(ranks)
                for micro, batch in enumerate(seen["batches"])
            ]
            raise Reached({"ranks": ranks, "batches": batches})


class Replay(NamedTuple):
    """Whether the step was reproduced, and the report."""

    reproduced: bool
    report: str  # "" on all ranks but the first

    def __str__(self) -> str:
        return self.report


def replay(
    file: str | Path,
    config: str | Path | None = None,
    model_class: type[LitDiffusion] = LitDiffusion,
    data_class: type[DataModule] = DataModule,
) -> Replay:
    """Repeat a training step whose loss or gradient was not finite, and locate the cause.

    Args:
        file: non_finite/step-….json of a run.
        config: A config over that of the run, with the addresses whose secrets are masked there.
        model_class: The class of the model that was trained.
        data_class: The class of its data.

    Raises:
        ValueError: If the file, its config or its checkpoint is missing or damaged.
    """
    path = Path(file)
    record = _read(path)
    os.environ["WANDB_MODE"] = "disabled"
    start = None if record["checkpoint"] is None else path.parent / record["checkpoint"]
    if start is not None and not start.is_file():
        raise UsageError(f"expected {start} next to {path.name}, but it does not exist.")
    with tempfile.TemporaryDirectory() as folder:
        experiment = _rehearsal(path, record, start, folder)
        recorded = Path(folder) / "config.yaml"
        recorded.write_text(yaml.safe_dump(experiment))
        words = ["fit", "--config", str(recorded)]
        words += [] if config is None else ["--config", str(config)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint")
            warnings.filterwarnings(
                "ignore", message=".*checkpoint directory .* exists and is not"
            )
            try:
                DiffusionCLI(model_class, data_class, args=words)
            except Reached as reached:
                seen = reached.seen
            else:
                raise UsageError(f"the run ended before step {record['step']}.")
    if not is_first_rank():
        return Replay(True, "")  # if a rank failed, a launcher would kill rank 0
    verdict, same = _verdict(record, seen)
    begin = "the beginning" if start is None else start.name
    head = f"Step {record['step']} from {begin}; not finite: {record['not_finite']}."
    lines = [head, "", *_table(seen["batches"]), "", *_causes(seen), verdict]
    return Replay(same, "\n".join(lines))


def _read(path: Path) -> dict[str, Any]:
    """The file of a step, and its config."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}; expected non_finite/step-….json of a run.")
    try:
        record = json.loads(path.read_text())
        known = {"step", "batches", "checkpoint", "config", "world_size", "not_finite"}
        if missing := known - set(record):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} was not written by Guard: {error}.") from error
    if record["config"] is None:
        raise UsageError(
            f"{path} was written by a Python program and has no config: expected that of a run "
            f"of `lit-diffusion fit`; in Python, add Witness({record['step']}, "
            f"{record['world_size']}) to the callbacks and fit from its checkpoint."
        )
    return record


def _rehearsal(
    path: Path, record: dict[str, Any], start: Path | None, folder: str
) -> dict[str, Any]:
    """The run's config, without validation, measurements, logging, checkpoints, early stopping."""
    config: dict[str, Any] = yaml.safe_load((path.parent / record["config"]).read_text())
    config["ckpt_path"] = None if start is None else str(start)
    # A guard that skipped earlier steps must skip them again.
    bases = (Checkpoint, EarlyStopping, Guard, Likelihood, Measures, ProgressBar, Timer)
    left_out = {cls.__name__ for base in bases for cls in (base, *subclasses(base))}
    trainer = config["trainer"]
    callbacks = trainer["callbacks"] or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    stay = [c for c in callbacks if c["class_path"].rpartition(".")[2] not in left_out]
    guard = {
        "class_path": f"{Guard.__module__}.{Guard.__name__}",
        "init_args": {"on_non_finite": "skip", "max_skips": record["step"] + 1},
    }
    witness = {
        "class_path": f"{Witness.__module__}.{Witness.__name__}",
        "init_args": {"step": record["step"], "world_size": record["world_size"]},
    }
    trainer |= {
        "callbacks": [witness, *stay, guard],
        "logger": None,
        "default_root_dir": folder,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "max_time": None,
    }
    return config


# The report ------------------------------------------------------------------------------------


def _rows(batches: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """(rank, micro-batch, example, λ, loss) of each example."""
    rows = []
    for batch in batches:
        known = [batch[name] for name in ("examples", "logsnr", "losses")]
        n = max((len(values) for values in known if values is not None), default=0)
        columns = [[None] * n if values is None else values for values in known]
        place = batch["rank"], batch["micro_batch"]
        rows += [(*place, *row) for row in zip(*columns, strict=True)]
    return rows


def _verdict(record: dict[str, Any], seen: dict[str, Any]) -> tuple[str, bool]:
    """Whether the step was reproduced, as a sentence and as a boolean."""
    before, now = _rows(record["batches"]), _rows(seen["batches"])
    words = {
        "examples": ([row[:3] for row in before], [row[:3] for row in now]),
        "λ's": ([row[3] for row in before], [row[3] for row in now]),
        "non-finite losses": (
            [isinstance(row[4], str) for row in before],
            [isinstance(row[4], str) for row in now],
        ),
        "state of the gradient": (
            "gradient" in record["not_finite"],
            any(rank["gradients"] for rank in seen["ranks"]),
        ),
    }
    other = [word for word, (one, two) in words.items() if one != two]
    if not other:
        same = "the same examples, bitwise the same λ's, the same non-finite losses and gradient"
        return f"Reproduced: {same}.", True
    place = f"{record.get('device')} with torch {record.get('torch')}"
    return f"Not reproduced: {', '.join(other)} differ. The run was on {place}.", False


def _table(batches: list[dict[str, Any]]) -> list[str]:
    """One line per example, non-finite ones first."""
    rows = sorted(_rows(batches), key=lambda row: not isinstance(row[4], str))
    lines = [f"{'rank':>6}{'part':>6}{'example':>10}{'λ':>14}{'loss':>14}"]
    for rank, micro, example, logsnr, loss in rows[:ROWS]:
        name = "?" if example is None else example
        numbers = [("?" if x is None else f"{float(x):.6g}") for x in (logsnr, loss)]
        bad = "   not finite" if isinstance(loss, str) else ""
        lines.append(f"{rank:>6}{micro:>6}{name:>10}{numbers[0]:>14}{numbers[1]:>14}{bad}")
    if len(rows) > ROWS:
        rest = sum(isinstance(row[4], str) for row in rows[ROWS:])
        lines.append(f"… and {len(rows) - ROWS} more, {rest} of them not finite")
    return lines


def _causes(seen: dict[str, Any]) -> list[str]:
    """Where the first non-finite value appears: module and gradients."""
    lines = []
    for rank, one in enumerate(seen["ranks"]):
        of = f" on rank {rank}" if len(seen["ranks"]) > 1 else ""
        if one["images"]:
            named = ", ".join(map(str, one["images"][:NAMES]))
            lines.append(f"Non-finite images{of}: examples {named}.")
        if one["module"] is None:
            lines.append(f"The output of every module is finite{of}.")
        else:
            fed = "finite inputs"
            if not one["module"]["finite_inputs"]:
                fed = "inputs that are not finite either"
            lines.append(
                f"First module with non-finite output{of}: {one['module']['name']} "
                f"({one['module']['kind']}), with {fed}."
            )
    names = seen["ranks"][0]["gradients"]  # the mean over all ranks
    if names:
        more = f", … and {len(names) - NAMES} more" if len(names) > NAMES else ""
        lines.append(
            f"Non-finite gradients: {len(names)} of {seen['ranks'][0]['parameters']}: "
            f"{', '.join(names[:NAMES])}{more}."
        )
    else:
        lines.append("Every gradient is finite.")
    return lines


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in the inputs or outputs of a module."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())
