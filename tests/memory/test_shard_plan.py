"""Which rank keeps which elements: all of them, once, in equal chunks; a small bucket by hand."""

import pytest
import torch

from magi_train.memory import shard_plan
from magi_train.memory.shard_plan import Segment, plan_shards


def parameters(*numels, dtype=torch.float32):
    return [(f"p{i}", torch.empty(n, dtype=dtype, device="meta")) for i, n in enumerate(numels)]


def test_a_small_bucket_by_hand():
    """Parameters start at 0, 16 and 64 of 96 elements; two ranks own 48 each."""
    plan = plan_shards(parameters(3, 40, 17), 2)
    (bucket,) = plan.buckets
    assert (bucket.names, bucket.numels) == (("p0", "p1", "p2"), (3, 40, 17))
    assert (bucket.offsets, bucket.chunk, bucket.dtype) == ((0, 16, 64), 48, "float32")
    assert [bucket.piece(slot, 0) for slot in range(3)] == [(0, 3), (0, 32), (0, 0)]
    assert [bucket.piece(slot, 1) for slot in range(3)] == [(3, 3), (32, 40), (0, 17)]
    assert [plan.owned(rank) for rank in range(2)] == [35, 25]
    assert list(bucket.segments(0, 48)) == [Segment(0, 0, 3, 0), Segment(1, 0, 32, 16)]
    assert list(bucket.segments(48, 96)) == [Segment(1, 32, 8, 0), Segment(2, 0, 17, 16)]
    assert list(bucket.segments(16, 20)) == [Segment(1, 0, 4, 0)]
    assert list(bucket.segments(3, 16)) == [], "between two parameters"
    assert list(bucket.segments(2, 3)) == [Segment(0, 2, 1, 0)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("numels", [(1,), (16, 16, 16), (5, 1000, 7, 3, 0, 64), (15, 17)])
def test_every_element_has_one_owner(world_size, numels):
    plan = plan_shards(parameters(*numels), world_size)
    (bucket,) = plan.buckets
    assert bucket.chunk % 16 == 0
    assert all(offset % 16 == 0 for offset in bucket.offsets)
    for slot, numel in enumerate(numels):
        pieces = [bucket.piece(slot, rank) for rank in range(world_size)]
        assert [i for low, high in pieces for i in range(low, high)] == list(range(numel))
        for rank, (low, high) in enumerate(pieces):
            chunk = bucket.segments(rank * bucket.chunk, (rank + 1) * bucket.chunk)
            mine = [(s.start, s.start + s.length) for s in chunk if s.slot == slot]
            assert mine == ([(low, high)] if low < high else [])
    assert sum(plan.owned(rank) for rank in range(world_size)) == sum(numels)


def test_buckets_are_full_at_a_size_and_of_one_dtype(monkeypatch):
    monkeypatch.setattr(shard_plan, "BUCKET_BYTES", 4096)
    mixed = parameters(512, 500, 12, 1, 2000, 8)
    mixed[1:1] = [("half", torch.empty(8, dtype=torch.bfloat16, device="meta"))]
    plan = plan_shards(mixed, 2)
    # 2048 + 2000 + 48 bytes are one bucket; what is larger than one has its own
    assert [b.names for b in plan.buckets] == [
        ("p0", "p1", "p2"), ("half",), ("p3",), ("p4",), ("p5",),
    ]  # fmt: skip
    assert [b.dtype for b in plan.buckets] == ["float32", "bfloat16", *["float32"] * 3]
    assert plan.world_size == 2
    assert plan_shards([], 2).buckets == ()


def test_what_is_larger_than_a_bucket_is_gathered_in_rounds(monkeypatch):
    monkeypatch.setattr(shard_plan, "BUCKET_BYTES", 1024)
    (bucket,) = plan_shards(parameters(640), 2).buckets
    assert list(bucket.rounds(2, 4)) == [(0, 128), (128, 256), (256, 320)], "1024 bytes of all"
    assert list(bucket.rounds(2, 2)) == [(0, 256), (256, 320)]
    (tiny,) = plan_shards(parameters(40), 2).buckets
    assert list(tiny.rounds(1000, 4)) == [(0, 16), (16, 32)], "at least 16 elements"


def test_without_a_change_a_collective_gathers_128_mib():
    (bucket,) = plan_shards(parameters(2**27), 2).buckets
    assert next(iter(bucket.rounds(2, 4))) == (0, 2**24)
