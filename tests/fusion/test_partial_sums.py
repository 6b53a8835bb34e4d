"""What generated code's partial sums are added up by: the kernel, and the line that calls it."""

import inspect

import pytest
import torch
from torch._inductor.codegen.simd import SIMDScheduling

from magi_train.core import compat
from magi_train.fusion import partial_sums

pytest.importorskip("triton")
from magi_train.fusion.kernels import column_sums as kernels
from magi_train.fusion.kernels import multi_tensor
from tests.close import difference, tolerance


@pytest.mark.skipif(not multi_tensor.interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (128, 16), (300, 100), (0, 5), (5, 0)])
def test_the_kernel_equals_float64(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    got = kernels.column_sums(x)
    limit = tolerance(torch.float32, max(shape[0], 1))
    assert difference({"": got}, {"": kernels.column_sums_reference(x.double())}) < limit
    assert (got.shape, got.dtype) == ((shape[1],), torch.float32)


def test_more_rows_than_the_kernel_is_good_for_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(kernels, "_column_sums", None)
    x = torch.ones(kernels.MOST_ROWS + 1, 3)
    assert kernels.column_sums(x).tolist() == [kernels.MOST_ROWS + 1] * 3
    assert kernels.column_sums(torch.ones(3, 5).t()).tolist() == [5] * 3


SUMS = [
    "workspace_2[0 * 788 * 1024 : (0 + 1) * 788 * 1024].view(788, 1024)",
    "workspace_2[0 * (788) * (1024) : (0 + 1) * (788) * (1024)].view(788, 1024)",  # torch 2.13
    "ws[1 * ((15 + s0)//16) * 9 : (1 + 1) * ((15 + s0)//16) * 9].view(((15 + s0)//16), 9)",
]


@pytest.mark.parametrize("rest", ["", ".view([1, 1024])", ".view([9]).to(torch.bfloat16)"])
@pytest.mark.parametrize("partial", SUMS)
def test_the_line_of_generated_code_calls_the_op(partial, rest):
    lines = []

    class Wrapper:
        def writeline(self, line):
            lines.append(line)

    class Graph:
        wrapper_code = Wrapper()

    class Scheduling:
        def _codegen_mix_order_reduction(self, one, two):
            write = V.graph.wrapper_code.writeline
            write(f"buf50 = {partial}.sum(dim=0){rest}")
            write(f"buf51 = {partial}.prod(dim=0){rest}")
            write(one)

    from torch._inductor.codegen import simd
    from torch._inductor.virtualized import V

    patch = pytest.MonkeyPatch()
    patch.setattr(simd, "SIMDScheduling", Scheduling)
    with patch.context(), V.set_graph_handler(Graph()):
        with compat.partial_sums_by(partial_sums.OPERATOR):
            Scheduling()._codegen_mix_order_reduction(None, None)
        Scheduling()._codegen_mix_order_reduction("buf52 = x.sum(dim=0)", None)
    patch.undo()
    op = partial_sums.OPERATOR
    assert lines[:3] == [
        f"buf50 = {op}({partial}){rest}",
        f"buf51 = {partial}.prod(dim=0){rest}",
        None,
    ]
    assert lines[3] == f"buf50 = {partial}.sum(dim=0){rest}", "outside of the context"


def test_this_torch_writes_the_line_as_it_is_looked_for():
    source = inspect.getsource(SIMDScheduling._codegen_mix_order_reduction)
    assert '{ws_name}[{start} : {end}].view({nsplit}, {rnumel}).{opname}(dim=0)"' in source
