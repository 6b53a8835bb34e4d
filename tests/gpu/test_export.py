"""Exports on CUDA: machine code in bfloat16, replayed as CUDA graphs, and decoding."""

import subprocess
import sys

import pytest
import torch

import magi_train
from magi_train import ExportConfig
from magi_train.core.errors import ExportError
from magi_train.exporter.decoder import export_decoder
from magi_train.exporter.few_queries import LEAST_KEYS
from magi_train.exporter.generate import load_decoder
from tests.exporter.nets import Block
from tests.exporter.test_few_queries import check_numbers
from tests.models import gpt2, images, llama, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


LOADS = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"


def ends_torchs_loader(file, device):
    """Return by which signal torch loading what torch alone wrote ends; 0 if it does not."""
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).to(device)
    program = torch.export.export(plain, (torch.ones(2, 4, device=device),))
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    done = subprocess.run([sys.executable, "-c", LOADS, str(file)], capture_output=True, text=True)
    assert done.returncode <= 0, done.stderr
    return -done.returncode


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    """Skip where torch's own loader crashes, with nothing of ours in the file."""
    folder = tmp_path_factory.mktemp("loader")
    try:
        magi_train.export(
            torch.nn.Linear(4, 4).cuda(),
            (torch.ones(2, 4).cuda(),),
            folder / "model.pt2",
            target="pt2",
        )
    except ExportError as error:
        if "loader ends with" not in str(error):
            raise
        ended = ends_torchs_loader(folder / "plain.pt2", "cuda")
        if not ended:  # so what is wrong is ours
            raise
        pytest.skip(f"{error}; what torch writes alone ends its loader by signal {ended} too")


@pytest.mark.parametrize("target", ["program", "pt2"])
@pytest.mark.parametrize("graphs", [False, True])
def test_bfloat16_on_the_device(tmp_path, target, graphs, request):
    if target == "pt2":
        request.getfixturevalue("machine_code")
    model, path = Block().cuda(), tmp_path / "model.pt2"
    report = magi_train.export(
        model, (images(0).cuda(),), path, target=target, dynamic={"batch": (1, 8)},
        config=ExportConfig(precision="bfloat16"),
    )  # fmt: skip
    run = magi_train.load(path, buckets=(1, 4, 8), cuda_graphs=graphs)
    run.warmup(calls=3)
    for rows in (1, 3, 8, 3):
        x = images(rows, rows).cuda()
        with torch.no_grad():
            wanted = model.eval()(x)
        got = run(x)
        assert (got - wanted).norm() / wanted.norm() < 0.05
    assert report.measured["error_output"] < 0.05


def test_graphs_stay_where_they_gain(tmp_path):
    wide = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(20))).cuda()
    path = tmp_path / "model.pt2"
    x = torch.randn(8, 4096, device="cuda")
    magi_train.export(wide, (x,), path, dynamic={"batch": (1, 2**15)})
    run = magi_train.load(path, cuda_graphs="auto")
    for rows in (1, 2**15):
        x = torch.randn(rows, 4096, device="cuda")
        before = torch.cuda.memory_reserved()
        for _ in range(4):
            torch.testing.assert_close(run(x), wide(x))
        recorded = {key[0][0] for key in run._run._recorded}
        assert recorded == {1}, "bound by launches at one row only"
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 2**30, "what was dropped is given back"


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("graphs", [False, True])
def test_decoding_equals_generate(tmp_path, make, graphs, machine_code):
    model = make().cuda().eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    path = tmp_path / "decoder.pt2"
    export_decoder(model, path, length=48, batch=2, target="pt2")
    decoder = load_decoder(path, cuda_graphs=graphs)
    for seed in (0, 1):
        ids = tokens(seed)[:2].cuda()
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20}
        wanted = model.generate(ids, do_sample=False, **given)
        assert torch.equal(decoder.generate(ids, **given), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["none", "boolean", "added", "mostly empty"])
def test_attention_of_few_queries(kind, dtype):
    check_numbers("cuda", 4, 2048, 64, 8, kind, dtype)
    check_numbers("cuda", 1, 1111, 40, 3, kind, dtype)


@pytest.mark.parametrize("target", ["program", "pt2"])
def test_code_runs_the_kernel_for_few_queries(tmp_path, target, request):
    if target == "pt2":
        request.getfixturevalue("machine_code")
    model = llama().cuda().eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    path = tmp_path / "decoder.pt2"
    report = export_decoder(model, path, length=2 * LEAST_KEYS, batch=2, target=target)
    if target == "pt2":
        assert "decode: attention of few queries by the kernel, calls: 2" in report.notes
    compile = {"compile": True} if target == "program" else {}
    decoder = load_decoder(path, cuda_graphs=True, **compile)
    ids = tokens(0)[:2].cuda()
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20}
    on_gpu = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=on_gpu, acc_events=True) as profile:
        got = decoder.generate(ids, **given)
    assert torch.equal(got, model.generate(ids, do_sample=False, **given))
    assert [e for e in profile.events() if "_parts" in e.name]
