"""What the arguments of `DataModule` mean for decoding images, and for keeping them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_diffusion.training.data.decoding.arrays import ArrayDecoder
from lit_diffusion.training.data.decoding.images import ImageDecoder
from lit_diffusion.training.data.decoding.split import Split
from lit_diffusion.training.data.decoding.transforms import library_versions

if TYPE_CHECKING:
    from lit_diffusion.training.data.module import DataModule
    from lit_diffusion.training.data.reading.image_paths import ImagePaths


def decoder_of(
    data: DataModule, paths: ImagePaths, like: ImageDecoder | None, training: bool
) -> ImageDecoder:
    """Return what decodes the images of a split.

    Args:
        data: Has the arguments.
        paths: Reads images that are files of their own.
        like: A decoder whose examples these must resemble, None for any.
        training: Whether the split is trained on, so that random transforms act.
    """
    transforms, later = data.transforms.fixed(), False
    if training:
        # In memory the rest of them, from the first random one on, is applied at each access.
        now, rest = data.transforms.divided()
        transforms, later = (data.transforms, False) if data.streaming else (now, bool(rest))
    if data.kind != "image":
        return ArrayDecoder(data.kind, **_examples(data, paths, like))
    return ImageDecoder(
        **_examples(data, paths, like),
        mode=data.mode,
        transforms=transforms,
        buckets=data.buckets,
        partial=later,
    )


def _examples(data: DataModule, paths: ImagePaths, like: ImageDecoder | None) -> dict[str, Any]:
    """The arguments that the decoders of all kinds of data have."""
    return {
        "shape": data.shape,
        "labels": data.label_key is not None,
        "conditions": data.condition_keys,
        "like": None if like is None else like.like,
        "paths": paths,
        "text": None if data.text_key is None else (data.text_key, data.text_length),
    }


def map_identity(data: DataModule, split: Split) -> dict[str, Any]:
    """Return everything that determines the bytes of a split in memory.

    Args:
        data: Has the arguments.
        split: What is decoded.
    """
    identity: dict[str, Any] = {
        name: getattr(data, name) for name in ("shape", "image_key", "label_key")
    }
    if data.kind != "image":
        identity["kind"] = data.kind
    if data.condition_keys:
        identity["condition_keys"] = data.condition_keys
    if data.text_key is not None:
        identity |= {"text_key": data.text_key, "text_length": data.text_length}
    if data.buckets:
        identity["buckets"] = data.buckets.sizes
    if data.transforms or data.mode or data.buckets:
        described = split.decoder.transforms.description
        identity |= {"mode": data.mode, "transform": described, "by": library_versions()}
    return identity | {"fingerprint": split.source.fingerprint}
