"""Ranks that disagree or fail: every rank ends with an error that names rank and cause, in time."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import magi_train
from magi_train import CommConfig, Config
from magi_train.core import world
from tests.models import GraphBreak, Small, tokens
from tests.ranks import free_port, run_ranks, values

SECONDS = 30


def hasty(rank, world_size, fn, *args):
    """Run `fn` with shorter waits than a job of hours has: in a process of its own."""
    world.SILENCE_SECONDS, world.GRACE_SECONDS, world.MEET_SECONDS = 5.0, 2.0, 1.0
    return fn(rank, world_size, *args)


def different_config(rank, world_size):
    comm = CommConfig(compression=None if rank == 0 else "bfloat16")
    magi_train.prepare(Small(), config=Config(comm=comm))


def test_a_different_config_names_rank_and_setting():
    for outcome in run_ranks(different_config):
        assert outcome.error.startswith("PlanMismatchError")
        assert "rank 1: comm.compression is 'bfloat16', not None" in outcome.error


def different_model(rank, world_size):
    model = Small()
    if rank == 1:
        model.head = torch.nn.Linear(32, 95, bias=False)
    magi_train.prepare(model)


def test_a_different_model_names_the_parameter():
    for outcome in run_ranks(different_model):
        assert outcome.error.startswith("PlanMismatchError")
        assert "parameters.head.weight" in outcome.error


def different_program(rank, world_size):
    model = magi_train.prepare(Small(), config=Config(lowering="aot_eager"))
    if rank == 0:
        magi_train.prepare(Small())
    else:
        model(tokens(0), tokens(1)).backward()


def test_ranks_at_different_places_say_so():
    errors = [o.error for o in run_ranks(different_program)]
    assert any(
        "PlanMismatchError" in e and "every rank must run the same program" in e for e in errors
    )
    assert all(errors)


def one_cannot_capture(rank, world_size, tier):
    torch.manual_seed(0)
    model = magi_train.prepare(
        Small() if rank == 0 else GraphBreak(), config=Config(tier=tier, lowering="aot_eager")
    )
    model(tokens(rank), tokens(1)).backward()
    report = magi_train.report(model)
    return report.tier, report.reason, model.head.weight.grad.clone()


def test_one_rank_that_cannot_capture_takes_all_to_region():
    outcomes = run_ranks(one_cannot_capture, "auto")
    (tier0, why0, grad0), (tier1, why1, grad1) = (o.value for o in outcomes)
    assert tier0 == tier1 == "region"
    assert "on rank 1" in why0
    assert "graph_break()" in why0
    assert why0 == why1
    assert torch.equal(grad0, grad1)


def test_and_is_an_error_where_graph_is_forced():
    for outcome in run_ranks(one_cannot_capture, "graph"):
        assert outcome.error.startswith("CaptureError")
        assert "on rank 1" in outcome.error


def raises_in_step_three(rank, world_size, tier, compression):
    comm = CommConfig(compression=compression)
    model = magi_train.prepare(Small(), config=Config(tier=tier, lowering="aot_eager", comm=comm))
    for step in range(6):
        if rank == 1 and step == 2:
            error = ValueError("the data of rank 1 is broken")
            model._magi_runtime.world.fail(error)  # as the except hook of a script does
            raise error
        model(tokens(step), tokens(1)).backward()
        model.zero_grad()


@pytest.mark.parametrize(("tier", "compression"), [("graph", None), ("eager", "int8")])
def test_a_rank_that_raises_ends_the_other(tier, compression):
    first, second = run_ranks(raises_in_step_three, tier, compression)
    assert "the data of rank 1 is broken" in second.error
    assert first.error.startswith("RemoteRankError: rank 1 failed: ValueError: the data of rank 1")
    assert abs(first.ended_at - second.ended_at) < SECONDS


def raises_inside_the_model(rank, world_size):
    model = magi_train.prepare(Small(), config=Config(tier="eager"))
    for step in range(4):
        ids = tokens(step) if rank == 0 or step < 2 else tokens(step) + 1000
        model(ids, tokens(1)).backward()


def test_an_error_inside_the_model_reaches_the_other_rank():
    first, second = run_ranks(raises_inside_the_model)
    assert second.error.startswith("IndexError")
    assert "rank 1 failed: IndexError" in first.error


def stops_early(rank, world_size):
    model = magi_train.prepare(Small(), config=Config(tier="eager"))
    for step in range(3 if rank == 0 else 2):
        model(tokens(step), tokens(1)).backward()
    if rank == 1:
        model._magi_runtime.world.close()  # as at the end of a script
        time.sleep(4)  # the process lives on: only its training has ended


def test_a_rank_that_ends_early_is_named():
    first = run_ranks(hasty, stops_early)[0]
    assert "RemoteRankError: ranks [1] ended their program while rank 0 still waits" in first.error
    assert "bucket 0 (" in first.error


def killed(rank, world_size):
    model = magi_train.prepare(Small(), config=Config(tier="eager"))
    for step in range(4):
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        model(tokens(step), tokens(1)).backward()


def test_a_killed_rank_ends_the_other():
    begin = time.monotonic()
    first, second = run_ranks(hasty, killed)
    assert second.exit_code == -signal.SIGKILL
    assert "RemoteRankError" in first.error
    assert time.monotonic() - begin < 60


def stuck_elsewhere(rank, world_size):
    model = magi_train.prepare(Small(), config=Config(tier="eager"))
    if rank == 1:
        error = RuntimeError("rank 1 gives up")
        model._magi_runtime.world.fail(error)
        time.sleep(6)
        raise error
    torch.distributed.barrier()  # no code of ours is waiting here


def test_a_rank_that_is_stuck_in_a_foreign_call_is_ended():
    first, _ = run_ranks(hasty, stuck_elsewhere)
    assert first.exit_code == 1
    assert "magi-train: rank 0 is ended because it is stuck and rank 1 failed" in first.error
    assert "rank 1 gives up" in first.error


def slow_compile(rank, world_size):
    """One rank compiles much longer than a heartbeat may be silent."""
    model = magi_train.prepare(Small(), config=Config(lowering="aot_eager", timeout_seconds=60))
    region = model._magi_region
    compile_graph = region.compile_graph

    def slowly(*args, **kwargs):
        if rank == 1:
            time.sleep(world.SILENCE_SECONDS + 4)
        return compile_graph(*args, **kwargs)

    region.compile_graph = slowly
    model(tokens(rank), tokens(1)).backward()
    return magi_train.report(model).tier


def test_a_rank_that_compiles_long_is_waited_for():
    assert [o.value for o in run_ranks(hasty, slow_compile)] == ["graph", "graph"]


def never_asks(rank, world_size):
    if rank == 0:
        magi_train.prepare(Small(), config=Config(timeout_seconds=1))
    time.sleep(3)


def test_a_rank_that_never_prepares_is_named():
    first = run_ranks(hasty, never_asks)[0]
    assert "rank 1 did not answer 'settings' within 1 s" in first.error


def runs_alone(rank, world_size):
    """Rank 0 alone runs a forward that could be trained on, before rank 1 takes a step."""
    world.PATIENCE_SECONDS = 0.5
    said = []
    world.logger.warning = lambda text, *values: said.append(text % values)
    model = magi_train.prepare(Small(), config=Config(lowering="aot_eager"))
    if rank == 1:
        time.sleep(2)
    model(tokens(rank), tokens(1)).backward()
    return [text for text in said if "capture of region" in text]


def test_a_rank_that_waits_says_for_whom():
    (said, nothing) = values(run_ranks(runs_alone))
    assert nothing == []
    assert len(said) == 1
    assert "rank 0 has waited" in said[0]
    assert "for rank 1 at 'capture of region 0'" in said[0]
    assert "torch.no_grad()" in said[0]


def fails_to_compile(rank, world_size):
    model = magi_train.prepare(Small(), config=Config(lowering="aot_eager"))
    region = model._magi_region
    if rank == 1:
        region.compile_graph = lambda *_, **__: 1 / 0
    model(tokens(rank), tokens(1)).backward()
    report = magi_train.report(model)
    return report.tier, report.reason, model.head.weight.grad.clone()


def test_a_compiler_that_fails_on_one_rank_takes_all_to_eager():
    (tier0, why0, grad0), (tier1, _, grad1) = (o.value for o in run_ranks(fails_to_compile))
    assert tier0 == tier1 == "eager"
    assert "on rank 1, compilation failed: division by zero" in why0
    assert torch.equal(grad0, grad1)


class PlannedError(Exception):
    pass


def planned_failure(_):
    raise PlannedError


def catches_in_step_three(rank, world_size, broken, compression=None, bucket_mib=0.001):
    """`broken` names, for each rank, the parameter whose gradient is an error once, "" for none."""
    torch.manual_seed(0)
    comm = CommConfig(compression=compression, bucket_mib=bucket_mib)
    model = magi_train.prepare(Small(), config=Config(tier="eager", comm=comm, timeout_seconds=20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parameters = dict(model.named_parameters())
    for step in range(6):
        hook = None
        if step == 2 and broken[rank]:
            hook = parameters[broken[rank]].register_post_accumulate_grad_hook(planned_failure)
        try:
            model(tokens(2 * step + rank), tokens(1)).backward()
            optimizer.step()
        except PlannedError:
            hook.remove()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in parameters.items()}


def skips_step_three(rank, world_size):
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in (0, 1, 3, 4, 5):
        model(tokens(2 * step + rank), tokens(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in model.module.named_parameters()}


def test_an_error_in_the_backward_that_all_ranks_catch_costs_that_step_only(two_ranks):
    want = values(two_ranks(skips_step_three))[0]
    first, second = values(two_ranks(catches_in_step_three, ("a.bias", "a.bias")))
    for name, weight in want.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight)


@pytest.mark.parametrize("compression", [None, "int8"])
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (("", "a.bias"), "the backward of ranks [1] ended with an error that their program caught"),
        (("b.bias", "a.bias"), "at another place on each rank: ranks had sent ["),
    ],
    ids=["on one rank", "at two places"],
)
def test_an_error_in_the_backward_that_ranks_catch_unequally_ends_all(broken, words, compression):
    for outcome in run_ranks(hasty, catches_in_step_three, broken, compression):
        assert words in outcome.error, outcome.error


def test_an_error_before_the_only_bucket_is_no_step_of_other_ranks():
    """Else they would average their gradients with those of the step behind it."""
    broken, words = ("", "a.bias"), "the backward of ranks [1] ended with an error"
    for outcome in run_ranks(hasty, catches_in_step_three, broken, None, 1.0):
        assert words in outcome.error, outcome.error


SCRIPT = """
import torch, torch.distributed as dist
import magi_train
from magi_train import CommConfig, Config
from tests.models import Small, tokens

torch.set_num_threads(1)
comm = CommConfig(compression="int8", bucket_mib=0.001)
model = magi_train.prepare(Small(), config=Config(tier="eager", comm=comm))
for step in range(3):
    model(tokens(0), tokens(1)).backward()
    if dist.get_rank() == 1 and step == 1:
"""


def run_scripts(last_line):
    """Run SCRIPT with one more line, which rank 1 gets to; return exit codes and rank 0's error."""
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"{SCRIPT}        {last_line}"],
            env={**env, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [p.communicate(timeout=120)[1] for p in processes]
    return [p.returncode for p in processes], errors[0]


def test_threads_that_wait_in_gloo_do_not_abort_a_program_that_ends():
    hook = "model.a.bias.register_post_accumulate_grad_hook(lambda _: 1 / 0)"
    codes, error = run_scripts(hook)
    assert "rank 1 failed: ZeroDivisionError" in error, error
    assert codes == [1, 1], error


def test_a_program_that_ends_early_is_named_though_its_connection_breaks():
    codes, error = run_scripts("raise SystemExit")
    assert "RemoteRankError: ranks [1] ended their program while rank 0 still waits" in error, error
    assert codes == [1, 0], error
