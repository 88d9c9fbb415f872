"""A text encoder of the `transformers` library: its files, and the model, loaded when needed.

    folder or name on the hub → config, tokenizer, weights → texts → tokens (B, T, E), mask (B, T)

The files are read as data: weights from safetensors only, and no code of the folder is executed.
transformers is an optional dependency, imported when the first such encoder is made.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_diffusion.models.extras import import_transformers

__all__ = ["FrozenEncoder", "digest_of", "folder_of"]

FILES = ("*.safetensors", "*.json", "*.txt", "*.model")  # all that is loaded of a model
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")  # or a *.model of sentencepiece
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and without remarks on weights that are left out; missing ones are an error."""
    logging = import_transformers().utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before[0])
        if before[1]:
            logging.enable_progress_bar()


def folder_of(path: str, revision: str | None = None) -> Path:
    """The local folder of a model; one on the hub is downloaded, only the files that are read.

    Args:
        path: A folder, or a name on the hub.
        revision: Of a name on the hub; None means the newest.

    Raises:
        ValueError: If there is no such folder, and nothing of this name can be downloaded.
    """
    if Path(path).expanduser().is_dir():
        if revision is not None:
            raise ValueError(
                f"TransformersText: a revision is that of a name on the hub, {path} is a folder, "
                f"got {revision!r}: leave it out."
            )
        return Path(path).expanduser()
    hub = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(path, revision=revision, allow_patterns=[*FILES]))
    except (OSError, ValueError, hub.errors.HFValidationError) as error:
        raise ValueError(
            f"TransformersText: expected the folder of a text encoder or its name on the hub, got "
            f"{path!r}, which is no folder here and cannot be downloaded: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def digest_of(folder: Path) -> bytes:
    """The SHA-256 of the files of a model, with their names.

    Args:
        folder: The folder.

    Raises:
        ValueError: If it has no config or no weights in safetensors.
    """
    files = sorted({path for pattern in FILES for path in folder.glob(pattern)})
    names = [path.name for path in files]
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        pickled = any(any(folder.glob(pattern)) for pattern in PICKLES)
        raise ValueError(
            f"TransformersText: expected in {folder} a config.json and weights in .safetensors, "
            f"got {', '.join(names) or 'no such files'}"
            + (
                "; other files of weights can execute code and are not read: convert them by "
                "model.save_pretrained(…)."
                if pickled
                else ": give a folder to which save_pretrained wrote model and tokenizer."
            )
        )
    if not any(name in VOCABULARIES or name.endswith(".model") for name in names):
        # transformers would make a tokenizer that knows no words, and say nothing.
        raise ValueError(
            f"TransformersText: expected in {folder} a tokenizer, got {', '.join(names)}: write "
            "it there by tokenizer.save_pretrained(…)."
        )
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.digest()


class FrozenEncoder:
    """A text encoder of transformers and its tokenizer, loaded when they are first needed.

    It is not a module, so that nothing that walks through a network trains, averages, casts or
    stores it, and a copy of the network shares it.

    Args:
        folder: The model and its tokenizer.
        truncate: Whether texts of too many tokens are cut off, and not refused.
    """

    def __init__(self, folder: Path, truncate: bool = False) -> None:
        self.folder = folder
        self.truncate = truncate
        self._tokenizer: Any = None
        self._model: Any = None
        self._none: tuple[Tensor, Tensor] | None = None
        self.config = self._read("AutoConfig")
        self.width = int(self.config.get_text_config().hidden_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenEncoder:
        return self

    def _read(self, kind: str, **options: Any) -> Any:
        """Load a part from the folder, with no network, and no code of the folder executed."""
        try:
            with _quiet():
                return getattr(import_transformers(), kind).from_pretrained(
                    self.folder, local_files_only=True, trust_remote_code=False, **options
                )
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
            raise ValueError(
                f"TransformersText: {self.folder} cannot be loaded as {kind} of transformers: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the folder."""
        if self._tokenizer is None:
            found = self._read("AutoTokenizer")
            found.padding_side = "right"
            if found.pad_token is None:  # whatever it is, it is masked
                found.pad_token = found.eos_token or found.unk_token
            self._tokenizer = found
        return self._tokenizer

    def _weights(self) -> nn.Module:
        """The model, or the part of it that reads texts; no weight may be missing."""
        kinds = import_transformers()
        kind = "AutoModel"
        if self.config.model_type == "clip":
            kind = "CLIPTextModel"
        elif type(self.config) in kinds.MODEL_FOR_TEXT_ENCODING_MAPPING:
            kind = "AutoModelForTextEncoding"
        model, told = self._read(
            kind, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        missing = [name for name in told["missing_keys"] if "pooler" not in name]
        if missing:
            raise ValueError(
                f"TransformersText: the weights in {self.folder} lack {len(missing)} of a "
                f"{type(model).__name__}, such as {missing[0]}: copy or download the folder again."
            )
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        encoder: nn.Module = model.eval().requires_grad_(False)
        return encoder

    def ids(self, texts: Sequence[str]) -> Any:
        """The numbers of the tokens of texts, and which of them are in use.

        Args:
            texts: B texts.

        Raises:
            ValueError: If a text has too many tokens.
        """
        tokenizer = self.tokenizer
        most = tokenizer.model_max_length
        most = min(most, getattr(self.config.get_text_config(), "max_position_embeddings", most))
        if not self.truncate:
            for text in texts:
                if (found := len(tokenizer(text, verbose=False)["input_ids"])) > most:
                    raise ValueError(
                        f"a text of at most {most} tokens of {self.folder.name}, got {found}: "
                        f"{text[:40]!r}…; shorten it, or set truncate of TransformersText"
                    )
        cut = {"truncation": True, "max_length": most} if self.truncate and most < 10**9 else {}
        return tokenizer(list(texts), padding=True, return_tensors="pt", **cut)

    def __call__(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """The tokens of texts and which of them are in use, each text encoded once.

        Args:
            texts: B texts; an empty one means "no text".
            device: Where to run.

        Shapes:
            tokens (B, T, E), float32; mask (B, T), bool.

        Raises:
            ValueError: If a text has too many tokens.
        """
        known = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        # What is made in inference mode could not be used in training afterwards.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            given = self.ids([*known])
            mask = given["attention_mask"].to(device).bool()
            if mask.shape[1] == 0:  # nothing but empty texts, of a tokenizer without end token
                tokens = torch.zeros(len(known), 1, self.width, device=device)
                mask = mask.new_ones(len(known), 1)
            else:
                self._model = (self._model or self._weights()).to(device)
                ids = given["input_ids"].to(device)
                tokens = self._model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
                tokens = tokens.float().masked_fill(~mask[..., None], 0)
                mask[:, 0] = True  # a text without tokens is one of zeros
            rows = torch.tensor([known[text] for text in texts], dtype=torch.int64, device=device)
            return tokens[rows], mask[rows]

    def count(self, texts: Sequence[str]) -> int:
        """The number of tokens of the longest of texts, at least 1; the model does not run.

        Args:
            texts: The texts.

        Raises:
            ValueError: If one has too many tokens.
        """
        ids = self.ids(texts)["input_ids"] if texts else torch.zeros(0, 1)
        return max(1, ids.shape[1])

    def none(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The tokens of no text; if only they are needed, the model does not stay in memory.

        Args:
            device: Where they are needed.

        Shapes:
            tokens (1, T, E); mask (1, T).
        """
        if self._none is None:
            before = self._model
            self._none = self([""], device)
            self._model = before
        tokens, mask = self._none = (self._none[0].to(device), self._none[1].to(device))
        return tokens, mask
