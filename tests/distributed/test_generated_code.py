"""Collectives in Inductor's own output: in plan order, with compute between launch and wait.

And a second process that takes the code from PyTorch's cache: nothing compiled, the same result.
"""

import re

import torch
from torch import nn

import magi_train
from magi_train import CommConfig, Config
from tests.ranks import run_ranks, values


class Deep(nn.Module):
    """Eight layers, so that a backward has compute to hide collectives behind."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])

    def forward(self, x):
        return self.layers(x).square().mean()


def marks(code):
    """Return launches, waits and matrix products in the order of the generated code."""
    calls = r"magi_train\.(bucket_launch|bucket_wait)\.default\((.*)|extern_kernels\.(?:add)?mm\("
    found = []
    for match in re.finditer(calls, code):
        if match.group(1) is None:
            found.append("mm")
            continue
        numbers = re.findall(r"(?<![\w.])\d+(?![\w.])", re.sub(r"\[.*?\]", "", match.group(2)))
        found.append((match.group(1), int(numbers[1])))  # after the reducer's ordinal
    return found


def compiled_backward(rank, world_size):
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    model = magi_train.prepare(Deep(), config=Config(comm=CommConfig(bucket_mib=0.03)))
    x = torch.randn(16, 64)
    with torch._inductor.config.patch(fx_graph_cache=False):
        _, codes = run_and_get_code(lambda: model(x).backward())
    return [m for m in map(marks, codes) if ("bucket_launch", 0) in m]


def test_launch_early_wait_late_in_plan_order(two_ranks):
    for found in values(two_ranks(compiled_backward)):
        assert len(found) == 1, "one backward graph"
        order = found[0]
        launches = [m[1] for m in order if m != "mm" and m[0] == "bucket_launch"]
        waits = [m[1] for m in order if m != "mm" and m[0] == "bucket_wait"]
        assert launches == waits == list(range(len(launches)))
        assert len(launches) > 3
        first_wait = order.index(("bucket_wait", 0))
        assert first_wait > order.index(("bucket_launch", launches[-1])), "a wait before a launch"
        for index in launches[:-2]:  # the last buckets have nothing left to hide behind
            between = order[order.index(("bucket_launch", index)) : first_wait]
            assert between.count("mm") >= 1, f"nothing runs beside bucket {index}: {order}"
        first, last = (
            order.index(("bucket_launch", 0)),
            order.index(("bucket_launch", launches[-1])),
        )
        assert order[first:last].count("mm") >= 6


def cached_run(rank, world_size):
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    config = Config(comm=CommConfig(bucket_mib=0.03))
    model = magi_train.prepare(Deep(), config=config)
    loss = model(torch.randn(16, 64, generator=torch.Generator().manual_seed(rank)))
    loss.backward()
    report = magi_train.report(model)
    return {
        "hits": counters["inductor"]["fxgraph_cache_hit"],
        "misses": counters["inductor"]["fxgraph_cache_miss"],
        "loss": float(loss.detach()),
        "gradients": [p.grad.clone() for p in model.parameters()],
        "rows": [(r.name, r.plan, r.cached) for r in report.rows],
        "tier": report.tier,
    }


def test_a_second_process_hits_the_cache_with_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cold, warm = values(run_ranks(cached_run)), values(run_ranks(cached_run))
    for before, after in zip(cold, warm, strict=True):
        assert after["misses"] == 0
        assert after["hits"] >= 2
        assert after["tier"] == before["tier"] == "graph"
        assert after["loss"] == before["loss"]
        assert all(map(torch.equal, after["gradients"], before["gradients"]))
        rows = [{name: plan for name, plan, _ in run["rows"]} for run in (before, after)]
        assert rows[0] == rows[1]
        assert any(cached for *_, cached in after["rows"])
    other = values(run_ranks(cached_run, world_size=3))
    misses = [r["misses"] for r in other]  # a late rank may take what an early one has compiled
    assert max(misses) >= 1, "another world must not take this code"
