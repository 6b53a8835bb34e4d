"""The order of generated code under a budget: what is planned in turn is not made side by side."""

import contextlib

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.choices import InductorChoices
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V

import magi_train
from magi_train import Config
from magi_train.core import compat

ROWS, WIDTH, INNER = 64, 32, 256


def two_layers(x, y, weight, up, gate, down, table):
    """Two layers that read one table, the second behind what takes much more than the table."""
    first = ((x @ weight) * table) @ weight
    a, b = y @ up, y @ gate
    inner = nn.functional.silu(a) * b
    second = ((inner @ down) * table) @ weight
    return first, second, inner.t() @ a, a.t() @ b


def products_before_the_first_ends(context):
    shapes = [(ROWS, WIDTH), (ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH, INNER), (WIDTH, INNER),
              (INNER, WIDTH), (ROWS, WIDTH)]  # fmt: skip
    inputs = [torch.randn(shape) for shape in shapes]
    torch._dynamo.reset()
    with context, torch.no_grad(), inductor_config.patch(fx_graph_cache=False):
        results, (code,) = run_and_get_code(torch.compile(two_layers), *inputs)
        expected = two_layers(*inputs)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-3)
    calls = [line for line in code.splitlines() if "extern_kernels.mm(" in line]
    (first,) = [i for i, line in enumerate(calls) if "mm(buf1, arg1_1" in line]
    down = [i for i, line in enumerate(calls) if "arg6_1" in line]
    return down[0] < first


def test_kernels_of_two_layers_that_read_one_table_stay_two():
    assert products_before_the_first_ends(contextlib.nullcontext())  # else this shows nothing
    assert not products_before_the_first_ends(compat.fusions_in_place())


@pytest.mark.parametrize("budget_gib", [None, 64.0])
def test_only_a_budget_changes_what_is_fused(monkeypatch, budget_gib):
    seen = []
    compile_fx = compat.compile_fx

    def watched(*args, **kwargs):
        seen.append(type(V.choices) is InductorChoices)
        return compile_fx(*args, **kwargs)

    monkeypatch.setattr(compat, "compile_fx", watched)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    config = Config(memory_budget_gib=budget_gib)
    model, _ = magi_train.prepare(model, torch.optim.SGD(model.parameters()), config=config)
    magi_train.prepare_step(lambda x: model(x).sum(), model)(torch.randn(4, 8)).backward()
    assert seen
    assert seen == [budget_gib is None] * len(seen)
    assert type(V.choices) is InductorChoices
