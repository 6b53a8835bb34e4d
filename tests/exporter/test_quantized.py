"""Exports whose linears hold their weights in one byte: numbers, sizes, refusals."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import magi_train
from magi_train import ExportConfig
from magi_train.core.errors import ExportError
from magi_train.exporter.decoder import export_decoder
from magi_train.exporter.generate import load_decoder
from magi_train.exporter.quantized import with_narrow_weights
from tests.exporter.nets import ROOT
from tests.models import llama

WIDTH = 256
ROUNDING = {"int8": 1 / 127 / 2, "float8": 2.0**-4}
"""The largest error of a weight: int8 of the largest in its channel, e4m3 of itself."""


class Net(nn.Module):
    """Two linears, one smaller than what constant folding may add."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_without_torchao_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ExportError, match=r"needs torchao.*magi-train\[quantize\]"):
        export(Net(), tmp_path / "a.pt2", "int8")
    assert not list(tmp_path.iterdir())


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match=r"'int8', 'float8'.*got 'int4'"):
        ExportConfig(precision="int4")


def export(module, path, precision, target="program"):
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    config = ExportConfig(precision=precision)
    return x, magi_train.export(module, {"x": x}, path, target=target, config=config,
                                dynamic={"batch": (1, 8)})  # fmt: skip


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of torchao, as it is imported
@pytest.mark.parametrize("precision", ["int8", "float8"])
@pytest.mark.parametrize("target", ["program", "pt2"])
def test_numbers_and_bytes(precision, target, tmp_path):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    module = Net().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    plain, narrow = tmp_path / "plain.pt2", tmp_path / "narrow.pt2"
    export(module, plain, None, target)
    x, report = export(module, narrow, precision, target)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    # two layers of weights; errors of channels are independent, so this is far beyond them
    error = report.measured["error_output"]
    assert 1e-4 < error <= 2 * ROUNDING[precision]
    assert any(f"2 linears are {precision}" in note for note in report.notes)
    weights = 4 * WIDTH * (WIDTH + 8)  # three of four bytes each, but for scales and more operators
    assert plain.stat().st_size - narrow.stat().st_size > 0.9 * 3 * weights
    code = (
        "import sys, torch, magi_train\n"
        "run = magi_train.load(sys.argv[1])\n"
        "x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))\n"
        "torch.save(run(x=x[:3]), sys.argv[2])\n"
        "assert 'torchao' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(narrow), str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=ROOT)
    with torch.no_grad():
        want = module(x[:3])
    got = torch.load(tmp_path / "out")
    got = got if isinstance(got, torch.Tensor) else next(iter(got.values()))
    assert float((got - want).norm() / want.norm()) <= 2 * ROUNDING[precision]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_a_module_without_linears(tmp_path):
    pytest.importorskip("torchao")
    with pytest.raises(ExportError, match="Sequential has none"):
        magi_train.export(
            nn.Sequential(nn.Conv2d(3, 4, 3)), (torch.randn(1, 3, 8, 8),), tmp_path / "a.pt2",
            config=ExportConfig(precision="int8"),
        )  # fmt: skip


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_a_decoder_generates_what_its_narrow_weights_say(tmp_path):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model, ids = llama().eval(), torch.tensor([[1, 2, 3]])
    config = ExportConfig(precision="int8")
    report = export_decoder(model, tmp_path / "a.pt2", length=16, config=config)
    assert any("linears are int8" in note for note in report.notes)
    got = load_decoder(tmp_path / "a.pt2").generate(ids, max_new_tokens=6)
    narrow, _ = with_narrow_weights(model, "int8")
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, narrow(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)
