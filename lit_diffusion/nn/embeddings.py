"""How numbers and names are put so that a network can use them.

A log-SNR is a number on a line, where neighbours should act alike: it is spread over waves of
many lengths, smooth in λ. A label is a name without neighbours: it looks up a row of a table.
What else is known of an example are numbers as they come, which pass through two linear layers.
All become vectors of one width, which are added and steer every block. A noisy pixel, at last,
is a number whose last digits matter when there is little noise: it, too, is shown together with
fine waves of itself.

Legend: B batch, F features; λ = ``logsnr`` (B,), ``label`` (B,) with −1 for "no label", z noisy
images (B, C, H, W).
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class LogSNREmbedding(nn.Module):
    """Waves of λ through two linear layers: MLP([cos(ω_k λ), sin(ω_k λ)]).

    The wavelengths 2π/ω_k run geometrically from ``longest`` (it tells pure noise from clean
    data) down to ``shortest`` (it tells 0 from 0.1). All is computed in float32, under autocast
    too: what a network must do is a steep function of λ, for which bfloat16 has less than three
    digits.

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
        """The angular frequencies ω_k in rising order, (waves,), on the device of the parameters.

        Computed at every call, not kept in a buffer, which ``.to(torch.bfloat16)`` would round.
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
    """The image beside fine waves of itself: z, then sin(2ⁿπz) and cos(2ⁿπz) for each exponent n.

    At small noise a pixel is known up to its grey level, and the noise is what is left over: its
    distance to the nearest level, a thousandth of the pixel's range. A convolution cannot see that
    much finer than the picture; a wave with the period of the levels shows it at full size.
    Computed in float32 at least, under autocast too: 2⁷π has no digit of its phase in bfloat16.

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
        """Append the waves as further channels."""
        with torch.autocast(z.device.type, enabled=False):
            exact = z if z.dtype in (torch.float32, torch.float64) else z.float()
            waves = [exact * (2**n * math.pi) for n in self.exponents]
            seen = [exact, *(w.sin() for w in waves), *(w.cos() for w in waves)]
            return torch.cat(seen, dim=1).to(z.dtype)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"exponents={self.exponents}"


class LabelEmbedding(nn.Module):
    """A table of one row per class, and one more for "no label".

    The extra row is what classifier-free guidance trains by dropping labels: the same network
    then predicts with and without them. It is row 0, and class k is row k + 1, so nothing need
    be compared with −1; a label outside [−1, num_classes) has no row and raises IndexError (on
    CUDA, a device assertion).

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
        # About the size of what LogSNREmbedding gives at first, to which this is added.
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
    """Numbers that are known of an example, through two linear layers: MLP([c₁, c₂, …, dropped]).

    Zero may be a value like any other, so that a condition is dropped is a number of its own.

    Args:
        sizes: How many numbers each condition has for an example, by its name; at least one.
        features: Width F of the result.

    Shapes:
        each condition (B, *) with so many numbers behind B, of any type; dropped (B,), bool, or
        None for nowhere; no condition at all is one dropped everywhere → (B, F).

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


class SteeredNetwork(nn.Module):
    """A network that λ, a label and other numbers steer: e = embed(λ) + embed(label) + embed(c).

    What all networks of this folder have in common, errors included. A network calls
    `make_steering` where its first layers are made, and `steer` for e. Where it has an argument
    `activation_checkpointing` it calls its blocks by `recall`.
    """

    activation_checkpointing = False

    def make_steering(
        self, features: int, num_classes: int | None, conditions: Mapping[str, int]
    ) -> None:
        """Make what is needed of the three embeddings.

        Args:
            features: Width F of e.
            num_classes: Number of classes, None for none.
            conditions: How many numbers each further condition has, by its name.
        """
        self.embed_logsnr = LogSNREmbedding(features)
        self.embed_label = None if num_classes is None else LabelEmbedding(num_classes, features)
        self.embed_condition = ConditionEmbedding(conditions, features) if conditions else None

    def steer(
        self,
        logsnr: Tensor,
        label: Tensor | None,
        dropped: Tensor | None,
        cond: Mapping[str, Tensor],
    ) -> Tensor:
        """The sum e of the embeddings.

        Args:
            logsnr: λ.
            label: Class of each example, −1 for none; None for none at all.
            dropped: Whose conditions are dropped; None for nobody's.
            cond: The further conditions; empty for all dropped.

        Shapes:
            logsnr, label and dropped (B,), each condition (B, *) → (B, F).

        Raises:
            ValueError: If the network was built without what it is given.
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
        return embedding

    def recall(self, block: Callable[..., Tensor], *given: Tensor | None) -> Tensor:
        """Call a block; with `activation_checkpointing` keep only what it was given.

        In training, what it computes on its way is then forgotten, and computed again, random
        numbers included, when the backward pass comes to it. Loss and gradients are the same.

        Args:
            block: The block.
            *given: Its arguments.
        """
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, *given, use_reentrant=False)
            return out
        return block(*given)
