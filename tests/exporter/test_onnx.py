"""ONNX: ONNX Runtime computes what the module does."""

import importlib.util

import pytest
import torch

import magi_train
from magi_train.core.errors import ExportError
from tests.close import tolerance
from tests.exporter.nets import Block
from tests.exporter.test_export import LIBRARY, check_library_model
from tests.models import images

MISSING = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
needs_onnx = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install 'magi-train[onnx]'"
)


@needs_onnx
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_computes_the_same(tmp_path):
    model, path = Block(), tmp_path / "model.onnx"
    magi_train.export(model, (images(0),), path, target="onnx", dynamic={"batch": (1, 8)})
    run = magi_train.load(path)
    assert run.manifest["target"] == "onnx"
    for rows in (1, 7):
        with torch.no_grad():
            wanted = model.eval()(images(1, rows))
        error = (run(images(1, rows)) - wanted).norm() / wanted.norm()
        assert error <= tolerance(torch.float32, 9 * 32)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ExportError, match="damaged or cut short"):
        magi_train.load(path)


@needs_onnx
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIBRARY)
def test_library_models_in_onnx_runtime(name, tmp_path):
    check_library_model(name, tmp_path, "onnx", "onnx")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("onnx", "onnxscript"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ExportError, match=r"needs onnx.*; pip install 'magi-train\[onnx\]'"):
        magi_train.export(torch.nn.ReLU(), (torch.ones(2),), tmp_path / "a.onnx", target="onnx")
    assert list(tmp_path.iterdir()) == []
