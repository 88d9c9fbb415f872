"""The diffusion transformer: an image as a sequence of patches, with attention among all of them.

The image is cut into squares of P × P pixels, and each becomes one vector, a *token*. All blocks
have the same form, resolution and width, so that a model grows by more or wider blocks. Attention
depends on the content of tokens only, so their positions are added as an embedding. λ and the
label modulate each block by *adaptive layer norm*: they scale and shift the input of a branch and
*gate* its output. The gates are zero-initialised, so every block of a new network is the identity.

    z ─ patches ─ linear ─ + place ─ block ─ ··· ─ block ─ norm, linear ─ patches ─ out
                                       │             │          │
                  λ, label, ··· ─ e ───┴─────────────┴──────────┘

    block:  h ← h + gate · attend(scale · norm(h) + shift),  then the same with a perceptron

Legend: B batch, C channels, H × W pixels, P side of a patch, N = H·W / P² tokens, E width of a
token and of the embedding e.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffusion.nn.cross_attention import CrossAttention
from lit_diffusion.nn.embeddings import ConditionalNetwork, FourierWaves
from lit_diffusion.nn.patches import patchify, phases, rotate, unpatchify
from lit_diffusion.nn.text import TextEncoder


class Size(NamedTuple):
    """The size of a transformer: number of blocks, width of a token, attention heads."""

    depth: int
    width: int
    heads: int


#: The published sizes: 33, 130, 458 and 675 million parameters at 1000 classes and patches of 2.
SIZES = {
    "S": Size(depth=12, width=384, heads=6),
    "B": Size(depth=12, width=768, heads=12),
    "L": Size(depth=24, width=1024, heads=16),
    "XL": Size(depth=28, width=1152, heads=16),
}


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens: softmax(q kᵀ / √D) v in each head.

    Args:
        width: Width E of a token.
        heads: Number of heads, each of width D = E / heads.
        qk_norm: Normalise queries and keys (layer norm in each head, with a gain g), which bounds
            the logits by √D · max|g_q| · max|g_k|.

    Shapes:
        h (B, N, E), angle (N, D/2) or None → (B, N, E). Queries and keys are rotated by ``angle``.

    References:
        Dehghani et al. (2023), Scaling Vision Transformers to 22 Billion Parameters,
        arXiv:2302.05442, Section 2 (``qk_norm``).
    """

    def __init__(self, width: int, heads: int = 1, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        head = width // heads
        self.norm_query = nn.LayerNorm(head, bias=False) if qk_norm else nn.Identity()
        self.norm_key = nn.LayerNorm(head, bias=False) if qk_norm else nn.Identity()
        self.project = nn.Linear(width, width)

    def forward(self, h: Tensor, angle: Tensor | None = None) -> Tensor:
        """The output of the attention for each token."""
        packed = self.query_key_value(h).unflatten(2, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, D)
        query, key = self.norm_query(query), self.norm_key(key)
        if angle is not None:
            query, key = rotate(query, angle), rotate(key, angle)
        # Normalised or rotated tensors are float32 under autocast.
        query, key = query.to(value.dtype), key.to(value.dtype)
        seen = F.scaled_dot_product_attention(query, key, value)
        return self.project(seen.transpose(1, 2).flatten(2))


class Modulation(nn.Module):
    """The vectors that modulate a block: a zero-initialised linear layer of the embedding.

    Computed in float32, under autocast too. It has one row per image and not per token, so this
    costs little, and a rounding error here is the same for all tokens and does not average out.

    Args:
        width: Width E of the embedding and of a vector.
        vectors: Number of vectors.

    Shapes:
        embedding (B, E) → ``vectors`` times (B, 1, E).
    """

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__()
        self.vectors = vectors
        self.layer = nn.Linear(width, vectors * width)

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """The vectors, each to be broadcast over the tokens."""
        with torch.autocast(embedding.device.type, enabled=False):
            return self.layer(embedding)[:, None].chunk(self.vectors, dim=2)


class DiTBlock(nn.Module):
    """Attention, then a perceptron, each with a skip connection and modulated by the embedding.

    Args:
        width: Width E of a token.
        heads: Number of attention heads.
        qk_norm: Normalise queries and keys.
        context: Width F of the tokens of a text, to which there is attention as well, before the
            perceptron; None for no text.

    Shapes:
        h (B, N, E), embedding (B, E), angle (N, E / heads / 2) or None, tokens (B, T, F) and mask
        (B, T) of a text → (B, N, E).

    References:
        Chen et al. (2023), PixArt-α, arXiv:2310.00426, Section 2.3 (the attention to a text).
    """

    def __init__(
        self, width: int, heads: int = 1, qk_norm: bool = False, context: int | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(width, vectors=6)
        self.attend = SelfAttention(width, heads, qk_norm)
        self.read = None if context is None else CrossAttention(width, context, heads)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )

    def forward(
        self,
        h: Tensor,
        embedding: Tensor,
        angle: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Add the output of the attention to ``h``, then that of the perceptron."""
        shift, scale, gate, shift_own, scale_own, gate_own = self.modulation(embedding)
        h = h + gate * self.attend(torch.addcmul(shift, self.norm(h), 1 + scale), angle)
        if self.read is not None:  # neither scaled nor gated: its projection begins at zero
            h = h + self.read(self.norm(h), tokens, mask)
        return h + gate_own * self.perceptron(
            torch.addcmul(shift_own, self.norm(h), 1 + scale_own)
        )


class DiT(ConditionalNetwork):
    """A diffusion transformer for images, latents, series or sets, conditioned on λ and others.

    For large data sets and much compute: it has no built-in locality and must learn it, but keeps
    improving with its size. On small images with little data a `UNet` is better. The cost grows
    with the square of the number of tokens, so large images are given as latents. The output is
    exactly zero at initialisation.

    Args:
        shape: (C, H, W) of the images; H and W multiples of ``patch``. Images of other
            sides pass as well, if they are multiples too. (C, L) for series, (C, D, H, W) for
            volumes, and (C, N) for sets of N points of C coordinates.
        patch: Side P of a patch; half the side means four times the tokens of an image.
        size: S, B, L or XL: the published values of the next three arguments.
        depth: Number of blocks; None takes the size's.
        width: Width E of a token, a multiple of 4·``heads``; None takes the size's.
        heads: Number of attention heads; None takes the size's.
        num_classes: Number of classes, for a class-conditional network; None for none.
        rope: Also rotate queries and keys by their positions, so that attention can depend on the
            distance between tokens. The position embedding stays, since rotations do not encode
            absolute positions.
        qk_norm: Normalise queries and keys, so that growing attention logits cannot make training
            diverge; worth its small cost in long runs, in bfloat16 and at high learning rates.
        positions: Where tokens of images of other sides are. ``index``: as many steps apart as in
            ``shape``, for a larger view of the same things. ``resampled``: spread over the
            same extent, for the same things at another resolution. ``none``: nowhere, so that
            the network treats tokens as a set, which it permutes if its input is permuted; with
            a patch of 1 the points of a set.
        fourier: Exponents n of the waves sin(2ⁿπz), cos(2ⁿπz) given as input with z, such as
            (6, 7) for 256 grey levels and (3, 4) for 17; () for none. Not for latents.
        conditions: Further conditions, by name, with the number of values of each, such as
            {attributes: 40}, each of size about 1; None for none.
        text: Encoder of the condition ``text``, at whose tokens every block looks as well; None
            for no texts.
        augment: Number of values that describe how an image was augmented, 9 for ``data.augment``,
            which the command line gives by itself; None for none.
        activation_checkpointing: Keep of each block only what goes into it, and compute the rest
            again in the backward pass: the same gradients for less memory, and up to a third more
            arithmetic.

    Shapes:
        z (B, C, H, W), logsnr (B,), label (B,) int64 in [−1, num_classes) or None → (B, C, H, W).
        Label −1 means "no label", None means all −1. Each further condition is (B, *), and zero
        where dropped (B,), bool; none at all means all dropped. A text is (B, T), as its encoder
        takes it, and augment (B, K), None for zeros.

    Raises:
        ValueError: If a number does not fit the others, or an image does not fit the patches.

    References:
        Peebles & Xie (2022), Scalable Diffusion Models with Transformers, arXiv:2212.09748,
        Section 3.2 and Table 1. Su et al. (2021), RoFormer, arXiv:2104.09864 (``rope``). Dehghani
        et al. (2023), arXiv:2302.05442 (``qk_norm``).

    Example:
        >>> net = DiT(shape=(3, 8, 12), depth=2, width=64, heads=4, num_classes=10)
        >>> z, logsnr = torch.randn(2, 3, 8, 12), torch.tensor([-1.0, 4.0])
        >>> net(z, logsnr, label=torch.tensor([7, -1])).shape
        torch.Size([2, 3, 8, 12])
        >>> net(z, logsnr).abs().max().item()  # zero at initialisation
        0.0
        >>> with torch.device("meta"):  # the size of DiT-XL/2, without its memory
        ...     large = DiT(shape=(4, 32, 32), patch=2, size="XL", num_classes=1000)
        >>> round(sum(p.numel() for p in large.parameters()) / 1e6)
        675
        >>> small = {"patch": 1, "depth": 2, "width": 64, "heads": 4}
        >>> points = DiT(shape=(3, 50), positions="none", **small)
        >>> points(torch.randn(2, 3, 80), logsnr).shape  # sets of 80 points in space
        torch.Size([2, 3, 80])
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (1, 8, 8),
        patch: int = 2,
        size: str = "S",
        depth: int | None = None,
        width: int | None = None,
        heads: int | None = None,
        num_classes: int | None = None,
        rope: bool = False,
        qk_norm: bool = False,
        positions: Literal["index", "resampled", "none"] = "index",
        fourier: tuple[int, ...] = (),
        conditions: dict[str, int] | None = None,
        text: TextEncoder | None = None,
        augment: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 2 <= len(shape) <= 4 or min(shape) < 1:
            raise ValueError(
                "shape must be positive integers (C, H, W), or (C, L) for series, or "
                f"(C, D, H, W) for volumes, got {tuple(shape)}."
            )
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}.")
        usual = SIZES[size]
        self.shape = tuple(shape)
        self.patch = patch
        self.size = size
        self.depth = usual.depth if depth is None else depth
        self.width = usual.width if width is None else width
        self.heads = usual.heads if heads is None else heads
        self.num_classes = num_classes
        self.rope = rope
        self.qk_norm = qk_norm
        self.positions = positions
        self.fourier = tuple(fourier)
        self.conditions = dict(conditions or {})
        self.augment = augment
        self.activation_checkpointing = activation_checkpointing
        self._check_arguments()
        self._check(self.shape)

        features, channels = self.width, shape[0]
        self.make_embeddings(features, num_classes, self.conditions, text, augment)
        self.waves = FourierWaves(self.fourier)
        seen = channels * (1 + 2 * len(self.fourier))
        dims = len(self.shape) - 1
        self.layer_in = nn.Linear(seen * patch**dims, features)
        self.blocks = nn.ModuleList(
            DiTBlock(features, self.heads, qk_norm, None if text is None else text.width)
            for _ in range(self.depth)
        )
        self.norm_out = nn.LayerNorm(features, eps=1e-6, elementwise_affine=False)
        self.modulation_out = Modulation(features, vectors=2)
        self.layer_out = nn.Linear(features, channels * patch**dims)
        self._initialise()

    def _check_arguments(self) -> None:
        """Raise if the arguments do not fit each other."""
        if min(self.patch, self.depth, self.heads) < 1:
            raise ValueError(
                "patch, depth and heads must be at least 1, "
                f"got {self.patch}, {self.depth} and {self.heads}."
            )
        if self.width < 1 or self.width % (4 * self.heads):
            raise ValueError(
                f"width must be a multiple of 4·heads = {4 * self.heads}, got {self.width}."
            )
        if self.positions not in ("index", "resampled", "none") or (
            self.rope and self.positions == "none"
        ):
            raise ValueError(
                "positions must be index, resampled or none, and without positions there is no "
                f"rope, got positions={self.positions!r} and rope={self.rope}."
            )

    def _initialise(self) -> None:
        """Xavier initialisation; zero for the modulation and output layers."""
        for layer in [self.layer_in, *self.blocks.modules()]:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        modulation = [m.layer for m in self.modules() if isinstance(m, Modulation)]
        projections = [m.project for m in self.blocks.modules() if isinstance(m, CrossAttention)]
        for layer in [*modulation, *projections, self.layer_out]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _check(self, shape: tuple[int, ...]) -> None:
        """Refuse images that cannot be cut into patches."""
        channels, *sides = shape
        fits = len(shape) == len(self.shape) and channels == self.shape[0]
        if not fits or any(side < 1 or side % self.patch for side in sides):
            axes = {2: "(C, L)", 3: "(C, H, W)", 4: "(C, D, H, W)"}[len(self.shape)]
            raise ValueError(
                f"a DiT of patch={self.patch} for {self.shape[0]} channels takes images "
                f"whose sides are multiples of {self.patch}, got {axes} = {tuple(shape)}; give "
                "another patch, or crop the images."
            )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise unless the network takes examples of this shape, by the meaning of ``positions``.

        With ``resampled`` and ``none``, sides may be any multiples of ``patch``. With ``index``,
        places outside ``shape`` were never trained, so that only ``shape`` is taken.

        Args:
            shape: (C, H, W), or (C, L), or (C, D, H, W).

        Raises:
            ValueError: If it does not take them.
        """
        self._check(shape)
        if self.positions == "index" and tuple(shape) != self.shape:
            raise ValueError(
                f"a DiT of positions='index' knows the places of {self.shape} only, got "
                f"{tuple(shape)}: train with positions='resampled' for other sizes."
            )

    def _places(self, sides: Sequence[int], device: torch.device) -> list[Tensor]:
        """The places of the tokens along each axis, in tokens of ``shape``."""
        places = []
        for side, built in zip(sides, self.shape[1:], strict=True):
            place = torch.arange(side // self.patch, dtype=torch.float32, device=device)
            if self.positions == "resampled" and side != built:
                place = (place + 0.5) * (built / side) - 0.5
            places.append(place)
        return places

    def forward(
        self,
        z: Tensor,
        logsnr: Tensor,
        label: Tensor | None = None,
        dropped: Tensor | None = None,
        augment: Tensor | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """Map noisy images to a prediction of the same shape and type."""
        self._check(z.shape[1:])
        others, tokens, mask = self.read_text(cond, len(z))
        embedding = F.silu(self.embed(logsnr, label, dropped, others, augment))

        sides = z.shape[2:]
        places, axes, head = self._places(sides, z.device), len(sides), self.width // self.heads
        h = self.layer_in(patchify(self.waves(z), self.patch))
        if self.positions != "none":
            waves = self.width // (2 * axes)
            place = phases(places, waves, 10_000.0, total=self.width // 2)
            h = h + torch.cat([place.sin(), place.cos()], dim=1).to(z.dtype)
        angle = phases(places, head // (2 * axes), 100.0, head // 2) if self.rope else None
        for block in self.blocks:
            h = self.call_block(block, h, embedding, angle, tokens, mask)
        shift, scale = self.modulation_out(embedding)
        out = self.layer_out(torch.addcmul(shift, self.norm_out(h), 1 + scale))
        return unpatchify(out, self.patch, sides).to(z.dtype)

    def extra_repr(self) -> str:
        """The arguments, except for an encoder of texts, which is shown as a submodule."""
        names = (
            "shape, patch, size, depth, width, heads, num_classes, rope, qk_norm, "
            "positions, fourier, conditions, text, augment, activation_checkpointing"
        )
        plain = [name for name in names.split(", ") if name != "text" or self.text is None]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in plain)
