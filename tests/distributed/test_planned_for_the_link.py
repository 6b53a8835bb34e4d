"""Two ranks: one link for both, buckets planned anew while training, trials, equal replicas."""

import copy
import functools
import itertools
import json
from unittest import mock

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import magi_train
from magi_train import CommConfig, Config
from magi_train.comm import link, reducer, schedule
from magi_train.comm.schedule import TIMED, WARM
from magi_train.comm.trial import FORMS, ROUNDS, Trial
from magi_train.comm.trial import WARM as TRIAL_WARM
from magi_train.core.world import World
from tests.close import difference, tolerance
from tests.models import Small, tokens
from tests.ranks import run_ranks, values

CPU = torch.device("cpu")


def gradients(model):
    named = [(n.removeprefix("module."), p.grad) for n, p in model.named_parameters()]
    return {n: None if g is None else g.clone() for n, g in named}


def finds(rank, world_size, folder):
    """Measure, remember, doubt, and meet a broken file on one rank."""
    world, found = World.current(), []
    find = functools.partial(link.find, world, CPU, 60, budget_seconds=0.1)
    places = mock.patch.object(link.compat, "cache_dir", return_value=f"{folder}/{rank}")
    with places, mock.patch.object(link, "STILL_HOLDS", 1e9):
        found += [find(), find()]
        with mock.patch.object(link, "STILL_HOLDS", 0.5):  # nothing can hold
            found.append(find())
        if rank == 1:
            for file in (link.Path(folder) / "1" / "magi_train").iterdir():
                file.write_text(file.read_text()[:-5])
        found.append(find())
        found.append(find(remember=False))
    return found


def test_ranks_have_one_link_and_doubt_the_file(tmp_path, two_ranks):
    first, second = values(two_ranks(finds, str(tmp_path)))
    assert first == second
    sources = [each.source for each in first]
    assert sources == ["measured", "remembered", "measured", "measured", "measured"]
    assert first[0].points == first[1].points
    assert first[0].gap_seconds == first[1].gap_seconds
    assert 0 <= first[0].gap <= first[0].latency_seconds
    assert all(each.latency_seconds > 0 and each.seconds_per_byte > 0 for each in first)


def plans_anew(rank, world_size, tier, compression):
    """Train past the profile with a plan that is always replaced; compare each step with DDP's."""
    torch.manual_seed(0)
    model = Small().train()
    theirs = DistributedDataParallel(copy.deepcopy(model))
    small = mock.patch.object(schedule, "CAPS", (2**12, 2**13, 2**14))
    comm = CommConfig(link="1000us 0.01gbit", compression=compression)
    config = Config(tier=tier, lowering="aot_eager", comm=comm)
    errors, plans = [], []
    with small, mock.patch.object(reducer, "LEAST_GAIN", -1e9):
        ours = magi_train.prepare(model, config=config)
        for step in range(WARM + TIMED + 2):
            for each in (ours, theirs):
                each.zero_grad()
                each(tokens(10 * step + rank), tokens(1)).backward()
            errors.append(difference(gradients(ours), gradients(theirs)))
            plans.append(ours._magi_runtime.reducer.plan)
    report = magi_train.report(ours)
    rows = [row.plan["backward"] for row in report.rows if row.name == "communication_plan"]
    order = [s.name for b in plans[-1].buckets for s in b.slots]
    residuals = {n: s["residual"] for n, s in magi_train.compression_state(ours).items()}
    changed = [i for i, (a, b) in enumerate(itertools.pairwise(plans)) if a is not b]
    return errors, changed, rows, order, residuals, gradients(ours), report.measured


@pytest.mark.parametrize(("tier", "compression"), [("eager", None), ("eager", "int8")])
def test_hooks_get_buckets_for_the_gradients_that_were_seen(tier, compression, two_ranks):
    first, second = values(two_ranks(plans_anew, tier, compression))
    errors, changed, rows, order, residuals, grads, measured = first
    assert changed == [WARM + TIMED - 2], "once, between the last step watched and the next"
    assert rows == ["assumed", "measured"]
    assert order == second[3]
    assert sorted(order) == sorted(grads)
    assert order[0].startswith("head")
    assert all(torch.equal(g, second[5][n]) for n, g in grads.items())
    # int8: a rounding is at most 1/254 of a block's largest element, in two shots, of this step and
    # the one before; a rank's largest element may be some times that of the mean
    limit = tolerance(torch.float32, 64) if compression is None else 3 * 4 / 254
    assert max(errors) <= limit
    assert (compression is None) == (not residuals)
    assert {"exposed_communication_ms", "synchronised_step_ms"} <= measured.keys()


def test_a_captured_graph_keeps_its_plan(two_ranks):
    for errors, changed, rows, *_ in values(two_ranks(plans_anew, "graph", None)):
        assert not changed
        assert rows == ["assumed"]
        assert max(errors) <= tolerance(torch.float32, 64)


def tries(rank, world_size, costs, trial):
    """Train through a trial in which a step of each form costs what `costs` says."""
    torch.manual_seed(0)
    model = Small().train()
    theirs = DistributedDataParallel(copy.deepcopy(model))
    comm = CommConfig(compression="balanced", bucket_mib=0.005, trial=trial)
    ours = magi_train.prepare(model, config=Config(tier="eager", comm=comm))
    owner, now, errors = ours._magi_runtime.reducer, [0.0], []
    if trial:
        owner._trial = Trial(lambda: now[0])
    for step in range(TRIAL_WARM + ROUNDS * len(FORMS) + 3):
        now[0] += costs[owner._trial.form] if trial else 0.0
        for each in (ours, theirs):
            each.zero_grad()
            each(tokens(10 * step + rank), tokens(1)).backward()
        errors.append(difference(gradients(ours), gradients(theirs)))
    rows = [r.plan for r in magi_train.report(ours).rows if r.name == "codec_trial"]
    trained = gradients(ours)
    kept = [len(magi_train.compression_state(ours))]
    held = sum(len(storages) for storages in owner.compressor._memory._kept.values())
    magi_train.load_compression_state(ours, {"a.weight": {"residual": torch.ones(32, 32)}})
    kept.append(len(magi_train.compression_state(ours)))
    ours.b.requires_grad_(False)  # another plan
    ours(tokens(rank), tokens(1)).backward()
    kept.append(len(magi_train.compression_state(ours)))
    return errors, rows, trained, kept, held


@pytest.mark.parametrize(
    ("none", "codec", "chosen"), [(1.0, 0.99, "none"), (1.0, 0.9, "int8"), (0.0, 0.0, None)]
)
def test_a_level_stays_on_only_where_it_gains(none, codec, chosen, two_ranks):
    costs = {"none": none, "bfloat16": 2.0, "codec": codec}
    first, second = values(two_ranks(tries, costs, chosen is not None))
    errors, rows, grads, kept, held = first
    assert all(torch.equal(g, second[2][n]) for n, g in grads.items())
    assert all(bool(k) == (chosen != "none") for k in kept), "a dropped codec keeps nothing"
    assert bool(held) == (chosen != "none"), "nor does the memory that it had"
    exact = [error <= tolerance(torch.float32, 64) for error in errors]
    turns = [form == "none" for form in FORMS] * ROUNDS
    if chosen is None:
        assert not rows
        assert not any(exact)
        return
    assert [row["chosen"] for row in rows] == [chosen]
    # turns begin one step after the warm-up's last end
    want = [False] * TRIAL_WARM + turns + [chosen == "none"] * 3
    assert exact == want


def drifts(rank, world_size, every):
    torch.manual_seed(0)
    config = Config(tier="eager", comm=CommConfig(check_replicas=every))
    model = magi_train.prepare(Small(), config=config)
    for step in range(4):
        if step == 2 and rank == 1:
            with torch.no_grad():
                model.a.weight.view(torch.int32)[3, 5] ^= 1  # the last bit of one element
                model.b.bias += 1
        model(tokens(rank), tokens(1)).backward()


@pytest.mark.full
@pytest.mark.parametrize("every", [1, 2])
def test_replicas_that_differ_are_told_by_name(every):
    for outcome in run_ranks(drifts, every):
        assert "ReplicaMismatchError: a.weight is not the same on all ranks" in outcome.error
        assert "ranks [1] differ from rank 0, and so do 1 parameters after it" in outcome.error


def test_and_not_without_being_asked(two_ranks):
    values(two_ranks(drifts, None))
    values(two_ranks(drifts, 5))


def trained(model, rank, steps):
    for step in range(steps):
        model(tokens(10 * step + rank), tokens(1)).backward()
        model.zero_grad()


def saves(rank, world_size, folder, compression):
    torch.manual_seed(0)
    comm = CommConfig(compression=compression, bucket_mib=0.005)
    model = magi_train.prepare(Small(), config=Config(tier="eager", comm=comm))
    trained(model, rank, 2)
    state = magi_train.compression_state(model)
    if rank == 0:
        torch.save(state, f"{folder}/state.pt")
    return state


def loads(rank, world_size, folder, compression):
    torch.manual_seed(0)
    comm = CommConfig(compression=compression, bucket_mib=0.02)
    model = magi_train.prepare(Small(), config=Config(tier="eager", comm=comm))
    magi_train.load_compression_state(model, torch.load(f"{folder}/state.pt"))
    state = magi_train.compression_state(model)
    trained(model, rank, 1)
    return state


@pytest.mark.full
@pytest.mark.parametrize("compression", ["int8", "powersgd"])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
def test_compression_goes_on_with_another_number_of_ranks(compression, before, after, tmp_path):
    folder = str(tmp_path)
    saved = values(run_ranks(saves, folder, compression, world_size=before))[0]
    for state in values(run_ranks(loads, folder, compression, world_size=after)):
        assert state.keys() == saved.keys()
        for name, kept in saved.items():
            for kind, value in kept.items():
                assert value.abs().max() > 0
                off = difference({name: state[name][kind]}, {name: value})
                assert off <= tolerance(torch.float32, before)


def explains(rank, world_size):
    import contextlib
    import io

    from magi_train.cli import main

    said = io.StringIO()
    ended = mock.patch.object(torch.distributed, "destroy_process_group")
    with ended, contextlib.redirect_stdout(said):
        assert main(["explain", "--link", "--json"]) == 0
    return said.getvalue()


@pytest.mark.full
def test_explain_prints_the_link_once():
    first, second = values(run_ranks(explains))
    assert second == ""
    row = json.loads(first)
    assert row["source"] == "measured"
    assert row["gbit_per_second"] > 0
