"""Programs compiled at load: once a shape, with the same numbers, and refused without them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import magi_train
from magi_train import ExportConfig
from magi_train.core import device_graphs
from magi_train.core.errors import ExportError
from magi_train.exporter import compare, compiled, loaded
from magi_train.exporter.compiled import Compiled
from tests.close import tolerance
from tests.exporter.nets import Block
from tests.exporter.test_loaded import Recorder, changed
from tests.models import images


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.pt2"
    magi_train.export(Block(8), (images(0, 2),), path, dynamic={"batch": (1, 8)})
    return path


class Writes(nn.Module):
    """Writes a row of a cache that it is given, as decoders do."""

    def forward(self, x, at, cache):
        cache.index_copy_(0, at, x)
        return (cache.cumsum(0) * 2,)


def uncompiled(monkeypatch, change=lambda results: results):
    """Replace torch.compile by what runs the module, and counts the modules."""
    made = []

    def compile(module, **given):
        assert given["fullgraph"]
        assert given["dynamic"] is False
        made.append(given["options"])
        return lambda *inputs: change(module(*inputs))

    monkeypatch.setattr(torch, "compile", compile)
    return made


def test_compiled_once_a_shape(file):
    plain, run = magi_train.load(file), magi_train.load(file, buckets=(4,), compile=True)
    run.warmup()
    by_op = []
    inner, run._run._by_op = run._run._by_op, lambda *t: by_op.append(t) or inner(*t)
    limit = tolerance(torch.float32, 8 * 9)
    for rows in (1, 3, 4):
        x = images(rows, rows)
        torch.testing.assert_close(run(x), plain(x), rtol=limit, atol=limit)
    assert not by_op
    assert len(run._run._code) == 1


def test_compiled_code_is_replayed(file, monkeypatch):
    made = uncompiled(monkeypatch)
    monkeypatch.setitem(device_graphs.makers, "cpu", Recorder)
    plain, run = magi_train.load(file), magi_train.load(file, compile=True, cuda_graphs=True)
    for rows in (2, 2, 2, 3, 2):
        torch.testing.assert_close(run(images(rows, rows)), plain(images(rows, rows)))
    assert len(made) == 2
    assert len(run._run._recorded) == 1


def test_what_a_program_writes_is_written():
    inputs = (torch.ones(1, 3), torch.tensor([1]), torch.zeros(4, 3))
    program = torch.export.export(Writes(), inputs)
    run = Compiled(program, {})
    cache = torch.zeros(4, 3)
    for row in (2, 0, 3):
        with torch.no_grad():
            (got,) = run(torch.full((1, 3), row + 1.0), torch.tensor([row]), cache)
        assert torch.equal(got, cache.cumsum(0) * 2)
    assert torch.equal(cache[:, 0], torch.tensor([1.0, 0.0, 3.0, 4.0]))


class Weighed(nn.Module):
    def forward(self, x, y):
        return (x * 2 + y,)


def test_a_tensor_that_is_given_twice_at_first():
    """Without guards nobody would notice that later arguments are two tensors."""
    run = Compiled(torch.export.export(Weighed(), (torch.ones(3), torch.zeros(3))), {})
    x, zeros = torch.ones(3), torch.zeros(3)
    with torch.no_grad():
        assert torch.equal(run(x, x)[0], 3 * x)
        assert torch.equal(run(x, zeros)[0], 2 * x)
        assert torch.equal(run(zeros, x)[0], x)


def test_threads_compile_a_shape_once(file, monkeypatch):
    made = uncompiled(monkeypatch)
    run = magi_train.load(file, compile={"max_autotune": True})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, [images(0, 2), images(0, 3)] * 8))
    assert [options["max_autotune"] for options in made] == [True, True]


def test_further_shapes_run_op_by_op(file, monkeypatch, caplog):
    made = uncompiled(monkeypatch)
    monkeypatch.setattr(compiled, "MAX_SHAPES", 1)
    run = magi_train.load(file, compile=True)
    for rows in (1, 2, 3, 2):
        assert torch.equal(run(images(0, rows)), magi_train.load(file)(images(0, rows)))
    assert len(made) == 1
    assert len([r for r in caplog.records if "1 shapes are compiled" in r.message]) == 1


def test_code_that_computes_something_else_is_refused(file, monkeypatch):
    made = uncompiled(monkeypatch, lambda results: [r * 1.01 for r in results])
    run = magi_train.load(file, compile=True)
    for _ in range(2):  # no later call may run it either
        with pytest.raises(ExportError, match=r"result 0 is off by 1\.0e-02 .* without `compile`"):
            run(images(0, 2))
    assert len(made) == 2


def test_what_is_allowed_is_of_the_dtype_inside(tmp_path, monkeypatch):
    path, config = tmp_path / "model.pt2", ExportConfig(precision="bfloat16")
    magi_train.export(Block(8), (images(0, 2),), path, config=config)
    for factor, right in ((1.01, True), (1.2, False)):
        uncompiled(monkeypatch, lambda results, f=factor: [r * f for r in results])
        run = magi_train.load(path, compile=True)
        if right:
            assert run(images(0, 2)).dtype == torch.float32
        else:
            with pytest.raises(ExportError, match=r"off by 2\.0e-01"):
                run(images(0, 2))


@pytest.mark.parametrize(
    ("dtype", "device", "eps"),
    [
        (torch.float32, "cpu", 2.0**-23),
        (torch.float32, "meta", 2.0**-10),  # an accelerator, which may round to TF32
        (torch.float64, "meta", 2.0**-52),
        (torch.bfloat16, "meta", 2.0**-7),
    ],
)
def test_what_is_allowed_is_of_the_device(dtype, device, eps):
    inputs = (torch.ones(3, dtype=dtype, device=device),)
    assert compare.allowed(torch.export.export(torch.nn.ReLU(), inputs)) == eps**0.5


def test_what_cannot_be_compiled_says_so(file, monkeypatch):
    def compile(module, **given):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(ExportError, match=r"compiled here \(RuntimeError: no C\+\+ compiler\)"):
        magi_train.load(file, compile=True)(images(0, 2))


def test_only_programs_are_compiled(tmp_path):
    path = tmp_path / "model.pt2"
    magi_train.export(nn.Linear(2, 2), (torch.ones(2, 2),), path)
    for target, words in loaded.KINDS.items():
        changed(path, target=target)
        with pytest.raises(ExportError, match=words):
            magi_train.load(path, compile=True)


def test_generated_code_for_gpus_has_a_short_erf(tmp_path, monkeypatch):
    """To the 16 bits that a GELU ends in; not on the CPU, and not in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 8)).eval()
    found = {}
    for devices in (("cuda",), ("cpu",)):
        monkeypatch.setattr(compiled, "WITH_KERNELS", devices)
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(5, 24, dtype=dtype)
            magi_train.export(model.to(dtype), (x,), tmp_path / "m.pt2")
            torch._dynamo.reset()
            run = magi_train.load(tmp_path / "m.pt2", compile=True)
            _, codes = run_and_get_code(lambda run=run, x=x: run(x))
            found[devices, dtype] = "exp2(" in "".join(codes)
    assert [key for key, short in found.items() if short] == [(("cpu",), torch.bfloat16)]
