"""Questions about graphs: what may share memory."""

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from magi_train import api
from magi_train.core.graph import aliased, aliasing, user_line


def graph_of_views(seed: int) -> Graph:
    """A graph of inputs, views, copies and nodes of which nothing is known, at random."""
    choose = random.Random(seed)
    graph = Graph()
    with FakeTensorMode():
        nodes = []
        for i in range(3):
            node = graph.placeholder(f"x{i}")
            node.meta["val"] = torch.empty(4, 4)
            nodes.append(node)
        for _ in range(25):
            source, other = choose.choices(nodes, k=2)
            kind = choose.choice(["view", "view", "copy", "add", "unknown", "lifted"])
            if kind == "add":
                node = graph.call_function(torch.ops.aten.add.Tensor, (source, other))
                node.meta["val"] = torch.empty(4, 4)
            elif kind == "lifted":  # a copy, whose fake value lies in its argument's storage
                node = graph.call_function(torch.ops.aten.lift_fresh_copy.default, (source,))
                node.meta["val"] = source.meta.get("val")
            else:
                node = graph.call_function(torch.ops.aten.t.default, (source,))
                known = source.meta.get("val")
                if kind == "view" and known is not None:
                    node.meta["val"] = known.t()
                elif kind != "unknown":
                    node.meta["val"] = torch.empty(4, 4)
            nodes.append(node)
    graph.output(tuple(nodes[-3:]))
    return graph


@pytest.mark.parametrize("seed", range(30))
def test_what_shares_memory_with_some_nodes_is_found_at_once(seed):
    graph = graph_of_views(seed)
    found = set(random.Random(seed).sample(list(graph.nodes), 4))
    wanted = {n for n in graph.nodes if aliased(n) & found}
    assert aliasing(graph.nodes, found) == wanted
    assert aliasing(graph.nodes, set()) == set()


def test_the_users_line_is_none_of_this_packages():
    node = Graph().placeholder("x")
    ours = f'  File "{api.__file__}", line 42, in forward\n    return module(x)\n    ^^^^^^\n'
    theirs = '  File "train.py", line 3, in <lambda>\n    loss = model(x)\n           ^^^^^\n'
    node.stack_trace = ours + theirs + ours
    assert user_line(node) == 'File "train.py", line 3, in <lambda> loss = model(x)'
    node.stack_trace = ours
    assert user_line(node) == ""
    node.stack_trace = None
    assert user_line(node) == ""
