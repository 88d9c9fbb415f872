"""The ranges of the arguments of `DataModule`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lit_diffusion.training.data.decoding.transforms import CHANNELS, Fit
from lit_diffusion.training.data.reading.columns import BATCH, TEXT
from lit_diffusion.training.data.reading.held_out import DEFAULT, HELD_OUT

if TYPE_CHECKING:
    from lit_diffusion.training.data.module import DataModule

LEAST = {"batch_size": 1, "shuffle_window": 1, "num_workers": 0, "seed": 0, "open_shards": 1}
LEAST |= {"steps_per_epoch": 1, "val_examples": 1, "text_length": 1}
Kind = Literal["image", "signal", "volume", "points", "vector", "latents"]
#: The axes of an example of each kind; those of latents are any.
KINDS: dict[str, tuple[str, ...]] = {
    "image": ("channels", "height", "width"),
    "signal": ("channels", "length"),
    "volume": ("channels", "depth", "height", "width"),
    "points": ("numbers of a point", "points"),
    "vector": ("numbers",),
    "latents": (),
}
CHOICES = {"on_bad_example": ("skip", "raise"), "on_changed_data": ("refuse", "continue")}


def check_share(val_share: float | None, val_split: str | None) -> None:
    """Raise an error if a share is to be held out beside a split to validate on.

    Args:
        val_share: The share, None for none.
        val_split: The split, None for none.

    Raises:
        ValueError: If both were given.
    """
    if val_share is not None and val_split not in (None, DEFAULT, HELD_OUT):
        raise ValueError(
            f"data.val_share {val_share} holds out training examples to validate on, got also "
            f"data.val_split {val_split!r}; set one of them to null"
        )


def check_kind(data: DataModule) -> Any:
    """Return how the data are normalised, once their kind fits their shape and what is asked.

    Args:
        data: Has the arguments.

    Raises:
        ValueError: If it does not.
    """
    kind, shape = data.kind, data.shape
    if kind not in KINDS:
        raise ValueError(f"data.kind must be one of {', '.join(KINDS)}, got {kind!r}")
    axes = KINDS[kind]
    if not shape or min(shape) < 1 or (axes and len(shape) != len(axes)):
        wanted = f"({', '.join(axes)}{',' * (len(axes) == 1)})" if axes else "(channels, …)"
        fitting = [name for name, other in KINDS.items() if other and len(other) == len(shape)]
        hint = f"; data of this shape are of data.kind {' or '.join(fitting)}" if fitting else ""
        hint = "" if kind in fitting else hint
        raise ValueError(
            f"data.shape must be {wanted}, all positive, got {shape}, with data.kind {kind}{hint}"
        )
    if data.normalize not in ("auto", "mean_std", "min_max", None):
        raise ValueError(
            f"data.normalize must be auto, mean_std, min_max or null, got {data.normalize!r}"
        )
    for name in ("horizontal_flip", "mode", "transform", "buckets"):
        if kind != "image" and getattr(data, name):
            raise ValueError(
                f"data.{name} is for pictures, got {getattr(data, name)!r} with data.kind {kind}; "
                "leave it out"
            )
    if data.normalize != "auto":
        return data.normalize
    return None if kind in ("image", "latents") else "mean_std"


def check_buckets(data: DataModule) -> None:
    """Raise an error if the buckets are no sizes, or something else contradicts them.

    Args:
        data: Has the arguments.

    Raises:
        ValueError: If it does.
    """
    sizes = data.buckets.sizes
    if not sizes:
        return
    if min(map(min, sizes)) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(
            "data.buckets must be different sizes [height, width], all positive, got "
            f"{', '.join(f'{height} × {width}' for height, width in sizes)}"
        )
    if data.streaming:
        raise ValueError(
            "data.buckets needs data.streaming: false, for in a stream nothing is known of a "
            "picture's size before it is read, and all ranks must make a step of one size"
        )
    if any(isinstance(step.apply, Fit) for step in data.transforms.steps):
        raise ValueError(
            "data.buckets resizes and crops every picture to its bucket, got also Fit in "
            "data.transform; leave Fit out, or set data.buckets to null"
        )


def check_arguments(data: DataModule) -> None:
    """Raise an error if an argument is out of its range.

    Args:
        data: Has the arguments.

    Raises:
        ValueError: If one is.
    """
    if not data.path.strip():  # which would be the current folder
        raise ValueError(
            f"data.path must be a folder, a file or the name of a data set, got {data.path!r}"
        )
    taken = set(BATCH) & set(data.condition_keys)
    if taken or len(set(data.condition_keys)) < len(data.condition_keys):
        raise ValueError(
            f"data.condition_keys must be different columns, none of them called "
            f"{', '.join(BATCH)}, got {', '.join(data.condition_keys)}; the label's column is "
            "data.label_key, any other column may be renamed"
        )
    if data.text_key is not None and TEXT in data.condition_keys:
        raise ValueError(
            f"data.text_key makes the entry {TEXT!r} of a batch, and so does "
            f"data.condition_keys={', '.join(data.condition_keys)}; rename that column"
        )
    for name, low in LEAST.items():
        if (value := getattr(data, name)) is not None and value < low:
            raise ValueError(f"data.{name} must be at least {low}, got {value}")
    for name, choices in CHOICES.items():
        if (choice := getattr(data, name)) not in choices:
            raise ValueError(f"data.{name} must be {' or '.join(choices)}, got {choice!r}")
    if data.mode is not None and data.mode not in ("L", "RGB", "RGBA"):
        raise ValueError(f"data.mode must be L, RGB, RGBA or null, got {data.mode!r}")
    if data.val_share is not None and not 0 < data.val_share < 1:
        raise ValueError(
            f"data.val_share must be between 0 and 1, or null for none, got {data.val_share}"
        )
    channels = data.shape[0]
    if data.mode is not None and not data.transforms and CHANNELS[data.mode] != channels:
        raise ValueError(
            f"data.mode {data.mode} has {CHANNELS[data.mode]} channel(s), got data.shape "
            f"with {channels}; set one of them"
        )
    check_buckets(data)
    if not 0 <= data.max_bad_share <= 1:
        raise ValueError(f"data.max_bad_share must be from 0 to 1, got {data.max_bad_share}")
