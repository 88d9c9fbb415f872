"""The tokens of captions, as `encode` stores them: arrays of one shape, in float16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lit_diffusion.models import TransformersText
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.data.decoding.split import chunks
from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.data.reading.bad_examples import Bad
from lit_diffusion.training.data.reading.columns import MisfitError, caption

__all__ = ["TextTokens"]

CHUNK = 1000  # captions that are counted at a time


class TextTokens:
    """Encodes captions, all padded to the number of tokens of the longest one.

    Args:
        encoder: The encoder, on the device where it is to run.
        data: The captions.
        splits: The splits in which the longest is searched, which reads them once.

    Raises:
        UsageError: If a caption has more tokens than the encoder takes.
    """

    def __init__(self, encoder: TransformersText, data: DataModule, splits: Sequence[str]) -> None:
        self.encoder = encoder
        self.length = 1
        for texts in _captions(data, splits):
            try:
                self.length = max(self.length, encoder.frozen.count(texts))
            except ValueError as error:
                raise UsageError(
                    f"expected in column {data.text_key!r} {error}, which is --truncate true."
                ) from error

    @property
    def facts(self) -> dict[str, Any]:
        """Whose tokens they are, for the card of the data."""
        return {
            "path": self.encoder.path,
            "revision": self.encoder.revision,
            "sha256": self.encoder.sha256,
            "tokens": self.length,
            "width": self.encoder.width,
        }

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The tokens of texts, with their mask and the mark of the encoder.

        Args:
            texts: B captions.

        Shapes:
            result (B, 1 + T, E + 1), float16, on the CPU.

        Raises:
            UsageError: If a token is too large for float16.
        """
        tokens, mask = self.encoder.frozen(texts, self.encoder.identity.device)
        missing = self.length - tokens.shape[1]
        stored = self.encoder.stored(F.pad(tokens, (0, 0, 0, missing)), F.pad(mask, (0, missing)))
        half = stored.half().cpu()
        if not bool(half.isfinite().all()):
            raise UsageError(
                f"the tokens of {self.encoder.path} reach {float(stored.abs().max()):.3g}, too "
                "large for float16: train with data.text_key, which encodes them while training."
            )
        return half


def _captions(data: DataModule, splits: Sequence[str]) -> Iterator[list[str]]:
    """The usable captions of splits, without their images being decoded."""
    for name in splits:
        for examples in chunks(data.open_split(name).source.head(None), CHUNK):
            found = [one.conditions[-1] for one in examples if not isinstance(one, Bad)]
            yield [text for text in found if _usable(text, data)]


def _usable(text: Any, data: DataModule) -> bool:
    try:
        caption(text, str(data.text_key), data.text_length)
    except MisfitError:
        return False  # reported with its row when it is encoded
    return True
