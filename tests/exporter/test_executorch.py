"""ExecuTorch: its runtime computes what the module does."""

import builtins
import dataclasses
import importlib.util
import threading

import pytest
import torch

import magi_train
from magi_train.core.errors import ExportError
from magi_train.exporter.capture import capture
from magi_train.exporter.executorch_file import write_executorch
from tests.close import tolerance
from tests.exporter.nets import Block
from tests.exporter.test_export import LIBRARY, check_library_model
from tests.models import images

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None,
    reason="executorch not installed: pip install 'magi-train[executorch]'",
)


@needs_executorch
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_executorch_computes_the_same(tmp_path):
    model, path = Block(), tmp_path / "model.pte"
    options = {"target": "executorch", "dynamic": {"batch": (1, 8)}}
    magi_train.export(model, (images(0),), path, **options)
    run = magi_train.load(path)
    assert run.manifest["target"] == "executorch"
    passes = {row["name"]: row["plan"] for row in run.manifest["passes"]}
    assert "fold_batch_norm" in passes
    assert "channels_last" not in passes
    first = run(images(1, 3))
    kept = first.clone()
    for rows in (1, 7):
        batch = images(1, rows).to(memory_format=torch.channels_last)
        with torch.no_grad():
            wanted = model.eval()(batch)
        error = (run(batch) - wanted).norm() / wanted.norm()
        assert error <= tolerance(torch.float32, 9 * 32)
    assert torch.equal(first, kept), "a result is the caller's"
    with pytest.raises(ExportError, match="batch"):
        run(images(1, 9))
    for words, options in (
        ("cannot be replayed", {"cuda_graphs": True}),
        ("run by ExecuTorch", {"compile": True}),
    ):
        with pytest.raises(ExportError, match=words):
            magi_train.load(path, **options)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ExportError, match="damaged or cut short"):
        magi_train.load(path)


@needs_executorch
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_threads_share_a_file(tmp_path):
    model, path = Block(), tmp_path / "model.pte"
    magi_train.export(model, (images(0),), path, target="executorch", dynamic={"batch": (1, 8)})
    run, wrong = magi_train.load(path), []
    with torch.no_grad():
        pairs = [(x, model.eval()(x)) for x in (images(seed, 1 + seed) for seed in range(4))]

    def calls(x, wanted):
        for _ in range(20):
            if (run(x) - wanted).norm() > tolerance(torch.float32, 9 * 32) * wanted.norm():
                wrong.append(len(x))

    threads = [threading.Thread(target=calls, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_executorch
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({*LIBRARY} - {"gpt2"}))
def test_library_models_in_executorch(name, tmp_path):
    check_library_model(name, tmp_path, "executorch", "pte")


@needs_executorch
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_views_of_attention_that_lies_otherwise_in_memory(tmp_path):
    """GPT-2; with a dynamic batch ExecuTorch 1.5.1 refuses a view of it."""
    make, inputs = LIBRARY["gpt2"]
    model, path, example = make(), tmp_path / "model.pte", inputs()
    magi_train.export(model, example, path, target="executorch")
    with torch.no_grad():
        wanted = model.eval()(**example).logits
    error = (magi_train.load(path)(**example).logits - wanted).abs().max() / wanted.abs().max()
    assert error <= tolerance(torch.float32, 64)


@needs_executorch
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_what_it_cannot_lower_leaves_nothing(tmp_path):
    class Sorted(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.svd(x)[1]

    with pytest.raises(ExportError, match=r"cannot write .* as 'executorch'"):
        magi_train.export(Sorted(), (torch.rand(3, 3),), tmp_path / "a.pte", target="executorch")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "executorch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    words = r"'executorch' needs executorch.*; pip install 'magi-train\[executorch\]'"
    path = tmp_path / "a.pte"
    with pytest.raises(ExportError, match=words):
        magi_train.export(torch.nn.ReLU(), (torch.ones(2),), path, target="executorch")
    assert list(tmp_path.iterdir()) == []


def test_sizes_need_a_limit(tmp_path):
    model, path = torch.nn.Linear(2, 2), tmp_path / "a.pte"
    with pytest.raises(ExportError, match=r"batch in .* has no limit; give dynamic="):
        magi_train.export(model, (torch.ones(3, 2),), path, target="executorch", dynamic="batch")
    assert list(tmp_path.iterdir()) == []


def test_other_devices_are_refused(tmp_path):
    captured = capture(torch.nn.ReLU(), (torch.ones(2),), None, None, None, None)
    contract = dataclasses.replace(captured.contract, device="cuda")
    elsewhere = dataclasses.replace(captured, contract=contract)
    with pytest.raises(ExportError, match="for the CPU, and the model is on 'cuda'"):
        write_executorch(elsewhere, tmp_path / "a.pte", {})
