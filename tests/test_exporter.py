"""Export: the same logits in a new process, a manifest of what ran, clear errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import magi_train
from magi_train import Config
from magi_train.core.errors import ExportError
from tests.close import difference, tolerance
from tests.models import llama, tokens, vit

ROOT = Path(__file__).parents[1]
CHECK = """
import sys, torch, magi_train
run, manifest = magi_train.load(sys.argv[1])
inputs, wanted = torch.load(sys.argv[2])
got = run(**inputs)
got = got if isinstance(got, torch.Tensor) else got.logits
print(float((got - wanted).abs().max() / wanted.abs().max()), "transformers.models" in sys.modules)
"""


class Logits(torch.nn.Module):
    """A decoder that returns its logits alone."""

    def __init__(self):
        super().__init__()
        self.model = llama()

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def in_a_new_process(path, inputs, wanted, folder):
    torch.save((inputs, wanted), folder / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(path), str(folder / "expected.pt")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    error, loaded = done.stdout.split()
    return float(error), loaded == "True"


@pytest.mark.parametrize("target", ["program", "pt2"])
def test_the_same_logits_in_a_new_process(tmp_path, target):
    model, inputs = Logits(), {"input_ids": tokens(0)}
    model.train()
    model.model.lm_head.eval()  # a part that the user holds in another mode
    report = magi_train.export(model, inputs, tmp_path / "model.pt2", target=target)
    assert model.training
    assert not model.model.lm_head.training
    assert len(next(r.plan for r in report.rows if r.plan)["causal"]) == 2
    with torch.no_grad():
        wanted = model.eval()(**inputs)
    error, with_source = in_a_new_process(tmp_path / "model.pt2", inputs, wanted, tmp_path)
    assert error <= tolerance(torch.float32, 64)
    assert not with_source, "the file must not need the model's source"
    _, manifest = magi_train.load(tmp_path / "model.pt2")
    assert manifest["target"] == target
    assert manifest["passes"][0]["name"] == "canonicalize_attention"
    assert manifest["inputs"] == [{"shape": [4, 16], "dtype": "torch.int64"}]


def test_a_prepared_module_exports_as_the_plain_one(tmp_path):
    torch.manual_seed(0)
    plain = vit()
    prepared = magi_train.prepare(plain, config=Config(lowering="aot_eager"))
    x = torch.randn(2, 3, 32, 32)
    prepared(pixel_values=x, labels=torch.tensor([0, 1])).loss.backward()
    for name, module in (("a", plain), ("b", prepared)):
        magi_train.export(module, {"pixel_values": x}, tmp_path / f"{name}.pt2")
    a, b = (magi_train.load(tmp_path / f"{n}.pt2")[0](pixel_values=x).logits for n in "ab")
    assert torch.equal(a, b)
    assert difference({"y": a}, {"y": plain.eval()(pixel_values=x).logits}) < 1e-5


def test_errors_say_what_is_wrong_and_leave_nothing(tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, x):
            return x + 1 if x.sum().item() > 0 else x

    path = tmp_path / "model.pt2"
    with pytest.raises(ExportError, match=r"torch\.export cannot capture Broken"):
        magi_train.export(Broken(), (torch.ones(2),), path)
    with pytest.raises(ValueError, match="'program' or 'pt2', got 'onnx'"):
        magi_train.export(Broken(), (torch.ones(2),), path, target="onnx")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ExportError, match="does not exist"):
        magi_train.load(path)
    magi_train.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ExportError, match="no artifact of magi-train"):
        magi_train.load(path)
