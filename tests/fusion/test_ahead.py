"""Kernels that compile ahead: launched once, waited for, and as the late launch will be."""

import contextlib
import signal
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from magi_train.fusion import ahead, chunked, dropout, fused_step, kernel_ops

HOST = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch):
    monkeypatch.setattr(ahead, "_asked", set())
    monkeypatch.setattr(ahead, "_running", {})
    monkeypatch.setattr(ahead, "DEVICES", ("cpu", "cuda"))


@pytest.fixture
def asked(monkeypatch):
    """What is asked for, by kernel, device and variant; nothing is launched."""
    calls = []

    def note(kernel, device, launch, variant=None):
        calls.append((kernel, device.type, launch, variant))

    for module in (chunked, dropout, fused_step):
        monkeypatch.setattr(module, "compile_ahead", note)
    return calls


def idle():
    """Return once the thread has done what it was given until now."""
    ahead._thread().submit(int).result()


def test_a_kernel_is_launched_once_in_another_thread_for_each_variant():
    threads = []

    def launch(device):
        threads.append(threading.current_thread())

    for variant in (1, 2, 1):
        ahead.compile_ahead("k", HOST, launch, variant)
    idle()
    assert len(threads) == 2
    assert threading.current_thread() not in threads


def test_what_is_being_compiled_is_waited_for_and_what_has_not_begun_will_not():
    began, go, done = threading.Event(), threading.Event(), []

    def long(device):
        began.set()
        go.wait(60)
        done.append("long")

    ahead.compile_ahead("long", HOST, long)
    ahead.compile_ahead("behind", HOST, lambda device: done.append("behind"))
    ahead.compile_ahead("other", HOST, lambda device: done.append("other"))
    began.wait(60)
    ahead.wait("behind")
    ahead.wait("of no such name")
    assert not done
    threading.Timer(0.1, go.set).start()
    ahead.wait("long")
    assert done[0] == "long"
    idle()
    assert done == ["long", "other"]


def test_nothing_is_compiled_while_a_graph_is_captured():
    done = []
    for number in range(3):
        ahead.compile_ahead(f"k{number}", HOST, lambda device: done.append(1))
    ahead.wait_for_all()
    before = len(done)
    idle()
    assert len(done) == before


def test_on_other_devices_nothing_compiles(monkeypatch):
    monkeypatch.setattr(ahead, "DEVICES", ("cuda",))
    ahead.compile_ahead("k", HOST, lambda device: None)
    assert not ahead._asked
    assert not ahead._running


def test_a_failure_is_left_to_who_needs_the_kernel():
    def fails(device):
        raise RuntimeError("no compiler")

    ahead.compile_ahead("k", HOST, fails)
    idle()
    ahead.wait("k")  # nothing raised


def test_an_op_waits_for_its_kernel(monkeypatch):
    """The op's function for CUDA is called by hand: there is no such device here."""
    order, functions = [], {}

    class Library:
        def define(self, schema, tags):
            """Nothing: the op is there."""

        def impl(self, name, function, key):
            functions[key] = function

    module = SimpleNamespace(dropout_bits=lambda x: order.append("launched"))
    monkeypatch.setattr(kernel_ops, "_library", Library())
    monkeypatch.setattr(kernel_ops.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    kernel_ops.define("dropout_bits(Tensor seeds) -> Tensor", lambda x: x)
    monkeypatch.setattr(kernel_ops, "wait", order.append)
    functions["CUDA"](torch.zeros(1))
    assert order == ["dropout_bits", "launched"]


def test_another_process_compiles_for_a_device_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    process = ahead.Process("cuda", 90, 32)
    group = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    settings = {k: v for k, v in group.items() if k != "params"}
    known = (fused_step.Adam(), settings, True, torch.bfloat16, torch.bfloat16)
    assert process.compile(partial(chunked._on_nothing, (-100, 0.0, 1.0, None)))
    assert process.compile(dropout._on_nothing)
    assert process.compile(partial(fused_step._on_nothing, *known))
    assert not process.compile(partial(chunked._on_nothing, ("no", "such", "arguments")))
    compiled = {path.stem for path in tmp_path.glob("*/*.cubin")}
    assert compiled == {"_adamw", "_advance", "_cross_entropy", "_dropout_bits"}
    process.close()
    assert process.compile(dropout._on_nothing)  # by another one
    process.close()


def test_a_kernel_is_launched_here_though_the_process_fails(monkeypatch):
    """As on a device, which is not here: the launch is all that is left."""
    launched = []

    def fails(*target):
        raise OSError("no more processes")

    monkeypatch.setattr(ahead, "_process", fails)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    ahead._compile(launched.append, torch.device("cuda", 0))
    assert launched == [torch.device("cuda", 0)]


def test_a_process_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(ahead, "SECONDS", 0.1)
    process = ahead.Process("no such backend", 90, 32)
    stopped = process._process
    stopped.send_signal(signal.SIGSTOP)
    assert not process.compile(dropout._on_nothing)
    process.close()
    assert stopped.returncode == -signal.SIGKILL


def test_an_optimizer_expects_each_kernel_that_its_groups_take(asked, monkeypatch):
    """As on a device: kernels do not run on the CPU, so what is asked for is looked at."""
    monkeypatch.setattr(fused_step.FusedStep, "why_never", lambda self, p, group: None)
    weight = SimpleNamespace(device=torch.device("cuda", 0))
    groups = [{"params": [weight]}, {"params": []}]
    step = fused_step.FusedStep(fused_step.Adam(), lambda p: None, None, None, print)
    pairs = [(torch.bfloat16, torch.bfloat16), (torch.float32, None)]
    step.compile_ahead(SimpleNamespace(param_groups=groups), pairs)
    assert [(kernel, kind) for kernel, kind, *_ in asked] == [
        ((fused_step.Adam, torch.bfloat16, torch.bfloat16), "cuda"),
        ((fused_step.Adam, torch.float32, None), "cuda"),
    ]  # fmt: skip


def test_a_step_waits_for_the_kernel_that_it_launches(monkeypatch):
    monkeypatch.setattr(fused_step, "DEVICES", ("cpu",))
    waited = []
    monkeypatch.setattr(fused_step, "wait", waited.append)
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    step = fused_step.FusedStep(fused_step.Sgd(), lambda p: None, None, None, print)
    taken, _ = step.divide(optimizer)
    step.run(optimizer, taken)
    assert waited == [fused_step._kernel(step.algorithm, torch.float32, None)]


def test_the_early_launch_of_an_optimizers_kernel_changes_nothing():
    """The interpreter runs it: a row that takes no part."""
    for kind, algorithm in (
        (torch.optim.AdamW, fused_step.Adam),
        (torch.optim.SGD, fused_step.Sgd),
    ):
        optimizer = kind([torch.nn.Parameter(torch.ones(3))], lr=0.1)
        dtypes = (torch.bfloat16, torch.bfloat16)
        fused_step._on_nothing(algorithm(), optimizer.param_groups[0], True, *dtypes, HOST)
        assert torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(3))
        assert not optimizer.state
