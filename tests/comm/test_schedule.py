"""The schedule: the model by hand, sizes that follow the link, gradients' order, and the trial."""

import pytest
import torch
from torch import nn

from magi_train.comm.link import CPU_LAUNCH_SECONDS as LAUNCH_SECONDS
from magi_train.comm.link import Link
from magi_train.comm.plan import MIB, plan_buckets, predict
from magi_train.comm.schedule import (
    CAPS,
    TIMED,
    WARM,
    Message,
    Meter,
    Profile,
    Sizes,
    choose,
    exposed,
)
from magi_train.comm.trial import FORMS, GAIN, ROUNDS, Trial
from magi_train.comm.trial import WARM as TRIAL_WARM
from magi_train.core.config import CommConfig

GBIT = 8e-9


def gbit(rate, latency=3e-4):
    return Link(latency, 8e-9 / rate, "given")


MODEL = [(f"p{i}", nn.Parameter(torch.empty(MIB // 4, device="meta"))) for i in range(32)]


def sizes(plan):
    return [b.flags_offset * 4 for b in plan.buckets]


def test_exposed_by_hand():
    link = Link(1.0, 0.1, "given")
    buckets = [Message(10, 1, 2.0), Message(20, 2, 3.0), Message(5, 1, 20.0)]
    # the first ends at 2 + 1 + 1, the second at 4 + 2 + 2, the third waits for its gradient
    assert exposed(buckets, link, 20.0) == pytest.approx(1.5 + 3 * LAUNCH_SECONDS)
    assert exposed(buckets[:2], link, 9.0) == pytest.approx(2 * LAUNCH_SECONDS)
    # unknown backward: as long as the bytes take, 3 seconds; ready after a half, and all of it
    parts = [Message(10, 1, 0.5), Message(20, 1, 1.0)]
    assert exposed(parts, link) == pytest.approx(1.5 + 2 + 3 - 3 + 2 * LAUNCH_SECONDS)


def test_messages_in_flight_together_cost_gaps():
    link = Link(1.0, 0.1, "measured", gap_seconds=0.25, launch_seconds=0.0)
    buckets = [Message(10, 1, 2.0), Message(20, 2, 3.0), Message(5, 1, 20.0)]
    # sent at 3.25 and 5.75, there at 4 and 7.25; the third has the wire for itself
    assert exposed(buckets, link, 20.0) == pytest.approx(1.5)
    assert exposed(buckets[:2], link, 4.0) == pytest.approx(3.25)
    host = Link(1.0, 0.1, "measured", gap_seconds=0.25, launch_seconds=0.5)
    assert exposed(buckets[:2], host, 4.0) == pytest.approx(3.25 + 2 * 0.5)
    # so buckets may be smaller than where each costs a latency
    late, early = (
        plan_buckets(MODEL, CommConfig(), 2, Link(0.1, GBIT, "measured", gap_seconds=gap))
        for gap in (None, 1e-4)
    )
    assert max(sizes(early)) < max(sizes(late))


def test_sizes_follow_the_latency():
    largest = [
        max(sizes(plan_buckets(MODEL, CommConfig(), 2, gbit(1.0, latency))))
        for latency in (1e-5, 1e-2, 1.0)
    ]
    assert largest == sorted(largest)
    assert largest[0] < largest[-1] == 32 * MIB


def test_no_fixed_size_is_predicted_to_be_better():
    for link in (gbit(1.0), gbit(0.2), gbit(10.0, 5e-5), gbit(1000.0, 2e-5)):
        ours = predict(plan_buckets(MODEL, CommConfig(), 2, link).buckets, link)
        for size in (1, 2, 4, 8, 16, 25, 64):
            fixed = plan_buckets(MODEL, CommConfig(bucket_mib=size), 2, link)
            assert ours <= predict(fixed.buckets, link)


def test_a_size_that_is_set_stays():
    config = CommConfig(bucket_mib=8)
    assert plan_buckets(MODEL, config, 2, gbit(1.0)) == plan_buckets(MODEL, config, 2)


def test_a_backward_longer_than_the_link_needs_only_a_small_end():
    ready = {f"p{i}": 10.0 * (31 - i) for i in range(32)}
    plan = plan_buckets(MODEL, CommConfig(), 2, gbit(1.0), ready)
    assert sizes(plan)[-1] == MIB
    assert predict(plan.buckets, gbit(1.0), ready) < 0.015


def test_gradients_travel_in_the_order_in_which_they_were_seen():
    ready = {"p2": 0.0, "p0": 1.0, "p1": 2.0}
    plan = plan_buckets(MODEL[:4], CommConfig(), 2, gbit(0.01, 1e-6), ready)
    assert [s.name for b in plan.buckets for s in b.slots] == ["p2", "p0", "p1", "p3"]


def test_codecs_count_with_their_bytes_and_messages():
    named = [("a", nn.Parameter(torch.empty(512, 512, device="meta")))]
    link = Link(1.0, 1e-6, "given")
    plain, half = (
        plan_buckets(named, CommConfig(compression=c), 2, link).buckets for c in (None, "bfloat16")
    )
    a_mib = MIB * 1e-6
    assert predict(plain, link, {"a": 0.0}) == pytest.approx(1 + a_mib + LAUNCH_SECONDS)
    assert predict(half, link, {"a": 0.0}) == pytest.approx(2 + a_mib / 2 + LAUNCH_SECONDS)


def test_choose_takes_the_least_and_of_equal_ones_the_largest():
    assert choose(8 * MIB, lambda s: abs(s.cap - MIB)).cap == MIB
    everything = Sizes(first=8 * MIB, cap=8 * MIB, last=0)
    assert choose(8 * MIB, lambda s: 0.0) == everything
    assert (CAPS[0], CAPS[-1]) == (65536, 134217728)
    assert choose(1, lambda s: 0.0).cap == 65536


def test_profile_takes_the_median_after_warming_up():
    now = [0.0]
    profile = Profile(lambda: now[0])
    assert (WARM, TIMED) == (2, 3)
    for backward in range(WARM + TIMED):
        assert not profile.done
        for name, after in (("b", 1.0), ("a", 100.0 if backward in (0, 1, WARM + 1) else 3.0)):
            now[0] = 1000.0 * backward + after
            profile.mark(name)
        profile.end()
        profile.end()  # a backward without gradients is none
    assert profile.done
    assert profile.ready() == {"b": 0.0, "a": 2.0}


def test_meter_counts_waits_and_steps():
    now = [10.0]
    meter = Meter(lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    meter.wait(lambda: wait(1.0))
    assert meter.end() == {"exposed_communication_ms": 1e3}
    wait(4.0)
    meter.wait(lambda: wait(2.0))
    meter.wait(lambda: wait(3.0))
    assert meter.end() == {"exposed_communication_ms": 3e3, "synchronised_step_ms": 9e3}
    for seconds in [100.0] * 20 + [1.0] * 10:
        meter.wait(lambda seconds=seconds: wait(seconds))
        found = meter.end()
    assert found == {"exposed_communication_ms": 50500.0, "synchronised_step_ms": 50500.0}, "of 20"


@pytest.mark.parametrize(
    ("none", "half", "codec", "chosen"),
    [
        (1.0, 1.0, 1.0, "none"),
        (1.0, 1 - GAIN / 2, 1 - GAIN / 2, "none"),
        (1.0, 0.9, 0.9 * (1 - GAIN / 2), "bfloat16"),
        (1.0, 0.9, 0.8, "codec"),
        (1.0, 1.1, 0.9, "codec"),
    ],
)
def test_trial_keeps_the_most_exact_form_unless_another_gains(none, half, codec, chosen):
    costs, now = {"none": none, "bfloat16": half, "codec": codec}, [0.0]
    trial, used = Trial(lambda: now[0]), []
    for _ in range(TRIAL_WARM + ROUNDS * len(FORMS) + 1):
        used.append(trial.form)
        now[0] += costs[trial.form]
        if trial.step():
            break
    assert used[:TRIAL_WARM] == ["codec"] * TRIAL_WARM
    assert {form: used[TRIAL_WARM:].count(form) for form in FORMS} == dict.fromkeys(FORMS, ROUNDS)
    assert trial.medians() == pytest.approx(costs)
    faster = {form: seconds / 2 for form, seconds in costs.items()}
    assert trial.choose([faster, costs, faster]) == costs
    assert (trial.form, trial.done) == (chosen, True)
