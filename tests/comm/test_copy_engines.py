"""Averages through peers' memory: threads for ranks, plain memory for the GPUs'."""

import threading
import time

import pytest
import torch

from magi_train.comm import copy_engines
from magi_train.comm.copy_engines import CopyEngines, PeerAverage
from magi_train.core import compat

HALF = 6 * 1024
"""Bytes of memory for a shot: 512 numbers of float32 for each of three ranks."""


def averaged(ranks, numel, dtype, wide=None, rounds=1, slow=None):
    """Run `rounds` averages on all ranks; return by rank what they were made of and gave."""
    buffers = [torch.full((2 * HALF,), 255, dtype=torch.uint8) for _ in range(ranks)]  # NaNs
    meeting = threading.Barrier(ranks, timeout=30)
    given = [[torch.randn(numel) for _ in range(ranks)] for _ in range(rounds)]
    results = [[] for _ in range(ranks)]
    errors = []

    def rank(r):
        def barrier():
            meeting.wait()
            if r == slow:
                time.sleep(0.02)  # what it reads now must still be there

        average = PeerAverage(buffers, r, barrier)
        try:
            for each in given:
                packed = each[r].to(dtype)
                flat = packed if wide is None else torch.empty(numel, dtype=wide)
                average.run(packed, flat)
                results[r].append(flat)
        except Exception as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return given, results


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("numel", [1, 63, 64 * 2 + 1, 1536, 1537, 5000])
@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float32, None), (torch.bfloat16, torch.float32)]
)
def test_the_mean_is_rounded_once_and_alike_on_all_ranks(ranks, numel, dtype, wide):
    given, results = averaged(ranks, numel, dtype, wide)
    exact = torch.stack([x.to(dtype).double() for x in given[0]]).mean(0)
    for (flat,) in results:
        assert flat.dtype is (wide or dtype)
        assert torch.equal(flat, results[0][0])
        assert torch.equal(flat, flat.to(dtype).to(flat.dtype)), "nothing finer was ever sent"
    # a sum in float32 of so many, and one rounding; on a CPU torch rounds sum and quotient
    largest = max(x.abs().max().item() for x in given[0])
    error = (results[0][0].double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps * exact.abs() + ranks * 2**-23 * largest).all()
    if ranks == 2:
        assert torch.equal(results[0][0].to(dtype), exact.to(dtype)), "halving is exact"


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_nothing_is_written_over_before_it_was_read(slow):
    given, results = averaged(3, 4000, torch.float32, rounds=2, slow=slow)
    for i, each in enumerate(given):
        for found in results:
            assert torch.allclose(found[i], torch.stack(each).mean(0), rtol=1e-6, atol=1e-6)


def test_memory_of_this_rank_is_held_as_torch_gave_it(monkeypatch):
    given = []

    def empty(*size, **kwargs):
        given.append(torch.empty(*size, **kwargs))
        return given[0]

    class Handle:
        rank, world_size = 1, 2

        def get_buffer(self, rank, sizes, dtype):
            return torch.zeros(sizes, dtype=dtype)

    monkeypatch.setattr("torch.distributed._symmetric_memory.empty", empty)
    monkeypatch.setattr("torch.distributed._symmetric_memory.rendezvous", lambda *_: Handle())
    buffers, _ = compat.peer_memory(64, torch.device("cpu"), 1.0)
    assert buffers[1] is given[0], "a pool gives it to the next caller once nobody holds it"
    assert buffers[0] is not given[0]


class OnItsWay:
    def __init__(self):
        self.ended = False

    def arrived(self):
        return self.ended


class Ranks:
    """Keeps what a watch tells all ranks."""

    rank = 1

    def __init__(self):
        self.told = []

    def fail(self, error):
        self.told.append(str(error))


def test_a_rank_that_does_not_come_is_told_with_the_bucket(monkeypatch, caplog):
    monkeypatch.setattr(copy_engines, "StreamExchange", lambda *_: OnItsWay())
    ranks = Ranks()
    engines = CopyEngines(ranks, None, timeout_seconds=0.5)
    first = engines.start(None, None, "bucket 0 (a .. b)")
    engines.start(None, None, "bucket 1 (c .. d)")
    assert engines.late() == ""
    first.ended = True
    deadline = time.monotonic() + 20
    while not ranks.told and time.monotonic() < deadline:
        time.sleep(0.05)
    (text,) = ranks.told
    assert "rank 1" in text
    assert "bucket 1 (c .. d)" in text
    assert text in caplog.text, "the others may have ended"
