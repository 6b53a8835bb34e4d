"""Plans are data, reports count, compat names what is missing, tiers fall instead of crashing."""

import json

import pytest
import torch

import magi_train
from magi_train import Config, Report
from magi_train.comm.plan import plan_buckets
from magi_train.core import compat, passes, world
from magi_train.core.config import CommConfig
from magi_train.core.errors import CaptureError, PassError
from magi_train.core.report import PassRow
from tests.models import GraphBreak, Small, tokens


def test_a_plan_is_json_with_a_stable_fingerprint():
    plan = plan_buckets(Small().named_parameters(), CommConfig(), 2)
    assert json.loads(json.dumps(plan.as_dict())) == plan.as_dict()
    again = plan_buckets(Small().named_parameters(), CommConfig(), 2)
    assert plan.fingerprint() == again.fingerprint()


def test_equal_rows_are_counted():
    report = Report()
    for plan in ({"a": 1}, {"a": 1}, {"a": 2}):
        report.add(PassRow("p", "joint", plan, 1.0))
    assert [(r.graphs, r.seconds) for r in report.rows] == [(2, 2.0), (1, 1.0)]
    assert "a=1 x2" in str(report)


def test_a_pass_that_breaks_the_graph_is_named():
    class Breaks:
        name, stage = "breaks_it", passes.Stage.PRE_GRAD

        def plan(self, gm, context):
            return passes.Plan()

        def apply(self, gm, plan, context):
            output = gm.graph.output_node()
            node = gm.graph.create_node("call_function", torch.relu, (output.args[0],))
            output.args = (node,)
            output.append(node)

    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(PassError, match="'breaks_it' left a broken graph"):
        passes.run_passes([Breaks()], gm, passes.PassContext(), Report())


def test_graphs_are_dumped_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("MAGI_TRAIN_DUMP", str(tmp_path))
    from tests.models import llama

    model = magi_train.prepare(llama(), config=Config(lowering="aot_eager"))
    model(input_ids=tokens(0), labels=tokens(0)).loss.backward()
    before = next(tmp_path.glob("*canonicalize_attention_before.py")).read_text()
    after = next(tmp_path.glob("*canonicalize_attention_after.py")).read_text()
    assert "arange" in before
    assert "is_causal = True" in after
    assert "is_causal = True" not in before


def test_a_pass_can_be_switched_off():
    from tests.models import llama

    model = magi_train.prepare(llama(), config=Config(lowering="aot_eager", fusion=None))
    model(input_ids=tokens(0), labels=tokens(0)).loss.backward()
    assert "canonicalize_attention" not in [r.name for r in magi_train.report(model).rows]


def test_nothing_private_is_missing_here():
    assert compat.problems() == ()
    assert compat.torch_version() >= compat.OLDEST_TORCH


def test_a_missing_name_drops_to_eager_with_its_name(monkeypatch, caplog):
    monkeypatch.setattr(compat, "_missing", [])
    assert compat._lookup("torch._inductor", "no_such_name") is None
    assert compat._lookup("torch._no_such_module", "x") is None
    model = magi_train.prepare(Small())
    model(tokens(0), tokens(1)).backward()
    report = magi_train.report(model)
    assert report.tier == "eager"
    assert "torch._inductor.no_such_name" in report.reason
    assert "torch._inductor.no_such_name" in caplog.text
    with pytest.raises(CaptureError, match="no_such_name"):
        magi_train.prepare(Small(), config=Config(tier="graph"))(tokens(0), tokens(1))


def test_the_reason_names_the_users_line():
    model = magi_train.prepare(GraphBreak(), config=Config(lowering="aot_eager"))
    model(tokens(0), tokens(1)).backward()
    reason = magi_train.report(model).reason
    assert "graph_break()" in reason
    assert "models.py" in reason


@pytest.mark.parametrize(
    ("mine", "theirs", "text"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a.b is 2, not 1"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "a[1] is 3, not 2"),
        ({"a": [1]}, {"a": [1, 2]}, "a has 2 entries, not 1"),
        ({"a": 1}, {}, "a is None, not 1"),
    ],
)
def test_the_first_difference_is_named(mine, theirs, text):
    assert world._difference(mine, theirs) == text


def test_torchruns_variables_without_a_rank_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(magi_train.MagiError, match="RANK is not"):
        magi_train.prepare(Small())


def test_what_the_driver_says_is_reported(monkeypatch):
    import pynvml

    from magi_train.core import hardware

    assert isinstance(hardware.devices_in_use(), dict)
    memory = type("Memory", (), {"total": 141 * 2**30})
    for name, value in {
        "Init": None, "Shutdown": None, "DeviceGetCount": 2, "DeviceGetHandleByIndex": 0,
        "DeviceGetName": "NVIDIA H200", "DeviceGetMemoryInfo": memory,
        "SystemGetDriverVersion": "580.1",
    }.items():  # fmt: skip
        monkeypatch.setattr(pynvml, f"nvml{name}", lambda *_, value=value: value)
    assert hardware.devices_in_use() == {"driver": "580.1", "gpus": "2 x NVIDIA H200, 141 GiB"}


def test_one_process_needs_no_group():
    assert world.World.current().size == 1
    model = magi_train.prepare(Small(), config=Config(lowering="aot_eager"))
    with model.no_sync():
        model(tokens(0), tokens(1)).backward()
    assert model.head.weight.grad is not None
