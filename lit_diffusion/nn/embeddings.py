"""Embeddings of λ, labels, further conditions and noisy pixels.

λ is a continuous number, whose embedding should be smooth: sines and cosines of many wavelengths.
A label is a category, embedded by a row of a table. Further conditions are real numbers, which
pass through two linear layers. All three become vectors of one width; their sum modulates every
block. The last digits of a noisy pixel matter when there is little noise, so pixels can be given
to a network together with fine waves of themselves.

Legend: B batch, F features; λ = ``logsnr`` (B,), ``label`` (B,) with −1 for "no label", z noisy
images (B, C, H, W).
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_diffusion.nn.augment import AugmentEmbedding
from lit_diffusion.nn.text import TextEncoder


class LogSNREmbedding(nn.Module):
    """Waves of λ through two linear layers: MLP([cos(ω_k λ), sin(ω_k λ)]).

    The wavelengths 2π/ω_k form a geometric sequence from ``longest``, which distinguishes pure
    noise from clean data, down to ``shortest``, which resolves differences of 0.1. Computed in
    float32, under autocast too: a network's output is a steep function of λ, of which bfloat16
    keeps less than three digits.

    Args:
        features: Width F of the result, at least 1.
        waves: Number of wavelengths, at least 2.
        longest: Longest wavelength, in units of λ. The default is twice the usual range [−20, 20].
        shortest: Shortest wavelength, in units of λ.

    Shapes:
        logsnr (B,) of any floating type → (B, F) in the type of the parameters.

    References:
        Vaswani et al. (2017), Attention Is All You Need, arXiv:1706.03762, Section 3.5.

    Example:
        >>> embed = LogSNREmbedding(features=8)
        >>> embed(torch.tensor([-3.0, 0.0, 3.0])).shape
        torch.Size([3, 8])
        >>> embed.frequencies()[[0, -1]]  # 2π/80 and 2π/2
        tensor([0.0785, 3.1416])
    """

    def __init__(
        self,
        features: int = 128,
        waves: int = 32,
        longest: float = 80.0,
        shortest: float = 2.0,
    ) -> None:
        super().__init__()
        if features < 1 or waves < 2:
            raise ValueError(
                f"features must be at least 1 and waves at least 2, got {features} and {waves}."
            )
        if not 0 < shortest < longest:
            raise ValueError(
                f"wavelengths must satisfy 0 < shortest < longest, got {shortest} and {longest}."
            )
        self.features = features
        self.waves = waves
        self.longest = longest
        self.shortest = shortest
        self.layer_in = nn.Linear(2 * waves, features)
        self.layer_out = nn.Linear(features, features)

    def frequencies(self) -> Tensor:
        """The angular frequencies ω_k in ascending order, (waves,), on the parameters' device.

        Computed at every call and not stored in a buffer, which ``.to(torch.bfloat16)`` would
        round.
        """
        slow, fast = math.log(2 * math.pi / self.longest), math.log(2 * math.pi / self.shortest)
        device = self.layer_in.weight.device
        return torch.linspace(slow, fast, self.waves, dtype=torch.float32, device=device).exp()

    def forward(self, logsnr: Tensor) -> Tensor:
        """Embed λ (B,) as (B, F)."""
        with torch.autocast(logsnr.device.type, enabled=False):
            phase = logsnr.float()[:, None] * self.frequencies()
            waves = torch.cat([phase.cos(), phase.sin()], dim=1).to(self.layer_in.weight.dtype)
            return self.layer_out(F.silu(self.layer_in(waves)))

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"features={self.features}, waves={self.waves}, "
            f"longest={self.longest}, shortest={self.shortest}"
        )


class FourierWaves(nn.Module):
    """The image with fine waves of itself: z, then sin(2ⁿπz) and cos(2ⁿπz) for each exponent n.

    At low noise the grey level of a pixel is certain, and the noise is its distance to that level,
    a thousandth of the pixel's range. A convolution can hardly resolve that; a wave with the
    period of the levels has it at full amplitude. Computed in float32 at least, under autocast
    too: in bfloat16 the phase 2⁷πz would have no correct digit.

    Args:
        exponents: The n, integers of at least 0. A wave has period 2¹⁻ⁿ: for 256 levels on [−1, 1]
            the finest of use is n = 7, for 17 levels n = 4.

    Shapes:
        z (B, C, H, W) → (B, C·(1 + 2·len(exponents)), H, W), of the type of z.

    Raises:
        ValueError: If an exponent is negative.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, Appendix C.

    Example:
        >>> FourierWaves((3,))(torch.full((1, 1, 1, 1), 0.5 + 1 / 32)).flatten()
        tensor([0.5312, 0.7071, 0.7071])
    """

    def __init__(self, exponents: tuple[int, ...] = ()) -> None:
        super().__init__()
        if any(n < 0 for n in exponents):
            raise ValueError(
                f"exponents must be integers of at least 0, got {tuple(exponents)}; the wave of "
                "exponent 0 already is as long as the range [−1, 1]."
            )
        self.exponents = tuple(exponents)

    def forward(self, z: Tensor) -> Tensor:
        """Append the waves as channels."""
        with torch.autocast(z.device.type, enabled=False):
            exact = z if z.dtype in (torch.float32, torch.float64) else z.float()
            waves = [exact * (2**n * math.pi) for n in self.exponents]
            seen = [exact, *(w.sin() for w in waves), *(w.cos() for w in waves)]
            return torch.cat(seen, dim=1).to(z.dtype)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"exponents={self.exponents}"


class LabelEmbedding(nn.Module):
    """A table with one row per class, and one more for "no label".

    Classifier-free guidance trains the extra row by dropping labels: the same network then
    predicts with and without them. It is row 0, and class k is row k + 1, so no comparison with −1
    is needed; a label outside [−1, num_classes) has no row and raises IndexError (on CUDA, a
    device assertion).

    Args:
        num_classes: Number of classes, at least 1.
        features: Width F of the result.

    Shapes:
        label (B,) of integers in [−1, num_classes), or None for no labels at all → (B, F).

    References:
        Ho & Salimans (2022), Classifier-Free Diffusion Guidance, arXiv:2207.12598, Section 3.2.

    Example:
        >>> embed = LabelEmbedding(num_classes=10, features=8)
        >>> torch.equal(embed(torch.tensor([-1, -1]), 2), embed(None, 2))
        True
    """

    def __init__(self, num_classes: int = 10, features: int = 128) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(
                f"num_classes must be at least 1, got {num_classes}; "
                "a network without classes takes num_classes=None."
            )
        self.num_classes = num_classes
        self.features = features
        self.table = nn.Embedding(num_classes + 1, features)
        # About the initial size of LogSNREmbedding's output, to which this is added.
        nn.init.normal_(self.table.weight, std=0.2)

    def forward(self, label: Tensor | None, batch: int) -> Tensor:
        """Look up the rows of ``label``, or ``batch`` times the row that means "no label"."""
        if label is None:
            return self.table.weight[0].expand(batch, -1)
        return self.table(label + 1)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"num_classes={self.num_classes}, features={self.features}"


class ConditionEmbedding(nn.Module):
    """Further conditions through two linear layers: MLP([c₁, c₂, …, dropped]).

    Zero may be a valid value, so whether the conditions are dropped is a separate input.

    Args:
        sizes: Number of values of each condition per example, by name; at least one condition.
        features: Width F of the result.

    Shapes:
        each condition (B, *), of any type; dropped (B,), bool, or None for none dropped; no
        condition at all means all dropped → (B, F).

    Raises:
        ValueError: If a size is below 1; if a condition is missing, unknown, or of another size.

    Example:
        >>> embed = ConditionEmbedding({"angle": 2, "age": 1}, features=8)
        >>> embed({"angle": torch.zeros(5, 2), "age": torch.arange(5)}, None, 5).shape
        torch.Size([5, 8])
    """

    def __init__(self, sizes: Mapping[str, int], features: int = 128) -> None:
        super().__init__()
        if not sizes or min(sizes.values()) < 1:
            raise ValueError(f"each condition must have at least one number, got {dict(sizes)}.")
        self.sizes = dict(sizes)
        self.features = features
        self.layer_in = nn.Linear(sum(sizes.values()) + 1, features)
        self.layer_out = nn.Linear(features, features)

    def forward(self, cond: Mapping[str, Tensor], dropped: Tensor | None, batch: int) -> Tensor:
        """Embed the conditions of ``batch`` examples."""
        like = self.layer_in.weight
        if dropped is None:
            dropped = torch.full((batch,), not cond, device=like.device)
        if not cond:
            cond = {name: like.new_zeros(batch, size) for name, size in self.sizes.items()}
        came = {name: value[:1].numel() for name, value in cond.items()}
        if came != self.sizes:
            raise ValueError(
                f"this network was built for conditions of {self.sizes} numbers, got {came}; give "
                f"conditions={came}."
            )
        seen = [cond[name].reshape(batch, -1) for name in self.sizes] + [dropped[:, None]]
        numbers = torch.cat([part.to(like.dtype) for part in seen], dim=1)
        return self.layer_out(F.silu(self.layer_in(numbers)))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"sizes={self.sizes}, features={self.features}"


TEXT = "text"  # the name of the condition that is a text


class Read(NamedTuple):
    """The conditions without the text, and what the encoder made of the text, if there is one.

    Shapes:
        tokens (B, T, E), mask (B, T), bool.
    """

    others: Mapping[str, Tensor]
    tokens: Tensor | None = None
    mask: Tensor | None = None


class ConditionalNetwork(nn.Module):
    """A network conditioned on λ, a label and other numbers c: e = e(λ) + e(label) + e(c).

    The common base of the networks here. A network calls `make_embeddings` where its first layers
    are made, and `embed` to compute e. If it also looks at texts, it calls `read_text` before. If
    it has an argument `activation_checkpointing`, it calls its blocks by `call_block`.
    """

    activation_checkpointing = False
    text: TextEncoder | None

    def make_embeddings(
        self,
        features: int,
        num_classes: int | None,
        conditions: Mapping[str, int],
        text: TextEncoder | None = None,
        augment: int | None = None,
    ) -> None:
        """Make those of the three embeddings that are needed, and keep the encoder of texts.

        Args:
            features: Width F of e.
            num_classes: Number of classes, None for none.
            conditions: Number of values of each further condition, by name.
            text: The encoder of the condition ``text``, None for no texts.
            augment: Number of values that describe an augmentation, None for none.

        Raises:
            ValueError: If there are an encoder of texts and numbers of the name ``text``.
        """
        if text is not None and TEXT in conditions:
            raise ValueError(
                f"the condition {TEXT!r} is what the encoder of texts is given, and cannot be "
                f"numbers as well, got conditions={dict(conditions)}: rename them."
            )
        self.text = text
        self.embed_logsnr = LogSNREmbedding(features)
        self.embed_label = None if num_classes is None else LabelEmbedding(num_classes, features)
        self.embed_condition = ConditionEmbedding(conditions, features) if conditions else None
        self.embed_augment = None if augment is None else AugmentEmbedding(augment, features)

    def embed(
        self,
        logsnr: Tensor,
        label: Tensor | None,
        dropped: Tensor | None,
        cond: Mapping[str, Tensor],
        augment: Tensor | None = None,
    ) -> Tensor:
        """The sum e of the embeddings.

        Args:
            logsnr: λ.
            label: Class of each example, −1 for no label; None means all −1.
            dropped: Whether the conditions of each example are dropped; None for no example.
            cond: The further conditions; empty means all dropped.
            augment: What was done to each example; None for nothing.

        Shapes:
            logsnr, label and dropped (B,), each condition (B, *), augment (B, K) → (B, F).

        Raises:
            ValueError: If the network was built without labels or conditions but is given some.
        """
        embedding: Tensor = self.embed_logsnr(logsnr)
        if self.embed_label is not None:
            embedding = embedding + self.embed_label(label, len(logsnr))
        elif label is not None:
            raise ValueError(
                f"this {type(self).__name__} was built without classes (num_classes=None) but got "
                "a label; give num_classes, or pass no label."
            )
        if self.embed_condition is not None:
            embedding = embedding + self.embed_condition(cond, dropped, len(logsnr))
        elif cond:
            raise ValueError(
                f"this {type(self).__name__} was built without conditions but got "
                f"{', '.join(cond)}; give conditions, or pass none."
            )
        if self.embed_augment is not None:
            embedding = embedding + self.embed_augment(augment, len(logsnr))
        elif augment is not None:
            raise ValueError(
                f"this {type(self).__name__} was built for data that are not augmented "
                f"(augment=None), got {augment.shape[1]} numbers; give augment={augment.shape[1]}."
            )
        return embedding

    def read_text(self, cond: Mapping[str, Tensor], batch: int) -> Read:
        """Encode the text among the conditions.

        Args:
            cond: The further conditions; if there are none at all, the text is dropped as well.
            batch: Number B of examples.

        Raises:
            ValueError: If there are other conditions but no text, or a text alone where the
                network was built for others as well.
        """
        if self.text is None:
            return Read(cond)
        others = {name: value for name, value in cond.items() if name != TEXT}
        if cond and (TEXT not in cond or (self.embed_condition is not None and not others)):
            raise ValueError(
                f"this {type(self).__name__} was built for texts"
                f"{' and other conditions' if self.embed_condition else ''}, got "
                f"{', '.join(cond)}; give all of them, or none."
            )
        return Read(others, *self.text.read(cond[TEXT] if cond else self.text.no_text(batch)))

    def call_block(self, block: Callable[..., Tensor], *given: Tensor | None) -> Tensor:
        """Call a block; with `activation_checkpointing` store only its inputs in training.

        Its activations are then computed again, random numbers included, during the backward
        pass. Loss and gradients are the same.

        Args:
            block: The block.
            *given: Its arguments.
        """
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, *given, use_reentrant=False)
            return out
        return block(*given)
