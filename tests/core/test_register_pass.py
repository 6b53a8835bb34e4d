"""Passes of other packages: each stage, the report, the caches, and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import magi_train
from magi_train import Stage
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "passes.md").read_text()

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "other-passes"
version = "1"
[tool.setuptools]
py-modules = ["other_passes"]
"""

MORE_STAGES = '''
import os


class Count(FastGelu):
    """Triples the first relu's result (JOINT) or doubles a gradient (BACKWARD): visible effects."""

    def __init__(self, stage, target, factor):
        self.name, self.stage = f"count_{stage}", stage
        self.target, self.factor = target, factor

    def uuid(self):
        return f"count-{self.stage}-{self.factor}"

    def _nodes(self, gm):
        return [n for n in gm.graph.nodes if n.target is self.target]

    def plan(self, gm, context):
        nodes = self._nodes(gm)
        return FastGeluPlan(tuple(n.name for n in nodes[:1])) if nodes else None

    def apply(self, gm, plan, context):
        node = self._nodes(gm)[0]
        with gm.graph.inserting_after(node):
            scaled = gm.graph.call_function(torch.ops.aten.mul.Tensor, (node, self.factor))
        scaled.meta = dict(node.meta)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


aten = torch.ops.aten
register_pass(Count(Stage.JOINT, aten.relu.default, float(os.environ.get("FACTOR", "3"))))
register_pass(Count(Stage.BACKWARD, aten.mm.default, 2.0))
'''

USE = """
import json, sys, torch, magi_train, other_passes
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.ReLU())
x = torch.randn(3, 4)
prepared = magi_train.prepare(model, config=magi_train.Config(lowering=sys.argv[1]))
loss = prepared(x).sum()
loss.backward()
got = model[0].weight.grad.clone()
hidden = model[0](x)
exact = torch.nn.functional.gelu(hidden, approximate="tanh").relu()
model.zero_grad()
exact.sum().backward()
ratio = got.sum() / model[0].weight.grad.sum()
print(json.dumps({
    "value": float(loss / exact.sum()), "gradient": float(ratio),
    "rows": {row.name: [row.plan, row.cached] for row in magi_train.report(prepared).rows},
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which a package with passes is installed, as pip does it."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    example = re.search(r"```python\n(.*?)```", DOCUMENT, re.DOTALL).group(1)
    (source / "other_passes.py").write_text(example + MORE_STAGES)
    (source / "pyproject.toml").write_text(PROJECT)
    options = ["-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return site


def run(site, lowering, **env):
    path = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", USE, lowering],
        env={**os.environ, "PYTHONPATH": path, **env},
        cwd=site,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(result, factor):
    assert result["value"] == pytest.approx(factor, rel=1e-5)
    # the joint pass scales the value alone, the backward pass the gradient
    assert result["gradient"] == pytest.approx(2, rel=1e-5)
    assert len(result["rows"]["fast_gelu"][0]["nodes"]) == 1
    for name in ("count_joint", "count_backward"):
        assert len(result["rows"][name][0]["nodes"]) == 1


def test_an_installed_package_adds_passes_at_every_stage(site):
    check(run(site, "aot_eager"), 3)


@pytest.mark.full
def test_the_uuid_is_in_the_caches(site, tmp_path):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    cold, warm = run(site, "inductor", **cache), run(site, "inductor", **cache)
    other = run(site, "inductor", FACTOR="5", **cache)
    check(cold, 3)
    check(warm, 3)
    check(other, 5)
    assert not cold["rows"]["count_joint"][1]
    assert warm["rows"]["count_joint"][1], "the second process must not compile again"
    assert not other["rows"]["count_joint"][1]


class Idle:
    """Does nothing."""

    name, stage = "idle", Stage.JOINT

    def __init__(self, version="1"):
        self.version = version

    def uuid(self):
        return f"idle-{self.version}"

    def plan(self, gm, context):
        return None

    def apply(self, gm, plan, context):
        raise AssertionError("there is nothing to apply")


@pytest.fixture
def idle():
    magi_train.register_pass(Idle())
    yield
    magi_train.unregister_pass("idle")


def test_what_is_refused(idle):
    with pytest.raises(ValueError, match="'idle' is registered already"):
        magi_train.register_pass(Idle())
    with pytest.raises(TypeError, match="lacks uuid"):
        magi_train.register_pass(
            type("P", (), {"name": "p", "stage": "joint", "plan": 0, "apply": 0})()
        )
    wrong = Idle()
    wrong.name, wrong.stage = "other", "forward"
    with pytest.raises(ValueError, match="one of pre_grad, joint, backward; got 'forward'"):
        magi_train.register_pass(wrong)
    with pytest.raises(ValueError, match=r"no pass named 'other' is registered, only \['idle'\]"):
        magi_train.unregister_pass("other")


def other_pass_on_rank_one(rank, world_size):
    import torch

    magi_train.register_pass(Idle(str(rank)))
    magi_train.prepare(torch.nn.Linear(2, 2))


def test_ranks_must_register_the_same():
    for outcome in run_ranks(other_pass_on_rank_one):
        assert "PlanMismatchError" in outcome.error
        assert "registered passes" in outcome.error
