"""Inference passes: what each leaves of the graph, numbers against float64, and its refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magi_train
from magi_train import ExportConfig
from magi_train.core.errors import ExportError
from tests.close import tolerance
from tests.exporter.nets import Block, Heads
from tests.models import images


def run_export(module, inputs, path, **settings):
    report = magi_train.export(module, inputs, path, config=ExportConfig(**settings))
    targets = [
        str(n.target) for n in torch.export.load(path).graph.nodes if n.op == "call_function"
    ]
    return {row.name: row.plan for row in report.rows}, targets, report


def error_of(path, module, x):
    """Return the relative error of a file against the module in float64."""
    with torch.no_grad():
        wanted = module.eval().double()(x.double())
    module.float()
    got = magi_train.load(path)(x).double()
    return float((got - wanted).norm() / wanted.norm())


def test_batch_norm_and_dropout_are_gone(tmp_path):
    model, path = Block(), tmp_path / "model.pt2"
    _, targets, _ = run_export(model, (images(0),), path)
    assert not any("batch_norm" in t or "dropout" in t for t in targets)
    assert error_of(path, model, images(1)) <= tolerance(torch.float32, 9 * 32)
    off = {"fold_batch_norm": False, "remove_no_ops": False}
    plans, targets, _ = run_export(model, (images(0),), path, **off)
    assert sum("batch_norm" in t for t in targets) == 2
    assert sum("dropout" in t for t in targets) == 1
    assert not plans.keys() & off.keys()


@pytest.mark.parametrize("kind", ["conv1d", "linear", "shared", "training"])
def test_batch_norm_behind_other_ops(tmp_path, kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv = nn.Linear(4, 6, bias=False), nn.Conv1d(4, 6, 1)
            kinds = {"affine": kind != "linear", "track_running_stats": kind != "training"}
            self.norm = nn.BatchNorm1d(6, **kinds)
            for each in (self.norm.running_mean, self.norm.running_var):
                if each is not None:
                    each.uniform_(0.5, 2)

        def forward(self, x):
            y = self.linear(x) if kind == "linear" else self.conv(x)
            return self.norm(y) + y if kind == "shared" else self.norm(y)

    model, path = Net(), tmp_path / "model.pt2"
    x = torch.randn((5, 4) if kind == "linear" else (5, 4, 7))
    plans, _, _ = run_export(model, (x,), path)
    plan = plans["fold_batch_norm"]
    reason = {"shared": "has other users", "training": "statistics of the batch"}.get(kind)
    assert bool(plan["folded"]) == (reason is None)
    assert reason is None or reason in plan["left_alone"][0][1]
    assert error_of(path, model, x) <= tolerance(torch.float32, 4)


def test_linears_of_one_input_become_one(tmp_path):
    model, path, x = Heads(), tmp_path / "model.pt2", torch.randn(2, 3, 8)
    plans, targets, _ = run_export(model, (x,), path, merge_linears=True)
    assert [len(group) for group in plans["merge_linears"]["groups"]] == [3]
    assert sum("linear" in t for t in targets) == 1
    got, wanted = magi_train.load(path)(x), model(x)
    for name in ("scores", "values"):
        torch.testing.assert_close(got[name], wanted[name])
    model.k.weight = model.q.weight  # would be kept twice
    plans, targets, _ = run_export(model, (x,), path, merge_linears=True)
    assert "has other users" in plans["merge_linears"]["left_alone"][0][1]


def test_constants_are_computed_once_and_random_ones_stay(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("large", torch.randn(1024, 1))

        def forward(self, x):
            noise = torch.zeros(4).normal_()
            grown = (self.large @ self.large.T).sum() * 0
            return x @ (self.weight.T.exp() + 1) + noise * 0 + grown

    path, x = tmp_path / "model.pt2", torch.randn(2, 4)
    model = Net()
    plans, targets, _ = run_export(model, (x,), path)
    assert plans["fold_constants"]["nodes"]
    assert not any("exp" in t for t in targets)
    assert any("normal" in t for t in targets)
    torch.testing.assert_close(magi_train.load(path)(x), model(x))


def test_a_constant_that_would_grow_stays(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("column", torch.ones(1024, 1))

        def forward(self, x):
            return x + self.column * self.column.T

    plans, targets, _ = run_export(Net(), (torch.ones(1024, 1024),), tmp_path / "model.pt2")
    assert "4 MiB" in plans["fold_constants"]["left_alone"][0][1]
    assert any("mul" in t for t in targets)


def test_channels_last_where_it_gains_and_can(tmp_path):
    path = tmp_path / "model.pt2"
    plans, _, _ = run_export(Block(), (images(0),), path)
    assert len(plans["channels_last"]["nodes"]) == 2
    weights = [t for t in torch.export.load(path).state_dict.values() if t.dim() == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    plans, _, _ = run_export(Block(8), (images(0),), path)
    assert "fewer than 16 channels" in plans["channels_last"]["left_alone"][0][1]

    class Viewed(Block):
        def forward(self, x):
            return F.relu(self.second(self.first(x))).view(x.shape[0], -1).sum(1)

    model = Viewed()
    plans, _, _ = run_export(model, (images(0),), path)
    assert "needs the old layout" in plans["channels_last"]["left_alone"][0][1]
    assert error_of(path, model, images(1)) <= tolerance(torch.float32, 32 * 32 * 32)


def test_precision_is_measured_and_can_be_refused(tmp_path):
    model, path = Block(), tmp_path / "model.pt2"
    _, _, report = run_export(model, (images(0),), path, precision="bfloat16")
    loaded = magi_train.load(path)
    assert {t.dtype for t in torch.export.load(path).state_dict.values()} == {torch.bfloat16}
    assert loaded(images(0)).dtype is torch.float32
    assert next(model.parameters()).dtype is torch.float32
    error = report.measured["error_output"]
    assert 1e-4 < error < 0.05
    assert loaded.manifest["measured"]["error_output"] == error
    assert 0 <= report.measured["same_argmax_output"] <= 1
    with pytest.raises(ExportError, match="output moved by"):
        run_export(model, (images(0),), path, precision="bfloat16", max_error=error / 2)
    with pytest.raises(ValueError, match="precision must be"):
        ExportConfig(precision="int3")


def test_a_pass_that_breaks_the_numbers_is_caught(tmp_path, monkeypatch):
    from magi_train.fusion import convolutions

    real = convolutions._new_weights
    monkeypatch.setattr(convolutions, "_new_weights", lambda *a: [t * 1.01 for t in real(*a)])
    with pytest.raises(ExportError, match="turn passes off one by one"):
        run_export(Block(), (images(0),), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
