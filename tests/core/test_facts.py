"""Facts about input tensors: what is looked at, what is remembered, and when it ends."""

import collections
import copy
import dataclasses
import gc

import pytest
import torch

import magi_train
from magi_train.core import compat, facts
from magi_train.core.facts import (
    ARGS,
    COUNTING,
    KWARGS,
    NOTHING,
    ONES,
    Assumptions,
    Fact,
    Inputs,
    known,
    recording,
    tensors,
)

PADDED = torch.tensor([[1, 1, 1], [1, 0, 1]])
FAR = "meta"  # a device whose values nobody can look at, on any host


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.bfloat16])
def test_a_mask_on_the_host_is_looked_at(dtype):
    assert known(torch.ones(2, 3, dtype=dtype)) == ONES
    assert known(torch.ones(2, 1, 3, 3, dtype=dtype)) == ONES
    assert known(PADDED.to(dtype)) == NOTHING
    assert known(torch.ones(3, 2, dtype=dtype).t()) == ONES


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_not_looked_at():
    assert known(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])) == NOTHING


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
        torch.ones(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.ones(1, facts.MAX_ELEMENTS + 1, dtype=torch.bool),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}",
)
def test_what_is_no_mask_full_of_ones(tensor):
    assert known(tensor) == NOTHING


def moved(mask, move=lambda m: m.to(FAR)):
    with recording():
        return move(mask)


def test_a_move_is_remembered_until_the_tensor_changes():
    assert known(torch.ones(2, 3).to(FAR)) is None, "nobody looked"
    far = moved(torch.ones(2, 3))
    assert known(far) == ONES
    assert known(moved(PADDED)) == NOTHING
    assert known(far.clone()) is None, "another tensor"
    assert known(copy.copy(far)) is None
    far[0].mul_(0)  # through a view
    assert known(far) is None


def test_a_fact_ends_with_its_tensor():
    before = len(facts._recorded)
    far = moved(torch.ones(2, 3))
    assert len(facts._recorded) == before + 1
    del far
    gc.collect()
    assert len(facts._recorded) == before


def test_only_the_move_itself_is_trusted():
    """What happens to the batch after its move, in a hook for instance, is seen or unknown."""
    assert known(moved(torch.ones(2, 3), lambda m: m.to(FAR).mul_(2))) is None
    assert known(moved(torch.ones(2, 3), lambda m: m.to(FAR) * 0)) is None
    assert known(moved(torch.ones(2, 3), lambda m: m.mul_(0).to(FAR))) == NOTHING
    assert known(moved(torch.ones(2, 3), lambda m: m.to(FAR, torch.bool))) == ONES


def test_to_device_moves_a_batch():
    batch = {"mask": torch.ones(2, 3), "more": [PADDED, (1, "text")], "free": torch.rand(2)}
    got = magi_train.to_device(batch, FAR)
    assert known(got["mask"]) == ONES
    assert known(got["more"][0]) == NOTHING
    assert got["more"][1] == (1, "text")
    assert got["free"].device.type == FAR
    assert batch["mask"].device.type == "cpu"
    back = magi_train.to_device({"x": torch.ones(2, 3)}, "cpu")
    assert back["x"].device.type == "cpu"


def test_to_device_moves_objects_with_to():
    encoding = pytest.importorskip("transformers").BatchEncoding({"m": torch.ones(2, 3)})
    assert known(magi_train.to_device(encoding, FAR)["m"]) == ONES


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


SET_A, SET_AB, NONE = frozenset("a"), frozenset("ab"), frozenset()


def ones(names):
    return frozenset((name, ONES) for name in names)


A, B = Inputs(SET_AB, ones("ab")), Inputs(SET_AB, ones("a"))


def test_a_fact_that_drops_no_mask_makes_no_second_form():
    useless = Assumptions(True)
    useless.learn(A, A.facts, [SET_A], [SET_A])
    assert useless.key(A) == NONE
    # one of two masks made of the same input is gone: the graph relies on the fact
    mixed = Assumptions(True)
    mixed.learn(A, A.facts, [SET_A, SET_A], [SET_A])
    assert mixed.key(A) == ones(SET_A)
    both = Assumptions(True)
    both.learn(A, A.facts, [SET_AB, frozenset({"%weight", "a"})], [frozenset({"%weight", "a"})])
    assert both.key(A) == ones(SET_AB)
    assert both.key(B) == NONE, "half of a mask's inputs proves nothing"


def test_forms_are_bounded():
    many = Assumptions(True)
    masks = [frozenset({str(i)}) for i in range(8)]
    paths = frozenset().union(*masks)
    many.learn(Inputs(paths, NONE), NONE, masks, masks)
    keys = {many.key(Inputs(paths, ones(m))) for m in masks}
    assert NONE in keys
    assert len(keys) == facts.MAX_VARIANTS


def test_nothing_is_looked_at_without_a_mask_that_wants_it(monkeypatch):
    looked = []
    monkeypatch.setattr(facts, "_look", lambda t: looked.append(t) or ONES)
    call = {"ids": PADDED, "mask": torch.ones(2, 3)}
    off = Assumptions(False)
    assert off.look((), call) == Inputs()
    plain = Assumptions(True)
    first = plain.look((), call)
    assert len(looked) == 2
    plain.learn(first, first.facts, [], [])
    plain.look((), call)
    assert len(looked) == 2
    path = f"{KWARGS}['mask']"
    masked = Assumptions(True)
    masked.learn(first, first.facts, [frozenset({path})], [])
    assert masked.look((), call).facts == {(path, ONES)}
    assert len(looked) == 3


def test_an_unknown_mask_is_an_advice():
    assumptions, path = Assumptions(True), f"{KWARGS}['mask']"
    inputs = assumptions.look((), {"mask": torch.ones(2, 3).to(FAR)})
    assert inputs.unknown == {path}
    advice = assumptions.learn(inputs, NONE, [frozenset({path})], [frozenset({path})])
    assert path in advice
    assert "magi_train.to_device" in advice
    looked = assumptions.look((), {"mask": moved(PADDED)})
    assert not assumptions.learn(looked, NONE, [frozenset({path})], [frozenset({path})])


COUNTS = torch.arange(6).expand(2, 6)
PACKED = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_positions(dtype):
    assert known(COUNTS.to(dtype)) == COUNTING
    assert known(PACKED.to(dtype)) == Fact("packed", facts.FEWEST_SEQUENCES)
    assert known(torch.zeros(2, 20, dtype=dtype)) == Fact("packed", 64)
    assert known(torch.zeros(2, facts.MAX_SEQUENCES, dtype=dtype)) == NOTHING, "too many"
    assert known(moved(PACKED.to(dtype))) == Fact("packed", facts.FEWEST_SEQUENCES)


@pytest.mark.parametrize(
    "tensor",
    [
        COUNTS + 1,  # as some models number their rows
        torch.tensor([[0, 1, 2, 4, 5]]),
        torch.tensor([[0, 1, 2, 1, 2]]),  # begins again, but not at 0
        torch.tensor([[1, 1, 0, 1, 2]]),  # left padding, as generation numbers it
        torch.tensor([[0, 1, 2], [1, 2, 3]]),
        torch.tensor([[0, 1, 2, 2]]),
        COUNTS.float(),
        COUNTS[0],
        COUNTS.expand(3, 2, 6),  # several kinds of positions
    ],
    ids=str,
)
def test_what_are_no_positions(tensor):
    assert known(tensor) == NOTHING


def test_positions_written_on_the_device_are_unknown():
    far = moved(PACKED)
    far.add_(1)
    assert known(far) is None


def packed(count):
    return Inputs(SET_A, frozenset({("a", Fact("packed", count))}))


def test_a_form_for_more_sequences_takes_fewer():
    several = Assumptions(True)
    several.learn(packed(64), packed(64).facts, [SET_A], [])
    assert several.key(packed(64)) == packed(64).facts
    assert several.key(packed(16)) == packed(64).facts
    assert several.key(packed(256)) == packed(256).facts
    assert several.key(packed(16)) == packed(64).facts, "the smallest that fits"
    counting = Inputs(SET_A, frozenset({("a", COUNTING)}))
    assert several.key(counting) == counting.facts, "another kind has a form of its own"
    useless = Assumptions(True)
    useless.learn(packed(64), packed(64).facts, [SET_A], [SET_A])
    assert useless.key(packed(64)) == useless.key(packed(256)) == NONE
    assert useless.key(counting) == counting.facts
