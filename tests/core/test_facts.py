"""Facts about input tensors: what is looked at, what is remembered, and when it ends."""

import collections
import copy
import dataclasses
import gc

import pytest
import torch

import magi_train
from magi_train.core import compat, facts
from magi_train.core.facts import ARGS, KWARGS, Assumptions, Inputs, all_ones, recording, tensors

PADDED = torch.tensor([[1, 1, 1], [1, 0, 1]])
FAR = "meta"  # a device whose values nobody can look at, on any host


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.bfloat16])
def test_a_mask_on_the_host_is_looked_at(dtype):
    assert all_ones(torch.ones(2, 3, dtype=dtype)) is True
    assert all_ones(torch.ones(2, 1, 3, 3, dtype=dtype)) is True
    assert all_ones(PADDED.to(dtype)) is False
    assert all_ones(torch.ones(3, 2, dtype=dtype).t()) is True


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((2, 3), 1.0 + 2**-20),
        torch.full((2, 3), 2),
        torch.ones(6),
        torch.ones(2, 0),
        torch.ones(1, 1, 1, 1, 1),
        torch.ones(2, 3, requires_grad=True),
        torch.nn.Parameter(torch.ones(2, 3), requires_grad=False),
        torch.ones(2, 3).to_sparse(),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.ones(1, facts.MAX_ELEMENTS + 1, dtype=torch.bool),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}",
)
def test_what_is_no_mask_full_of_ones(tensor):
    assert all_ones(tensor) is False


def moved(mask, move=lambda m: m.to(FAR)):
    with recording():
        return move(mask)


def test_a_move_is_remembered_until_the_tensor_changes():
    assert all_ones(torch.ones(2, 3).to(FAR)) is None, "nobody looked"
    far = moved(torch.ones(2, 3))
    assert all_ones(far) is True
    assert all_ones(moved(PADDED)) is False
    assert all_ones(far.clone()) is None, "another tensor"
    assert all_ones(copy.copy(far)) is None
    far[0].mul_(0)  # through a view
    assert all_ones(far) is None


def test_a_fact_ends_with_its_tensor():
    before = len(facts._recorded)
    far = moved(torch.ones(2, 3))
    assert len(facts._recorded) == before + 1
    del far
    gc.collect()
    assert len(facts._recorded) == before


def test_only_the_move_itself_is_trusted():
    """What happens to the batch after its move, in a hook for instance, is seen or unknown."""
    assert all_ones(moved(torch.ones(2, 3), lambda m: m.to(FAR).mul_(2))) is None
    assert all_ones(moved(torch.ones(2, 3), lambda m: m.to(FAR) * 0)) is None
    assert all_ones(moved(torch.ones(2, 3), lambda m: m.mul_(0).to(FAR))) is False
    assert all_ones(moved(torch.ones(2, 3), lambda m: m.to(FAR, torch.bool))) is True


def test_to_device_moves_a_batch():
    batch = {"mask": torch.ones(2, 3), "more": [PADDED, (1, "text")], "free": torch.rand(2)}
    got = magi_train.to_device(batch, FAR)
    assert all_ones(got["mask"]) is True
    assert all_ones(got["more"][0]) is False
    assert got["more"][1] == (1, "text")
    assert got["free"].device.type == FAR
    assert batch["mask"].device.type == "cpu"
    back = magi_train.to_device({"x": torch.ones(2, 3)}, "cpu")
    assert back["x"].device.type == "cpu"


def test_to_device_moves_objects_with_to():
    encoding = pytest.importorskip("transformers").BatchEncoding({"m": torch.ones(2, 3)})
    assert all_ones(magi_train.to_device(encoding, FAR)["m"]) is True


@dataclasses.dataclass
class Batch:
    mask: torch.Tensor
    name: str = ""


Pair = collections.namedtuple("Pair", "x mask")


@pytest.mark.parametrize(
    "batch",
    [
        {"mask": torch.ones(2, 3)},
        {3: [torch.ones(2, 3)]},
        collections.OrderedDict(mask=torch.ones(2, 3)),
        collections.UserDict(mask=torch.ones(2, 3)),
        [0, (torch.ones(2, 3),)],
        Pair(0, torch.ones(2, 3)),
        Batch(torch.ones(2, 3)),
        torch.ones(2, 3),
    ],
    ids=lambda b: type(b).__name__,
)
def test_paths_are_what_dynamo_reads(batch):
    """Positional and by keyword: each tensor of a call is found again among the graph's inputs."""
    seen = []

    def backend(gm, _):
        seen.append({compat.source_name(n) for n in gm.graph.find_nodes(op="placeholder")})
        return gm.forward

    def leaf(x):
        if isinstance(x, torch.Tensor | int):
            return x
        if isinstance(x, Batch | Pair):
            return x.mask
        return leaf(list(x.values())[-1] if hasattr(x, "values") else x[-1])

    def region(*args, **kwargs):
        return leaf(args[0]) + leaf(kwargs["batch"]) * 2

    torch.compile(region, backend=backend, fullgraph=True)(batch, batch=copy.deepcopy(batch))
    paths = {p for p, _ in tensors((batch,), ARGS)} | {
        p for p, _ in tensors({"batch": batch}, KWARGS)
    }
    assert len(paths) == 2
    assert seen == [paths]


def test_a_batch_that_holds_itself_ends():
    batch = [torch.ones(2, 3)]
    batch.append(batch)
    assert len(dict(tensors(batch, ARGS))) <= facts.MAX_DEPTH + 1
    assert len(dict(tensors([torch.ones(1)] * 1000, ARGS))) == facts.MAX_ITEMS


A, B = Inputs(frozenset("ab"), frozenset("ab")), Inputs(frozenset("ab"), frozenset("a"))
SET_A, SET_AB, NONE = frozenset("a"), frozenset("ab"), frozenset()


def test_a_fact_that_drops_no_mask_makes_no_second_form():
    useless = Assumptions(True)
    useless.learn(A, A.ones, [SET_A], [SET_A])
    assert useless.key(A) == NONE
    # one of two masks made of the same input is gone: the graph relies on the fact
    mixed = Assumptions(True)
    mixed.learn(A, A.ones, [SET_A, SET_A], [SET_A])
    assert mixed.key(A) == SET_A
    both = Assumptions(True)
    both.learn(A, A.ones, [SET_AB, frozenset({"%weight", "a"})], [frozenset({"%weight", "a"})])
    assert both.key(A) == SET_AB
    assert both.key(B) == NONE, "half of a mask's inputs proves nothing"


def test_forms_are_bounded():
    many = Assumptions(True)
    masks = [frozenset({str(i)}) for i in range(8)]
    paths = frozenset().union(*masks)
    many.learn(Inputs(paths, NONE), NONE, masks, masks)
    keys = {many.key(Inputs(paths, m)) for m in masks}
    assert NONE in keys
    assert len(keys) == facts.MAX_VARIANTS


def test_nothing_is_looked_at_without_a_mask_that_wants_it(monkeypatch):
    looked = []
    monkeypatch.setattr(facts, "_look", lambda t: looked.append(t) or True)
    call = {"ids": PADDED, "mask": torch.ones(2, 3)}
    off = Assumptions(False)
    assert off.look((), call) == Inputs()
    plain = Assumptions(True)
    first = plain.look((), call)
    assert len(looked) == 2
    plain.learn(first, first.ones, [], [])
    plain.look((), call)
    assert len(looked) == 2
    path = f"{KWARGS}['mask']"
    masked = Assumptions(True)
    masked.learn(first, first.ones, [frozenset({path})], [])
    assert masked.look((), call).ones == {path}
    assert len(looked) == 3


def test_an_unknown_mask_is_an_advice():
    assumptions, path = Assumptions(True), f"{KWARGS}['mask']"
    inputs = assumptions.look((), {"mask": torch.ones(2, 3).to(FAR)})
    assert inputs.unknown == {path}
    advice = assumptions.learn(inputs, NONE, [frozenset({path})], [frozenset({path})])
    assert path in advice
    assert "magi_train.to_device" in advice
    known = assumptions.look((), {"mask": moved(PADDED)})
    assert not assumptions.learn(known, NONE, [frozenset({path})], [frozenset({path})])
