"""A byte-level GPT and its batches, for benchmarks of communication: small, real text, no download.

The text is that of examples.corpus, Python's own standard library.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import corpus

HEAD = 64
VALIDATION_BATCHES = 16


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, `[batch, length, width]` like its input."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))  # type: ignore[no-any-return]


class Gpt(nn.Module):
    """A byte-level GPT of `layers` blocks; `width` is a multiple of 64."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of predicting `y` from `x`, both `[batch, length]`."""
        hidden = self.tokens(x) + self.places.weight
        logits = self.head(self.norm(self.blocks(hidden)))
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def texts() -> tuple[Tensor, Tensor]:
    """Return the bytes of the training and of the validation text, each `[bytes]` of uint8."""
    first, second = (
        torch.frombuffer(bytearray(t.encode()), dtype=torch.uint8) for t in corpus.split_text()
    )
    return first, second


def draw(text: Tensor, seed: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return `[batch, length]` bytes from random places of `text`, and those that follow them."""
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - length - 1, (batch,), generator=g)
    rows = torch.stack([text[i : i + length + 1] for i in starts.tolist()]).long()
    return rows[:, :-1], rows[:, 1:]


def validate(model: nn.Module, text: Tensor, batch: int, length: int) -> float:
    """Return the mean loss on batches of `text` that are the same in every call."""
    device = next(model.parameters()).device
    with torch.no_grad():
        drawn = [draw(text, 10**6 + i, batch, length) for i in range(VALIDATION_BATCHES)]
        losses = [model(x.to(device), y.to(device)) for x, y in drawn]
    return float(torch.stack(losses).mean())
