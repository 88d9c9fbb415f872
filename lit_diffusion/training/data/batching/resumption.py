"""What must not change between a checkpoint and its resumption.

The order of training is a function of the data and of some settings. If one of these has changed,
the place in the checkpoint is a place in another order, and to go on there would leave out some
examples and repeat others, silently. The path of the data may change, since data may move: their
size, their first image and digests of their content identify them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_diffusion.training.data.decoding import augment
from lit_diffusion.training.data.decoding.split import Split
from lit_diffusion.training.data.reading.content import differ
from lit_diffusion.training.data.reading.order import ORDER_VERSION

if TYPE_CHECKING:
    from lit_diffusion.training.data.module import DataModule

ARGUMENTS: tuple[str, ...] = (
    "num_workers",
    "batch_size",
    "streaming",
    "shuffle_window",
    "seed",
    "open_shards",
)
ARGUMENTS += ("on_bad_example", "horizontal_flip", "train_split", "label_key")
CONTENT = "the content of the training data"
TOTAL, SHARDS = "the number of training examples", "the number of shards"
FIRST = "the checksum of the first training image"
DATA = (TOTAL, SHARDS, FIRST, CONTENT)


def settings_of(data: DataModule, split: Split, world: int, total: int | None) -> dict[str, Any]:
    """Return what must not change, for the state of the data.

    Args:
        data: Has the arguments.
        split: What is trained on.
        world: Number of ranks.
        total: Number of training examples, None if unknown.
    """
    return {
        "the order of the data": ORDER_VERSION,
        "the number of ranks": world,
        **{f"data.{name}": getattr(data, name) for name in ARGUMENTS},
        "data.shape": list(data.shape),
        "data.condition_keys": list(data.condition_keys) or None,
        "data.val_share": data.val_share,
        "data.kind": None if data.kind == "image" else data.kind,
        "data.normalize": data.normalize,
        "data.mode": data.mode,
        "data.buckets": [[*size] for size in data.buckets.sizes] or None,
        "data.transform": data.transforms.description or None,
        "data.augment": augment.settings_of(data.augment),
        "data.text_key": data.text_key,
        "data.text_length": data.text_length if data.text_key else None,
        TOTAL: total,
        SHARDS: split.source.shards,
        FIRST: zlib.crc32(split.decoder.like["image"].tobytes()),
        CONTENT: split.source.content,
    }


def check_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise an error if a setting has changed.

    Args:
        then: What `settings_of` returned before the checkpoint.
        now: What it returns now.

    Raises:
        ValueError: If one has changed; the data themselves are not looked at.
    """
    for key, value in now.items():
        if key not in DATA and then.get(key) != value:
            raise ValueError(
                f"cannot resume the data: {key} was {then.get(key)} in the checkpoint and is "
                f"{value} now; set it back, or start a new run"
            )


def change_of_data(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return in words how the data differ from those of the checkpoint, None if they do not.

    Args:
        then: What `settings_of` returned before the checkpoint.
        now: What it returns now.
    """
    for key in (TOTAL, SHARDS, FIRST):
        if key in now and then.get(key) != now[key]:
            return f"{key} was {then.get(key)} in the checkpoint and is {now[key]} now"
    if differ(then.get(CONTENT), now.get(CONTENT)):
        return f"{CONTENT} is not that of the checkpoint"
    return None
