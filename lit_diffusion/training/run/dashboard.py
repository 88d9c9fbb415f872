"""Weights & Biases: a view of the run folder, whose failure never ends a run.

    trainer, callbacks → Dashboard.log_… → queue → one thread → W&B's own process → disk or network

Everything that W&B shows of a run is in the run folder as well. So a failure of W&B, at any time,
costs one warning and the rest of the display, but not the run. A call may also hang, if W&B's own
process does; hence the thread, for which training does not wait.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image

from lit_diffusion.training.lightning_internals import logged_step, wandb_process
from lit_diffusion.training.run.messages import inform, warn
from lit_diffusion.training.run.secrets import masked, without_secrets

__all__ = ["Dashboard", "show"]

#: Whether the user chose where W&B keeps tables until they are sent; else it is the run folder.
DATA_DIR_IS_GIVEN = "WANDB_DATA_DIR" in os.environ


def show(trainer: Trainer, name: str, path: Path, note: str = "") -> None:
    """Log a picture of the run folder with every logger that takes pictures.

    Its step is that of the row being logged, so that it appears beside the numbers of that step.

    Args:
        trainer: Has the loggers.
        name: The name of the panel.
        path: The picture.
        note: The end of its caption.
    """
    step = logged_step(trainer)
    caption = f"after {trainer.global_step} steps" + (f"; {note}" if note else "")
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(name, [str(path)], step=step, caption=[caption])
        elif isinstance(logger, TensorBoardLogger):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")


def _attempted(method: Callable[..., Any]) -> Callable[..., None]:
    """Wrap a method of WandbLogger so that its failure disables W&B and nothing else."""

    @functools.wraps(method)
    def attempt(self: Dashboard, *args: Any, **kwargs: Any) -> None:
        if self.alive:
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                self._lost = _sentence(error)

    return attempt


class _Nothing:
    """Replaces the W&B run once it is lost, for code that calls it directly."""

    def __getattr__(self, name: str) -> _Nothing:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return self

    def __getitem__(self, name: str) -> _Nothing:
        return self

    def __setitem__(self, name: str, value: Any) -> None:
        pass


class Dashboard(WandbLogger):
    """A W&B run, offline unless WANDB_MODE says otherwise, on which training never depends.

    Where W&B cannot be reached at the start the run is written offline, for `wandb sync`. If it
    fails later, or a call takes more than a minute, there is one warning, and W&B is left out of
    the rest of the run.

    Args:
        folder: The run folder, runs/<name>/<time>; W&B writes below it.
        id: The id of the W&B run; an existing run is continued. None means a new one.
    """

    PATIENCE = 60.0  # seconds in which a call must return
    FAREWELL = 600.0  # and the last one, which waits for all uploads
    REACH = "20"  # seconds in which W&B must be reached, unless WANDB_INIT_TIMEOUT is set

    def __init__(self, folder: Path, id: str | None = None) -> None:
        online = os.environ.setdefault("WANDB_MODE", "offline") not in ("offline", "dryrun")
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_INIT_TIMEOUT", self.REACH)
        if not DATA_DIR_IS_GIVEN:
            os.environ["WANDB_DATA_DIR"] = str((folder / "wandb").resolve())
        name = f"{folder.parent.name}/{folder.name}"
        # Jobs of a sweep may start within one second, on different machines.
        new = f"{re.sub(r'[^a-zA-Z0-9_.-]+', '-', name)[-100:]}-{secrets.token_hex(2)}"
        super().__init__(
            project=os.environ.get("WANDB_PROJECT", "lit-diffusion"),
            name=name,
            id=os.environ.get("WANDB_RUN_ID") or id or new,
            save_dir=str(folder),
            resume="allow" if online else None,
        )
        self._wandb_init.pop("anonymous", None)  # W&B warns of it even if it is None
        self._folder = folder
        self._lost = ""  # why W&B is left out
        self._told = False
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._deadline: float | None = None  # of the call that is being made
        self._exit_code: int | None = 1  # reported to W&B if it is left out
        self._thread: Any = threading.Thread(target=self._work, name="dashboard", daemon=True)
        self._begin(online)

    def __getstate__(self) -> dict[str, Any]:
        """For ranks that are spawned: they write into the same run, and wait for each call."""
        return super().__getstate__() | {"_calls": None, "_thread": None}

    def _begin(self, online: bool) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _shown_arguments():
                run = self._open(online)
        except Exception as error:
            self._lost = _sentence(error)
            _ = self.alive
            return
        if run.offline:
            self.FAREWELL = self.PATIENCE
        else:
            inform(f"Weights & Biases: {run.url}")
        self._thread.start()
        atexit.register(self.finish, None)

    def _open(self, online: bool) -> Any:
        """Open the W&B run, offline if W&B cannot be reached."""
        try:
            return super().experiment
        except Exception as error:
            _teardown()  # its process may have died since the last run
            if online:
                warn(
                    f"Weights & Biases cannot be reached ({_sentence(error)}): this run is "
                    f"written offline, and `wandb sync {self._folder}/wandb/offline-run-*` "
                    "sends it."
                )
                self._wandb_init.update(mode="offline", resume=None)
        return super().experiment

    # The thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        """Make the calls, one after the other; at the end, or after a failure, close the run."""
        run: Any = self._experiment
        for call in iter(self._calls.get, None):
            self._make(call, self.PATIENCE)
            if self._lost:
                break
        self._make(lambda: run.finish(exit_code=self._exit_code), self.FAREWELL)
        if self._lost:
            self._make(_teardown, self.PATIENCE)

    def _make(self, call: Callable[[], Any], seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        try:
            call()
        except Exception as error:
            self._lost = self._lost or _sentence(error)
        finally:
            self._deadline = None

    def _later(self, call: Callable[[], Any]) -> None:
        if self.alive and self._thread is None:
            self._make(call, self.PATIENCE)
        elif self.alive:
            self._calls.put(call)

    def _overdue(self) -> bool:
        deadline = self._deadline
        return deadline is not None and time.monotonic() > deadline

    @property
    def alive(self) -> bool:
        """Whether W&B still works; warns once if it does not."""
        if not self._lost and self._overdue():
            self._lost = "it does not answer"
        if self._lost and not self._told:
            self._told = True
            warn(f"Weights & Biases is left out of this run from here on: {self._lost}.")
        return not self._lost

    def finish(self, exit_code: int | None = None) -> None:
        """Close the W&B run, with a limit on the wait.

        Args:
            exit_code: 0 if the run ended well; None leaves it to W&B to find out.
        """
        atexit.unregister(self.finish)
        self._exit_code = exit_code
        self._calls.put(None)
        while self._thread.is_alive() and not self._overdue():
            self._thread.join(0.2)
        if self._thread.is_alive():
            _ = self.alive
            with contextlib.suppress(Exception):
                wandb_process().kill()  # a hanging call would keep the program from ending
            self._thread.join(self.PATIENCE)
        self._lost = self._lost or self._unwritten()
        _ = self.alive

    def _unwritten(self) -> str:
        """What W&B's process could not write, which it reports in its log only."""
        with contextlib.suppress(Exception):
            run: Any = self._experiment
            log = Path(run.settings.log_internal).read_text(errors="replace")
            if found := re.search(r"failed to save record: ([^\"]*)", log):
                return found[1]
        return ""

    # What a logger does ----------------------------------------------------------------------

    @property
    def experiment(self) -> Any:
        """The W&B run; once it is lost, an object that does nothing."""
        return _Nothing() if self._lost else super().experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Show numbers.

        Args:
            metrics: Names and numbers.
            step: Where they belong.
        """
        self._later(functools.partial(super().log_metrics, dict(metrics), step))

    def log_hyperparams(self, params: Any) -> None:
        """Show the model's description in the config.

        Args:
            params: The model's hyper-parameters.
        """
        self.log_config({"model": dict(params)})

    def log_config(self, config: dict[str, Any]) -> None:
        """Show a config, or replace a part of it.

        Args:
            config: Plain data.
        """
        self._later(lambda: self.experiment.config.update(masked(config), allow_val_change=True))

    log_image = _attempted(WandbLogger.log_image)
    log_table = _attempted(WandbLogger.log_table)
    log_audio = _attempted(WandbLogger.log_audio)
    log_video = _attempted(WandbLogger.log_video)
    after_save_checkpoint = _attempted(WandbLogger.after_save_checkpoint)
    finalize = _attempted(WandbLogger.finalize)


def _sentence(error: Exception) -> str:
    """An error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":. ")


@contextlib.contextmanager
def _shown_arguments() -> Iterator[None]:
    """Mask the secrets in the words of the command, which W&B records with the run."""
    words, sys.argv = sys.argv, [*map(without_secrets, sys.argv)]
    try:
        yield
    finally:
        sys.argv = words


def _teardown() -> None:
    """Make W&B forget its run, which the next one would continue, and end its process."""
    import wandb
    from wandb.sdk.lib import module

    process = None
    with contextlib.suppress(Exception):
        process = wandb_process()
    with contextlib.suppress(Exception):
        module.unset_globals()
        wandb.teardown()
    if process is not None:
        process.kill()
        process.wait()
