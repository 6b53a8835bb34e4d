"""What an attention mask allows, proven by running the subgraph that makes it.

A mask is constant if nothing it is computed from is an input of the graph, or only inputs about
whose values the context knows a fact (core/facts.py). It is then executed, and the result compared
with the candidates, element by element: everything, the lower triangle, a band (a sliding window).

A mask of packed sequences depends on `position_ids`, of which only the kind is known: every
sequence counts from 0. It is executed for several such inputs: one sequence a row, which tells the
band; only sequences of one token, which shows all that is allowed across sequences; and random cuts
that differ from row to row. Each result must equal, element by element, the band within the
sequences. Libraries build such masks from comparisons of pairs of tokens, which these inputs
exercise in every position.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from magi_train.core import compat
from magi_train.core.facts import Fact
from magi_train.core.graph import ancestors, changed_behind, example_value
from magi_train.fusion.verified import execute

MAX_PROOF_ELEMENTS = 2**31
"""Masks larger than this are not executed: 2 GiB of booleans."""
CUTS = (1.0, 0.5, 0.5, 0.2, 0.1, 0.02)
"""Probability with which a sequence begins at a token, in the runs of a proof."""


@dataclass(frozen=True)
class Verdict:
    """What a mask is.

    Attributes:
        kind: "causal": the lower triangle. "unmasked": everything. "band": a window, within packed
            sequences or the whole row. "left": none of these.
        reason: Why it is left.
        back: How many keys before a query it sees, -1 for all; of a band.
        ahead: How many behind.
        positions: The input whose zeros begin sequences, None where a row is one sequence.
    """

    kind: Literal["causal", "unmasked", "band", "left"]
    reason: str = ""
    back: int = -1
    ahead: int = -1
    positions: Node | None = None


def left(reason: str) -> Verdict:
    """Return that a mask stays as it is."""
    return Verdict("left", reason)


def inputs_of(mask: Node) -> frozenset[str]:
    """Return the names of the inputs and attributes that `mask` is computed from."""
    return frozenset(n.name for n in ancestors(mask) if n.op in ("placeholder", "get_attr"))


def judge(
    gm: GraphModule, mask: Node, length: int, keys: int, facts: Mapping[str, Fact], unpacked: str
) -> Verdict:
    """Return what `mask` allows.

    Args:
        gm: The graph.
        mask: Its node, broadcast to `[..., length, keys]`.
        length: Number of queries.
        keys: Number of keys.
        facts: What is known about inputs.
        unpacked: Why packed sequences need not be tried, "" to try.
    """
    shape = example_value(mask).shape
    if any(not isinstance(size, int) for size in shape):
        return left("the size of the mask is dynamic")
    if example_value(mask).numel() > MAX_PROOF_ELEMENTS:
        return left(f"the mask has more than {MAX_PROOF_ELEMENTS} elements")
    needed = ancestors(mask)
    inputs = [n for n in needed if n.op == "placeholder" and _is_static(n)]
    given = {n: _value(n, facts[n.name]) for n in inputs if n.name in facts}
    packed = [n for n in given if facts[n.name].kind == "packed"]
    unknown = inputs_of(mask) - {n.name for n in given}
    if unknown:
        return left(f"the mask depends on {', '.join(sorted(unknown)[:3])}")
    if packed and (unpacked or len(packed) > 1):
        names = ", ".join(sorted(n.name for n in packed))
        return left(f"the mask depends on {names}; {unpacked or 'one input can tell sequences'}")
    changer = changed_behind(gm, needed)
    if changer is not None:
        return left(f"{changer.name} may change the mask in place")
    allowed = _allowed(gm, mask, needed, given, length, keys)
    if isinstance(allowed, str):
        return left(allowed)
    verdict = _shape_of(allowed)
    if not packed or verdict.kind == "left":
        return verdict
    return _with_cuts(gm, mask, needed, given, packed[0], verdict)


def _is_static(node: Node) -> bool:
    value = example_value(node)
    return isinstance(value, Tensor) and all(isinstance(s, int) for s in value.shape)


def _value(node: Node, fact: Fact) -> Tensor:
    """Return the value of an input; one sequence a row if it is packed."""
    like = example_value(node)
    with compat.unset_fake_temporarily():
        if fact.kind == "ones":
            return torch.ones(tuple(like.shape), dtype=like.dtype, device=like.device)
        counts = torch.arange(like.shape[-1], dtype=like.dtype, device=like.device)
        return counts.expand(tuple(like.shape)).contiguous()


def _allowed(
    gm: GraphModule,
    mask: Node,
    needed: set[Node],
    given: Mapping[Node, Any],
    length: int,
    keys: int,
) -> Tensor | str:
    """Return which scores the mask keeps for these inputs, `[..., length, keys]`, or why not."""
    value = execute(gm, needed, given, mask)
    if isinstance(value, str):
        return value
    if tuple(value.shape[-2:]) != (length, keys):
        value = value.expand(*value.shape[:-2], length, keys)
    if value.dtype is torch.bool:
        return value
    lowest = torch.finfo(value.dtype).min
    allowed = value == 0
    return allowed if bool((allowed | (value <= lowest)).all()) else "the mask is a bias, no mask"


def _shape_of(allowed: Tensor) -> Verdict:
    length, keys = allowed.shape[-2:]
    if bool(allowed.all()):
        return Verdict("unmasked")
    one = allowed[(0,) * (allowed.dim() - 2)]
    ahead, back = int(one[0].sum()) - 1, int(one[:, 0].sum()) - 1
    if length == keys and one[0, 0] and bool((allowed == _band(one, back, ahead)).all()):
        if (back, ahead) == (length - 1, 0):
            return Verdict("causal")
        # a limit that no pair reaches is none
        return Verdict("band", back=_limit(back, length), ahead=_limit(ahead, length))
    return left("the mask is constant, but neither causal nor all-true")


def _band(like: Tensor, back: int, ahead: int) -> Tensor:
    return torch.ones_like(like).tril(ahead).triu(-back)


def _limit(distance: int, length: int) -> int:
    return distance if distance < length - 1 else -1


def _with_cuts(
    gm: GraphModule,
    mask: Node,
    needed: set[Node],
    given: Mapping[Node, Tensor],
    positions: Node,
    whole: Verdict,
) -> Verdict:
    """Return `whole` within sequences, if the mask is that wherever they begin."""
    like = given[positions]
    rows, length = like.shape
    back, ahead = {"causal": (-1, 0), "unmasked": (-1, -1)}.get(
        whole.kind, (whole.back, whole.ahead)
    )
    generator = torch.Generator().manual_seed(0)
    for probability in CUTS:
        with compat.unset_fake_temporarily():
            begins = torch.rand(rows, length, generator=generator) < probability
            begins[:, 0] = True
            number = torch.arange(length)
            counted = number - torch.where(begins, number, 0).cummax(-1).values
            drawn = {**given, positions: counted.to(like.device, like.dtype)}
            sequence = begins.cumsum(-1).to(like.device)
        allowed = _allowed(gm, mask, needed, drawn, length, length)
        if isinstance(allowed, str):
            return left(allowed)
        leading = allowed.shape[0] if allowed.dim() == 4 else 1
        if allowed.dim() > 4 or (rows > 1 and leading not in (1, rows)):
            return left(f"the mask is {list(allowed.shape)}, for {rows} rows of positions")
        with compat.unset_fake_temporarily():
            wide = allowed.reshape((1,) * (4 - allowed.dim()) + tuple(allowed.shape))
            wanted = (sequence[:, :, None] == sequence[:, None, :])[:, None]
            reach = [length - 1 if limit < 0 else limit for limit in (back, ahead)]
            if not bool((wide == (wanted & _band(wide[0, 0], *reach))).all()):
                return left(f"the mask depends on {positions.name}, but not by where it is 0")
    return Verdict("band", back=back, ahead=ahead, positions=positions)


TRIALS = (2, 3, 7)
"""Sizes that a dynamic dimension is tried at, besides the ends of its range."""


def judge_dynamic(gm: GraphModule, mask: Node, length: Any, keys: Any) -> Verdict:
    """Return what a mask allows whose sizes may change.

    It is executed for the smallest and the largest sizes of their ranges and for some between. The
    largest sequence must show whether a window ends the reach of a token, so it must be declared;
    rows of the batch are compared with each other, and a few tell.

    Args:
        gm: The graph.
        mask: Its node.
        length: Number of queries, an int or a symbolic one.
        keys: Number of keys, likewise.
    """
    sizes: set[Node] = set()
    needed: set[Node] = set()
    todo = [mask]
    while todo:  # ancestors, as far as the sizes
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            if isinstance(example_value(node), torch.SymInt):
                sizes.add(node)
            else:
                todo += node.all_input_nodes
    unknown = sorted(n.name for n in needed if n.op in ("placeholder", "get_attr"))
    if unknown:
        return left(f"the mask depends on {', '.join(unknown[:3])}")
    changer = changed_behind(gm, needed - sizes)
    if changer is not None:
        return left(f"{changer.name} may change the mask in place")
    trials = _trials(sizes, length, keys)
    if isinstance(trials, str):
        return left(trials)
    verdicts = []
    for values in trials:
        given = {n: compat.evaluate_size(example_value(n), values) for n in sizes}
        at = [n if isinstance(n, int) else compat.evaluate_size(n, values) for n in (length, keys)]
        allowed = _allowed(gm, mask, needed, given, *at)
        verdicts.append(left(allowed) if isinstance(allowed, str) else _shape_of(allowed))
    kinds = {v.kind for v in verdicts}
    if kinds == {"unmasked"} or kinds == {"causal"}:
        return verdicts[0]
    refused = [v for v in verdicts if v.kind == "left"]
    return refused[0] if refused else left("the mask depends on the size, and is no band of all")


def _trials(sizes: set[Node], length: Any, keys: Any) -> list[dict[Any, int]] | str:
    """Return values of all symbols to try, or why they cannot be chosen."""
    symbolic = [example_value(n) for n in sizes] + [s for s in (length, keys) if _is_symbolic(s)]
    of_length = {s for n in (length, keys) if _is_symbolic(n) for s in compat.size_symbols(n)}
    ranges = {}
    for size in symbolic:
        for symbol in compat.size_symbols(size):
            if symbol not in ranges and str(symbol) == str(size):
                ranges[symbol] = compat.symbol_bounds(size)
    missing = {s for size in symbolic for s in compat.size_symbols(size)} - ranges.keys()
    if missing:
        return f"the sizes of the mask are computed from {sorted(map(str, missing))}"
    trials = []
    ends = {s: r[1] for s, r in ranges.items() if s in of_length}
    if any(end is None or end**2 > MAX_PROOF_ELEMENTS // 4 for end in ends.values()):
        return "the largest sequence is not declared, or too large to try"
    for choice in (*TRIALS, None):
        values = {}
        for symbol, (low, high) in ranges.items():
            most = ends.get(symbol) or 4  # rows of a batch
            top = most if choice is None else choice
            values[symbol] = max(low, min(top, most if high is None else high))
        trials.append(values)
    return trials


def _is_symbolic(size: Any) -> bool:
    return isinstance(size, torch.SymInt)
