"""Attention canonicalization: drop masks that are proven trivial, feed grouped keys and values.

Library models build an attention mask in Python. Captured, it is a `[batch, 1, query, key]` tensor
that says what `is_causal=True` (or no mask) says for free, and it keeps the attention op from its
fast path: without the mask the kernel skips half of the scores and reads no mask, and keys and
values need not be repeated for grouped-query attention.

Proof, never names. A mask is constant if nothing it is computed from is an input of the graph; its
subgraph is then executed, and the result compared with `tril` and with all-true, element by element
(for additive masks: 0 where allowed, and -inf or the dtype's lowest value elsewhere). Repeated
heads are proven by running the movement of data, from a candidate tensor to the attention op, on a
tensor of its own element numbers. An input that the context says is all ones (a padding mask of a
batch without padding, core/facts.py) counts as constant. A mask that depends on other inputs or is
changed in place, a sliding window, or sizes that are not known, are left alone, with the reason in
the plan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from magi_train.core import compat
from magi_train.core.graph import ancestors, changed_behind, erase_unused, example_value
from magi_train.core.passes import PassContext, Plan, Stage
from magi_train.fusion.verified import execute

ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
MAX_MOVEMENT_NODES = 8
"""How far back from the attention op a repeat of heads is looked for."""
MAX_PROOF_ELEMENTS = 2**31
"""Masks larger than this are not executed: 2 GiB of booleans."""

_MOVES = {
    "expand", "reshape", "view", "unsqueeze", "getitem", "contiguous", "repeat_interleave",
    "expand_as", "repeat", "flatten", "_unsafe_view", "clone", "slice", "transpose", "permute",
    "alias", "squeeze", "unflatten",
}  # fmt: skip


@dataclass(frozen=True)
class AttentionPlan(Plan):
    """What to do to each attention node.

    Attributes:
        causal: Nodes whose mask equals the lower triangle.
        unmasked: Nodes whose mask allows everything.
        grouped: Nodes with the names of the unrepeated key and value.
        left_alone: Nodes that keep their mask or repeated heads, each with the reason.
        assumed: Inputs that the proofs take to be all ones: a batch with padding has another graph.
    """

    causal: tuple[str, ...]
    unmasked: tuple[str, ...]
    grouped: tuple[tuple[str, str, str], ...]
    left_alone: tuple[tuple[str, str], ...]
    assumed: tuple[str, ...] = ()


class CanonicalizeAttention:
    """See the head of this module."""

    name = "canonicalize_attention"
    stage = Stage.PRE_GRAD

    def plan(self, gm: GraphModule, context: PassContext) -> AttentionPlan | None:
        """Return what is proven about the masks and heads in `gm`; None without attention."""
        causal, unmasked, grouped, left = [], [], [], []
        assumed: set[str] = set()
        verdicts: dict[tuple[Node, int, int], str] = {}
        nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in ATTENTION]
        for node in nodes:
            arguments = attention_arguments(node)
            mask = arguments["attn_mask"]
            trivial = mask is None
            if isinstance(mask, Node):
                verdict = self._mask_verdict(gm, arguments, mask, verdicts, context.ones)
                trivial = verdict in ("causal", "unmasked")
                if verdict == "causal" and not arguments["is_causal"]:
                    causal.append(node.name)
                elif verdict == "unmasked":
                    unmasked.append(node.name)
                else:
                    left.append((node.name, verdict))
                    trivial = False
                if trivial:
                    assumed |= inputs_of(mask)
            if trivial and not arguments["enable_gqa"]:
                sources = self._grouped_sources(gm, arguments)
                if isinstance(sources, str):
                    left.append((node.name, sources))
                elif sources is not None and _grouping_pays(arguments, sources, context):
                    grouped.append((node.name, sources[0].name, sources[1].name))
        if not (causal or unmasked or grouped or left):
            return None
        return AttentionPlan(
            tuple(causal), tuple(unmasked), tuple(grouped), tuple(left), tuple(sorted(assumed))
        )

    def apply(self, gm: GraphModule, plan: AttentionPlan, context: PassContext) -> None:
        """Rewrite the nodes that `plan` names, then drop what only the masks needed."""
        by_name = {n.name: n for n in gm.graph.nodes}
        groups = {name: (by_name[key], by_name[value]) for name, key, value in plan.grouped}
        replaced: set[Node] = set()
        for name in dict.fromkeys([*plan.causal, *plan.unmasked, *groups]):
            node = by_name[name]
            arguments = attention_arguments(node)
            replaced |= set(node.all_input_nodes)
            if name in plan.causal or name in plan.unmasked:
                arguments["attn_mask"] = None
            if name in plan.causal:
                arguments["is_causal"] = True
            if name in groups:
                arguments["key"], arguments["value"] = groups[name]
                arguments["enable_gqa"] = True
            node.args = (arguments.pop("query"), arguments.pop("key"), arguments.pop("value"))
            node.kwargs = {k: v for k, v in arguments.items() if v != DEFAULTS[k]}
        erase_unused(gm, replaced)

    def _mask_verdict(
        self,
        gm: GraphModule,
        arguments: dict[str, Any],
        mask: Node,
        known: dict[tuple[Node, int, int], str],
        ones: frozenset[str],
    ) -> str:
        """Return "causal", "unmasked", or why neither is proven."""
        query, key = example_value(arguments["query"]), example_value(arguments["key"])
        if query is None or key is None:
            return "the shapes of query and key are not known"
        length, keys = query.shape[-2], key.shape[-2]
        if not isinstance(length, int) or not isinstance(keys, int):
            return "the sequence length is dynamic"
        if (mask, length, keys) not in known:
            known[mask, length, keys] = _fold(gm, mask, length, keys, ones)
        return known[mask, length, keys]

    def _grouped_sources(
        self, gm: GraphModule, arguments: dict[str, Any]
    ) -> tuple[Node, Node] | str | None:
        query = example_value(arguments["query"])
        if query is None or query.dim() != 4:
            return None
        heads = query.shape[1]
        key = _unrepeated(gm, arguments["key"], heads)
        value = _unrepeated(gm, arguments["value"], heads)
        if key is None or value is None:
            return None
        if example_value(key).shape[1] != example_value(value).shape[1]:
            return "keys and values are repeated differently"
        return key, value


def attention_arguments(node: Node) -> dict[str, Any]:
    """Return all arguments of an attention node by name, defaults filled in."""
    return {**DEFAULTS, **dict(zip(ARGUMENTS, node.args, strict=False)), **node.kwargs}


def inputs_of(mask: Node) -> frozenset[str]:
    """Return the names of the inputs and attributes that `mask` is computed from."""
    return frozenset(n.name for n in ancestors(mask) if n.op in ("placeholder", "get_attr"))


def mask_inputs(gm: GraphModule) -> list[frozenset[str]]:
    """Return, for each masked attention op in `gm`, the names of the inputs its mask depends on."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in ATTENTION]
    masks = [attention_arguments(n)["attn_mask"] for n in nodes]
    known = {m: inputs_of(m) for m in masks if isinstance(m, Node)}
    return [known[m] for m in masks if m in known]


def _fold(gm: GraphModule, mask: Node, length: int, keys: int, ones: frozenset[str]) -> str:
    shape = example_value(mask).shape
    if any(not isinstance(size, int) for size in shape):
        return "the size of the mask is dynamic"
    if example_value(mask).numel() > MAX_PROOF_ELEMENTS:
        return f"the mask has more than {MAX_PROOF_ELEMENTS} elements"
    needed = ancestors(mask)
    known = {n: _ones(n) for n in needed if n.op == "placeholder" and n.name in ones}
    inputs = inputs_of(mask) - {n.name for n, value in known.items() if value is not None}
    if inputs:
        return f"the mask depends on {', '.join(sorted(inputs)[:3])}"
    changer = changed_behind(gm, needed)
    if changer is not None:
        return f"{changer.name} may change the mask in place"
    value = execute(gm, needed, known, mask)
    if isinstance(value, str):
        return value
    if tuple(value.shape[-2:]) != (length, keys):
        value = value.expand(*value.shape[:-2], length, keys)
    allowed = value if value.dtype is torch.bool else _allowed_by_addition(value)
    if allowed is None:
        return "the mask is a bias, not a mask"
    if bool(allowed.all()):
        return "unmasked"
    lower = torch.ones(length, keys, dtype=torch.bool, device=allowed.device).tril()
    if length == keys and bool((allowed == lower).all()):
        return "causal"
    return _window(allowed) or "the mask is constant, but neither causal nor all-true"


def _ones(node: Node) -> Tensor | None:
    """Return the value of an input that is all ones, None where its size is not known."""
    value = example_value(node)
    if not isinstance(value, Tensor) or any(not isinstance(s, int) for s in value.shape):
        return None
    with compat.unset_fake_temporarily():
        return torch.ones(tuple(value.shape), dtype=value.dtype, device=value.device)


def _window(allowed: Tensor) -> str:
    """Return the sliding window that `allowed` (`[..., length, length]`) is, "" if it is none."""
    length, keys = allowed.shape[-2:]
    one = allowed[(0,) * (allowed.dim() - 2)]
    ahead, back = int(one[0].sum()) - 1, int(one[:, 0].sum()) - 1
    band = torch.ones_like(one).tril(ahead).triu(-back)
    if length != keys or not one[0, 0] or not bool((allowed == band).all()):
        return ""
    return (
        f"the mask is a sliding window of {back} keys back and {ahead} ahead, "
        "which the attention op cannot express without it"
    )


def _allowed_by_addition(mask: Tensor) -> Tensor | None:
    """Return which scores an additive mask keeps, or None where it also changes some."""
    lowest = torch.finfo(mask.dtype).min
    allowed = mask == 0
    return allowed if bool((allowed | (mask <= lowest)).all()) else None


def _unrepeated(gm: GraphModule, node: Any, heads: int) -> Node | None:
    """Return the tensor whose heads `node` repeats `heads / its heads` times each, or None."""
    value = example_value(node) if isinstance(node, Node) else None
    if value is None or value.dim() != 4 or any(not isinstance(s, int) for s in value.shape):
        return None
    path: list[Node] = []
    current: Any = node
    best: Node | None = None
    while isinstance(current, Node) and len(path) < MAX_MOVEMENT_NODES and _moves_data(current):
        path.append(current)
        current = current.args[0]
        if not isinstance(current, Node):
            break
        source = example_value(current)
        if _may_be_grouped(source, value, heads) and _is_repeat(gm, current, path, node, heads):
            best = current
    return best


def _moves_data(node: Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
    single = [n for n in node.all_input_nodes if isinstance(example_value(n), Tensor)]
    return node.op in ("call_function", "call_method") and name in _MOVES and len(single) == 1


def _may_be_grouped(source: Any, repeated: Tensor, heads: int) -> bool:
    return (
        isinstance(source, Tensor)
        and source.dim() == 4
        and all(isinstance(s, int) for s in source.shape)
        and source.shape[0] == repeated.shape[0]
        and source.shape[2:] == repeated.shape[2:]
        and source.shape[1] < heads
        and heads % source.shape[1] == 0
        and repeated.shape[1] == heads
    )


def _is_repeat(
    gm: GraphModule, source: Node, path: Sequence[Node], target: Node, heads: int
) -> bool:
    """Return whether `path` turns element numbers of `source` into each head repeated in place."""
    shape = example_value(source).shape
    numbers = torch.arange(shape.numel(), dtype=torch.int64).reshape(shape)
    if changed_behind(gm, set(path)) is not None:
        return False
    other = ancestors(target) - ancestors(source)
    moved = execute(gm, other | set(path), {source: numbers}, target)
    wanted = numbers.repeat_interleave(heads // shape[1], dim=1)
    return isinstance(moved, Tensor) and torch.equal(moved, wanted)


def _grouping_pays(
    arguments: dict[str, Any], sources: tuple[Node, Node], context: PassContext
) -> bool:
    """Return whether the attention kernel of this device takes grouped heads without a detour."""
    if context.device_type != "cpu":
        return True
    query, key = example_value(arguments["query"]), example_value(sources[0])
    choose: Callable[..., int] = compat.fused_attention_choice
    with compat.unset_fake_temporarily():
        q = torch.zeros(1, query.shape[1], 8, query.shape[-1], requires_grad=True)
        k = torch.zeros(1, key.shape[1], 8, key.shape[-1], requires_grad=True)
        return choose(q, k, k, is_causal=True, enable_gqa=True) != 0
