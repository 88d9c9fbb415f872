"""Which classes a list of transforms may name, and how they are made from plain data.

A config is a file, and whoever wrote it chooses the classes. So a transform is `Fit`, a class of
torchvision.transforms.v2, or a subclass of its `Transform` in a module that has been allowed
(--plugins); and its arguments are numbers, texts, lists of such, and further transforms. A
function cannot be an argument, since it could be neither recorded nor compared.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import register_type

from lit_diffusion.description import allowed_modules
from lit_diffusion.registry import subclasses
from lit_diffusion.training.data.decoding.repeatable import own_generator

V2 = "torchvision.transforms.v2"

#: Those of torchvision.transforms.v2 that use no random numbers, whatever their arguments.
FIXED = {
    *("CenterCrop", "ClampBoundingBoxes", "ClampKeyPoints", "ConvertBoundingBoxFormat"),
    *("ConvertImageDtype", "Grayscale", "Identity", "LinearTransformation", "Normalize"),
    *("PILToTensor", "Pad", "RGB", "Resize", "SanitizeBoundingBoxes", "SanitizeKeyPoints"),
    *("SetClampingMode", "ToDtype", "ToImage", "ToPILImage", "ToPureTensor", "ToTensor"),
    *("UniformTemporalSubsample",),
}
#: Those that cannot be used, and why.
REFUSED = {
    "Transform": "it is only the base of transforms",
    "Lambda": "it takes a function, which cannot be recorded as data",
    "MixUp": "it mixes the examples of a batch",
    "CutMix": "it mixes the examples of a batch",
    "FiveCrop": "it returns several pictures",
    "TenCrop": "it returns several pictures",
}

if TYPE_CHECKING:
    Plain = Any
else:

    class Plain:
        """A number, a text, null; lists and mappings of such. Nothing is made of it in parsing."""

    # jsonargparse makes objects of what looks like their description, wherever it may be anything.
    def _unchanged(value: Any) -> Any:
        return value

    # With a key jsonargparse does not look for the class in all packages above it.
    key = (__name__, "Plain")
    register_type(Plain, _unchanged, _unchanged, type_check=lambda *_: True, uniqueness_key=key)

Given = str | dict[str, Plain]


def make(given: Any, where: str, own: Mapping[str, type]) -> tuple[Any, str, bool]:
    """Return a transform, its name, and whether it is random.

    Args:
        given: The name of its class, or {class_path, init_args}.
        where: Its place in the config, for messages.
        own: Classes of ours by name.

    Raises:
        ValueError: If its class is not allowed, or the arguments are wrong.
    """
    path, arguments = _parts(given, where)
    cls = _find(path, where, own)
    name = cls.__name__
    parts: list[bool] = []  # of the transforms among the arguments: whether they are random

    def value(one: Any, place: str, listed: bool) -> Any:
        if (isinstance(one, Mapping) and "class_path" in one) or (listed and isinstance(one, str)):
            inner, _, is_random = make(one, place, own)
            parts.append(is_random)
            return inner
        if isinstance(one, Mapping):
            return {key: value(item, f"{place}.{key}", False) for key, item in one.items()}
        if isinstance(one, list | tuple):
            return [value(item, f"{place}[{k}]", listed) for k, item in enumerate(one)]
        if one is None or isinstance(one, bool | int | float | str):
            return one
        raise ValueError(
            f"{place} must be plain data (numbers, texts, lists, transforms by name), which a "
            f"config can record, got {type(one).__name__}"
        )

    made = {
        key: _enumerated(key, value(one, f"{where}.{key}", key == "transforms"))
        for key, one in arguments.items()
    }
    try:
        inspect.signature(cls).bind(**made)
        transform = cls(**made)
    except Exception as error:  # constructors raise anything
        raise ValueError(f"{where}: {name} cannot be made so: {error}") from error
    if name in own:
        return transform, name, transform.random
    if (place := own_generator(transform)) is not None:
        raise ValueError(
            f"{where}: {place} is a generator of random numbers, whose state a resumed run would "
            "not have: use those of torch, random or NumPy itself, which are seeded for each "
            "example"
        )
    if cls is getattr(sys.modules[V2], name, None):
        container = name == "Compose" and bool(parts)
        return transform, name, any(parts) if container else name not in FIXED
    if not isinstance(getattr(cls, "random", None), bool):
        raise ValueError(
            f"{where}: {name} must say whether it uses random numbers: give the class an "
            "attribute `random`, True or False; random ones are applied in training only"
        )
    return transform, name, cls.random  # type: ignore[attr-defined]


def describe_all(given: Sequence[Any], own: Mapping[str, type]) -> list[dict[str, Any]]:
    """Return transforms as plain data, the same however they were written.

    Args:
        given: Names or {class_path, init_args}, each of which `make` accepts.
        own: Classes of ours by name.
    """
    found = []
    for one in given:
        path, arguments = _parts(one, "data.transform")
        cls = _find(path, "data.transform", own)
        name = cls.__name__
        if name not in own:
            package = V2 if cls is getattr(sys.modules[V2], name, None) else cls.__module__
            name = f"{package}.{name}"
        found.append({"class_path": name, "init_args": _plain(arguments, own)})
    return found


def _plain(value: Any, own: Mapping[str, type], listed: bool = False) -> Any:
    if (isinstance(value, Mapping) and "class_path" in value) or (
        listed and isinstance(value, str)
    ):
        return describe_all([value], own)[0]
    if isinstance(value, Mapping):
        return {str(k): _plain(v, own, k == "transforms") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, own, listed) for one in value]
    return value


def _parts(given: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    """The path of a class, and its arguments."""
    if isinstance(given, str):
        return given, {}
    if isinstance(given, Mapping) and isinstance(given.get("class_path"), str):
        arguments = given.get("init_args") or {}
        if isinstance(arguments, Mapping) and given.keys() <= {"class_path", "init_args"}:
            return given["class_path"], arguments
    raise ValueError(
        f"{where} must be the name of a class, or class_path and init_args as in a config, so "
        f"that it can be recorded, got {type(given).__name__ if callable(given) else given!r}"
    )


def _find(path: str, where: str, own: Mapping[str, type]) -> type:
    """The class of a path, if it is one of a transform that is allowed."""
    v2 = importlib.import_module(V2)
    module, _, name = path.rpartition(".")
    if name in own and module in ("", own[name].__module__, "lit_diffusion.training.data"):
        return own[name]
    found: Any = None
    if module in ("", V2):
        found = getattr(v2, name, None)
        if name in REFUSED:
            raise ValueError(f"{where}: {name} cannot be used, for {REFUSED[name]}")
    if not module and found is None:
        named = [one for one in subclasses(v2.Transform) if one.__name__ == name]
        found = next((one for one in named if _is_allowed(one.__module__)), None)
    elif module and _is_allowed(module):
        if module not in sys.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ValueError(f"{where}: {path} cannot be imported: {error}") from error
        found = getattr(sys.modules[module], name, None)
    if inspect.isclass(found) and issubclass(found, v2.Transform):
        defined = found.__module__
        if defined.startswith(f"{V2}.") or _is_allowed(defined):
            return found
    raise ValueError(
        f"{where} must be Fit, a class of {V2}, or a Transform of a module named by --plugins, "
        f"got {path!r}"
    )


def _is_allowed(module: str) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in allowed_modules())


def _enumerated(key: str, value: Any) -> Any:
    """Return a text as the member of the enumeration that this argument of torchvision takes."""
    kinds = {"interpolation": "InterpolationMode", "policy": "AutoAugmentPolicy"}
    if not isinstance(value, str) or key not in kinds:
        return value
    kind = getattr(sys.modules[V2], kinds[key])
    try:
        return kind(value)
    except ValueError as error:
        names = ", ".join(one.value for one in kind)
        raise ValueError(f"{key} must be one of {names}, got {value!r}") from error
