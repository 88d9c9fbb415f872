"""Text encoders of the `transformers` library, frozen, as the encoder of a network's texts.

    bytes of captions (B, T) → texts → frozen model → tokens (B, T, E), mask (B, T)
    stored tokens (B, 1 + T, E + 1), as `lit-diffusion encode --text` wrote them → the same

The model is never trained, so it is no part of the network: neither the optimizer nor an average
nor a checkpoint contains it. A checkpoint has its name, and the SHA-256 of its files, which is
compared whenever weights are loaded: with another encoder the same words would mean something
else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_diffusion.models.extras import import_transformers
from lit_diffusion.models.frozen_encoder import (
    FrozenEncoder,
    digest_of,
    folder_of,
)
from lit_diffusion.nn.text import TextEncoder, bytes_text

__all__ = ["TransformersText"]

CODES = 8  # bytes of the SHA-256 that stand before the stored tokens of each text


class TransformersText(TextEncoder):
    """A pretrained text encoder of transformers (CLIP, T5, BERT, …), frozen, in float32.

    It knows far more words than the captions of a data set have, and costs no training. No text is
    the empty text. The files are read as data: weights from safetensors only, and no code of the
    folder is executed.

    Args:
        path: Folder of the model and its tokenizer, as save_pretrained writes them or
            `hf download NAME --local-dir` does; or a name on the hub.
        revision: Of a name on the hub: a branch, tag or commit; None means the newest. It becomes
            the commit that was found.
        truncate: Cut off texts of more tokens than the model takes, 77 for CLIP; by default they
            are refused.

    Shapes:
        text (B, T) bytes, 0 for padding, or the stored tokens (B, 1 + T, E + 1) → tokens
        (B, T, E), mask (B, T).

    Raises:
        ModuleNotFoundError: If transformers is not installed.
        ValueError: If there is no such encoder, it is not stored as safetensors, or it is not the
            one that the weights of the network, or the stored tokens, were made with.

    References:
        Radford et al. (2021), Learning Transferable Visual Models From Natural Language
        Supervision, arXiv:2103.00020. Saharia et al. (2022), Photorealistic Text-to-Image
        Diffusion Models with Deep Language Understanding, arXiv:2205.11487 (a frozen T5).
    """

    identity: Tensor

    def __init__(self, path: str, revision: str | None = None, truncate: bool = False) -> None:
        super().__init__()
        import_transformers()
        folder = folder_of(str(path), revision)
        digest = digest_of(folder)
        self.path = str(path)
        self.revision = folder.name if not Path(path).expanduser().is_dir() else None
        self.truncate = truncate
        self.frozen = FrozenEncoder(folder, truncate)
        self.width = self.frozen.width
        self._compared = False
        self.register_buffer("identity", torch.tensor(list(digest), dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(_refuse_another)

    @property
    def sha256(self) -> str:
        """The SHA-256 of the encoder's files, in hexadecimal."""
        return bytes(self.identity.tolist()).hex()

    @torch.compiler.disable
    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, but within `once` no tensor is encoded twice."""
        return super().read(text)

    @torch.compiler.disable
    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of texts, and which of them are in use."""
        if text.is_floating_point() and text.ndim == 3 and text.shape[2] == self.width + 1:
            return self._restored(text)
        if text.is_floating_point() or text.ndim != 2:
            raise ValueError(
                f"a TransformersText of width {self.width} takes bytes (B, T), or tokens "
                f"(B, 1 + T, {self.width + 1}) that `lit-diffusion encode --text` stored, got "
                f"{text.dtype} {tuple(text.shape)}: set data.text_key to the column of captions, "
                "or data.condition_keys to [text]."
            )
        return self.frozen(bytes_text(text), text.device)

    def check(self, texts: Sequence[str]) -> None:
        """Refuse texts of too many tokens."""
        self.frozen.count(texts)

    def no_text(self, batch: int) -> Tensor:
        """A zero for each example."""
        return torch.zeros(batch, 1, dtype=torch.int64, device=self.identity.device)

    def stored(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens in the form in which data hold them: with their mask, and whose they are.

        The last number of each row is 1 where a token is in use. The first row has the first
        bytes of the SHA-256. A dropped text is zero everywhere.

        Args:
            tokens: As the encoder returns them.
            mask: As the encoder returns it.

        Shapes:
            tokens (B, T, E), mask (B, T); result (B, 1 + T, E + 1).
        """
        rows = torch.cat([tokens, mask[..., None].to(tokens.dtype)], dim=2)
        header = torch.zeros_like(rows[:, :1])
        codes = self._codes(header)
        header[:, 0, : len(codes)] = codes
        header[:, 0, -1] = 1
        return torch.cat([header, rows], dim=1)

    def _codes(self, like: Tensor) -> Tensor:
        return self.identity[: min(CODES, self.width)].to(like)

    def _restored(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and mask from the form of `stored`, with no text where they were dropped."""
        header, rows = rows[:, 0], rows[:, 1:]
        dropped = header[:, -1] == 0
        codes = self._codes(header)
        if not self._compared or rows.device.type == "cpu":  # on a GPU once, since this waits
            wrong = (header[:, : len(codes)] != codes).any(dim=1) & ~dropped
            self._compared = not bool(dropped.all())
            if bool(wrong.any()):
                raise ValueError(
                    f"expected tokens that `lit-diffusion encode --text {self.path}` stored, got "
                    "those of another encoder: set path to that of README.md beside the data, or "
                    "encode the data again."
                )
        none, used = self.frozen.none(rows.device)
        length = max(rows.shape[1], none.shape[1])
        rows = F.pad(rows, (0, 0, 0, length - rows.shape[1]))
        none = F.pad(none, (0, 0, 0, length - none.shape[1])).to(rows.dtype)
        used = F.pad(used, (0, length - used.shape[1]))
        tokens = torch.where(dropped[:, None, None], none, rows[..., :-1])
        return tokens, torch.where(dropped[:, None], used, rows[..., -1] > 0)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"path={self.path!r}, revision={self.revision!r}, truncate={self.truncate}"


def _refuse_another(
    module: TransformersText, state: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Refuse weights that were trained with another encoder."""
    found = state.get(f"{prefix}identity")
    if found is not None and not torch.equal(found.cpu(), module.identity.cpu()):
        raise ValueError(
            f"expected in {module.path} the text encoder that these weights were trained with, of "
            f"SHA-256 {bytes(found.tolist()).hex()[:16]}…, got "
            f"{module.sha256[:16]}…: put that folder back, or name it as "
            "path of TransformersText."
        )
