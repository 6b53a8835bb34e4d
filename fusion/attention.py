"""Attention canonicalization: drop masks that are proven trivial, feed grouped keys and values.

Library models build an attention mask in Python. Captured, it is a `[batch, 1, query, key]` tensor
that says what `is_causal=True` (or no mask) says for free, and it keeps the attention op from its
fast path: without the mask the kernel skips half of the scores and reads no mask, and keys and
values need not be repeated for grouped-query attention.

Proof, never names: fusion/masks.py tells what a mask allows, fusion/heads.py what a key repeats.
What is proven becomes `is_causal`, or no mask. Sliding windows and packed sequences become
`varlen_attention` (fusion/varlen.py) on devices and dtypes that have a kernel for it; where the
sequences begin is computed once, from the positions. A decoder's step, one query over a cache whose
mask must stay, has the heads that share a key as rows of one head instead of repeating keys and
values. Everything else (a mask that depends on other
inputs or is changed in place, sizes that are not known) is left alone, with the reason in the plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from magi_train.core.facts import Fact
from magi_train.core.graph import (
    erase_unused,
    example_value,
    insert_call,
    insert_computation,
)
from magi_train.core.passes import PassContext, Plan, Stage
from magi_train.fusion import heads, masks, varlen
from magi_train.fusion.masks import Verdict, inputs_of
from magi_train.fusion.verified import autocast_at

ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


@dataclass(frozen=True)
class Banded:
    """One attention node that becomes variable-length.

    Attributes:
        node: Its name.
        key: Its key, or what that repeats.
        value: Its value, likewise.
        back: How many keys before a query it sees, -1 for all.
        ahead: How many behind.
        positions: The input whose zeros begin sequences, "" where a row is one.
        sequences: At most so many are in the batch.
        dtype: That autocast computes in, "" without it.
    """

    node: str
    key: str
    value: str
    back: int
    ahead: int
    positions: str
    sequences: int
    dtype: str


@dataclass(frozen=True)
class AttentionPlan(Plan):
    """What to do to each attention node.

    Attributes:
        causal: Nodes whose mask equals the lower triangle.
        unmasked: Nodes whose mask allows everything.
        grouped: Nodes with the names of the unrepeated key and value.
        left_alone: Nodes that keep their mask or repeated heads, each with the reason.
        assumed: Inputs whose values the proofs rely on: other batches have another graph.
        banded: Nodes with a window or packed sequences.
        stacked: Nodes with one query, whose heads become rows; with the unrepeated key and value.
    """

    causal: tuple[str, ...]
    unmasked: tuple[str, ...]
    grouped: tuple[tuple[str, str, str], ...]
    left_alone: tuple[tuple[str, str], ...]
    assumed: tuple[str, ...] = ()
    banded: tuple[Banded, ...] = ()
    stacked: tuple[tuple[str, str, str], ...] = ()


class CanonicalizeAttention:
    """See the head of this module."""

    name = "canonicalize_attention"
    stage = Stage.PRE_GRAD

    def plan(self, gm: GraphModule, context: PassContext) -> AttentionPlan | None:
        """Return what is proven about the masks and heads in `gm`; None without attention."""
        causal: list[str] = []
        unmasked: list[str] = []
        grouped, left, banded, stacked = [], [], [], []
        assumed: set[str] = set()
        verdicts: dict[tuple[Node, int, int, str], Verdict] = {}
        self._dynamic: dict[Node, Verdict] = {}
        nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in ATTENTION]
        for node in nodes:
            arguments = attention_arguments(node)
            mask = arguments["attn_mask"]
            trivial = mask is None
            if isinstance(mask, Node):
                dtype, refusal = _computed_in(gm, node, arguments)
                verdict = self._mask_verdict(gm, arguments, mask, verdicts, context, refusal)
                trivial = verdict.kind in ("causal", "unmasked") and not (
                    verdict.kind == "causal" and arguments["is_causal"]
                )
                if verdict.kind == "band" and not refusal:
                    banded.append(self._banded(gm, node, verdict, context.facts, dtype))
                    assumed |= inputs_of(mask)
                elif trivial:
                    (causal if verdict.kind == "causal" else unmasked).append(node.name)
                    assumed |= inputs_of(mask)
                else:
                    left.append((node.name, _why(verdict, refusal)))
                    if not context.training and (pair := _one_query(gm, arguments)):
                        stacked.append((node.name, pair[0].name, pair[1].name))
            if trivial and not arguments["enable_gqa"]:
                query, key, value = (arguments[n] for n in ("query", "key", "value"))
                found = heads.sources(gm, query, key, value)
                if isinstance(found, str):
                    left.append((node.name, found))
                elif found and heads.grouping_pays(query, found[0], context.device_type):
                    grouped.append((node.name, found[0].name, found[1].name))
        if not (causal or unmasked or grouped or left or banded):
            return None
        return AttentionPlan(
            tuple(causal),
            tuple(unmasked),
            tuple(grouped),
            tuple(left),
            tuple(sorted(assumed)),
            tuple(banded),
            tuple(stacked),
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
        offsets: dict[tuple[str, int, int, int], Node] = {}
        for each in plan.banded:
            replaced.add(by_name[each.node])
            _make_variable(by_name, each, offsets)
        for name, key, value in plan.stacked:
            replaced.add(by_name[name])
            _stack(by_name[name], by_name[key], by_name[value])
        erase_unused(gm, replaced)

    def _mask_verdict(
        self,
        gm: GraphModule,
        arguments: dict[str, Any],
        mask: Node,
        known: dict[tuple[Node, int, int, str], Verdict],
        context: PassContext,
        refusal: str,
    ) -> Verdict:
        query, key = example_value(arguments["query"]), example_value(arguments["key"])
        if query is None or key is None:
            return masks.left("the shapes of query and key are not known")
        length, keys = query.shape[-2], key.shape[-2]
        sizes = (length, keys, *example_value(mask).shape)
        if not context.training and not all(isinstance(size, int) for size in sizes):
            if mask not in self._dynamic:
                self._dynamic[mask] = masks.judge_dynamic(gm, mask, length, keys)
            return self._dynamic[mask]
        if not isinstance(length, int) or not isinstance(keys, int):
            return masks.left("the sequence length is dynamic")
        question = (mask, length, keys, refusal)
        if question not in known:
            known[question] = masks.judge(gm, mask, length, keys, context.facts, refusal)
        verdict = known[question]
        rows = None if verdict.positions is None else example_value(verdict.positions).shape
        if rows is not None and tuple(rows) not in ((1, length), (query.shape[0], length)):
            return masks.left(f"{verdict.positions} {list(rows)} does not fit {list(query.shape)}")
        return verdict

    def _banded(
        self,
        gm: GraphModule,
        node: Node,
        verdict: Verdict,
        facts: Mapping[str, Fact],
        dtype: str,
    ) -> Banded:
        arguments = attention_arguments(node)
        query, *pair = (arguments[n] for n in ("query", "key", "value"))
        found = None if arguments["enable_gqa"] else heads.sources(gm, query, *pair)
        key, value = found if isinstance(found, tuple) else pair
        count = rows = int(example_value(query).shape[0])
        positions = verdict.positions
        if positions is not None:  # one row of positions may stand for all
            count = facts[positions.name].sequences * (rows // example_value(positions).shape[0])
        name = "" if positions is None else positions.name
        limits = (verdict.back, verdict.ahead)
        return Banded(node.name, key.name, value.name, *limits, name, count, dtype)


def attention_arguments(node: Node) -> dict[str, Any]:
    """Return all arguments of an attention node by name, defaults filled in."""
    return {**DEFAULTS, **dict(zip(ARGUMENTS, node.args, strict=False)), **node.kwargs}


def mask_inputs(gm: GraphModule) -> list[frozenset[str]]:
    """Return, for each masked attention op in `gm`, the names of the inputs its mask depends on."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in ATTENTION]
    masks = [attention_arguments(n)["attn_mask"] for n in nodes]
    known = {m: inputs_of(m) for m in masks if isinstance(m, Node)}
    return [known[m] for m in masks if m in known]


def _computed_in(gm: GraphModule, node: Node, arguments: dict[str, Any]) -> tuple[str, str]:
    """Return the dtype that autocast computes in ("" without), and why `node` cannot be banded."""
    values = [example_value(arguments[n]) for n in ("query", "key", "value")] + [
        example_value(node)
    ]
    if not all(isinstance(v, Tensor) for v in values):
        return "", "the shapes are not known"
    autocast = autocast_at(gm, node)
    dtype = autocast.dtype if autocast.enabled else values[0].dtype
    if values[3].dtype != dtype:
        return "", f"attention yields {values[3].dtype}, and not {dtype}"
    if arguments["is_causal"] or isinstance(arguments["scale"], Node):
        return "", "the mask is not all that the attention op is told"
    refusal = varlen.refusal(values[0], values[1], values[2], dtype, arguments["dropout_p"])
    return str(dtype).removeprefix("torch.") if autocast.enabled else "", refusal


def _why(verdict: Verdict, refusal: str) -> str:
    """Return why a mask stays."""
    if verdict.kind != "band":
        return verdict.reason or "the attention op is causal as well"
    ends = ["all" if n < 0 else str(n) for n in (verdict.back, verdict.ahead)]
    return f"the mask is a sliding window of {ends[0]} keys back and {ends[1]} ahead; {refusal}"


def _one_query(gm: GraphModule, arguments: Mapping[str, Any]) -> tuple[Node, Node] | None:
    """Return the unrepeated key and value of a single query under a mask that all heads share."""
    nodes = [arguments[n] for n in ("query", "key", "value", "attn_mask")]
    query, *_, mask = map(example_value, nodes)
    if query is None or mask is None or query.dim() != 4 or arguments["dropout_p"]:
        return None
    shared = query.shape[2] == 1 and all(size == 1 for size in mask.shape[-3:-1])
    if not shared or arguments["is_causal"] or not all(isinstance(s, int) for s in query.shape):
        return None
    if arguments["enable_gqa"]:
        return nodes[1], nodes[2]
    found = heads.sources(gm, *nodes[:3])
    return found if isinstance(found, tuple) else None


def _stack(node: Node, key: Node, value: Node) -> None:
    """Let the query heads that share a key be the rows of one head."""
    arguments = attention_arguments(node)
    batch, count, _, size = example_value(arguments["query"]).shape
    groups, width = example_value(key).shape[1], example_value(value).shape[-1]
    mask, scale = arguments["attn_mask"], arguments["scale"]

    def compute(query: Any, key: Any, value: Any, mask: Any) -> Any:
        rows = query.reshape(batch, groups, count // groups, size)
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
        return out.reshape(batch, count, 1, width)

    result = insert_computation(node, compute, [arguments["query"], key, value, mask])
    node.replace_all_uses_with(result)


def _make_variable(
    by_name: dict[str, Node], plan: Banded, offsets: dict[tuple[str, int, int, int], Node]
) -> None:
    """Replace an attention node by the variable-length op."""
    node = by_name[plan.node]
    arguments = attention_arguments(node)
    batch, count, length, size = example_value(arguments["query"]).shape
    shape = (batch, count, length, size)
    which = (plan.positions, plan.sequences, shape[0], shape[2])
    if which not in offsets:
        first = next(n for n in node.graph.nodes if n.target in ATTENTION)
        offsets[which] = _offsets(first, by_name.get(plan.positions), plan.sequences, shape)
    qkv = [arguments["query"], by_name[plan.key], by_name[plan.value]]
    scale = arguments["scale"]
    dtype = getattr(torch, plan.dtype) if plan.dtype else None

    def compute(query: Any, key: Any, value: Any, begins: Any) -> Any:
        q, k, v = (t if dtype is None else t.to(dtype) for t in (query, key, value))
        out = varlen.attend(q, k, v, begins, plan.back, plan.ahead, scale, shape)
        return out.contiguous() if example_value(node).is_contiguous() else out

    result = insert_computation(node, compute, [*qkv, offsets[which]])
    node.replace_all_uses_with(result)


def _offsets(before: Node, positions: Node | None, sequences: int, shape: Sequence[int]) -> Node:
    """Insert the computation of where sequences begin, in front of the first attention."""
    device = example_value(attention_arguments(before)["query"]).device
    batch, length = shape[0], shape[2]
    if positions is None:
        stop = {"dtype": torch.int32, "device": device}
        return insert_call(before, torch.arange, (0, batch * length + 1, length), stop)
    numbers = insert_call(before, torch.arange, (1, sequences + 2), {"device": device})

    def compute(positions: Any, numbers: Any) -> Any:
        return varlen.offsets_of(positions, numbers, (batch, length))

    found: Node = insert_computation(before, compute, [positions, numbers])
    return found
