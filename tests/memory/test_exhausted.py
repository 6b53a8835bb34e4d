"""An allocation that fails, in a forward, in a backward, and on one of two ranks."""

import sys

import pytest
import torch

import magi_train
from magi_train import Config
from magi_train.memory.exhausted import advice
from tests.models import Small, tokens
from tests.ranks import values

GIB = 2**30
TOO_MUCH = 2**55


class Greedy(torch.autograd.Function):
    """Asks for more than there is, in the forward or in the backward."""

    @staticmethod
    def forward(ctx, x, where):
        if where == "forward":
            torch.empty(TOO_MUCH)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        torch.empty(TOO_MUCH)
        return gradient, None


def trained(**config):
    torch._dynamo.reset()
    return magi_train.prepare(Small(), config=Config(lowering="aot_eager", **config))


def test_a_failed_allocation_of_a_forward_is_explained():
    module = trained()
    module._magi_region._first = lambda *_: Greedy.apply(torch.ones(1), "forward")
    with pytest.raises(RuntimeError, match="can't allocate memory") as error:
        module(tokens(0), tokens(0))
    (note,) = error.value.__notes__
    assert "without a memory budget; set Config(memory_budget_gib=" in note


def test_a_failed_allocation_of_a_backward_names_plan_and_budget(capsys):
    module = trained(memory_budget_gib=1.0)
    loss = Greedy.apply(module(tokens(0), tokens(0)), "backward")
    with pytest.raises(RuntimeError, match="can't allocate memory") as error:
        loss.backward()
    for _ in range(2):
        sys.excepthook(RuntimeError, error.value, None)
    text = capsys.readouterr().err
    assert "under a budget of 1 GiB. Set Config(memory_budget_gib=0.9)" in text
    assert len(error.value.__notes__) == 1
    other = ValueError("something else")
    sys.excepthook(ValueError, other, None)
    assert not hasattr(other, "__notes__")


@pytest.mark.parametrize(
    ("peak", "usable", "budget", "planned", "want"),
    [
        (70, 76, None, 0, ["peak of 70 GiB", "memory_budget_gib=76)"]),
        (78, 76, 74, 73, ["peak of 78 GiB", "planned were 73", "budget of 74", "=69)"]),
        (70, 76, 90, 85, ["planned were 85", "=76)"]),
        (70, 76, 70, 70, ["=63)"]),
        (10, 76, 70, 0, ["before the step was planned"]),
    ],
)
def test_the_budget_to_ask_for(peak, usable, budget, planned, want):
    sizes = [None if x is None else x * GIB for x in (peak, usable, budget)]
    text = advice(*sizes, planned * GIB)
    assert all(part in text for part in want), text


@pytest.mark.parametrize(("held", "named"), [(0, False), (73, False), (74, True)])
def test_segments_that_were_not_full_are_named(held, named):
    text = advice(70 * GIB, 76 * GIB, 74 * GIB, 72 * GIB, held * GIB)
    assert ("4 GiB lie in segments that were not full" in text) == named
    assert ("expandable_segments:True" in text) == named


def one_rank_runs_out(rank, world_size):
    module = trained()
    loss = module(tokens(0), tokens(0))
    try:
        (Greedy.apply(loss, "backward") if rank == 1 else loss).backward()
    except Exception as error:
        sys.excepthook(type(error), error, None)  # as at the end of a script
        return f"{type(error).__name__}: {error}"


@pytest.mark.full
def test_the_other_rank_ends_with_the_same_text(two_ranks):
    first, second = values(two_ranks(one_rank_runs_out))
    assert "can't allocate memory" in second
    assert "RemoteRankError: rank 1 failed" in first
    assert "magi-train: an allocation failed, without a memory budget" in first
