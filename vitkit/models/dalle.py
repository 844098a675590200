"""DALL-E (Ramesh et al. 2021): one causal transformer over a text's tokens and an image's.

No weights were published; names of parameters are this project's own, sizes the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vitkit.models.layers import Block, init_weights, token_parameter
from vitkit.models.registry import Entry, Family
from vitkit.nn import LayerNorm, Linear


@dataclass(frozen=True)
class DALLEConfig:
    """
    Args:
        text_length, text_tokens: of a text.
        grid, image_tokens: cells per side, and code words, of an image.
        dim, depth, num_heads: of the transformer.
        kernel: side of the neighbourhood the last layer attends to.
    """

    text_length: int = 256
    text_tokens: int = 16384
    grid: int = 32
    image_tokens: int = 8192
    dim: int = 3968
    depth: int = 64
    num_heads: int = 62
    kernel: int = 11

    def reduced(self) -> DALLEConfig:
        dim = 2 * self.dim // self.num_heads
        return replace(
            self,
            text_length=6,
            text_tokens=20,
            grid=4,
            image_tokens=16,
            dim=dim,
            depth=5,
            num_heads=2,
            kernel=3,
        )


def layer_kind(index: int, depth: int) -> str:
    """Attention of the index-th layer, from 1: columns every fourth, a neighbourhood in the last,
    rows otherwise."""
    if index == depth:
        return "neighbourhood"
    return "column" if (index - 2) % 4 == 0 else "row"


def sparse_mask(kind: str, text: int, grid: int, kernel: int) -> torch.Tensor:
    """[N, N] bool, True = attend: of what comes before, all of the text, and of the image a row's
    worth of tokens and the one above, the tokens above, or those of a square, which goes on at the
    other edge a row higher or lower."""
    n = grid * grid
    place = torch.arange(n)
    back = place[:, None] - place
    if kind == "row":
        image = back <= grid
    elif kind == "column":
        image = back % grid == 0
    else:
        reach = kernel // 2
        image = ((back + reach) // grid <= reach) & ((back + reach) % grid <= 2 * reach)
    mask = torch.ones(text + n, text + n, dtype=torch.bool).tril()
    mask[text:, text:] &= image
    return mask


class DALLE(torch.nn.Module):
    """Text tokens [B, T] (-1 is padding) and image tokens [B, grid * grid] to logits of the next
    token at every place [B, T + grid * grid, text_tokens + T + image_tokens]."""

    def __init__(self, config: DALLEConfig) -> None:
        super().__init__()
        c = self.config = config
        # A token of its own for padding at every place of the text, as the paper has it.
        self.text_embed = torch.nn.Embedding(c.text_tokens + c.text_length, c.dim)
        self.image_embed = torch.nn.Embedding(c.image_tokens, c.dim)
        self.start = token_parameter(1, 1, c.dim)
        self.text_positions = token_parameter(c.text_length, c.dim)
        self.row_positions = token_parameter(c.grid, 1, c.dim)
        self.column_positions = token_parameter(1, c.grid, c.dim)
        self.blocks = torch.nn.ModuleList(
            Block(c.dim, c.num_heads, 4 * c.dim) for _ in range(c.depth)
        )
        self.norm = LayerNorm(c.dim, eps=1e-6)
        self.head = Linear(c.dim, c.text_tokens + c.text_length + c.image_tokens)
        for kind in ("row", "column", "neighbourhood"):
            # The start belongs to the text; nothing sees the last token.
            mask = sparse_mask(kind, 1 + c.text_length, c.grid, c.kernel)[:-1, :-1]
            self.register_buffer(f"{kind}_mask", mask, persistent=False)
        init_weights(self)

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        c = self.config
        padding = c.text_tokens + torch.arange(c.text_length, device=text.device)
        words = self.text_embed(torch.where(text < 0, padding, text)) + self.text_positions
        cells = (self.row_positions + self.column_positions).flatten(0, 1)
        codes = self.image_embed(image) + cells
        # A place sees the tokens before it: what is predicted there is the token itself.
        x = torch.cat([self.start.expand(len(text), -1, -1), words, codes], 1)[:, :-1]
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, getattr(self, f"{layer_kind(i, c.depth)}_mask"))
        return self.head(self.norm(x))

    def example_inputs(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Random tokens; the last ones of the text are padding."""
        c = self.config
        text = torch.randint(c.text_tokens, (batch, c.text_length))
        text[:, -2:] = -1
        return text, torch.randint(c.image_tokens, (batch, c.grid**2))


FAMILY = Family(
    DALLE, {"dalle": Entry(DALLEConfig(), "DALL-E of its paper, 12 billion parameters; no weights")}
)
