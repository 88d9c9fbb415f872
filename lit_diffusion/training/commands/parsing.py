"""Parsing: what may be named in a config, and one line for every mistake.

jsonargparse explains a mistake in ten lines of nested alternatives; a user needs the place, what
was expected, what came, and what to do.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

from lit_diffusion.decoders import Decoder
from lit_diffusion.description import allow, allowed_modules, missing_package
from lit_diffusion.predictions import Prediction
from lit_diffusion.registry import load_plugins
from lit_diffusion.samplers import Sampler
from lit_diffusion.schedules import NoiseSchedule
from lit_diffusion.training.run.folder import last_checkpoint
from lit_diffusion.weightings import Weighting

__all__ = [
    "DiffusionParser",
    "explain",
    "fail",
    "find_checkpoint",
    "find_device",
    "import_plugins",
]

_FAMILIES = {
    "schedule": NoiseSchedule,
    "weighting": Weighting,
    "prediction": Prediction,
    "sampler": Sampler,
    "decoder": Decoder,
    "network": torch.nn.Module,
    "optimizer": torch.optim.Optimizer,
    "lr_scheduler": torch.optim.lr_scheduler.LRScheduler,
    "callbacks": Callback,
}
_PLUGINS = (
    "`lit-diffusion plugins` lists what there is; a class of your own needs --plugins, one of a "
    "package needs the package installed."
)


def fail(message: str) -> NoReturn:
    """Say in one line what went wrong, and leave with exit code 2.

    Args:
        message: What was expected, what came, what to do.
    """
    sys.stderr.write(f"lit-diffusion: error: {' '.join(message.split())}\n")
    sys.stderr.flush()
    raise SystemExit(2)


def find_checkpoint(given: str, name: str = "*") -> Path:
    """The checkpoint that is meant.

    Args:
        given: Its path; `last` for the newest below runs/.
        name: With `last`: of runs of this name.
    """
    if given != "last":
        return Path(given)
    found = last_checkpoint(Path("runs"), name)
    if found is None:
        fail(f"there is no checkpoint below runs/{name}; train first, or give its path.")
    sys.stderr.write(f"The newest checkpoint is {found}.\n")
    return found


def find_device(name: str) -> torch.device:
    """The device of a name, which must be there.

    Args:
        name: As PyTorch calls it; auto for the first GPU, or the CPU where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} is not here: {str(error).partition('. ')[0]}.")


def _names(base: type) -> set[str]:
    """The public concrete classes below a base."""
    found = set()
    children: list[type] = base.__subclasses__()
    for cls in children:
        if not cls.__name__.startswith("_") and not inspect.isabstract(cls):
            found.add(cls.__name__)
        found |= _names(cls)
    return found


def _suggest(name: str, known: set[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.6)
    return f"Did you mean {' or '.join(near)}? Else: {otherwise}" if near else otherwise


def explain(message: str) -> str:
    '''The sentence that matters in a parser's message.

    Args:
        message: What jsonargparse says.

    Example:
        >>> explain("""Parser key "data.batch_size": Expected a <class 'int'>. Got value: abc""")
        'data.batch_size: expected int, got abc.'
    '''
    keys = re.findall(r'[Pp]arser key "([^"]+)"', message)
    where = f"{'.'.join(keys)}: " if keys else ""
    given = re.search(r"(?:Given value|Got value): (.*)", message)

    if name := re.search(r"Expected a dot import path string: (\S+)", message):
        families = [
            _FAMILIES[word] for key in keys for word in key.split(".") if word in _FAMILIES
        ]
        known = _names(families[-1]) if families else set().union(*map(_names, _FAMILIES.values()))
        return f"{where}no class is named {name[1]!r}. {_suggest(name[1], known, _PLUGINS)}"
    if extra := re.search(r"^\s*(.*pip install .*)$", message, re.MULTILINE):
        return f"{where}{extra[1]}"  # a class that lacks an optional package says so itself
    if path := re.search(r"Problem with given class_path '([^']+)':?\s*(?:- .*)?$", message, re.M):
        if missing := missing_package(path[1]):
            return f"{where}{missing}"
        allowed = ", ".join(allowed_modules())
        return f"{where}{path[1]} may not be imported; allowed are {allowed}, and --plugins."
    if "Expected an instantiatable class" in message:
        return f"{where}name the class first, as in --sampler DDIMSampler --sampler.steps 20."
    if option := re.search(r"Option '([^']+)' is not accepted", message):
        class_path = re.search(r"'?class_path'?[:=] ?'([\w.]+)'", message)
        key = ".".join(keys) or "model.weighting"
        listed = f"`lit-diffusion fit --{key}.help CLASS` lists what a class takes."
        cls = class_path[1].rpartition(".")[2] if class_path else "the class"
        return f"{where}{cls} takes no argument {option[1]!r}. {listed}"
    reasons = re.findall(r"^\s*- (?!Expected a |Does not|Parser key)(.+)$", message, re.MULTILINE)
    if reasons:
        return f"{where}{reasons[0]}"
    kinds = [k for k in re.findall(r"Expected a <class '([\w.]+)'>", message) if k != "NoneType"]
    if kinds and given:
        return f"{where}expected {' or '.join(dict.fromkeys(kinds))}, got {given[1].strip()}."
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        if unknown[1].endswith(".ckpt"):
            return f"one checkpoint, please: {unknown[1]} is another. `last` is the newest."
        return f"no argument is called {unknown[1]}; --help lists them."
    return " ".join(message.split())[:500]


class DiffusionParser(LightningArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, without the usage.

        Args:
            message: What the parser says.
            ex: Where it comes from.
        """
        if os.environ.get("LIT_DIFFUSION_TRACEBACK"):
            raise ValueError(message) from ex
        fail(explain(str(message)))


def _prefer_what_may_be_named() -> None:
    """Let a bare name mean the class that may be named, where another library has it, too.

    jsonargparse looks for it among all classes that happen to be imported, and diffusers has a
    FourierFeatures as well. Two that may both be named stay ambiguous.
    """
    from jsonargparse import _typehints

    find = _typehints.get_all_subclass_paths
    if hasattr(find, "__wrapped__"):  # done before
        return

    @functools.wraps(find)
    def paths(*args: Any, **kwargs: Any) -> list[str]:
        found = find(*args, **kwargs)
        allowed = tuple(f"{module}." for module in allowed_modules())
        taken = {path.rpartition(".")[2] for path in found if path.startswith(allowed)}
        return [
            path
            for path in found
            if path.startswith(allowed) or path.rpartition(".")[2] not in taken
        ]

    _typehints.get_all_subclass_paths = paths


def import_plugins(argv: list[str]) -> None:
    """Import the modules named by --plugins or a config's plugins:, before parsing needs them.

    From then on the parser imports only what is allowed: our own modules, torch.optim, torch.nn,
    lightning.pytorch, installed plug-in packages, and the modules named here.

    Args:
        argv: The command line.
    """
    named: list[str] = []

    def add(value: Any) -> None:
        if isinstance(value, str):
            value = yaml.safe_load(value) if value.startswith("[") else value.split(",")
        named.extend(str(module).strip() for module in value or [])

    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if not equals:
            value = argv[i + 1] if i + 1 < len(argv) else ""
        if flag == "--plugins":
            add(value)
        elif flag in ("--config", "-c") and Path(value).is_file():
            with contextlib.suppress(yaml.YAMLError):
                config = yaml.safe_load(Path(value).read_text())
                add(config.get("plugins") if isinstance(config, dict) else None)
    load_plugins()
    _prefer_what_may_be_named()
    for module in named:
        module = module.removesuffix(".py")
        allow(module)
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:
                raise
            fail(f"no plug-in module {module!r}: expected {module}.py here, or a package.")
    jsonargparse.set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=allowed_modules()
    )
