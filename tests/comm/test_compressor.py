"""The compressor on one rank: what its codecs leave behind, when it counts, and what names mean."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from magi_train.comm.codecs.compressor import Compressor
from magi_train.comm.codecs.exact import ExactBuckets
from magi_train.comm.plan import plan_buckets
from magi_train.core.config import CommConfig
from magi_train.core.errors import MagiError
from magi_train.core.world import World
from tests.close import tolerance

ON, OFF = (True, "torch.bfloat16"), (False, "")
CPU = torch.device("cpu")
SHAPES = {"matrix": (64, 24), "vector": (64,)}


def plan_for(compression):
    named = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
    return plan_buckets(named, CommConfig(compression=compression, bucket_mib=1, low_rank=2), 1)


@pytest.fixture
def world():
    """Return the World of a process group of this process alone, so that lanes run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World()
    dist.destroy_process_group()


class Ranks:
    """Stands for a World of some ranks; nothing is sent."""

    backend, rank = "some", 0

    def __init__(self, size, nccl=False):
        self.size, self._nccl = size, nccl

    def uses_nccl(self, device):
        return self._nccl


def of(compressor, name):
    """Return the place of a parameter's bucket, and its slot."""
    return next(
        (i, s) for i, b in enumerate(compressor.plan.buckets) for s in b.slots if s.name == name
    )


def exchange(compressor, seed=0, scale=1.0, bad="", **how):
    """Exchange one step's gradients; return what was given and what came, by parameter."""
    given, got, handles = {}, {}, []
    for index, bucket in enumerate(compressor.plan.buckets):
        flat = torch.zeros(bucket.numel)
        generator = torch.Generator().manual_seed(seed)
        for slot in bucket.slots:
            value = torch.randn(slot.shape, generator=generator) * scale
            if slot.name == bad:
                value[0] = torch.inf
            slot.view(flat).copy_(value * compressor.factor(index, OFF))
            given[slot.name] = value
        names = {s.name for s in bucket.slots}
        handles.append((compressor.start(index, flat, names, scale, OFF, **how), bucket, flat))
    for handle, bucket, flat in handles:
        handle.wait()
        assert handle.arrived()
        got |= {s.name: s.view(flat).clone() for s in bucket.slots}
    compressor.settle()
    return given, got


@pytest.mark.parametrize("codec", ["int8", "fp8", "powersgd"])
def test_the_state_is_what_was_not_sent_without_the_loss_scale(codec, world):
    compressor = Compressor(plan_for(codec), world, CPU)
    assert compressor.stateful
    given, got = exchange(compressor, scale=8.0)
    assert torch.equal(got["vector"], given["vector"])
    off = (given["matrix"] - got["matrix"]) / 8
    assert off.abs().max() > 0
    state = compressor.state()
    assert state.keys() == {"matrix"}
    room = tolerance(torch.float32) * given["matrix"].abs().max() / 8
    assert (state["matrix"]["residual"] - off).abs().max() < room
    assert ("basis" in state["matrix"]) == (codec == "powersgd")


@pytest.mark.parametrize("codec", ["int8", "powersgd"])
@pytest.mark.parametrize("bad", ["matrix", "vector"])
def test_a_step_with_an_infinity_in_any_bucket_does_not_count(codec, bad, world):
    compressor = Compressor(plan_for(codec), world, CPU)
    exchange(compressor)
    before = compressor.state()["matrix"]
    exchange(compressor, seed=1, bad=bad)
    after = compressor.state()["matrix"]
    assert all(torch.equal(after[kind], before[kind]) for kind in before)
    exchange(compressor, seed=1)
    assert not torch.equal(compressor.state()["matrix"]["residual"], before["residual"])


def test_a_backward_that_is_forgotten_leaves_nothing(world):
    compressor = Compressor(plan_for("int8"), world, CPU)
    exchange(compressor)
    compressor.forget()
    assert compressor.state() == {}


def test_the_step_before_counts_when_the_next_one_starts(world):
    """Its residual is added to what travels next: equal gradients come back otherwise."""
    ours, twin = (Compressor(plan_for("int8"), world, CPU) for _ in range(2))
    _, first = exchange(ours)
    _, second = exchange(ours)
    assert not torch.equal(first["matrix"], second["matrix"])
    exchange(twin)
    twin.forget()
    assert torch.equal(exchange(twin)[1]["matrix"], first["matrix"])


@pytest.mark.parametrize("codec", ["int8", "powersgd"])
def test_state_is_loaded_by_name_and_its_shape_is_checked(codec, world):
    compressor, other = (Compressor(plan_for(codec), world, CPU) for _ in range(2))
    exchange(compressor)
    state = compressor.state()
    exchange(other, seed=1)
    other.load(state | {"gone": {"residual": torch.ones(1)}})
    again = other.state()["matrix"]
    for kind, value in state["matrix"].items():
        assert torch.allclose(again[kind], value, rtol=tolerance(torch.float32), atol=0), kind
    with pytest.raises(ValueError, match=r"of matrix has shape \[3\], the parameter \[64, 24\]"):
        other.load({"matrix": {"residual": torch.ones(3)}})
    other.load({})
    assert not other.state()["matrix"]["residual"].any()


@pytest.mark.parametrize("instead", ["bfloat16", ""])
def test_codecs_that_are_dropped_are_gone_with_what_they_keep(instead, world):
    compressor = Compressor(plan_for("int8"), world, CPU)
    exchange(compressor)
    state = compressor.state()
    compressor.drop(instead)
    assert not compressor.stateful
    given, got = exchange(compressor, seed=1)
    want = given["matrix"].bfloat16().float() if instead else given["matrix"]
    assert torch.equal(got["matrix"], want)
    assert compressor.state() == {}
    compressor.load(state)
    assert compressor.state() == {}


def test_what_was_packed_elsewhere_arrives_in_the_bucket(world):
    compressor = Compressor(plan_for(None), world, CPU)
    assert not compressor.stateful
    (bucket,) = compressor.plan.buckets
    flat, packed = torch.zeros(bucket.numel), torch.randn(bucket.numel).bfloat16()
    compressor.start(0, flat, set(), 1.0, OFF, packed).wait()
    assert torch.equal(flat, packed.float())


def test_lanes_are_made_once_and_where_something_is_encoded(world):
    assert Compressor(plan_for(None), world, CPU)._lanes is None
    safe = Compressor(plan_for("safe"), world, CPU)
    assert safe._lanes is None, "as long as nothing is known to be exact"
    exact = ExactBuckets(safe.plan)
    safe.know(exact)
    assert safe._lanes is None
    exact.choose(ON, [[of(safe, "matrix")[0]]])
    safe.know(exact)
    assert safe._lanes is Compressor(plan_for("int8"), world, CPU)._lanes is not None


@pytest.mark.parametrize("part", ["used_flags", "_mean", "_spare"])  # each in a lane of its own
def test_an_error_in_a_lane_is_raised_in_the_caller(part, world, monkeypatch):
    compressor = Compressor(plan_for("int8"), world, CPU)
    index, _ = of(compressor, "matrix")
    numel = compressor.plan.buckets[index].numel

    def start():
        return compressor.start(index, torch.zeros(numel), set(), 1.0, OFF)

    with monkeypatch.context() as patch:
        patch.setattr(compressor.codec(index, "int8"), part, None)
        wait = start if part == "used_flags" else start().wait
        with pytest.raises(TypeError, match="not callable"):
            wait()
    start().wait()


@pytest.mark.parametrize(
    ("size", "nccl", "index", "autocast", "factor", "wire"),
    [
        (4, False, "vector", OFF, 0.25, torch.float32),  # gloo sums
        (4, True, "vector", OFF, 1.0, torch.float32),  # NCCL averages
        (4, False, "matrix", OFF, 0.25, torch.float32),
        (4, False, "matrix", ON, 1.0, torch.float32),  # two shots of halves
        (2, True, "matrix", ON, 1.0, torch.bfloat16),  # one all-reduce of halves
        (3, True, "matrix", ON, 1.0, torch.float32),  # NCCL would round twice
    ],
)
def test_who_divides_and_what_travels(size, nccl, index, autocast, factor, wire):
    compressor = Compressor(plan_for("safe"), Ranks(size, nccl), CPU)
    place = of(compressor, index)[0]
    if compressor.exact.undecided(ON):
        compressor.exact.choose(ON, [[of(compressor, "matrix")[0]]])
    assert compressor.factor(place, autocast) == factor
    assert compressor.wire_dtype(place, autocast) is wire


def test_a_device_needs_nccl_for_codecs_only():
    device = torch.device("cuda")
    with pytest.raises(MagiError, match="needs NCCL for gradients on cuda, got the some backend"):
        Compressor(plan_for("int8"), Ranks(2), device)
    safe = Compressor(plan_for("safe"), Ranks(2), device)
    assert not safe.exact.undecided(ON), "nothing can carry halves"
    assert not Compressor(plan_for("int8"), Ranks(2, nccl=True), device)._lanes


def test_a_plan_of_nothing_has_no_nodes():
    assert not Compressor(plan_buckets([], CommConfig(), 2), Ranks(2), CPU).stateful
