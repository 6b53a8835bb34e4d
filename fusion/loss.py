"""Linear + cross-entropy in few large chunks of tokens: the full logits never exist.

A language model's logits, `[tokens, vocabulary]`, are its largest tensor by far, and eager keeps
two or three of them. Per chunk of tokens this rewrite computes the logits, their loss, and at once
the gradients (softmax - onehot, times weight and input), so that the forward keeps one gradient of
the size of the hidden states and one of the size of the weight; the backward multiplies them by the
gradient that comes in (fusion/attach.py). No matmul runs twice, and nothing waits for the device.
What lies between the matmuls of a chunk is one kernel for bfloat16 on CUDA devices, and elsewhere
plain ops in the graph, which Inductor compiles like the rest. The kernel is worth a rewrite of a
loss in one chunk, too: generated code reads the logits slower, and once more in the backward.

Source: Liger Kernel (Hsu et al. 2024, arXiv 2410.10989, section 3.2); Wijmans et al. 2024 (arXiv
2411.09009) for what the logits cost. Differs: few chunks, because each one reads and writes a
gradient of the weight (`vocabulary x width` in float32); the mean's divisor stays on the device;
softmax, loss and the sum of weight gradients over chunks are in float32 (the
matmuls in autocast's dtype), where eager under autocast rounds the weight's gradient to bfloat16.

Which region is a linear and a cross-entropy is read from the graph (match_loss) and then proven
(fusion/verified.py). Left alone, with the reason in the plan: logits that anything else reads,
float16 (its gradients need the loss scale before the loss is known), class weights, soft targets,
reduction "none", and losses whose logits fit one chunk where there is no kernel for them.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from magi_train.core import compat
from magi_train.core.graph import erase_unused, example_value, insert_call, insert_computation
from magi_train.core.passes import PassContext, Plan, Stage
from magi_train.fusion.chunked import (
    Recipe,
    chunk_bounds,
    chunked_cross_entropy,
    expect_kernel,
)
from magi_train.fusion.loss_match import ANCHORS, Match, match_loss
from magi_train.fusion.verified import Draw, Region, Small, autocast_at, prove, slice_region

MIB = 2**20
MAX_CHUNKS = 8
"""More would spend the gain on reading and writing the gradient of the weight."""
PROOF_CHUNKS = 3
KERNEL_LEAST_MIB = 32.0
"""Of smaller logits a launch more or less counts as much as how they are read."""
BUDGET_CHUNK_MIB = 2048.0
"""Under a memory budget, a chunk takes at most this: it costs less time than what would have to be
recomputed in place of it."""


@dataclass(frozen=True)
class ChunkedLoss:
    """One loss to compute in chunks.

    Attributes:
        node: The cross-entropy.
        linear: The node that makes its logits.
        chunks: How many; all but the last one are of one size.
        logits_mib: MiB of all logits, in the dtype of the linear. They never exist at a time, or
            with one chunk only until their gradient is there.
        kernel: Whether a kernel computes what lies between the matmuls.
    """

    node: str
    linear: str
    chunks: int
    logits_mib: float
    kernel: bool


@dataclass(frozen=True)
class LossPlan(Plan):
    """What to do to each cross-entropy.

    Attributes:
        chunked: The losses to rewrite.
        left_alone: The other ones, each with the reason.
    """

    chunked: tuple[ChunkedLoss, ...]
    left_alone: tuple[tuple[str, str], ...]


class ChunkLinearCrossEntropy:
    """See the head of this module.

    Args:
        chunk_bytes: Most bytes that the logits of a chunk may take, in the dtype of the linear and
            in that of the softmax together.
    """

    name = "chunk_linear_cross_entropy"
    stage = Stage.PRE_GRAD

    def __init__(self, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes

    def plan(self, gm: GraphModule, context: PassContext) -> LossPlan | None:
        """Return which losses are large and proven; None without any, or for inference."""
        chunked, left = [], []
        nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in ANCHORS]
        for node in nodes if context.training else []:
            verdict = self._verdict(gm, node, context)
            if isinstance(verdict, str):
                left.append((node.name, verdict))
            else:
                chunked.append(verdict)
        return LossPlan(tuple(chunked), tuple(left)) if chunked or left else None

    def apply(self, gm: GraphModule, plan: LossPlan, context: PassContext) -> None:
        """Replace the losses that `plan` names."""
        by_name = {n.name: n for n in gm.graph.nodes}
        for each in plan.chunked:
            match = match_loss(by_name[each.node])
            assert isinstance(match, Match), f"{each.node} was planned, but: {match}"
            _replace(gm, match, each)

    def _verdict(self, gm: GraphModule, loss: Node, context: PassContext) -> ChunkedLoss | str:
        """Return how to compute one loss, or why to leave it alone."""
        match = match_loss(loss)
        if isinstance(match, str):
            return match
        if torch.float16 in (match.recipe.compute, match.recipe.out):
            return "it is in float16, whose gradients need the loss scale before the loss is known"
        region = slice_region(gm, _inputs(match), loss)
        if isinstance(region, str):
            return region
        size = self._size(match, _has_kernel(match.recipe, context))
        if isinstance(size, str):
            return size
        return _proven(gm, match, region) or size

    def _size(self, match: Match, kernel: bool) -> ChunkedLoss | str:
        """Return in how many chunks, or why that does not pay.

        Args:
            match: The loss.
            kernel: Whether there is a kernel for it.
        """
        tokens, vocabulary = map(compat.size_hint, example_value(match.logits).shape)
        if tokens is None or not isinstance(example_value(match.logits).shape[1], int):
            return "the size of its logits is not known"
        assert vocabulary is not None, "a static size"
        recipe = match.recipe
        whole = tokens * vocabulary * (recipe.compute.itemsize + recipe.wide.itemsize)
        wanted = min(MAX_CHUNKS, math.ceil(whole / self.chunk_bytes), tokens)
        static = isinstance(example_value(match.logits).shape[0], int)
        chunks = len(chunk_bounds(tokens, wanted, static=static)) if wanted > 1 else 1
        mib = tokens * vocabulary * recipe.compute.itemsize / MIB
        if chunks == 1 and not (kernel and mib >= KERNEL_LEAST_MIB):
            return (
                f"its logits take {whole / MIB:.4g} MiB in {recipe.compute} and {recipe.wide}, "
                f"which fits one chunk of {self.chunk_bytes / MIB:.4g} MiB"
            )
        return ChunkedLoss(match.loss.name, match.linear.name, chunks, round(mib, 3), kernel)


def _has_kernel(recipe: Recipe, context: PassContext) -> bool:
    """Return whether one kernel makes the loss and its gradient from the logits."""
    if context.device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    return recipe.compute is torch.bfloat16 and recipe.soft_cap() is not None


def _inputs(match: Match) -> list[Node]:
    bias = [] if match.bias is None else [match.bias]
    return list(dict.fromkeys([match.x, match.weight, *bias, match.labels]))


def _proven(gm: GraphModule, match: Match, region: Region) -> str:
    """Return "" if the region is what `match` says, else why that is not proven."""
    autocast = autocast_at(gm, match.loss)
    if autocast_at(gm, match.linear) != autocast:
        return "autocast changes between the linear and the loss"
    inputs = [match.x, match.weight, *([] if match.bias is None else [match.bias])]
    try:
        small = Small([example_value(n) for n in inputs])
        small_logits = small.shape(example_value(match.weight))
    except ValueError as error:
        return str(error)
    vocabulary = small_logits[1] if match.recipe.transposed else small_logits[0]

    def draw(how: Draw) -> Sequence[Tensor]:
        x, weight, *bias = (example_value(n) for n in inputs)
        hidden = how.normal(small.shape(x), x, how.magnitude)
        matrix = how.normal(small.shape(weight), weight, hidden.shape[-1] ** -0.5)
        rest = [how.normal(small.shape(b), b, 1.0) for b in bias]
        picked = hidden
        for index in match.recipe.slices:
            picked = picked[index]
        labels = how.integers(0, vocabulary, [picked[..., 0].numel()], example_value(match.labels))
        labels[::4] = match.recipe.ignore_index
        return [hidden, matrix, *rest, labels]

    def reference(exact: bool) -> Callable[..., Tensor]:
        recipe = replace(match.recipe, vocabulary=vocabulary)
        recipe = replace(recipe, differentiated=(True, True, match.bias is not None))
        if exact:
            wide = torch.float64
            recipe = replace(recipe, compute=wide, wide=wide, out=wide)

        def function(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
            *bias, labels = rest
            columns = torch.arange(vocabulary, device=x.device)
            num_tokens = len(labels)
            return chunked_cross_entropy(
                x, weight, bias[0] if bias else None, labels, columns, recipe, PROOF_CHUNKS,
                num_tokens,
            )  # fmt: skip

        return function

    return prove(region, reference, draw, small, autocast)


def _replace(gm: GraphModule, match: Match, each: ChunkedLoss) -> None:
    loss, recipe = match.loss, replace(match.recipe, kernel=each.kernel)
    logits = example_value(match.logits)
    if each.kernel:
        expect_kernel(recipe, logits.device)
    tokens = logits.shape[0] if isinstance(logits.shape[0], int) else None
    columns = insert_call(loss, torch.arange, (logits.shape[1],), {"device": logits.device})
    arguments = (
        match.x,
        match.weight,
        match.bias,
        match.labels,
        columns,
        recipe,
        each.chunks,
        tokens,
    )
    with autocast_at(gm, loss).context():
        new = insert_computation(loss, chunked_cross_entropy, arguments)
    loss.replace_all_uses_with(new)
    erase_unused(gm, {loss})
