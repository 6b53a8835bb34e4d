"""Kernels that compile ahead: launched once, waited for, and as the late launch will be."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from magi_train.fusion import ahead, dropout, fused_step, kernel_ops, loss

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

    for module in (dropout, fused_step, loss):
        monkeypatch.setattr(module, "compile_ahead", note)
    return calls


def test_a_kernel_is_launched_once_in_another_thread_for_each_variant():
    threads = []
    for variant in (1, 2, 1):
        ahead.compile_ahead("k", HOST, lambda: threads.append(threading.current_thread()), variant)
    ahead.wait("k")
    assert len(threads) == 2
    assert threading.current_thread() not in threads


def test_whoever_needs_a_kernel_waits_for_it_and_for_no_other():
    go, done = threading.Event(), []
    ahead.compile_ahead("first", HOST, lambda: done.append("first"))
    ahead.compile_ahead("second", HOST, lambda: (go.wait(60), done.append("second")))
    ahead.wait("first")
    ahead.wait("of another name")
    assert done == ["first"]
    go.set()
    ahead.wait("second")
    assert done == ["first", "second"]


def test_all_are_waited_for_before_a_graph_is_captured():
    done = []
    for number in range(3):
        ahead.compile_ahead(f"k{number}", HOST, lambda: done.append(1))
    ahead.wait_for_all()
    assert len(done) == 3


def test_a_failure_is_left_to_who_needs_the_kernel():
    def fails():
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
    ahead.compile_ahead("dropout_bits", HOST, lambda: order.append("compiled"))
    monkeypatch.setattr(kernel_ops, "wait", lambda name: (order.append(name), ahead.wait(name)))
    functions["CUDA"](torch.zeros(1))
    assert sorted(order[:2]) == ["compiled", "dropout_bits"]
    assert order[2] == "launched"


def test_a_vocabulary_lets_one_expect_the_kernel_of_the_loss(asked, monkeypatch):
    monkeypatch.setattr(loss, "_runs_on", lambda device_type: True)
    small = nn.Linear(16, loss.VOCABULARY - 1)
    large = nn.Sequential(nn.Linear(4, 4), nn.Linear(2, loss.VOCABULARY, bias=False))
    with torch.autocast("cpu", torch.bfloat16):
        loss.expect_kernel(small)
    loss.expect_kernel(large)  # float32: there is no kernel
    assert not asked
    with torch.autocast("cpu", torch.bfloat16):
        loss.expect_kernel(large)
    loss.expect_kernel(large.bfloat16())
    assert [call[:2] for call in asked] == [("cross_entropy", "cpu")] * 2


def test_without_the_kernel_none_is_expected(asked):
    with torch.autocast("cpu", torch.bfloat16):
        loss.expect_kernel(nn.Linear(2, loss.VOCABULARY))
    assert not asked


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


def test_the_early_launch_of_an_optimizers_kernel_changes_nothing(monkeypatch):
    """The interpreter runs it: a row that takes no part."""
    monkeypatch.setattr(fused_step, "DEVICES", ("cpu",))
    flag = torch.zeros(1, dtype=torch.int32)
    for kind, algorithm in (
        (torch.optim.AdamW, fused_step.Adam),
        (torch.optim.SGD, fused_step.Sgd),
    ):
        optimizer = kind([torch.nn.Parameter(torch.ones(3))], lr=0.1)
        step = fused_step.FusedStep(algorithm(), lambda p: None, None, flag, print)
        step._launch_on_nothing(optimizer.param_groups[0], HOST, torch.bfloat16, torch.bfloat16)
        assert torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(3))
        assert not optimizer.state
    assert not flag
