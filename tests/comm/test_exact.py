"""Which buckets travel in bfloat16 because it takes nothing from them: seen, and agreed on."""

import pytest
import torch
from torch import nn

from magi_train.comm.codecs.exact import ExactBuckets, is_exact
from magi_train.comm.plan import MIB, plan_buckets
from magi_train.core.config import CommConfig

ON, OFF = (True, "torch.bfloat16"), (False, "")
SHORT = torch.tensor([1.0, 0.0, -2.5])
LONG = torch.tensor([1.0, 0.0, 1 + 2**-10])


def plan(compression="safe"):
    """Return buckets of a matrix each, and one with a vector."""
    shapes = {"a": (8, 8), "vector": (8,), "b": (8, 8), "c": (8, 8)}
    named = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    config = CommConfig(compression=compression, bucket_mib=256 / MIB)
    return plan_buckets(named, config, 2)


@pytest.fixture
def buckets():
    made = ExactBuckets(plan())
    return made, {s.name: i for i, b in enumerate(made._plan.buckets) for s in b.slots}


def test_exact_is_what_bfloat16_holds_and_not_only_zeros():
    assert is_exact(SHORT)
    assert not is_exact(LONG)
    assert not is_exact(torch.zeros(3)), "zeros prove nothing"
    assert is_exact(torch.zeros(3, dtype=torch.bfloat16)), "its dtype does"


def test_a_bucket_is_short_where_all_ranks_say_so(buckets):
    exact, place = buckets
    assert exact.undecided(ON)
    assert not exact.shortens
    for name, gradient in {"a": SHORT, "b": SHORT, "c": LONG}.items():
        exact.see(ON, name, gradient)
    exact.see(ON, "b", LONG)  # a second micro-batch: the first gradient decides
    assert exact.mine(ON) == sorted([place["a"], place["b"]])
    assert exact.codec(ON, place["b"]) == "float32", "before ranks agree"
    assert exact.choose(ON, [exact.mine(ON), [place["b"]]]) == [place["b"]]
    assert [exact.codec(ON, place[name]) for name in "abc"] == ["float32", "bfloat16", "float32"]
    assert exact.codec(OFF, place["b"]) == "float32", "under another state of autocast"
    assert not exact.undecided(ON)
    assert exact.undecided(OFF)
    assert exact.shortens


def test_nothing_seen_is_nothing_exact(buckets):
    exact, place = buckets
    assert exact.mine(ON) == []
    exact.see(ON, "a", SHORT)
    exact.forget(ON)
    assert exact.mine(ON) == []
    exact.see(ON, "a", LONG)
    assert exact.mine(ON) == [], "what is seen after it counts"
    exact.choose(ON, [[], []])
    assert not exact.shortens
    assert exact.codec(ON, place["a"]) == "float32"


def test_without_autocast_only_the_dtype_counts(buckets):
    exact, place = buckets
    exact.see(OFF, "a", SHORT)
    exact.see(OFF, "b", SHORT.bfloat16())
    assert exact.mine(OFF) == [place["b"]]


def test_a_parameter_without_a_gradient_does_not_matter_in_a_bucket_of_several():
    named = [(name, nn.Parameter(torch.zeros(8, 8))) for name in "ab"]
    exact = ExactBuckets(plan_buckets(named, CommConfig(compression="safe", bucket_mib=1), 2))
    exact.see(ON, "a", torch.eye(8).to_sparse())
    assert exact.mine(ON) == [], "nobody looks at sparse ones"
    exact.see(ON, "a", SHORT)
    assert exact.mine(ON) == [0]
    exact.see(ON, "b", LONG)
    assert exact.mine(ON) == []


@pytest.mark.parametrize(("compression", "possible"), [("safe", False), ("int8", True)])
def test_no_bucket_asks_no_question(compression, possible):
    exact = ExactBuckets(plan(compression), possible)
    for name in "abc":
        exact.see(ON, name, SHORT)
    assert not exact.undecided(ON)
    assert exact.mine(ON) == []
    for i, bucket in enumerate(exact._plan.buckets):
        assert exact.codec(ON, i) == (bucket.codec if compression == "int8" else "float32")
