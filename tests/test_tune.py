"""Gain or go: what is measured, what is dropped, that ranks agree, and that it is remembered."""

import os

import pytest
import torch

import magi_train
from magi_train import Config, tune
from magi_train.core.report import PassRow, Report
from magi_train.core.world import World
from magi_train.tune import TIMED, WARM, Tuner
from tests.models import llama, loss_of, tokens
from tests.ranks import values

STEPS = 1 + 3 * (WARM + TIMED) + 3


class Clock:
    """Time that passes as a table says, by the settings that are running."""

    def __init__(self, milliseconds):
        self.milliseconds, self.now, self.tuner = milliseconds, 0.0, None

    def __call__(self):
        return self.now

    def step(self, settings):
        """Let one step pass."""
        off = [n for n in ("attention", "weight_shadows") if not getattr(settings.fusion, n)]
        self.now += self.milliseconds.get("+".join(off), 1.0) / 1e3


def report_of(*names):
    report = Report()
    for name in names:
        report.add(PassRow(name, "joint", {"found": [1], "left_alone": []}, 0.0))
    return report


TUNED = Config(tune=True)
BOTH = ("canonicalize_attention", "use_weight_shadows")


@pytest.mark.parametrize(
    ("milliseconds", "dropped"),
    [
        ({"": 10.0, "attention": 12.0, "weight_shadows": 9.0}, ["weight_shadows"]),
        ({"": 10.0, "attention": 9.0, "weight_shadows": 9.0}, ["attention", "weight_shadows"]),
        ({"": 10.0, "attention": 9.99, "weight_shadows": 10.0}, []),
    ],
)
def test_a_pass_without_gain_goes(milliseconds, dropped):
    clock, report = Clock(milliseconds), report_of(*BOTH)
    tuner = Tuner(TUNED, World.current(), report, clock)
    seen = []
    for _ in range(STEPS):
        seen.append(tuner.next())
        clock.step(seen[-1])
    assert len(set(seen)) == (3 if len(dropped) < 2 else 4)
    assert tuner.done
    assert seen[-1] == tune.without(TUNED, dropped)
    row = next(row for row in report.rows if row.name == "tune")
    assert row.plan["dropped"] == dropped
    for name, value in milliseconds.items():
        assert row.plan["milliseconds"][f"without {name}" if name else "all"] == value


def test_only_passes_that_did_something_are_tried():
    report = report_of("use_weight_shadows")
    report.add(PassRow("canonicalize_attention", "pre_grad", {"left_alone": [["a", "why"]]}, 0.0))
    clock = Clock({"": 10.0, "weight_shadows": 11.0})
    tuner = Tuner(TUNED, World.current(), report, clock)
    seen = set()
    for _ in range(STEPS):
        seen.add(tuner.next())
        clock.step(tuner.settings)
    assert seen == {TUNED, tune.without(TUNED, ["weight_shadows"])}


def train(rank, world_size, slow, steps=STEPS):
    """Train a toy with tuning; the attention pass costs `slow[rank]` milliseconds."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    clock = Clock({"": 10.0 + slow[rank], "attention": 10.0})
    model = llama(num_hidden_layers=1)
    prepared = magi_train.prepare(model, config=Config(lowering="aot_eager", tune=True))
    region = prepared._magi_region
    region._tuner._clock = clock
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        loss = loss_of(prepared(input_ids=tokens(step + rank), labels=tokens(step)))
        clock.step(region._tuner.settings)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    rows = [r for r in magi_train.report(prepared).rows if r.name == "tune"]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    forms = len({form.settings for form in region._variants})
    return losses, rows[0].plan if rows else None, bool(rows) and rows[0].cached, weights, forms


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("own_cache")
def test_training_is_the_same_and_the_choice_is_remembered():
    plain = train(0, 1, [0.0], steps=0)  # nothing ran, nothing is chosen
    assert plain[1] is None
    losses, plan, cached, weights, forms = train(0, 1, [5.0])
    assert plan["dropped"] == ["attention"]
    assert not cached
    assert forms == 1, "the forms that lost must be forgotten"
    again, plan_again, cached_again, weights_again, _ = train(0, 1, [-5.0])
    assert cached_again
    assert plan_again == plan, "the second process must not measure"
    torch.testing.assert_close(losses, again, rtol=1e-5, atol=0)
    for name, value in weights.items():
        torch.testing.assert_close(value, weights_again[name], rtol=1e-4, atol=1e-6)


def tuned_on_two(rank, world_size, slow, folder):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    return train(rank, world_size, slow)


@pytest.mark.parametrize(("slow", "dropped"), [((5.0, -5.0), ["attention"]), ((-1.0, -2.0), [])])
def test_ranks_agree(slow, dropped, two_ranks, tmp_path):
    first, second = values(two_ranks(tuned_on_two, slow, str(tmp_path), timeout=200))
    assert first[1] == second[1]
    assert first[1]["dropped"] == dropped
    for name, value in first[3].items():
        assert torch.equal(value, second[3][name]), name


def test_the_setting_needs_fusion():
    config = Config(tune=True, fusion=None, lowering="aot_eager")
    prepared = magi_train.prepare(llama(num_hidden_layers=1), config=config)
    loss_of(prepared(input_ids=tokens(0), labels=tokens(0))).backward()
    assert not [r for r in magi_train.report(prepared).rows if r.name == "tune"]
