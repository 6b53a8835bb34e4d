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


@pytest.fixture
def asked(monkeypatch):
    """What is asked for, by kernel, device and variant; nothing is launched."""
    calls = []

    def note(kernel, device, launch, variant=None):
        calls.append((kernel, device.type, launch, variant))

    for module in (chunked, dropout, fused_step):
        monkeypatch.setattr(module, "compile_ahead", note)
    return calls


def test_a_kernel_is_launched_once_in_another_thread_for_each_variant():
    threads = []
    for variant in (1, 2, 1):
        ahead.compile_ahead(
            "k", HOST, lambda device: threads.append(threading.current_thread()), variant
        )
    ahead.wait("k")
    assert len(threads) == 2
    assert threading.current_thread() not in threads


def test_whoever_needs_a_kernel_waits_for_it_and_for_no_other():
    go, done = threading.Event(), []
    ahead.compile_ahead("first", HOST, lambda device: done.append("first"))
    ahead.compile_ahead("second", HOST, lambda device: (go.wait(60), done.append("second")))
    ahead.wait("first")
    ahead.wait("of another name")
    assert done == ["first"]
    go.set()
    ahead.wait("second")
    assert done == ["first", "second"]


def test_all_are_waited_for_before_a_graph_is_captured():
    done = []
    for number in range(3):
        ahead.compile_ahead(f"k{number}", HOST, lambda device: done.append(1))
    ahead.wait_for_all()
    assert len(done) == 3


def test_a_failure_is_left_to_who_needs_the_kernel():
    def fails(device):
        raise RuntimeError("no compiler")

    ahead.compile_ahead("k", HOST, fails)
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
    ahead.compile_ahead("dropout_bits", HOST, lambda device: order.append("compiled"))
    monkeypatch.setattr(kernel_ops, "wait", lambda name: (order.append(name), ahead.wait(name)))
    functions["CUDA"](torch.zeros(1))
    assert sorted(order[:2]) == ["compiled", "dropout_bits"]
    assert order[2] == "launched"


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
    assert [(kernel, kind, variant[1:]) for kernel, kind, _, variant in asked] == [
        ("Adam", "cuda", pair) for pair in pairs
    ]


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
