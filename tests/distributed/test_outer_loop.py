"""The outer loop on two ranks: what it computes, sends, saves, and does when a rank fails."""

import copy
import time

import pytest
import torch

import magi_train
from magi_train import CommConfig, Config
from magi_train.comm.codecs.compressor import Compressor
from tests.close import difference, tolerance
from tests.models import Small, tokens
from tests.ranks import run_ranks, values

LR, OUTER_LR, MOMENTUM, H = 0.1, 0.7, 0.9, 2


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def prepared(compression=None, tier="eager", **outer):
    torch.manual_seed(0)
    given = {"outer_steps": H, "outer_lr": OUTER_LR, "outer_momentum": MOMENTUM} | outer
    comm = CommConfig(compression=compression, bucket_mib=0.005, **given)
    model = magi_train.prepare(Small(), config=Config(tier=tier, lowering="aot_eager", comm=comm))
    return model, torch.optim.SGD(model.parameters(), lr=LR)


def step(model, optimizer, rank, number):
    """Take a step of two micro-batches, which counts as one."""
    quiet = getattr(model, "no_sync", None)
    if quiet is not None:
        with quiet():
            model(tokens(1000 + 10 * number + rank), tokens(1)).backward()
    else:
        model(tokens(1000 + 10 * number + rank), tokens(1)).backward()
    model(tokens(10 * number + rank), tokens(1)).backward()
    optimizer.step()
    optimizer.zero_grad()


def reference(ranks, steps):
    """Return the weights after `steps` steps of all ranks, each simulated here, in float64."""
    torch.manual_seed(0)
    start = Small().double()
    momentum = {n: torch.zeros_like(p) for n, p in start.named_parameters()}
    for begin in range(0, steps, H):
        ways = []
        for rank in range(ranks):
            model = copy.deepcopy(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            for number in range(begin, begin + H):
                step(model, optimizer, rank, number)
            ways.append({n: p.detach() for n, p in model.named_parameters()})
        for n, p in start.named_parameters():
            delta = sum(p.detach() - way[n] for way in ways) / ranks
            momentum[n] = MOMENTUM * momentum[n] + delta
            p.data -= OUTER_LR * (delta + MOMENTUM * momentum[n])
    return weights(start)


def trains(rank, world_size, compression, tier):
    model, optimizer = prepared(compression, tier)
    starts, start = [], Compressor.start

    def counted(self, index, *args):
        starts.append(index)
        return start(self, index, *args)

    Compressor.start = counted
    try:
        for number in range(3 * H):
            step(model, optimizer, rank, number)
            if number == 0:
                alone = weights(model)
        magi_train.exchange_weights(model)
        magi_train.exchange_weights(model)  # nothing after none
    finally:
        Compressor.start = start
    buckets = len(model._magi_runtime.reducer.plan.buckets)
    return weights(model), alone, starts == list(range(buckets)) * 3


@pytest.mark.parametrize(
    ("compression", "tier"), [(None, "eager"), (None, "auto"), ("int8", "eager")]
)
def test_three_rounds(compression, tier, two_ranks):
    first, second = values(two_ranks(trains, compression, tier))
    assert all(torch.equal(w, second[0][n]) for n, w in first[0].items())
    assert any(not torch.equal(w, second[1][n]) for n, w in first[1].items()), "ranks train alone"
    assert first[2], "each bucket travels once a round, and nothing else does"
    want = reference(2, 3 * H)
    # int8: a rounding of 1/254 of a block's largest way, twice a round, and what follows from it
    limit = tolerance(torch.float32, 64 * 3 * H) if compression is None else 0.02
    assert 0 < difference(first[0], {n: w.float() for n, w in want.items()}) <= limit


def saves(rank, world_size, compression, folder):
    """Go on from a state, in the same model and in another one; both must end alike."""
    model, optimizer = prepared(compression)
    for number in range(H + 1):  # the second round has one step
        step(model, optimizer, rank, number)
    state = magi_train.compression_state(model)
    saved = weights(model)
    other, inner = prepared(compression)
    other.load_state_dict(saved)
    magi_train.load_compression_state(other, state)
    again = magi_train.compression_state(other)
    magi_train.load_compression_state(model, state)  # residuals are now means, here as there
    for each, its in ((model, optimizer), (other, inner)):
        for number in range(H):
            step(each, its, rank, number)
        magi_train.exchange_weights(each)
    try:
        magi_train.load_compression_state(other, {"a.bias": {"outer_momentum": torch.zeros(1)}})
        said = ""
    except ValueError as error:
        said = str(error)
    return state, saved, weights(model), weights(other), said, again


@pytest.mark.parametrize("compression", [None, "int8"])
def test_state_goes_on(compression, two_ranks, tmp_path):
    first, second = values(two_ranks(saves, compression, str(tmp_path)))
    state, saved, ours, theirs, said, again = first
    assert all(torch.equal(w, second[1][n]) for n, w in saved.items()), "equal before a checkpoint"
    assert all(kept["outer_momentum"].abs().max() > 0 for kept in state.values())
    for name, kept in state.items():
        assert torch.equal(again[name]["outer_momentum"], kept["outer_momentum"])
    assert ("residual" in state["a.weight"]) == (compression is not None)
    assert all(torch.equal(w, theirs[n]) for n, w in ours.items())
    assert "the outer momentum of a.bias has shape [1], the parameter [32]" in said


def saves_and_rolls_back(rank, world_size, folder):
    model, optimizer = prepared(None, "eager", outer_momentum=0.0)
    step(model, optimizer, rank, 0)
    magi_train.save_checkpoint(folder, model)
    saved, written = weights(model), magi_train.plain_state_dict(folder)
    step(model, optimizer, rank, 1)
    magi_train.exchange_weights(model)
    step(model, optimizer, rank, 2)
    magi_train.load_checkpoint(folder, model)
    magi_train.exchange_weights(model)
    return saved, written, weights(model)


def test_a_checkpoint_in_a_round_is_of_equal_weights(two_ranks, tmp_path):
    """And what is loaded in a round is no way that was trained."""
    for saved, written, after in values(two_ranks(saves_and_rolls_back, str(tmp_path / "saved"))):
        assert all(torch.equal(written[n], w) for n, w in saved.items()), "each rank's"
        assert all(torch.equal(after[n], w) for n, w in saved.items()), "nothing moved"


def diverges(rank, world_size):
    """Rank 1 diverges in the second round; the first and the third are as ever."""
    model, optimizer = prepared("int8")
    at = []
    for number in range(3 * H):
        if number % H == 0:
            magi_train.exchange_weights(model)
            at.append(weights(model))
        if number == H + 1 and rank == 1:
            with torch.no_grad():
                model.a.bias[0] = float("inf")
        step(model, optimizer, rank, number)
    magi_train.exchange_weights(model)
    return [*at, weights(model)], magi_train.report(model).notes


def test_a_round_that_diverged_is_undone(two_ranks):
    (at, notes), other = values(two_ranks(diverges))
    assert all(torch.equal(w, at[1][n]) for n, w in at[2].items()), "back to where it began"
    assert any(not torch.equal(w, at[2][n]) for n, w in at[3].items())
    assert all(w.isfinite().all() for w in at[3].values())
    assert all(torch.equal(w, other[0][3][n]) for n, w in at[3].items())
    assert any("went back to where the round began" in note for note in notes)


def freezes(rank, world_size):
    """A layer is frozen in the middle of a round, and another one thawed later."""
    model, optimizer = prepared()
    model.b.requires_grad_(False)
    for number in range(3):
        step(model, optimizer, rank, number)
    model.a.requires_grad_(False)
    model.b.requires_grad_(True)
    step(model, optimizer, rank, 3)
    magi_train.exchange_weights(model)
    return weights(model)


def test_what_is_frozen_in_a_round_is_exchanged_first(two_ranks):
    first, second = values(two_ranks(freezes))
    assert all(torch.equal(w, second[n]) for n, w in first.items())


def ends_early(rank, world_size):
    model, optimizer = prepared()
    for number in range(H if rank == 1 else H + 1):
        step(model, optimizer, rank, number)
    if rank == 1:
        model._magi_runtime.world.close()  # as at the end of a script
        time.sleep(6)  # the process lives on: only its training has ended


@pytest.mark.full
def test_a_rank_that_ends_early_is_named():
    first, _ = run_ranks(ends_early)
    assert "RemoteRankError" in first.error
    assert "ranks [1] ended their program" in first.error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard_optimizer": True}, "does not go with shard_optimizer=True"),
        ({"memory_budget_gib": 1.0}, "does not go with memory_budget_gib"),
        ({"engine": "fsdp2"}, "does not go with engine='fsdp2'"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(ValueError, match=said):
        Config(comm=CommConfig(outer_steps=10), **options)
    with pytest.raises(ValueError, match="check_replicas compares weights that outer_steps lets"):
        CommConfig(outer_steps=10, check_replicas=5)
    with pytest.raises(ValueError, match="outer_momentum must be at least 0 and less than 1"):
        CommConfig(outer_momentum=1.0)
