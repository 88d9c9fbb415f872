"""Attention from one sequence to another, such as from the positions of an image to a text.

Legend: B batch, N positions, T tokens, E width of a position, F width of a token, D of a head.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class CrossAttention(nn.Module):
    """Multi-head attention: softmax(q kᵀ / √D) v with q of h, and k and v of the tokens.

    Tokens outside the mask are left out of the softmax, so what they contain does not matter.

    Args:
        width: Width E of h, a multiple of ``heads``.
        context: Width F of a token; None means ``width``.
        heads: Number of heads, each of width D = E / heads.

    Shapes:
        h (B, N, E), tokens (B, T, F), mask (B, T), bool, with at least one true in each row →
        (B, N, E).

    References:
        Vaswani et al. (2017), Attention Is All You Need, arXiv:1706.03762, Section 3.2. Rombach et
        al. (2022), High-Resolution Image Synthesis with Latent Diffusion Models,
        arXiv:2112.10752, Section 3.3.

    Example:
        >>> import torch
        >>> attend = CrossAttention(width=8, context=6, heads=2)
        >>> mask = torch.tensor([[True, True, False]])
        >>> attend(torch.randn(1, 5, 8), torch.randn(1, 3, 6), mask).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, width: int = 64, context: int | None = None, heads: int = 1) -> None:
        super().__init__()
        self.width = width
        self.context = width if context is None else context
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(self.context, 2 * width)
        self.project = nn.Linear(width, width)

    def forward(self, h: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The output of the attention for each position."""
        query = self.query(h).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D)
        tokens = tokens.to(self.key_value.weight.dtype)  # a frozen encoder's are always float32
        packed = self.key_value(tokens).unflatten(2, (2, self.heads, -1))
        key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, D)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return self.project(seen.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"width={self.width}, context={self.context}, heads={self.heads}"
