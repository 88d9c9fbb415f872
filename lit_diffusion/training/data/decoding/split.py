"""One split of a data set: where its examples come from, and how they become tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat

from torch import Tensor

from lit_diffusion.training.data.decoding.images import Decoded, ImageDecoder
from lit_diffusion.training.data.reading.bad_examples import Bad, BadExample
from lit_diffusion.training.data.reading.columns import MisfitError
from lit_diffusion.training.data.reading.source import Example, Source
from lit_diffusion.training.run.secrets import without_secrets


class Split:
    """A source of examples, the decoder of its images, and the name of both for messages.

    Args:
        name: Of the split.
        source: Reads its examples.
        decoder: Decodes them.
    """

    def __init__(self, name: str, source: Source, decoder: ImageDecoder) -> None:
        self.name = name
        self.source = source
        self.decoder = decoder

    def decode(
        self, examples: Iterable[Example | Bad], epochs: Iterable[int] = repeat(0)
    ) -> list[Decoded | Bad]:
        """Decode examples; one that cannot be used becomes a `Bad` in its place.

        Args:
            examples: Of this split.
            epochs: The epoch of each, for random transforms.
        """
        with self.decoder.transforms.isolated():
            return [
                one if isinstance(one, Bad) else self._decode(one, epoch)
                for one, epoch in zip(examples, epochs, strict=False)
            ]

    def batch(self, examples: Sequence[Example | Bad]) -> dict[str, Tensor]:
        """Return the batch of some examples, each of which must be usable.

        Args:
            examples: Of this split.

        Raises:
            BadExample: For the first that is not.
        """
        kept, bad = sift(self.decode(examples))
        if bad:
            raise BadExample(bad[0], self.name)
        return self.decoder.collate(kept)

    def first(self, looks: int) -> dict[str, Tensor]:
        """Return the first usable example, as a batch of one.

        Args:
            looks: How many of the first examples may be tried, at least 1.

        Raises:
            BadExample: For the first example, if none of them is usable.
            ValueError: If there is no example.
        """
        problem: BadExample | None = None
        for example in self.source.head(looks):
            try:
                return self.batch([example])
            except BadExample as error:
                problem = problem or error
        raise problem or ValueError(f"expected examples in split {self.name!r}, got none")

    def like_first(self, looks: int) -> Split:
        """Return this split with a decoder that expects all examples to look like the first.

        Args:
            looks: How many of the first examples may be tried, at least 1.

        Raises:
            BadExample: For the first example, if none of them is usable.
        """
        return Split(self.name, self.source, self.decoder.expecting(self.first(looks)))

    def _decode(self, example: Example, epoch: int) -> Decoded | Bad:
        try:
            return self.decoder(example, epoch)
        except MisfitError as problem:
            reason = without_secrets(f"expected {problem}")  # it may name an address
            return Bad(*self.source.where(example.index), 1, reason)


def sift(decoded: Iterable[Decoded | Bad]) -> tuple[list[Decoded], list[Bad]]:
    """Separate the usable examples from the bad ones.

    Args:
        decoded: As `Split.decode` returns them.
    """
    kept: list[Decoded] = []
    bad: list[Bad] = []
    for one in decoded:
        if isinstance(one, Bad):
            bad.append(one)
        else:
            kept.append(one)
    return kept, bad


def chunks(examples: Iterator[Example | Bad], size: int) -> Iterator[list[Example | Bad]]:
    """Cut a stream of examples into lists.

    Args:
        examples: The stream.
        size: Length of each list; the last may be shorter.
    """
    while chunk := list(islice(examples, size)):
        yield chunk
