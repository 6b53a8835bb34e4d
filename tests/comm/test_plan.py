"""Buckets: complete, in order, aligned, of one dtype, a function of the parameters alone."""

import math

import pytest
import torch
from torch import nn

from magi_train.comm.link import Link
from magi_train.comm.plan import ALIGN_BYTES, MIB, plan_buckets, predict
from magi_train.comm.schedule import Message, exposed
from magi_train.core.config import CommConfig


def parameters(*shapes, dtype=torch.float32):
    return [(f"p{i}", nn.Parameter(torch.zeros(s, dtype=dtype))) for i, s in enumerate(shapes)]


def names(plan):
    return [[s.name for s in b.slots] for b in plan.buckets]


def test_reverse_order_by_size():
    plan = plan_buckets(parameters((64,), (128,), (64,)), CommConfig(bucket_mib=600 / MIB), 2)
    # 256, 512 and 256 bytes; full at 600 and not before: small ones go with a large one
    assert names(plan) == [["p2", "p1"], ["p0"]]
    plan = plan_buckets(parameters(*[(64,)] * 7), CommConfig(bucket_mib=513 / MIB), 2)
    assert names(plan)[0] == ["p6", "p5", "p4"], "a byte is missing after two"


def test_the_last_bucket_is_small():
    plan = plan_buckets(parameters((10, 1), (1000, 1), (1000, 1)), CommConfig(bucket_mib=1), 2)
    assert names(plan) == [["p2", "p1", "p0"]] or names(plan)[-1] == ["p0"]
    many = plan_buckets(parameters(*[(MIB // 16, 1)] * 32), CommConfig(bucket_mib=2), 2)
    sizes = [b.flags_offset * 4 for b in many.buckets]
    assert sizes[-1] <= 2 * MIB / 8 < sizes[0]


def test_a_mebibyte_is_two_to_the_twentieth_bytes():
    # in numbers of this file's own: a constant that changes with the code guards nothing
    quarters = parameters(*[(65536,)] * 16)  # 256 KiB each
    found = names(plan_buckets(quarters, CommConfig(bucket_mib=1), 2))
    assert found[0] == ["p15", "p14", "p13", "p12"]


def test_sizes_without_a_setting_have_bounds():
    def largest(count, elements):
        with torch.device("meta"):
            made = parameters(*[(elements,)] * count)
        return max(b.flags_offset * 4 for b in plan_buckets(made, CommConfig(), 2).buckets)

    assert largest(160, 4 << 20) == 134217728  # of 2.5 GiB in pieces of 16 MiB: 128 MiB
    assert 4 << 20 <= largest(80, 1 << 16) <= 8388608  # of 20 MiB in pieces of 256 KiB
    assert largest(640, 1 << 16) == 10 << 20  # a sixteenth of 160 MiB


@pytest.mark.parametrize("world", [2, 3])
def test_encoded_buckets_are_whole_blocks_on_every_rank(world):
    plan = plan_buckets(
        parameters((64, 64), (31, 64), (64, 64)), CommConfig(compression="int8"), world
    )
    encoded = [b for b in plan.buckets if b.codec == "int8"]
    assert encoded
    for bucket in encoded:
        assert bucket.flags_offset % (256 * world) == 0
        assert all(slot.offset % 256 == 0 for slot in bucket.slots)


def test_slots_are_aligned_and_disjoint():
    plan = plan_buckets(parameters((3,), (5, 7), (1,)), CommConfig(), 2)
    for bucket in plan.buckets:
        end = 0
        for slot in bucket.slots:
            assert slot.offset >= end
            assert slot.offset * 4 % ALIGN_BYTES == 0
            end = slot.offset + math.prod(slot.shape)
        assert bucket.flags_offset >= end
        assert bucket.numel == bucket.flags_offset + len(bucket.slots)
    (bucket,) = plan_buckets(
        parameters((3,), (5, 7), (1,)), CommConfig(compression=None), 2
    ).buckets
    assert [s.offset for s in bucket.slots] == [0, 64, 128], "and no further apart than that"
    assert bucket.flags_offset == 192


def test_one_dtype_a_bucket_and_frozen_left_out():
    mixed = parameters((4,)) + [("half", nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)))]
    mixed[0][1].requires_grad_(False)
    plan = plan_buckets(mixed + parameters((4,))[:1], CommConfig(compression="bfloat16"), 2)
    assert names(plan) == [["p0"], ["half"]]
    assert [b.codec for b in plan.buckets] == ["bfloat16", "bfloat16"]
    assert [b.dtype for b in plan.buckets] == ["float32", "bfloat16"]
    half = parameters(*[(64, 64)] * 3, dtype=torch.bfloat16)
    mixed = [half[0], *parameters((64, 64), (0, 64), (64, 64))[1:], ("p3", half[2][1])]
    plan = plan_buckets(mixed, CommConfig(compression="int8"), 2)
    assert plan.codecs() == {"bfloat16": 2, "float32": 1, "int8": 1}, "others travel as they are"


@pytest.mark.parametrize("change", ["shape", "order", "config", "world"])
def test_the_fingerprint_notices(change):
    base = plan_buckets(parameters((4,), (8,)), CommConfig(), 2).fingerprint()
    shapes = {"shape": ((4,), (9,)), "order": ((8,), (4,))}.get(change, ((4,), (8,)))
    config = CommConfig(compression="bfloat16") if change == "config" else CommConfig()
    world = 4 if change == "world" else 2
    assert plan_buckets(parameters(*shapes), config, world).fingerprint() != base


def test_no_parameters_no_buckets():
    assert plan_buckets([], CommConfig(), 2).buckets == ()


def codecs(compression, *shapes, **options):
    config = CommConfig(compression=compression, **options)
    plan = plan_buckets(parameters(*shapes), config, 2)
    return {s.name: b.codec for b in plan.buckets for s in b.slots}


MODEL = ((64, 8), (64,), (64, 64), (64, 64), (64, 64), (64,), (8, 64))


def test_vectors_and_small_ends_are_exempt():
    found = codecs("balanced", *MODEL)
    assert found == {
        "p0": "bfloat16",
        "p1": "float32",
        "p2": "int8",
        "p3": "int8",
        "p4": "int8",
        "p5": "float32",
        "p6": "bfloat16",
    }


def test_large_ends_are_not():
    found = codecs("int8", (64, 64), *MODEL[1:])
    assert found["p0"] == found["p6"] == "int8"
    assert set(codecs("int8", (8, 4), (24, 24), (4, 8)).values()) == {"int8"}, "a tenth is not less"


def test_low_rank_only_where_factors_are_small():
    found = codecs("aggressive", *MODEL, (9, 40), (8, 64), low_rank=4)
    assert found["p2"] == "powersgd"
    assert found["p7"] == "bfloat16"
    ends = (64, 8), (64, 64), (64, 64)
    assert codecs("aggressive", *ends, (16, 16), (8, 8), low_rank=4)["p3"] == "powersgd", "a half"


def test_factors_are_what_low_rank_sends():
    config = CommConfig(compression="powersgd", bucket_mib=1, low_rank=4)
    plan = plan_buckets(parameters((8, 8), (64, 40), (40, 8, 8), (8, 8)), config, 2)
    half, (low,) = ([b for b in plan.buckets if (b.codec == "powersgd") == low] for low in (0, 1))
    assert low.wire_bytes() == 4 * 4 * (64 + 40 + 40 + 64)
    assert low.rank == 4
    assert {b.rank for b in half} == {0}
    assert plan.codecs() == {"bfloat16": 2, "powersgd": 2}
    assert plan.wire_bytes() == low.wire_bytes() + sum(b.wire_bytes() for b in half)


def test_vectors_share_a_bucket_with_what_is_small_and_last_only_where_nothing_is_encoded():
    shapes = ((8, 8), (8,), (64, 64), (64, 64), (8,))
    config = {"bucket_mib": 64 * 64 * 4 / MIB}
    assert names(plan_buckets(parameters(*shapes), CommConfig(compression=None, **config), 2)) == [
        ["p4", "p3"], ["p2"], ["p1", "p0"],
    ]  # fmt: skip
    encoded = plan_buckets(parameters(*shapes), CommConfig(compression="int8", **config), 2)
    assert ["p4", "p1"] in names(encoded)


def test_without_a_backward_gradients_are_taken_to_appear_evenly_by_bytes():
    config = CommConfig(compression=None, bucket_mib=4 / MIB)
    buckets = plan_buckets(parameters((1,), (3,)), config, 2).buckets
    link = Link(0.1, 1.0, "given")
    want = [Message(b.wire_bytes(), 1, at) for b, at in zip(buckets, (0.75, 1.0), strict=True)]
    assert predict(buckets, link) == exposed(want, link)


def test_exempt_buckets_leave_when_they_are_complete():
    config = CommConfig(compression="int8", bucket_mib=64 * 64 * 4 / MIB)
    plan = plan_buckets(parameters(*MODEL), config, 2)
    last = [min(int(s.name[1:]) for s in b.slots) for b in plan.buckets]
    assert last == sorted(last, reverse=True)
    assert sum(b.codec == "float32" for b in plan.buckets) == 1


@pytest.mark.parametrize(
    ("compression", "world_size", "node_size", "codec"),
    [
        ("hierarchical", 4, 2, "hierarchical"),
        ("hierarchical", 4, 1, "int8"),
        ("hierarchical", 4, 4, "float32"),
        ("balanced", 4, 2, "hierarchical"),
        ("balanced", 4, 4, "int8"),
        ("int8", 4, 2, "int8"),
    ],
)
def test_levels_follow_the_nodes(compression, world_size, node_size, codec):
    config = CommConfig(compression=compression)
    plan = plan_buckets(parameters((64, 64), (64, 64)), config, world_size, node_size=node_size)
    assert set(plan.codecs()) == {codec}
    (bucket,) = plan.buckets
    assert bucket.node_size == (node_size if codec == "hierarchical" else 1)
    assert bucket.collectives() == {"hierarchical": 4, "int8": 2, "float32": 1}[codec]
    if node_size == 1:  # which is what holds where nobody says
        assert plan == plan_buckets(parameters((64, 64), (64, 64)), config, world_size)
    if codec == "hierarchical":
        flat = plan_buckets(parameters((64, 64), (64, 64)), CommConfig(compression="int8"), 4)
        assert plan.wire_bytes() == flat.wire_bytes() // node_size
