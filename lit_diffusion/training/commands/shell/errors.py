"""Usage errors: a `ValueError` in Python, one line on the command line.

jsonargparse explains a mistake in ten lines of nested alternatives; a user needs the place, what
was expected, what was received, and what to do.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from lit_diffusion.description import allowed_modules, missing_package
from lit_diffusion.registry import subclasses
from lit_diffusion.training.run.secrets import without_secrets

__all__ = ["UsageError", "fail", "one_line", "unexpected"]

_PLUGINS = (
    "`lit-diffusion plugins` lists the known classes; for a class of your own use --plugins, and "
    "for one of a package install the package."
)


class UsageError(ValueError):
    """A wrong argument; the message states what was expected, what was received and what to do."""


def fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with code 2.

    Args:
        message: What was expected, what was received, and what to do.
    """
    line = without_secrets(" ".join(message.split()))
    sys.stderr.write(f"lit-diffusion: error: {line}\n")
    sys.stderr.flush()
    raise SystemExit(2)


def unexpected(error: BaseException) -> str:
    """The message of an error that was not made for a user: its type, and where it was raised.

    The text of a `KeyError` is a key, and that of many others a word, which alone says nothing.

    Args:
        error: Any, with its traceback.

    Example:
        >>> try:
        ...     {}["step"]
        ... except KeyError as error:
        ...     print(unexpected(error))  # doctest: +ELLIPSIS
        KeyError 'step', raised in ...
    """
    text = str(error).strip()
    if not isinstance(error, KeyError) and len(text.split()) > 2:
        return text
    kind = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return f"{kind} {text}".strip()
    place = frames[-1]
    return f"{kind} {text}".strip() + f", raised in {place.name} ({place.filename}:{place.lineno})"


def _families() -> dict[str, type]:
    """The base class of the classes that an argument of this name takes."""
    import torch
    from lightning.pytorch.callbacks import Callback

    from lit_diffusion.decoders import Decoder
    from lit_diffusion.predictions import Prediction
    from lit_diffusion.samplers import Sampler
    from lit_diffusion.schedules import NoiseSchedule
    from lit_diffusion.weightings import Weighting

    return {
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


def _names(base: type) -> set[str]:
    """The names of the public concrete classes below a base."""
    return {
        cls.__name__
        for cls in subclasses(base)
        if not cls.__name__.startswith("_") and not inspect.isabstract(cls)
    }


def _unknown_class(name: str, keys: list[str]) -> str:
    """No class has this name: suggest similar ones of the family that the argument takes."""
    families = _families()
    meant = [families[word] for key in keys for word in key.split(".") if word in families]
    known = _names(meant[-1]) if meant else set().union(*map(_names, families.values()))
    near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.6)
    hint = f"Did you mean {' or '.join(near)}? Otherwise: {_PLUGINS}" if near else _PLUGINS
    return f"no class is named {name!r}. {hint}"


def _not_importable(path: str) -> str:
    """A class that may not be imported, or whose package is missing."""
    if missing := missing_package(path):
        return missing
    if path == "lightning.Callback":  # the base class, where none is named
        return "name the class first, as class_path and init_args."
    allowed = ", ".join(allowed_modules())
    return f"{path} may not be imported; allowed are {allowed}, and --plugins."


def _meant(name: str, known: Sequence[str]) -> str:
    """The known name that a wrong one resembles, as a question; empty if there is none."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f" Did you mean {near[0]}?" if near else ""


def _unknown_argument(option: str, owner: str, known: Sequence[str]) -> str:
    """A class does not take this argument."""
    listed = ", ".join(known) or "none"
    return f"{owner} takes no argument {option!r}.{_meant(option, known)} It takes {listed}."


def _unrecognized(word: str, known: Sequence[str]) -> str:
    """A word of the command line, or a key of a config, that is not an argument."""
    if word.endswith(".ckpt"):
        return f"expected one checkpoint, got {word} as well. `last` is the newest."
    name = word.partition("=")[0]
    if word.startswith("-"):
        meant = _meant(name.lstrip("-"), known).replace("mean ", "mean --")
        return f"no argument is called {name}.{meant or ' --help lists them.'}"
    return f"one argument too many: {word}."


def one_line(message: str, owner: str = "the class", known: Sequence[str] = ()) -> str:
    '''The relevant sentence of a parser's message.

    Args:
        message: The message of jsonargparse.
        owner: The class whose arguments were parsed.
        known: The arguments that the parser knows.

    Example:
        >>> one_line("""Parser key "data.batch_size": Expected a <class 'int'>. Got value: abc""")
        'data.batch_size: expected int, got abc.'
    '''
    keys = re.findall(r'[Pp]arser key "([^"]+)"', message)
    where = f"{'.'.join(keys)}: " if keys else ""
    kinds = [k for k in re.findall(r"Expected a <class '([\w.]+)'>", message) if k != "NoneType"]
    name = re.search(r"Expected a dot import path string: (\S+)", message)
    if name and not {"int", "float"} & set(kinds):  # which may be a tensor as well
        return where + _unknown_class(name[1], keys)
    if extra := re.search(r"^\s*(.*pip install .*)$", message, re.MULTILINE):
        return f"{where}{extra[1]}"  # a class that lacks an optional package names it
    if inner := re.search(r"^\s*- ([\w.]+: expected .+, got .+)$", message, re.MULTILINE):
        return where + inner[1]  # of a nested argument, in one line already
    if named := re.search(
        r"Problem with given class_path '([^']+)':?\s*(?:- .*)?$", message, re.M
    ):
        return where + _not_importable(named[1])
    if "Expected an instantiatable class" in message:
        return f"{where}name the class first, as in --sampler DDIMSampler --sampler.steps 20."
    if option := re.search(r"Option '([^']+)' is not accepted", message):
        return where + _unknown_argument(option[1], owner, known)
    group = r"(?:Group '(\w+)'|Subcommand '\w+') does not accept (?:nested )?option '([\w.+-]+)'"
    if key := re.search(group, message):
        path = ".".join(filter(None, key.groups()))
        return f"no argument is called {path}.{_meant(path, known) or ' --help lists them.'}"
    reasons = re.findall(r"^\s*- (?!Expected a |Does not|Parser key)(.+)$", message, re.MULTILINE)
    if reasons:
        return f"{where}{reasons[0]}"
    given = re.search(r"(?:Given value|Got value): (.*)", message)
    if given and (choices := re.findall(r"typing\.Literal\[([^\]]+)\]", message)):
        options = dict.fromkeys(re.sub(r"['\"]", "", ", ".join(choices)).split(", "))
        return f"{where}expected one of {', '.join(options)}, got {given[1].strip()}."
    if kinds and given:
        return f"{where}expected {' or '.join(dict.fromkeys(kinds))}, got {given[1].strip()}."
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        return _unrecognized(unknown[1], known)
    rest = re.sub(r'^Parser key "[^"]+":', "", message) if len(keys) == 1 else message
    return (where if rest is not message else "") + " ".join(rest.split())[:500]
