"""The chunk body: loss of a linear and a cross-entropy, with its gradients, chunk by chunk.

Plain torch ops on tensors or on fx proxies of them: the same lines are the reference of the proof
(fusion/verified.py) and the nodes in the graph. With z the logits of one token after the steps of
the recipe, t its label, e the label smoothing and V the vocabulary:

    loss   = logsumexp(z) - (1 - e) z[t] - e mean(z)
    dz     = softmax(z) - (1 - e) onehot(t) - e / V

summed over the tokens whose label counts; dx = dlogits W, dW = sum over chunks of dlogits^T x. The
divisor of a mean is applied to the loss, and to the gradients in the backward. Where the recipe
says so, one op stands for loss and dlogits: fusion/kernels/cross_entropy.py on CUDA devices. There
the weight gets rows of zeros until its products have a size for which there are fast kernels: with
a vocabulary of 30522 the two of the backward take 1.9 in place of 4.6 ms, or of 3.0 where Inductor
pads a copy of the logits' gradient (16384 tokens of width 768, bfloat16, H200).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from magi_train.fusion.ahead import compile_ahead
from magi_train.fusion.attach import attach_gradients
from magi_train.fusion.kernel_ops import define

_library = torch.library.Library("magi_train", "FRAGMENT")
_library.define("copy_after(Tensor x, Tensor[] done) -> Tensor")
_library.impl("copy_after", lambda x, done: x.clone(), "CompositeExplicitAutograd")

copy_after = torch.ops.magi_train.copy_after.default
"""`(x, done) -> x`, once all of `done` lies in memory. Without it Inductor may compute all chunks
side by side in one kernel, or behind the last chunk what it still needs every chunk's logits for:
the losses and the sum of the weight's gradient."""


def _on_host(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from magi_train.fusion.kernels.cross_entropy import cross_entropy_reference

    losses, gradients = cross_entropy_reference(logits, *arguments)
    return losses, _fake(logits)[1].copy_(gradients)


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    from magi_train.fusion.kernels.cross_entropy import padded

    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return losses, logits.new_empty_strided(logits.shape, (padded(logits.shape[1]), 1))


cross_entropy = define(
    "cross_entropy(Tensor logits, Tensor labels, int ignore_index, float smoothing, float inner, "
    "float? outer, int vocabulary) -> (Tensor, Tensor)",
    _fake,
    on_host=_on_host,
    tags=(torch.Tag.flexible_layout,),
)
"""`(logits [t, c], labels [t], ...) -> (float32 [t], [t, c])`, see kernels/cross_entropy.py."""

ALIGNED_ROWS, ROUNDED_FROM = 128, 1024
"""Chunks of at least ROUNDED_FROM tokens are multiples of ALIGNED_ROWS, as matmul tiles are."""
Value = Any
"""A tensor, or the fx.Proxy of one."""


@dataclass(frozen=True)
class Recipe:
    """Everything about one loss but its tensors.

    Attributes:
        ignore_index: Label of tokens that do not count.
        mean: Whether the sum is divided by how many tokens count.
        smoothing: Label smoothing, 0 to 1.
        slices: Indices into the linear's input that pick the tokens, in order.
        steps: What happens to the logits: ("scale", factor) or ("tanh", 0).
        vocabulary: How many labels there are.
        transposed: The weight is `[width, vocabulary]` instead of `[vocabulary, width]`.
        differentiated: Whether input, weight and bias need gradients.
        compute: Dtype of the matmuls.
        wide: Dtype of softmax, loss and of sums over chunks.
        out: Dtype of the loss.
        kernel: Whether one op makes the loss and its gradient; see `soft_cap`.
    """

    ignore_index: int
    mean: bool
    smoothing: float
    slices: tuple[Any, ...]
    steps: tuple[tuple[str, float], ...]
    vocabulary: int
    transposed: bool
    differentiated: tuple[bool, bool, bool]
    compute: torch.dtype
    wide: torch.dtype
    out: torch.dtype
    kernel: bool = False

    @property
    def padding(self) -> int:
        """Rows of zeros that the weight gets, for the kernel."""
        from magi_train.fusion.kernels.cross_entropy import padded

        return padded(self.vocabulary) - self.vocabulary if self.kernel else 0

    def soft_cap(self) -> tuple[float, float | None] | None:
        """Return (a, c) if the steps are `c tanh(a x)`, or `a x` with c None; else None."""
        before, after, capped = 1.0, 1.0, 0
        for kind, factor in self.steps:
            capped += kind == "tanh"
            if kind == "scale" and capped:
                after *= factor
            elif kind == "scale":
                before *= factor
        return (before, after if capped else None) if capped < 2 else None


def chunked_cross_entropy(
    x: Value,
    weight: Value,
    bias: Value | None,
    labels: Value,
    columns: Value,
    recipe: Recipe,
    chunks: int,
    num_tokens: int | None,
) -> Value:
    """Return the loss, `[]`, with its gradients attached.

    Args:
        x: Hidden states, `[..., width]`.
        weight: `[vocabulary, width]`, or transposed.
        bias: `[vocabulary]`, or None.
        labels: `[tokens]`.
        columns: The numbers 0 to vocabulary - 1.
        recipe: The loss.
        chunks: How many.
        num_tokens: Tokens after the slices; None where that is dynamic.
    """
    for index in recipe.slices:
        x = x[index]
    rows = x.flatten(0, -2)
    counted = labels != recipe.ignore_index
    w = weight.detach().to(recipe.compute)
    w = w.t() if recipe.transposed else w
    b = None if bias is None else bias.detach().to(recipe.compute)
    if recipe.padding:
        w = F.pad(w, (0, 0, 0, recipe.padding))
        b = None if b is None else F.pad(b, (0, recipe.padding))
    total: Value = None
    parts = _Gradients(recipe)
    size = rows.size(0) if num_tokens is None else num_tokens
    for low, high in chunk_bounds(size, chunks, static=num_tokens is not None):
        tokens = rows.detach()[low:high].to(recipe.compute)
        if parts.last is not None:
            tokens = copy_after(tokens, [parts.last, total])
        logits = F.linear(tokens, w, b)
        loss, dz = _chunk(logits, labels[low:high], columns, recipe)
        total = loss if total is None else total + loss
        parts.add(tokens, w, dz)
    if parts.last is not None:  # else its last two parts may wait for the backward instead of it
        total = copy_after(total, [parts.last])
    if recipe.mean:
        count = counted.sum().to(recipe.wide)  # true division of integers is in float32
        total = total / count
        scale = torch.where(count > 0, 1.0 / count, 0.0)
    else:
        scale = torch.ones_like(total)
    gradients = zip((rows, weight, bias), parts.finished(), strict=True)
    pairs = [(tensor, gradient) for tensor, gradient in gradients if gradient is not None]
    return attach_gradients(
        total.to(recipe.out), scale, [t for t, _ in pairs], [g for _, g in pairs]
    )


def expect_kernel(recipe: Recipe, device: torch.device) -> None:
    """Let the kernel of a loss compile ahead."""
    steps = recipe.soft_cap()
    assert steps is not None, "planned for"
    arguments = (recipe.ignore_index, recipe.smoothing, *steps)
    compile_ahead("cross_entropy", device, partial(_on_nothing, arguments), arguments)


def _on_nothing(arguments: tuple[Any, ...], device: torch.device) -> None:
    from magi_train.fusion.kernels.cross_entropy import ROW_ALIGNMENT, cross_entropy

    logits = torch.empty(1, ROW_ALIGNMENT, dtype=torch.bfloat16, device=device)
    cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device=device), *arguments)


def chunk_bounds(size: Any, chunks: int, *, static: bool) -> list[tuple[Any, Any]]:
    """Return where each chunk starts and ends.

    Args:
        size: How many tokens: a number, or a proxy of it.
        chunks: How many.
        static: Whether the size is a number, so that chunks can be aligned.
    """
    if not static:
        return [(size * i // chunks, size * (i + 1) // chunks) for i in range(chunks)]
    step = -(-size // chunks)
    step = -(-step // ALIGNED_ROWS) * ALIGNED_ROWS if step >= ROUNDED_FROM else step
    return [(low, min(low + step, size)) for low in range(0, size, step)]


def _chunk(logits: Value, labels: Value, columns: Value, recipe: Recipe) -> tuple[Value, Value]:
    """Return the summed loss of one chunk and its gradient by the logits."""
    if recipe.kernel:
        steps = recipe.soft_cap()
        assert steps is not None, "planned for"
        losses, dz = cross_entropy(
            logits, labels, recipe.ignore_index, recipe.smoothing, *steps, recipe.vocabulary
        )
        return losses.sum(), dz
    counted = (labels != recipe.ignore_index).unsqueeze(1)
    targets = torch.where(counted, labels.unsqueeze(1), 0)
    z, tanhs = logits.to(recipe.wide), []
    for kind, factor in recipe.steps:
        z = torch.tanh(z) if kind == "tanh" else z * factor
        tanhs.append(z)
    e = recipe.smoothing
    log_sum = torch.logsumexp(z, -1, keepdim=True)
    each = log_sum - (1 - e) * z.gather(1, targets)
    if e:
        each = each - e * z.mean(-1, keepdim=True)
    loss = torch.where(counted, each, 0.0).sum()
    p = torch.exp(z - log_sum)
    if e:
        p = p - e / recipe.vocabulary
    dz = torch.where(columns == targets, p - (1 - e), p)
    dz = torch.where(counted, dz, 0.0)
    for (kind, factor), tanh in zip(reversed(recipe.steps), reversed(tanhs), strict=True):
        dz = dz * (1 - tanh * tanh) if kind == "tanh" else dz * factor
    return loss, dz


class _Gradients:
    """Collects what each chunk adds to the gradients of input, weight and bias.

    Attributes:
        last: What the last chunk computed last; None before the first.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.last: Value | None = None
        self.tokens: list[Value] = []
        self.weight: list[Value] = []
        self.bias: list[Value] = []

    def add(self, tokens: Value, weight: Value, dz: Value) -> None:
        """Add a chunk with inputs `[tokens, width]` and gradient `[tokens, vocabulary]`."""
        of_tokens, of_weight, of_bias = self.recipe.differentiated
        dlogits = dz.to(self.recipe.compute)
        if of_tokens:
            self.tokens.append(torch.matmul(dlogits, weight))
            self.last = self.tokens[-1]
        if of_weight:
            pair = (tokens.t(), dlogits) if self.recipe.transposed else (dlogits.t(), tokens)
            part = torch.matmul(*pair)
            self.last = self.weight[0].to(self.recipe.wide) + part if self.weight else part
            self.weight = [self.last]
        if of_bias:
            _add(self.bias, dz.sum(0, dtype=self.recipe.wide))

    def finished(self) -> tuple[Value | None, Value | None, Value | None]:
        """Return the three gradients, None where one is not needed."""
        rows = torch.cat(self.tokens) if self.tokens else None
        weight = self.weight[0] if self.weight else None
        bias = self.bias[0] if self.bias else None
        if self.recipe.padding:
            counts = slice(self.recipe.vocabulary)
            bias = None if bias is None else bias[counts]
            if weight is not None:
                weight = weight[:, counts] if self.recipe.transposed else weight[counts]
        return rows, weight, bias


def _add(total: list[Value], part: Value) -> None:
    total[:] = [total[0] + part] if total else [part]
