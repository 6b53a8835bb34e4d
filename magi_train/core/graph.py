"""Questions about FX graphs, and how to add a node with all its metadata."""

import functools
import heapq
import itertools
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from magi_train.core import compat
from magi_train.core.errors import PassError

_PACKAGE = str(Path(__file__).parents[1])
CASTS = (torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default)
"""A change of dtype in AOTAutograd's graphs: Inductor decomposes the second into the first."""
HALF = (torch.bfloat16, torch.float16)
"""The dtypes of 16 bits that autocast computes in."""
SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
"""Ops there whose result is their argument."""
IN_PLACE_OPERATORS = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ifloordiv, operator.iand, operator.ior, operator.ixor, operator.ipow, operator.imod,
    operator.ilshift, operator.irshift, operator.imatmul,
}  # fmt: skip


def example_value(node: Node) -> Any:
    """Return the fake value of `node`, whichever stage traced it; None if there is none."""
    return node.meta.get("example_value", node.meta.get("val"))


def call_with_metadata(graph: Graph, target: Callable[..., Any], args: tuple[Any, ...]) -> Node:
    """Insert a call with "val" and "tensor_meta", which Inductor's own passes rely on.

    Custom ops get their arguments in the strides that these have in the graph: what is computed for
    nobody else would come in any, and so would what the op returns.
    """
    node = graph.call_function(target, args)
    values = map_arg(args, lambda n: n.meta["val"])
    node.meta[compat.STRIDES_OF_ARGUMENTS] = (values, {})
    fakes = [v for v in pytree.tree_leaves(values) if isinstance(v, compat.FakeTensor)]
    mode = fakes[0].fake_mode if fakes else _fake_mode(graph)
    with mode:
        node.meta["val"] = target(*values)
    if isinstance(node.meta["val"], torch.Tensor):
        node.meta["tensor_meta"] = compat.extract_tensor_metadata(node.meta["val"])
    return node


def insert_computation(before: Node, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Run `function` on proxies of `arguments`, so that its ops become nodes in front of `before`.

    Each new node gets its fake value, under the key that this graph uses, and `before`'s stack
    trace.

    Args:
        before: Where to insert.
        function: Takes proxies; Python control flow is unrolled.
        arguments: Nodes, in lists too, become proxies; other values go in as they are.

    Returns:
        The result of `function`, nodes for proxies.
    """
    graph = before.graph
    old = set(graph.nodes)
    tracer = compat.GraphAppendingTracer(graph)
    proxies = pytree.tree_map(lambda a: Proxy(a, tracer) if isinstance(a, Node) else a, arguments)
    with graph.inserting_before(before):
        result = function(*proxies)
    for node in graph.nodes:
        if node not in old:
            _describe(node, before)
    return pytree.tree_map(lambda r: r.node if isinstance(r, Proxy) else r, result)


def insert_call(before: Node, target: Callable[..., Any], args: Any, kwargs: Any) -> Node:
    """Insert one call in front of `before`, with its fake value as `insert_computation` does."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    _describe(node, before)
    return node


def _describe(node: Node, like: Node) -> None:
    key = "example_value" if "example_value" in like.meta else "val"
    node.stack_trace = like.stack_trace
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta[key])
    with _fake_mode(like.graph), compat.python_dispatcher():
        if node.op == "call_method":
            node.meta[key] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.meta[key] = node.target(*args, **kwargs)  # type: ignore[operator]


def op_name(node: Node) -> str:
    """Return the bare name of what `node` calls: "linear", "add_"; "" if it calls nothing."""
    if node.op not in ("call_function", "call_method"):
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _fake_mode(graph: Graph) -> Any:
    for node in graph.nodes:
        if isinstance(example_value(node), compat.FakeTensor):
            return example_value(node).fake_mode
    raise AssertionError("a graph without a single fake tensor")


def ancestors(
    node: Node, of: Callable[[Node], Iterable[Node]] = lambda n: n.all_input_nodes
) -> set[Node]:
    """Return `node` and everything that it is computed from; `of` says from what one node is."""
    seen: set[Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += of(current)
    return seen


def _may_share(node: Node) -> list[Node]:
    """Return the arguments whose memory a node may hand on.

    What torch.export makes of `torch.tensor(...)` is a copy, though its fake value lies in the
    storage of the constant.
    """
    copies = node.target is torch.ops.aten.lift_fresh_copy.default
    return [] if copies else node.all_input_nodes


def mutated(node: Node) -> list[Node]:
    """Return the arguments that `node` changes in place."""
    target, first = node.target, [a for a in node.args[:1] if isinstance(a, Node)]
    out = node.kwargs.get("out")
    found = [out] if isinstance(out, Node) else []
    if node.op not in ("call_function", "call_method"):
        return []
    if node.kwargs.get("inplace"):
        return first or [a for a in (node.kwargs.get("input"),) if isinstance(a, Node)]
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema.arguments
        given = [*zip(schema, node.args, strict=False)]
        given += [(a, node.kwargs[a.name]) for a in schema if a.name in node.kwargs]
        writes = [v for a, v in given if a.alias_info is not None and a.alias_info.is_write]
        return found + [v for v in writes if isinstance(v, Node)]
    if getattr(target, "__module__", "") == "_operator":  # and_, or_ and not_ change nothing
        return found + (first if target in IN_PLACE_OPERATORS else [])
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return found + (first if in_place else [])


def aliased(node: Node) -> set[Node]:
    """Return `node` and those that it is computed from whose memory it may share.

    Fake tensors tell: what is a view of another lies in the same storage. A node without known
    tensors, or that runs a graph, may share memory with anything that it is computed from.
    """
    memory = _memory(node)
    sources = ancestors(node, of=_may_share)
    return {n for n in sources if not memory or not _memory(n) or memory & _memory(n)}


def written(graph: Graph) -> set[Node]:
    """Return the nodes whose memory, or a view's of it, the graph writes to."""
    return {a for n in graph.nodes for m in mutated(n) for a in aliased(m)}


def aliasing(nodes: Iterable[Node], found: set[Node]) -> set[Node]:
    """Return those of `nodes`, a whole graph in its order, for which `aliased` meets `found`."""
    behind: dict[Node, int] = {}  # which of `found` a node is computed from, a bit for each
    bits = {node: 1 << i for i, node in enumerate(found)}
    sharing: dict[int, int] = {}  # by storage
    unknown = 0
    for node, bit in bits.items():
        memory = _memory(node)
        for storage in memory:
            sharing[storage] = sharing.get(storage, 0) | bit
        unknown |= 0 if memory else bit
    result = set()
    for node in nodes:
        reached = functools.reduce(
            operator.or_, (behind[n] for n in _may_share(node)), bits.get(node, 0)
        )
        behind[node] = reached
        if not reached:
            continue
        memory = _memory(node)
        shared = functools.reduce(operator.or_, (sharing.get(s, 0) for s in memory), unknown)
        if not memory or reached & shared:
            result.add(node)
    return result


def _memory(node: Node) -> frozenset[int]:
    """Return the storages of the tensors that a node yields; none where they are not known."""
    if compat.is_higher_order(node.target):
        return frozenset()
    tensors = [v for v in pytree.tree_leaves(example_value(node)) if isinstance(v, Tensor)]
    if not all(isinstance(t, compat.FakeTensor) for t in tensors):
        return frozenset()
    return frozenset(compat.storage_key(t) for t in tensors)


def changed_behind(gm: GraphModule, nodes: set[Node]) -> Node | None:
    """Return an op outside of `nodes` that may change one of their values in place, or None."""
    for node in gm.graph.nodes:
        if node not in nodes and any(aliased(n) & nodes for n in mutated(node)):
            return node
    return None


def written_inputs(gm: GraphModule) -> set[Node]:
    """Return the inputs of `gm` that some op changes in place, itself or through a view."""
    writes = {m for node in gm.graph.nodes for m in mutated(node)}
    return {n for write in writes for n in aliased(write) if n.op == "placeholder"}


def is_read(node: Node) -> bool:
    """Return whether the value of `node` reaches the output, or an op that changes something."""
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            if user.op == "output" or mutated(user) or compat.is_higher_order(user.target):
                return True
            todo += {user} - seen
            seen.add(user)
    return False


def erase_unused(gm: GraphModule, nodes: set[Node]) -> None:
    """Erase `nodes` and what only they needed, as far as nothing reads it.

    Ops that change a tensor in place stay: before autograd they have no users, and still count.
    """
    candidates = set().union(*(ancestors(n) for n in nodes)) if nodes else set()
    for node in reversed(list(gm.graph.nodes)):
        if node in candidates and not node.users and not mutated(node):
            if node.op in ("call_function", "call_method"):
                gm.graph.erase_node(node)


def run_nodes(
    nodes: Iterable[Node],
    known: dict[Node, Any],
    arguments: Callable[[Node, Any, Any], tuple[Any, Any]] | None = None,
) -> dict[Node, Any]:
    """Execute `nodes` in order on real values; return the value of each, `known` included.

    Args:
        nodes: What to execute.
        known: Values that are given.
        arguments: From a node, its args and its kwargs to those that it is called with instead.
    """
    values = dict(known)
    for node in nodes:
        if node in values:
            continue
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
        if arguments is not None:
            args, kwargs = arguments(node, args, kwargs)
        if node.op == "call_function":
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            raise ValueError(f"cannot execute {node.op} node {node.name}")
    return values


def nested_nodes(gm: GraphModule) -> Iterator[Node]:
    """Yield the nodes of a graph and of the graphs that it calls."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


def outputs(graph: Graph) -> list[Any]:
    """Return what a graph from AOTAutograd returns, in order."""
    values: Any = graph.output_node().args[0]
    return list(values)


def input_gradients(backward: Graph) -> dict[int, tuple[int, Node]]:
    """Return {position of an input of the captured graph: (position in the output, its gradient)}.

    Only inputs as the caller gave them count, not those AOTAutograd made of a tensor subclass.
    """
    descriptors = backward.output_node().meta.get("desc") or []
    return {
        what.grad_of.idx: (position, node)
        for position, (node, what) in enumerate(zip(outputs(backward), descriptors, strict=False))
        if isinstance(what, compat.GradAOTOutput)
        and isinstance(what.grad_of, compat.PlainAOTInput)
        and isinstance(node, Node)
    }


def before_widening(node: Node) -> Node:
    """Return what `node` reads if it casts to a wider floating dtype, else `node`."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if node.target not in CASTS or not isinstance(source, Node):
        return node
    narrow, wide = source.meta["val"], node.meta["val"]
    same_shape = narrow.shape == wide.shape and narrow.device == wide.device
    floats = narrow.is_floating_point() and wide.is_floating_point()
    return source if same_shape and floats and narrow.itemsize < wide.itemsize else node


def is_view(node: Node) -> bool:
    """Return whether a node of AOTAutograd's graph looks at its first argument's memory."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    alias = returns[0].alias_info if returns else None
    return alias is not None and not alias.is_write


POINTWISE_WITHOUT_TAG = {"convert_element_type", "_to_copy", "clone", "full", "iota", "arange",
    "where", "full_like", "zeros_like", "ones_like", "scalar_tensor", "expand", "silu_backward",
    "embedding", "index", "gather", "native_dropout", "inductor_random", "inductor_lookup_seed",
    "_unsafe_view", "slice_backward", "select_backward", "constant_pad_nd",
}  # fmt: skip
"""Ops that Inductor computes element by element, though torch does not tag them so."""
REDUCTIONS = {
    "sum", "mean", "amax", "amin", "var", "var_mean", "prod", "any", "argmax", "argmin",
    "native_layer_norm", "native_layer_norm_backward", "_softmax", "_log_softmax",
    "_softmax_backward_data", "_log_softmax_backward_data", "prepare_softmax_online",
}  # fmt: skip


def is_pointwise(node: Node) -> bool:
    """Return whether generated code can compute a node's elements where they are read."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or op_name(node) in POINTWISE_WITHOUT_TAG


def is_reduction(node: Node) -> bool:
    """Return whether generated code computes a node together with what is read element-wise."""
    return isinstance(node.target, torch._ops.OpOverload) and op_name(node) in REDUCTIONS


def is_compute(node: Node) -> bool:
    """Return whether a node is a kernel of its own that other work can hide behind."""
    packet = getattr(node.target, "overloadpacket", None)
    name = str(packet)
    return node.op == "call_function" and (
        packet in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        or "convolution" in name
        or ("attention" in name and name.endswith(("backward", "backward_for_cpu")))
    )


def input_position(placeholder: Node) -> int | None:
    """Return which input of the captured graph a placeholder of AOTAutograd's graph is."""
    what = placeholder.meta.get("desc")
    return what.idx if isinstance(what, compat.PlainAOTInput) else None


def mutated_inputs(graph: Graph) -> set[Node]:
    """Return the inputs that AOTAutograd writes to when the forward is over: buffers, mostly."""
    descriptors = graph.output_node().meta.get("desc") or []
    changed = [getattr(what, "mutated_input", None) for what in descriptors]
    changed = [what for what in changed if what is not None]
    return {n for n in graph.find_nodes(op="placeholder") if n.meta.get("desc") in changed}


def written_over(graph: Graph) -> set[Node]:
    """Return the inputs of a joint graph whose memory its forward writes to: buffers, mostly."""
    written = {a for n in graph.nodes for m in mutated(n) for a in ancestors(m)}
    return {n for n in written if n.op == "placeholder"} | mutated_inputs(graph)


def reads_of(graph: Graph, inputs: set[Node]) -> list[tuple[Node, list[Node]]]:
    """Return what reads the memory of inputs: nodes, with those arguments that look at it."""
    seen = set(inputs)
    found = []
    for node in graph.nodes:
        read = [each for each in node.all_input_nodes if each in seen]
        if node.op != "call_function" or not read:
            continue
        if is_view(node):
            seen.add(node)
        elif not mutated(node):
            found.append((node, read))
    return found


def descendants(sources: Iterable[Node]) -> set[Node]:
    """Return everything that is computed from `sources`."""
    seen: set[Node] = set()
    todo = list(sources)
    while todo:
        for user in todo.pop().users:
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return seen


def spell_out(graph: Graph) -> None:
    """Write in another way what PyTorch's passes over AOTAutograd's graphs misread.

    `add(a, b, alpha=k)` is taken for `add(a, b)` where `a` or `b` is a matrix product: patterns
    look at arguments, not at keywords. It becomes `a + k * b`.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        factor, other = node.kwargs.get("alpha", 1), node.args[1]
        if factor == 1 or not isinstance(other, Node):
            continue
        with graph.inserting_before(node):
            product = call_with_metadata(graph, torch.ops.aten.mul.Tensor, (other, factor))
        if product.meta["val"].dtype != example_value(other).dtype:  # an int times a float
            graph.erase_node(product)
            continue
        product.stack_trace = node.stack_trace
        node.args, node.kwargs = (node.args[0], product), {}


def copies_of_inputs(graph: Graph) -> list[Node]:
    """Return the nodes of AOTAutograd's graph that copy an input, or a view of one, as it is."""
    seen = set(graph.find_nodes(op="placeholder"))
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and node.args and node.args[0] in seen:
            if is_view(node):
                seen.add(node)
            elif node.target is torch.ops.aten.clone.default:
                found.append(node)
    return [n for n in found if layout(example_value(n)) == layout(example_value(n.args[0]))]  # type: ignore[arg-type]


def has_changing_floats(graph: Graph) -> bool:
    """Return whether Dynamo's graph computes with a float of Python's that is no constant."""
    return any(isinstance(example_value(node), torch.SymFloat) for node in graph.nodes)


def num_bytes(value: Any) -> int:
    """Return the bytes of a tensor with static sizes, 0 for anything else."""
    if not isinstance(value, torch.Tensor):
        return 0
    numel = value.numel()
    return int(numel) * value.element_size() if isinstance(numel, int) else 0


def saved_for_backward(forward: GraphModule | Graph) -> list[Node]:
    """Return what a partitioned forward keeps for its backward, without its own inputs."""
    graph = forward.graph if isinstance(forward, GraphModule) else forward
    descriptors = graph.output_node().meta.get("desc") or []
    return list(
        dict.fromkeys(
            node
            for node, what in zip(outputs(graph), descriptors, strict=False)
            if isinstance(node, Node)
            and node.op != "placeholder"
            and type(what).__name__.startswith("SavedForBackwards")
        )
    )


def tangents(joint: Graph) -> list[Node]:
    """Return the inputs of a joint graph that are gradients of its outputs."""
    return [n for n in joint.find_nodes(op="placeholder") if "tangents" in n.name]


def is_backward(graph: Graph) -> bool:
    """Return whether a partitioned graph is the backward: whether it returns gradients."""
    descriptors = graph.output_node().meta.get("desc") or []
    return any(isinstance(what, compat.GradAOTOutput) for what in descriptors)


def user_line(node: Node) -> str:
    """Return the last line outside of this package that made `node`, "" if unknown."""
    lines = (node.stack_trace or "").strip().splitlines()
    frames: list[list[str]] = []
    for line in map(str.strip, lines):
        if line.startswith("File "):
            frames.append([line])
        elif frames and line.strip("^~ "):  # without the marks below it
            frames[-1].append(line)
    theirs = [frame for frame in frames if not frame[0].startswith(f'File "{_PACKAGE}{os.sep}')]
    return " ".join(theirs[-1]) if theirs else ""


def restore_order(graph: Graph) -> None:
    """Move every node behind what it reads, as little as possible.

    Raises:
        PassError: Some nodes read each other in a circle; names one.
    """
    order: list[Node] = []
    ready: set[Node] = set()
    waiting: dict[Node, list[Node]] = {}
    todo = list(reversed(graph.nodes))
    while todo:
        node = todo.pop()
        missing = next((n for n in node.all_input_nodes if n not in ready), None)
        if missing is not None:
            waiting.setdefault(missing, []).append(node)
            continue
        ready.add(node)
        order.append(node)
        todo += reversed(waiting.pop(node, []))
    if waiting:
        raise PassError(f"{next(iter(waiting)).name} is computed from itself")
    for before, node in itertools.pairwise(order):
        before.append(node)


def restrided(start: Mapping[Node, Tensor]) -> dict[Node, Any] | tuple[Node, str]:
    """Follow values that come in another layout through the graph, until nothing changes.

    Args:
        start: Fake values that replace those of these nodes.

    Returns:
        The fake value of every node that gets another one, or the node that cannot take its
        arguments so (a view, an operator that takes graphs, or the output, whose layout is
        promised), with what it said.
    """
    graph = next(iter(start)).graph
    number = {node: i for i, node in enumerate(graph.nodes)}
    values: dict[Node, Any] = dict(start)
    todo = sorted({(number[u], u) for n in start for u in n.users})
    while todo:
        _, node = heapq.heappop(todo)
        if node in values:
            continue
        calls = node.op == "call_function" and not compat.is_higher_order(node.target)
        if not calls and node.op != "call_method":
            return node, "its layout would change"
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values.get(n, example_value(n)))
        try:
            with compat.forgetting_sizes(_fake_mode(graph)):
                if calls:
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
                else:
                    value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        except (RuntimeError, TypeError, ValueError, KeyError, NotImplementedError) as error:
            return node, str(error).split("\n")[0]
        if layout(value) != layout(example_value(node)):
            values[node] = value
            for user in node.users:
                heapq.heappush(todo, (number[user], user))
    return values


def layout(value: Any) -> list[str]:
    """Return shape and strides of each tensor in `value`, as a text that can be compared."""
    leaves = pytree.tree_leaves(value)
    return [str((v.shape, v.stride())) for v in leaves if isinstance(v, torch.Tensor)]


def attribute(gm: GraphModule, node: Any) -> Tensor | None:
    """Return the parameter or buffer that `node` reads, None if it reads something else."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def written_attributes(gm: GraphModule) -> set[Node]:
    """Return the nodes that read a parameter or buffer which the graph writes to, by any name."""
    own = {n: a for n in gm.graph.nodes if (a := attribute(gm, n)) is not None}
    changed = {compat.storage_key(own[n]) for n in written(gm.graph) if n in own}
    return {n for n, tensor in own.items() if compat.storage_key(tensor) in changed}


def insert_attribute(gm: GraphModule, before: Node, name: str, value: Tensor) -> Node:
    """Add a buffer to `gm`, named like `name`, and a node in front of `before` that reads it."""
    free = (f"magi_{name}_{i}" for i in itertools.count())
    key = next(each for each in free if not hasattr(gm, each))
    gm.register_buffer(key, value.detach())
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(key)
    node.meta["val"] = _fake_mode(gm.graph).from_tensor(value.detach(), static_shapes=True)
    return node


def drop_unread(gm: GraphModule) -> tuple[str, ...]:
    """Delete the parameters and buffers that no node of `gm` reads; return their names."""
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    names = [n for n, _ in gm.named_parameters(remove_duplicate=False)]
    names += [n for n, _ in gm.named_buffers(remove_duplicate=False)]
    unread = tuple(n for n in names if n not in read)
    for name in unread:
        owner, _, last = name.rpartition(".")
        delattr(gm.get_submodule(owner), last)
    return unread


def copy_where_no_view_is(gm: GraphModule) -> None:
    """Let views copy whose input lies otherwise in memory than traced, and recompile the module.

    The strides of fake tensors are wrong for some ops, the backward of softplus among them, and an
    op that is decomposed later may give others. Values of a functional graph do not depend on who
    shares memory.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    gm.recompile()
