"""Texts as a condition: from the bytes of a caption to the tokens that a network looks at.

    "a seven"  →  bytes (B, T)  →  encoder  →  tokens (B, T, E), mask (B, T)  →  cross-attention

A caption is given as the bytes of its UTF-8 encoding, which needs no vocabulary and knows every
language and every misspelling. Shorter captions are padded with zeros, and a text of zeros alone
is no text: it is what a network is given where guidance drops the caption, or where there is none.
It then sees a single token, which is learned like all others.

Legend: B batch, T bytes of the longest text, E width of a token.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lit_diffusion.nn.cross_attention import CrossAttention

FEW = 4  # texts that are remembered while sampling: guidance alternates between two


def text_bytes(texts: Sequence[str], length: int | None = None) -> Tensor:
    """The bytes of texts in UTF-8, padded with zeros.

    Args:
        texts: B texts.
        length: Number T of columns, at least 1; None means that of the longest text. A longer text
            is refused and not cut off, since its end may matter most.

    Shapes:
        result (B, T), int64, in [0, 256).

    Raises:
        ValueError: If a text is blank, has a zero character, cannot be encoded, or is too long.

    Example:
        >>> text_bytes(["a 3", "é"])
        tensor([[ 97,  32,  51],
                [195, 169,   0]])
    """
    encoded = [_encode(text) for text in texts]
    longest = max(map(len, encoded), default=1) if length is None else length
    for text, found in zip(texts, encoded, strict=True):
        if len(found) > longest:
            raise ValueError(
                f"a text of at most {longest} bytes, got {len(found)}: {text[:40]!r}…"
            )
    rows = [torch.tensor([*found, *[0] * (longest - len(found))]) for found in encoded]
    return torch.stack(rows) if rows else torch.zeros(0, longest, dtype=torch.int64)


def _encode(text: str) -> bytes:
    if not text.strip():
        raise ValueError(f"a text, got {text[:40]!r}, which is blank")
    if "\0" in text:
        raise ValueError(f"a text without zero characters, which mean its end, got {text[:40]!r}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text that UTF-8 can encode, got {text[:40]!r}") from error


def bytes_text(rows: Tensor) -> list[str]:
    """The texts of their bytes: the inverse of `text_bytes`.

    Args:
        rows: As `text_bytes` returns them.

    Shapes:
        rows (B, T), integers.

    Example:
        >>> bytes_text(text_bytes(["a 3", "é"]))
        ['a 3', 'é']
    """
    return [bytes(filter(None, row)).decode(errors="replace") for row in rows.tolist()]


class TextEncoder(nn.Module, ABC):
    """Makes the tokens of a text, which a network then looks at by cross-attention.

    The abstract base of all encoders. A network takes one as its argument ``text``, and gives it
    the entry ``text`` of the batch. The tokens of each text depend on this text alone, and not on
    its padding. A text that was dropped is zero, and has at least one token as well.

    Attributes:
        width: Width E of a token.
    """

    width: int
    _seen: list[tuple[Tensor, tuple[Tensor, Tensor]]] | None = None  # within `once`

    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, but within `once` no tensor is encoded twice.

        Args:
            text: As for `forward`. It is recognised by being the same tensor, so that the device
                need not be waited for.
        """
        if self._seen is None or torch.compiler.is_compiling():
            found: tuple[Tensor, Tensor] = self(text)
            return found
        for before, found in self._seen:
            if before is text:
                return found
        found = self(text)
        self._seen = [*self._seen, (text, found)][-FEW:]
        return found

    def check(self, texts: Sequence[str]) -> None:
        """Refuse texts that it cannot take; by default it takes all.

        Args:
            texts: The texts.

        Raises:
            ValueError: If one cannot be taken.
        """
        del texts

    @abstractmethod
    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of texts, and which of them are in use, at least one of each text.

        Args:
            text: As the data contain it.

        Shapes:
            text (B, T, *); tokens (B, T, E), mask (B, T), bool.
        """

    @abstractmethod
    def no_text(self, batch: int) -> Tensor:
        """The input that means that there is no text, for so many examples.

        Args:
            batch: B.

        Shapes:
            result (B, T, *).
        """


@contextmanager
def once(network: nn.Module) -> Iterator[None]:
    """While it lasts, the encoders in a network encode no text twice, such as while sampling.

    Args:
        network: The network, in whose conditions and weights nothing changes meanwhile.

    Example:
        >>> encode = ByteTransformer(length=8, width=4, depth=1, heads=1)
        >>> text = text_bytes(["a 3"])
        >>> with once(encode):
        ...     encode.read(text)[0] is encode.read(text)[0]
        True
    """
    with ExitStack() as after:
        for module in network.modules():
            if isinstance(module, TextEncoder):
                after.callback(setattr, module, "_seen", module._seen)
                module._seen = []
        yield


class TextBlock(nn.Module):
    """Self-attention within the mask, then a perceptron, each with a skip connection.

    Args:
        width: Width E of a token.
        heads: Number of attention heads.

    Shapes:
        h (B, T, E), mask (B, T) → (B, T, E).
    """

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.norm_attend = nn.LayerNorm(width)
        self.attend = CrossAttention(width, width, heads)
        self.norm_perceptron = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """Add the output of the attention to ``h``, then that of the perceptron."""
        seen = self.norm_attend(h)
        h = h + self.attend(seen, seen, mask)
        return h + self.perceptron(self.norm_perceptron(h))


class ByteTransformer(TextEncoder):
    """A small transformer over the bytes of a text, which is trained along with the network.

    It learns the words of its data set, and no others: enough for captions of a limited vocabulary
    and for data of a million captions. It needs no tokenizer and no download.

    Args:
        length: Longest text in bytes, at least 1; None means 256, and in a config the
            `data.text_length`.
        width: Width E of a token, a multiple of ``heads``.
        depth: Number of blocks, at least 1.
        heads: Number of attention heads.

    Shapes:
        text (B, T), integers in [0, 256), T ≤ length, 0 for padding → tokens (B, T, E), mask
        (B, T). The first token is always in use: that of a text of zeros means "no text".

    Raises:
        ValueError: If a number is below 1 or does not divide the width; if a text is too long, or
            is no bytes.

    References:
        Xue et al. (2022), ByT5: Towards a Token-Free Future with Pre-trained Byte-to-Byte Models,
        arXiv:2105.13626. Xiong et al. (2020), On Layer Normalization in the Transformer
        Architecture, arXiv:2002.04745 (the order of norm and attention).

    Example:
        >>> encode = ByteTransformer(length=32, width=16, depth=1, heads=2)
        >>> tokens, mask = encode(text_bytes(["a three", "a 3"]))
        >>> tokens.shape, mask.sum(1)
        (torch.Size([2, 7, 16]), tensor([7, 3]))
    """

    def __init__(
        self, length: int | None = None, width: int = 256, depth: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        length = 256 if length is None else length
        if min(length, width, depth, heads) < 1 or width % heads:
            raise ValueError(
                "length, width, depth and heads must be at least 1, and width a multiple of "
                f"heads, got {length}, {width}, {depth} and {heads}."
            )
        self.length = length
        self.width = width
        self.depth = depth
        self.heads = heads
        self.table = nn.Embedding(256, width)
        self.place = nn.Parameter(torch.zeros(length, width))
        for parameter in (self.table.weight, self.place):
            nn.init.normal_(parameter, std=0.5)
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of texts, and which of them are in use."""
        if text.ndim != 2 or text.is_floating_point() or not 0 < text.shape[1] <= self.length:
            raise ValueError(
                f"a ByteTransformer of length={self.length} takes bytes (B, T) with T ≤ "
                f"{self.length}, got {text.dtype} {tuple(text.shape)}: give it length as "
                "data.text_length, and data.text_key the column of captions."
            )
        mask = text > 0
        first = torch.arange(text.shape[1], device=text.device) == 0
        mask = mask | first  # where the first byte is zero, it means "no text"
        h = self.table(text) + self.place[: text.shape[1]]
        for block in self.blocks:
            h = block(h, mask)
        return self.norm(h), mask

    def no_text(self, batch: int) -> Tensor:
        """A zero for each example."""
        return torch.zeros(batch, 1, dtype=torch.int64, device=self.place.device)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"length={self.length}, width={self.width}, depth={self.depth}, heads={self.heads}"
