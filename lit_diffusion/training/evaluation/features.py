"""Feature networks: embed images so that two sets of them can be compared.

    uint8 images (B, C, H, W) → features (B, F), and logits (B, K) of a classifier

Any nn.Module with this signature works, and may return the features alone. Distances under
different networks cannot be compared; a protocol therefore names the network by a fingerprint of
its weights, together with how it resizes images.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffusion.training.data.reading.sources import SHIPPED

__all__ = ["ClassifierFeatures", "Features", "InceptionFeatures", "extract", "fingerprint"]

# The end of its file's name is how its SHA-256 begins.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


class Features(NamedTuple):
    """The output of a feature network: features, and logits if it is a classifier.

    Shapes:
        features (B, F); logits (B, K) or None.
    """

    features: Tensor
    logits: Tensor | None = None


class InceptionFeatures(nn.Module):
    """The 2015 Inception network, the standard for published FID, KID and IS.

    It returns the 2048 features before the last layer and that layer's logits without bias,
    computed by torch-fidelity from the original weights. Images are resized to 299 × 299 as in
    TensorFlow 1, without antialiasing: with it, the numbers could not be compared with published
    ones. Grey images are repeated in three channels.

    Args:
        weights: A local copy of the weights; None uses PyTorch's cache and downloads them if they
            are missing.
        sha256: A prefix of the file's SHA-256; None means that of the original weights.

    Raises:
        FileNotFoundError: If there is no such file, or it cannot be downloaded.
        ValueError: If the SHA-256 or the contents differ from those expected.

    References:
        Heusel et al. (2017), GANs Trained by a Two Time-Scale Update Rule Converge to a Local
        Nash Equilibrium, arXiv:1706.08500.
    """

    num_features = 2048
    resize = "299 × 299, bilinear as in TensorFlow 1, no antialiasing"

    def __init__(self, weights: str | None = None, sha256: str | None = None) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # type: ignore[import-untyped]

        self.weights = weights
        self.sha256 = sha256
        path = _download() if weights is None else Path(weights).expanduser()
        _check_file(path, sha256 or INCEPTION[-12:-4])
        # torch-fidelity unpickles the file: check first that it holds tensors only.
        try:
            torch.load(path, map_location="cpu", weights_only=True)
            with torch.random.fork_rng([]):  # evaluation must not change the random state of a run
                self.network = FeatureExtractorInceptionV3(
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    feature_extractor_weights_path=str(path),
                )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"expected Inception's weights as torch-fidelity keeps them in {path}, got: "
                f"{reason}"
            ) from error

    def forward(self, images: Tensor) -> Features:
        """Compute features and logits of images.

        Args:
            images: Grey or colour images.

        Shapes:
            images (B, 1 or 3, H, W), uint8; features (B, 2048), logits (B, 1008).

        Raises:
            ValueError: If the number of channels is neither 1 nor 3.
        """
        if images.shape[1] not in (1, 3):
            raise ValueError(
                f"Inception expects images of 1 or 3 channels, got {images.shape[1]}: set "
                "features to another network."
            )
        return Features(*self.network(images.expand(-1, 3, -1, -1)))


def _download() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION[-12:-4], progress=False
            )
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"Inception's weights cannot be downloaded ({error}): fetch {URL_INCEPTION_V3} "
                "where there is a network and give the file as features.weights, or choose other "
                "features."
            ) from error
    return path


def _check_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"expected the weights of a feature network at {path}, found none")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected.lower()):
        raise ValueError(
            f"expected weights whose SHA-256 begins with {expected} in {path}, got {found}: to "
            "use them nevertheless, set features.sha256 to their hash"
        )


class ClassifierFeatures(nn.Module):
    """The last hidden features of a small classifier of one data set.

    Inception was trained on photographs and is slow; for handwritten digits a digit classifier is
    more sensitive and takes a second. Its distances are comparable with each other only. The one
    for the demo's digits is shipped; ``benchmarks/train_features.py`` trains one for any labelled
    data set.

    Args:
        weights: The name of a shipped data set, or a safetensors file written by the script.
        sha256: A prefix of the file's SHA-256; None for no check.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the SHA-256 or the contents differ from those expected.

    Example:
        >>> network = ClassifierFeatures("digits8x8")
        >>> network(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).logits.shape
        torch.Size([2, 10])
    """

    resize = "none"

    def __init__(self, weights: str = "digits8x8", sha256: str | None = None) -> None:
        super().__init__()
        from safetensors import SafetensorError, safe_open

        self.weights = weights
        self.sha256 = sha256
        shipped = SHIPPED / weights / "features.safetensors"
        path = shipped if weights.isidentifier() and shipped.is_file() else Path(weights)
        _check_file(path.expanduser(), sha256 or "")
        try:
            with safe_open(path.expanduser(), "pt") as file:
                made = json.loads((file.metadata() or {})["made"])
                state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
            self.image_shape = tuple(made["image_shape"])
            with torch.random.fork_rng([]):  # evaluation must not change the random state of a run
                self.network = Classifier(self.image_shape, made["num_classes"])
            self.network.load_state_dict(state)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"expected a classifier that benchmarks/train_features.py wrote in {path}, got: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        self.num_features = self.network.num_features
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Features:
        """Compute features and logits of images.

        Args:
            images: Images of the size that the classifier was trained on.

        Shapes:
            images (B, C, H, W), uint8; features (B, 32), logits (B, K).

        Raises:
            ValueError: If they have another shape.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"the classifier {self.weights} expects images {self.image_shape}, got "
                f"{tuple(images.shape[1:])}: set features to another network."
            )
        return self.network(images.float().div(127.5).sub(1))


class Classifier(nn.Module):
    """Three convolutions, 32 features, and a linear layer to the classes.

    Args:
        image_shape: (C, H, W) of the images.
        num_classes: K.
    """

    num_features = 32

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        cells = -(-height // 2) * -(-width // 2)
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * cells, self.num_features)),
        )
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Features:
        """Compute features and logits of x.

        Args:
            x: Images in [−1, 1].

        Shapes:
            x (B, C, H, W); features (B, 32), logits (B, K).
        """
        features = self.body(x)
        return Features(features, self.head(F.relu(features)))


@torch.no_grad()
def extract(network: nn.Module, images: Tensor) -> Features:
    """Features and logits as float64, computed in float32 whatever the precision of the run.

    Args:
        network: A feature network, in eval mode.
        images: Images as bytes.

    Shapes:
        images (B, C, H, W), uint8; features (B, F), logits (B, K) or None.

    Raises:
        ValueError: If the images are not bytes.
        TypeError: If the network does not return features.
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"expected images as bytes, uint8, got {images.dtype}: decode latents "
            "into images first, and leave FID out of their training."
        )
    with torch.autocast(images.device.type, enabled=False):
        found = network(images)
    features, logits = found if isinstance(found, tuple) else (found, None)
    if not torch.is_tensor(features) or features.ndim != 2 or len(features) != len(images):
        raise TypeError(
            f"expected {len(images)} rows of features from {type(network).__name__}, got "
            f"{tuple(features.shape) if torch.is_tensor(features) else type(features).__name__}"
        )
    wide = torch.float32 if images.device.type == "mps" else torch.float64
    return Features(features.to(wide), None if logits is None else logits.to(wide))


def fingerprint(network: nn.Module) -> str:
    """The first 16 digits of a SHA-256 over the class and the state of a network.

    Args:
        network: A feature network.

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> one, other = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> fingerprint(one) == fingerprint(one), fingerprint(one) == fingerprint(other)
        (True, False)
    """
    digest = hashlib.sha256(type(network).__qualname__.encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        plain: Any = value.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()[:16]
