"""magi bench: peers of a module and of cases, those that fail, and what rows say together."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import memory, train_step
from benchmarks import records as benchmark_records
from magi_train.cli import main
from magi_train.core.errors import MagiError
from magi_train.core.hardware import peak_flops
from magi_train.integrations import bench, figures, peers, ranks, records
from magi_train.integrations.bench_rank import Spec, count, load
from magi_train.integrations.cases import CASES, case_of
from magi_train.integrations.parts import PARTS, Training
from magi_train.integrations.peers import parse, why_not
from tests.processes import MARK, all_ended

ROOT = Path(__file__).parents[2]
BUILD = """
import os
import torch
from torch import nn
from magi_train.integrations.parts import Stage, part
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    def forward(self, x):
        return x + self.inside(x)
def build():
    module = nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(8, 1))
    return module, torch.randn(4, 8), loss
def loss(module, x):
    return (module(x) - x.sum(1, keepdim=True)).square().mean()
def flat():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), torch.randn(4, 8), loss
@part("half-dead", Stage.EDIT)
def half_dead(training):
    '''The last rank raises, before it meets the others.'''
    if int(os.environ["RANK"]) == training.ranks - 1:
        raise RuntimeError("not on this rank")
"""


def run(folder, *arguments, **more):
    (folder / "mine.py").write_text(BUILD)
    command = [sys.executable, "-m", "magi_train.cli", "bench", "--json", "--steps=3"]
    command += ["--warm-up=2", "--output", str(folder / "o.json"), *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=900)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((folder / "o.json").read_text())
    return done.returncode, found, {row["variant"]: row for row in found["rows"]}


@pytest.mark.full
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_peers_of_a_users_module(tmp_path, ranks):
    names = ["eager", "half-dead", "block-compile", "magi"]
    status, found, rows = run(tmp_path, "mine.py:build", "--nproc", ranks, "--peers", *names)
    assert status == 0, rows
    assert "not on this rank" in rows["half-dead"]["failed"], "a peer that fails says why"
    assert rows["block-compile"]["loss"] == pytest.approx(rows["eager"]["loss"], rel=1e-4)
    assert rows["magi"]["loss"] == pytest.approx(rows["eager"]["loss"], rel=1e-4)
    assert rows["magi"]["loss"] < rows["magi"]["first_loss"]
    assert f"on {ranks} rank(s)" in rows["magi"]["report"][0]
    for name in ("eager", "magi"):
        assert ("without_sync_ms" in rows[name]) == (ranks == "2")
    # compiled code is found again: by far, as nothing else makes the first start long
    cold, warm = (rows["block-compile"][f"start_up_{each}_s"] for each in ("cold", "warm"))
    assert warm < cold
    assert found["model_flops"] == 2 * 3 * 4 * (2 * 2 * 8 * 16 + 8) - 2 * 4 * 8 * 16
    assert {"date", "commit", "versions", "command", "loss_after"} <= found.keys()


@pytest.mark.full
def test_a_module_without_blocks(tmp_path):
    status, _, rows = run(tmp_path, "mine.py:flat", "--cold-only", "--peers", "block-compile")
    assert status == 1, "ours was not measured"
    assert "no repeated blocks" in rows["block-compile"]["failed"]


@pytest.mark.full
@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_sharded_peers_train_as_replicas_do(tmp_path, autocast):
    names = ["eager", "fsdp2", "fsdp2-reshard", "zero1", "zero2", "zero3"]
    given = ["--case=toy", "--nproc=2", "--cold-only", "--autocast", autocast, "--peers", *names]
    _, found, rows = run(tmp_path, *given)
    assert found["model_flops"] > 0
    expected = rows["eager"]["loss"]
    assert expected < rows["eager"]["first_loss"]
    # rounding of another order of the same operations, a step's worth each
    rounding = torch.finfo(torch.float32 if autocast == "none" else torch.bfloat16).eps
    for name in names[1:]:
        if "needs the package deepspeed" in rows[name].get("failed", ""):
            continue
        assert rows[name]["loss"] == pytest.approx(expected, rel=rounding), rows[name]


def test_a_wrong_name_is_refused_before_anything_runs(tmp_path, capsys):
    path = tmp_path / "named_so.py"
    path.write_text(BUILD)
    try:
        assert main(["bench", f"{path}:biuld"]) == 2
        assert "has no function 'biuld', only build, loss" in capsys.readouterr().err
        assert main(["bench", f"{path}:build", "--peers", "eagre"]) == 2
        assert "there is no peer 'eagre', only eager and magi, liger" in capsys.readouterr().err
        assert "half-dead" in PARTS, "what the file registers is known"
    finally:
        PARTS.pop("half-dead", None)
    assert main(["bench", "--case", "lama"]) == 2
    assert "there is no case 'lama', only llama-1b" in capsys.readouterr().err
    assert main(["bench", f"{path}:build", "--case", "toy"]) == 2
    assert "give a module's function, or --case" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ("complie", "did you mean 'compile'"),
        ("zero1+fsdp2", "zero1, fsdp2 in one"),
        ("compile+compile", "compile, compile in one"),
        ("magi+block-compile", "magi compiles by itself"),
        ("magi:presicion=fp8", "precision"),
        ("liger:fast", "takes nothing behind ':'"),
    ],
)
def test_a_peer_that_cannot_be_is_refused(peer, words):
    with pytest.raises(MagiError, match=words):
        parse(peer)


def test_parts_have_their_turn_by_stage():
    assert parse("eager") == []
    names = [each.name for each, _ in parse("compile+fsdp2+block-compile+liger")]
    assert names == ["liger", "block-compile", "fsdp2", "compile"]
    (ours, option), *_ = parse("magi:precision=fp8,fusion.loss=false")
    assert (ours.name, option) == ("magi", "precision=fp8,fusion.loss=false")
    config = peers.our_config(option)
    assert (config.precision, config.fusion.loss) == ("fp8", False)
    assert all(each.what for each in PARTS.values()), "the help text has a line for each"


def test_every_variant_of_the_benchmarks_is_a_peer():
    for variant in (*peers.DEFAULT, *memory.VARIANTS, *sum(train_step.VARIANTS.values(), ())):
        parse(variant)


def test_what_is_missing_is_known_before(monkeypatch):
    assert why_not("eager", 1, False) == ""
    assert why_not("torchao+compile", 1, False) == "torchao needs a GPU"
    assert "zero3 needs 2 ranks" in why_not("zero3", 1, True)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert "liger needs the package liger_kernel" in why_not("liger", 1, True)
    row = bench.row("zero3", Spec("toy", True), {}, 1.0)
    assert row["failed"].startswith("zero3 needs 2 ranks")


def training(module, **given):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    found = Training(
        module, lambda m, x: m(x).square().mean(), optimizer, [], torch.device("cpu"), None, 1
    )
    for name, value in given.items():
        setattr(found, name, value)
    return found


@pytest.fixture
def patched(monkeypatch):
    """Stand in for Liger; return what it was asked for."""
    asked = []

    def for_llama(rope=True, rms_norm=True, fused_linear_cross_entropy=True, model=None):
        raise AssertionError("called by the other function only")

    def apply(model, **given):
        asked.append(given)

    known = types.ModuleType("monkey_patch")
    known.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": for_llama, "lossless": lambda rope=True: None}
    known._apply_liger_kernel_to_instance = apply
    package = types.ModuleType("liger_kernel.transformers")
    package.monkey_patch = known
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    return asked


def of_type(kind):
    module = nn.Linear(4, 1)
    module.config = types.SimpleNamespace(model_type=kind)
    return training(module)


def test_liger_is_asked_for_all_or_for_the_loss(patched):
    peers.apply("liger", of_type("llama"))
    peers.apply("liger-loss", of_type("llama"))
    loss = {"rope": False, "rms_norm": False, "fused_linear_cross_entropy": True}
    assert patched == [{}, loss]
    with pytest.raises(MagiError, match="no fused_linear_cross_entropy for a model of type 'loss"):
        peers.apply("liger-loss", of_type("lossless"))


def test_a_part_that_would_do_nothing_is_refused(patched):
    for peer, words in (
        ("liger", "no kernels for a model of type None"),
        ("checkpoint", "has no gradient_checkpointing_enable"),
        ("head-compile", "has no head and loss_function"),
        ("block-compile", "no repeated blocks"),
    ):
        with pytest.raises(MagiError, match=words):
            peers.apply(peer, training(nn.Linear(4, 1)))
    assert patched == []


def test_a_step_is_what_the_parts_made_of_it():
    calls = []
    module = nn.Linear(4, 1)
    with_engine = training(
        module, backward=lambda loss: calls.append("backward"), update=lambda: calls.append("step")
    )
    before = module.weight.clone()
    assert with_engine.step(torch.ones(2, 4)).grad_fn is None
    assert calls == ["backward", "step"]
    assert torch.equal(module.weight, before), "the engine steps, not the optimizer"
    plain = training(module)
    peers.apply("eager", plain)
    plain.step(torch.ones(2, 4))
    assert not torch.equal(module.weight, before)
    assert module.weight.grad is None


def test_the_same_case_on_every_rank_with_other_batches():
    spec = Spec("toy", True)
    one, two = (load(spec, torch.device("cpu"), rank) for rank in range(2))
    for p, q in zip(one.module.parameters(), two.module.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(one.batches[0]["input_ids"], two.batches[0]["input_ids"])
    assert not torch.equal(one.batches[0]["input_ids"], one.batches[1]["input_ids"])
    assert (one.samples, one.unit, len(one.blocks)) == (128, "tokens", 2)


def test_cases_have_names():
    assert {"llama-1b", "bert", "vit-l", "torchvision-resnet50"} <= CASES.keys()
    assert case_of("timm/resnet18").unit == "images"
    assert case_of("transformers/qwen2").samples == 8 * 1024
    with pytest.raises(MagiError, match="there is no case 'torchvision/'"):
        case_of("torchvision/")


def test_a_case_with_another_number_of_rows():
    assert case_of("bert@3").samples == 3 * 512
    assert case_of("timm/resnet18@5").samples == 5
    batch = case_of("toy-packed@3").batch(torch.Generator().manual_seed(0))
    assert {name: tuple(x.shape) for name, x in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (3, 64)
    )
    for name in ("bert@", "bert@0", "bert@a", "bert@-1"):
        with pytest.raises(MagiError, match="ROWS at least 1, got 'bert@"):
            case_of(name)
    with pytest.raises(MagiError, match="there is no case 'gone'"):
        case_of("gone@2")


def test_flops_are_those_of_the_matrix_products():
    sizes = {"rows": 2, "length": 64, "width": 64, "inside": 128, "vocabulary": 256}
    tokens = sizes["rows"] * sizes["length"]
    # q, k, v, out with half as many heads of keys and values; gate, up, down; the head
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 64 * 256
    scores = 2 * 2 * tokens * 64 * 64  # both products, of 2 layers, before a factor of 2
    found = count(Spec("toy", True))
    rope = 3 * 2 * 2 * 8 * 64  # cos and sin are an outer product, and its gradient is not needed
    assert found["model_flops"] == pytest.approx(6 * (tokens * weights + scores), abs=rope)
    assert (found["samples"], found["unit"]) == (tokens, "tokens")
    assert figures.utilisation(4e14, 0.5, 1e15) == 0.8


def test_peaks_are_known_by_name():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA H100 PCIe") < peak_flops("NVIDIA H100 80GB HBM3")
    assert peak_flops("a GPU of tomorrow") is None


def test_exposed_is_what_nothing_covers():
    found = figures.exposed(
        [(0.0, 1000.0), (500.0, 2000.0), (5000.0, 6000.0)], [(1500.0, 3000.0)], steps=2
    )
    assert found == {
        "comm_ms": 1.5, "exposed_comm_ms": 1.25, "comm_under_compute": pytest.approx(1 / 6),
        "gpu_busy_ms": 2.0,
    }  # fmt: skip
    assert figures.exposed([], [(0.0, 1.0)], 1)["comm_under_compute"] == 1.0


def test_ranks_become_one_row():
    rows = [
        {"step_ms": 2.0, "peak_gib": 0.5, "loss": 1.0, "start_up_s": 9.0, "report": ["of 0"]},
        {"step_ms": 3.0, "peak_gib": 1.0, "loss": 2.0, "start_up_s": 1.0},
    ]
    assert bench.together(rows) == {
        "step_ms": 3.0, "peak_gib": 1.0, "loss": 1.5, "start_up_s": 9.0, "report": ["of 0"]
    }  # fmt: skip


SLEEPS = (
    "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
)


def test_ranks_end_with_the_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.2)
    code = f"import os\nif os.environ['RANK'] == '1': raise SystemExit('rank 1 is ill')\n{SLEEPS}"
    mine = {MARK: str(tmp_path)}
    why = ranks.run_ranks(["-c", code], 2, tmp_path, 300, mine)
    assert why == "rank 1 is ill"
    assert all_ended(tmp_path) is True, "the other rank, and what it started, ended too"


def test_ranks_that_hang_are_ended(tmp_path):
    mine = {MARK: str(tmp_path)}
    assert ranks.run_ranks(["-c", SLEEPS], 2, tmp_path, 1, mine) == "did not finish in 1 s"
    assert all_ended(tmp_path) is True
    assert ranks.run_ranks(["-c", "pass"], 1, tmp_path, 60) == ""


def row(name, ms, loss):
    figures = dict.fromkeys(("step_ms", "step_ms_p10", "step_ms_p90", "peak_gib"), ms)
    return {"variant": name, **figures, "back_to_back_ms": ms, "loss": loss}


def test_what_rows_say_together():
    rows = [row("eager", 30.0, 1.0), row("compile", 20.0, 1.0), row("magi", 10.0, 1.01)]
    text = bench.table([*rows, row("magi:tune=true", 40.0, 1.0)], 0.02)
    assert "magi is 2.000 times as fast as compile, the best peer" in text
    assert "magi:tune=true is 0.500 times as fast as compile" in text
    assert "its last loss agrees with that of eager" in text
    assert "DIFFERS" in bench.table(rows, 0.001)
    assert bench.agrees(rows, 0.02)
    assert not bench.agrees(rows, 0.001)
    failed = [{"variant": "eager", "failed": "Traceback\nout of memory"}, row("magi", 10.0, 1.0)]
    assert "eager failed: out of memory" in bench.table(failed, 0.02)
    assert bench.agrees(failed, 0.02)
    assert not bench.agrees([row("eager", 1.0, 1.0), {"variant": "magi", "failed": "x"}], 0.02)
    assert not bench.agrees([row("eager", 1.0, 1.0), row("magi", 1.0, math.nan)], 0.02)


def test_a_measured_step_is_counted(monkeypatch):
    seen, clock = [], [100.0]

    def step(i):
        clock[0] += 12.0 if i == 0 else 2.0 + i / 1000
        seen.append(i)
        return torch.tensor(float(i))

    monkeypatch.setattr(figures, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    joules = iter([100.0, 180.0])
    monkeypatch.setattr(figures, "energy_counter", lambda: lambda: next(joules))
    found = figures.measure(step, torch.device("cpu"), warm_up=3, steps=4, began=100.0)
    assert seen == list(range(3 + 2 * 4))
    assert (found["first_loss"], found["loss"]) == (0.0, 10.0)
    assert found["step_ms"] == pytest.approx(2004.5)
    assert found["step_ms_p10"] == pytest.approx(2002.5)
    assert found["step_ms_p90"] == pytest.approx(2006.5)
    assert found["back_to_back_ms"] == pytest.approx(2008.5)
    assert found["joules_per_step"] == 20.0
    assert found["first_step_s"] == pytest.approx(12.0)
    assert found["warm_up_s"] == pytest.approx(16.003)
    assert found["start_up_s"] == pytest.approx(16.003 - 3 * 2.0045)


def test_a_benchmark_s_record_says_how_to_make_it_again(tmp_path, monkeypatch):
    given = ["--case", "a b", "--output", str(tmp_path / "o.json"), "--commit=abc", "--kernels"]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *given])
    main_module = types.SimpleNamespace(__spec__=types.SimpleNamespace(name="benchmarks.memory"))
    monkeypatch.setitem(sys.modules, "__main__", main_module)
    parser = benchmark_records.parser_of("")
    parser.add_argument("--case")
    parser.add_argument("--kernels", action="store_true")
    benchmark_records.save("train_step", parser.parse_args(), rows=[])
    record = json.loads((tmp_path / "o.json").read_text())
    assert record["command"] == "python -m benchmarks.memory --case 'a b' --kernels"
    assert record["commit"] == "abc"


def test_a_record_says_which_code():
    head = records.head("bench", None)
    asked = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if asked.returncode == 0:
        assert asked.stdout.startswith(head["commit"].removesuffix("+changes"))
    assert records.head("bench", "abc")["commit"] == "abc"
    assert head["versions"]["torch"] == torch.__version__
