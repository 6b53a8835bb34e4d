"""Does it fit? The estimate without data against a real capture and what its graphs allocate."""

import dataclasses
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magi_train
from magi_train import Config, FusionConfig, MagiError, capture, cli, fits
from magi_train.core import compat
from magi_train.core.hardware import GPUS
from magi_train.fits import Setup, estimate, resized
from magi_train.fits_command import largest_batch, load_build
from magi_train.memory.budget import FitBudget
from tests.memory.tracker import traced_peak
from tests.models import MODELS, GraphBreak, Small, loss_of, tokens

GIB, TOLERANCE = 2**30, 0.05
ON_CPU = Setup(None, config=Config(lowering="aot_eager"))
SCRIPT = """
import torch
from tests.models import Small, tokens

def build():
    return Small(), {"input_ids": tokens(0), "labels": tokens(0)}

def positions():
    return Small(), (tokens(0), tokens(0)), lambda module, batch: module(*batch).sum()

def logits():
    return Small().head, torch.randn(4, 32)

def nothing():
    return Small()

def values():
    return build() if torch.rand(1).item() > 0.5 else build()

def looks():
    def loss(module, batch):
        return module(*batch).sum() * batch[0][0, 0].item()
    return Small(), (tokens(0), tokens(0)), loss

kept = Small()
def early():
    return kept, build()[1]
"""


def small():
    return Small(), {"input_ids": tokens(0), "labels": tokens(0)}


def captured(name, monkeypatch):
    """Return the plan of a real step under a generous budget, and its cut."""
    cuts, call = [], FitBudget.__call__

    def recorded(self, *args, **rest):
        cuts.append(call(self, *args, **rest))
        return cuts[-1]

    monkeypatch.setattr(FitBudget, "__call__", recorded)
    torch._dynamo.reset()
    make, batch = MODELS[name]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    config = Config(tier="graph", lowering="aot_eager", memory_budget_gib=1.0)
    prepared, _ = magi_train.prepare(model, optimizer, config=config)
    magi_train.prepare_step(lambda given: loss_of(prepared(**given)), prepared)(batch(0))
    rows = magi_train.report(prepared).rows
    return next(r.plan for r in rows if r.name == "fit_budget"), cuts[0]


@pytest.mark.parametrize(
    "name",
    [
        "unused_frozen_tied",
        *(
            pytest.param(n, marks=pytest.mark.full)
            for n in ("llama", "bert", "t5", "vit", "resnet")
        ),
    ],
)
def test_the_estimate_is_what_a_capture_plans_and_its_graphs_allocate(name, monkeypatch):
    plan, cut = captured(name, monkeypatch)
    traced, _ = traced_peak(*cut)
    make, batch = MODELS[name]
    found = estimate(lambda: (make(), batch(0)), ON_CPU)
    held = sum(found.resident_gib.values())
    rounding = plan["resident_gib"]["rounding"]
    assert held == pytest.approx(sum(plan["resident_gib"].values()) - rounding)
    assert found.without_gib == pytest.approx(plan["planned_gib"] - rounding, rel=TOLERANCE)
    assert found.without_gib - held == pytest.approx(traced / GIB, rel=TOLERANCE)
    assert found.least_gib < found.without_gib
    assert found.parameters == sum(p.numel() for p in make().parameters())


@pytest.mark.full
def test_a_gpu_its_ranks_and_the_optimizer_are_counted():
    def at(ranks, **config):
        setup = Setup(GPUS["h200"], ranks, Config(**config), torch.bfloat16)
        return estimate(small, setup).resident_gib

    one = at(1)
    four = at(4, shard_optimizer=True, fusion=FusionConfig(weight_shadows=False))
    assert one["workspace"] == 2 * 32 / 1024  # of the thread of the forward, and of the backward
    assert one["optimizer"] == 2 * one["parameters"]
    assert four["optimizer"] == pytest.approx(one["optimizer"] / 4, abs=1e-8)
    assert "buckets" not in one
    assert four["buckets"] >= one["parameters"]
    assert one["shadows"] == pytest.approx(one["parameters"] / 2, rel=0.03)
    assert "shadows" not in four


class Attention(nn.Module):
    """An attention with dropout, whose probabilities no GPU keeps."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 32)).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).square().mean()


def test_attention_with_dropout_is_fused_on_a_gpu():
    def peak(gpu):
        setup = Setup(gpu, config=ON_CPU.config)
        found = estimate(lambda: (Attention(), torch.randn(1, 1024, 32)), setup)
        return (found.without_gib - sum(found.resident_gib.values())) * GIB

    probabilities = 4 * 1024 * 1024
    assert peak(None) > probabilities
    assert peak(GPUS["h200"]) < probabilities


def test_a_budget_cuts_the_logits_into_more_chunks(monkeypatch):
    def build():
        torch.manual_seed(0)
        ids = torch.randint(0, 512, (256,))
        head = nn.Sequential(nn.Embedding(512, 8), nn.Linear(8, 512))
        return head, (ids,), lambda model, batch: F.cross_entropy(model(*batch), batch[0])

    whole = estimate(build, ON_CPU)
    for module in (capture, fits):
        monkeypatch.setattr(module, "BUDGET_CHUNK_MIB", 0.25)
    chunked = estimate(build, ON_CPU)
    assert chunked.without_gib == whole.without_gib
    assert chunked.least_gib < whole.least_gib - 256 * 512 * 4 / 2 / GIB
    given = Setup(None, config=dataclasses.replace(ON_CPU.config, memory_budget_gib=1.0))
    assert estimate(build, given).frontier == chunked.frontier


def test_autocast_as_on_cuda_is_undone():
    x = torch.randn(4, 8, dtype=torch.bfloat16)

    def dtypes():
        with torch.autocast("cpu", torch.bfloat16):
            results = [x.softmax(-1), F.layer_norm(x, (8,)), x.pow(2), x @ x.T, x.float() @ x.T]
            return [r.dtype for r in results]

    half = [torch.bfloat16] * 5
    assert dtypes() == half
    with compat.autocast_as_on_cuda():
        assert dtypes() == [torch.float32] * 3 + half[3:]
    assert dtypes() == half


def test_batches_are_resized_where_they_have_the_batch_size():
    batch = {"x": torch.zeros(4, 3), "scale": torch.zeros(5), "n": 7}
    batch["image"] = torch.zeros(4, 2, 3, 3).to(memory_format=torch.channels_last)
    found = resized(batch, 6)
    assert {n: tuple(t.shape) for n, t in found.items() if n != "n"} == {
        "x": (6, 3), "scale": (5,), "image": (6, 2, 3, 3)
    }  # fmt: skip
    assert found["image"].is_contiguous(memory_format=torch.channels_last)
    assert found["n"] == 7


@pytest.mark.parametrize(
    ("peak", "want"),
    [
        (lambda n: 1 + 0.5 * n, 18),
        (lambda n: 1 + 0.5 * n + (2 if n > 10 else 0), 14),
        (lambda n: 0.001 * n, 10000),
        (lambda n: 11 + n, 0),
        (lambda n: 9.5 + 0.5 * n, 1),
    ],
)
@pytest.mark.parametrize("start", [1, 8, 500])
def test_the_largest_batch_is_found(peak, want, start):
    asked = []

    def counted(n):
        asked.append(n)
        return peak(n)

    assert largest_batch(counted, start, 10.0, most=12) == want
    assert len(set(asked)) == len(asked)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "some_training.py"
    path.write_text(SCRIPT)
    return str(path)


def test_the_command_answers_and_its_status_says_so(script, capsys):
    given = ["explain", "--fits", script, "--gib", "2", "--no-search"]
    given.append("--magi.lowering=aot_eager")
    assert cli.main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    peak = found["estimate"]["without_gib"]
    assert found["fits"] == "without a budget"
    assert found["limit_gib"] == pytest.approx(2 * 0.96 - 1)
    assert found["largest_batch"] is None
    assert cli.main([*given, f"--magi.memory_budget_gib={0.5 * peak}"]) == 1
    text = capsys.readouterr().out
    assert "fits: no" in text
    assert "Small, " in text
    assert "smallest budget" in text


@pytest.mark.full
def test_the_command_searches_the_largest_batch(script, capsys):
    assert cli.main(["explain", "--fits", f"{script}:positions", "--gib", "1.1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    most = found["largest_batch"]
    assert 0 < most <= found["largest_batch_with_budget"]
    build, limit = load_build(f"{script}:positions"), 1.1 * 0.96 - 1
    assert estimate(build, Setup(GPUS["l4"]), most).without_gib <= limit
    assert estimate(build, Setup(GPUS["l4"]), 2 * most).without_gib > limit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.py"], "there is no script none.py"),
        (["SCRIPT:absent"], "has no function 'absent', only build, positions"),
        (["SCRIPT:nothing"], "must return .module, batch.*got Small"),
        (["SCRIPT:logits"], "the loss must be one number, got shape"),
        (["SCRIPT:values"], r"build\(\) failed.*without data, it must not look at values"),
        (["SCRIPT:looks"], r"fails on tensors without data, at .*SCRIPT:\d+: DataDependent"),
        (["SCRIPT:early"], "embedding.weight was made before build"),
        (["SCRIPT", "--gpu", "h2000"], "no GPU 'h2000' is known, only b200, h200"),
        (["SCRIPT", "--magi.engine=fsdp2"], "--fits plans replicas"),
        (["SCRIPT", "--gib", "0.5"], "nothing is left"),
        (["SCRIPT", "--ranks", "0"], "must be 1 or more"),
    ],
)
def test_what_is_of_no_use_is_named(script, capsys, arguments, message):
    given = [a.replace("SCRIPT", script) for a in arguments]
    gpu = [] if {"--gpu", "--gib"} & set(given) else ["--gpu", "h200"]
    assert cli.main(["explain", *gpu, "--no-search", "--fits", *given]) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert re.search(message.replace("SCRIPT", re.escape(script)), error), error


def test_a_step_that_is_not_captured_whole_is_refused():
    batch = {"input_ids": tokens(0), "labels": tokens(0)}
    with pytest.raises(MagiError, match=r"captured whole can be planned: .*graph_break"):
        estimate(lambda: (GraphBreak(), batch | small()[1]), ON_CPU)


@pytest.mark.full
def test_what_the_host_can_hold_is_counted():
    """On a GPU with a link so fast that all copies hide, the least peak is lower, for less time."""

    def at(**config):
        link = dataclasses.replace(GPUS["h200"].speed, flops=1e9, host=1e9)
        gpu = dataclasses.replace(GPUS["h200"], speed=link)
        config = Config(memory_budget_gib=1.0, **config)
        return estimate(deep, Setup(gpu, 1, config, torch.bfloat16))

    def deep():
        layers = [module for _ in range(6) for module in (nn.Linear(256, 256), nn.Tanh())]
        return nn.Sequential(*layers), (torch.randn(8192, 256),), lambda m, x: m(*x).square().mean()

    without, offload = at(), at(offload_activations=True)
    assert offload.without_gib == without.without_gib
    assert offload.least_gib < without.least_gib
    assert offload.least_recompute_ms < without.least_recompute_ms
