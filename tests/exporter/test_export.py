"""Export: the same numbers in a new process, a manifest of what ran, sizes found or declared."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import magi_train
from magi_train import Config, ExportConfig
from magi_train.core.errors import ExportError
from magi_train.core.passes import Plan, Stage, register_pass, unregister_pass
from tests.close import difference, tolerance
from tests.exporter.nets import Block, Heads, in_a_new_process
from tests.models import WIDTH, bert, gpt2, images, llama, resnet, t5, tokens, vit

PASSES = [
    "canonicalize_attention",
    "remove_no_ops",
    "fold_batch_norm",
    "fold_constants",
    "channels_last",
]


def convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 32}
    return ConvNextForImageClassification(ConvNextConfig(num_labels=5, **sizes))


LIBRARY = {
    "llama": (llama, lambda: {"input_ids": tokens(0), "use_cache": False}),
    "gpt2": (gpt2, lambda: {"input_ids": tokens(0), "use_cache": False}),
    "bert": (bert, lambda: {"input_ids": tokens(0)}),
    "t5 encoder": (lambda: t5().encoder, lambda: {"input_ids": tokens(0)}),
    "vit": (vit, lambda: {"pixel_values": images(0)}),
    "resnet": (resnet, lambda: {"pixel_values": images(0)}),
    "convnext": (convnext, lambda: {"pixel_values": images(0)}),
}


def rows_of(inputs, rows):
    """Return the examples with so many rows, all different."""
    found = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            step = 1 if value.is_floating_point() else 0
            found[name] = torch.cat([value.flip(0) + i * step for i in range(3)])[:rows]
    return found


def check_library_model(name, folder, target, suffix="pt2"):
    make, inputs = LIBRARY[name][0](), LIBRARY[name][1]()
    path = folder / f"model.{suffix}"
    config = ExportConfig(merge_linears=True)
    magi_train.export(make, inputs, path, target=target, dynamic={"batch": (1, 8)}, config=config)
    batches = [rows_of(inputs, rows) for rows in (1, 2, 7)]
    with torch.no_grad():
        outputs = [make.eval()(**batch) for batch in batches]
    pairs = [(b, next(iter(o.values()))) for b, o in zip(batches, outputs, strict=True)]
    error, (with_source, with_training) = in_a_new_process(path, pairs, folder)
    assert error <= tolerance(torch.float32, 64)
    assert not with_source, "the file must not need the model's source"
    assert not with_training, "nor the code that trains"


@pytest.mark.full
@pytest.mark.parametrize("name", LIBRARY)
def test_library_models_with_a_dynamic_batch(tmp_path, name):
    check_library_model(name, tmp_path, "program")


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "bert", "resnet"])
def test_library_models_as_machine_code(tmp_path, name):
    check_library_model(name, tmp_path, "pt2")


def test_a_new_process_needs_the_file_alone(tmp_path):
    model, path = Block(), tmp_path / "model.pt2"
    model.train()
    model.head.eval()  # a part that the user holds in another mode
    x = images(0)
    report = magi_train.export(model, (x,), path, dynamic="batch")
    assert model.training
    assert not model.head.training
    pairs = [({"x": images(n, n)}, model.eval()(images(n, n)).detach()) for n in (1, 2, 9)]
    error, loaded = in_a_new_process(path, pairs, tmp_path)
    assert error <= tolerance(torch.float32, 9 * 32)
    assert loaded == [False, False]
    manifest = magi_train.load(path).manifest
    assert [row["name"] for row in manifest["passes"]] == PASSES
    folded = [["batch_norm", "conv2d"], ["batch_norm_1", "conv2d_1"]]
    assert manifest["passes"][2]["plan"]["folded"] == folded
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["measured"] == report.measured
    assert manifest["measured"]["error_output"] < 1e-5
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.full
def test_machine_code_in_a_new_process(tmp_path):
    model, path = Block(8), tmp_path / "model.pt2"
    magi_train.export(model, (images(0),), path, target="pt2", dynamic="batch")
    pairs = [({"x": images(n, n)}, model.eval()(images(n, n)).detach()) for n in (1, 5)]
    error, _ = in_a_new_process(path, pairs, tmp_path)
    assert error <= tolerance(torch.float32, 9 * 32)
    loaded = magi_train.load(path)
    assert loaded.manifest["target"] == "pt2"
    for strided in (images(0).transpose(2, 3), images(0).to(memory_format=torch.channels_last)):
        with torch.no_grad():
            torch.testing.assert_close(loaded(strided), model.eval()(strided))
    with pytest.raises(ExportError, match=r"x must be float32 \[batch in 1\.\., 3, 32, 32\]"):
        loaded(images(0).double())


def test_passes_of_training_never_reach_an_export(tmp_path):
    class Mine:
        def __init__(self, stage):
            self.name, self.stage = f"mine_{stage}", stage
            self.training = []

        def plan(self, gm, context):
            self.training.append(context.training)
            return Plan()

        def apply(self, gm, plan, context):
            pass

        def uuid(self):
            return self.name

    mine = [Mine(stage) for stage in Stage]
    for each in mine:
        register_pass(each)
    try:
        prepared = magi_train.prepare(Block(), config=Config(lowering="aot_eager"))
        prepared(images(0)).sum().backward()
        magi_train.export(prepared, (images(0),), tmp_path / "model.pt2")
    finally:
        for each in mine:
            unregister_pass(each.name)
    ran = [row["name"] for row in magi_train.load(tmp_path / "model.pt2").manifest["passes"]]
    assert ran == [*PASSES, "mine_pre_grad"]
    assert [each.training for each in mine] == [[True, False], [True], [True]]


def test_a_prepared_module_exports_as_the_plain_one(tmp_path):
    plain = Block()
    prepared = magi_train.prepare(plain, config=Config(lowering="aot_eager"))
    prepared(images(0)).sum().backward()
    for name, module in (("a", plain), ("b", prepared)):
        magi_train.export(module, (images(0),), tmp_path / f"{name}.pt2")
    a, b = (magi_train.load(tmp_path / f"{n}.pt2")(x=images(1)) for n in "ab")
    assert torch.equal(a, b)
    assert difference({"y": a}, {"y": plain.eval()(images(1))}) < 1e-5


def test_sizes_are_found_declared_or_fixed(tmp_path):
    class Fixed(nn.Module):
        def forward(self, ids, x):
            return x.sum(1) + (ids.float() @ torch.ones(6))[:, None]

    path = tmp_path / "model.pt2"
    ids, x = torch.zeros(1, 6, dtype=torch.long), torch.randn(1, 6, 4)
    report = magi_train.export(Fixed(), (ids, x), path, dynamic="auto")
    assert "sequence of ids is fixed at 6: the model's code depends on that number" in report.notes
    assert magi_train.load(path)(ids.expand(5, 6), x.expand(5, 6, 4)).shape == (5, 4)
    with pytest.raises(ExportError, match="sequence of ids is fixed at 6"):
        magi_train.export(Fixed(), (ids, x), path, dynamic=("batch", "sequence"))
    with pytest.raises(ExportError, match="no input has a sequence dimension"):
        magi_train.export(nn.ReLU(), (torch.ones(2, 2),), path, dynamic="sequence")
    with pytest.raises(ValueError, match="'batch', 'sequence' or both"):
        magi_train.export(nn.ReLU(), (torch.ones(2, 2),), path, dynamic="rows")
    width = {"input": {1: Dim("width", min=2, max=9)}}
    magi_train.export(nn.ReLU(), (torch.ones(2, 3),), path, dynamic_shapes=width)
    run = magi_train.load(path)
    assert str(run.contract.sizes()["width"]) == "width in 2..9"
    assert run(torch.ones(2, 9)).shape == (2, 9)
    with pytest.raises(ExportError, match="dimension 1 does not fit"):
        run(torch.ones(2, 10))


def test_results_keep_their_names_and_some_can_be_dropped(tmp_path):
    model, path, x = Heads(), tmp_path / "model.pt2", torch.randn(2, 3, 8)
    report = magi_train.export(model, {"x": x, "mask": None, "scale": 2.0}, path)
    assert "output cache is left out of the file" in report.notes
    out = magi_train.load(path)(x)
    assert list(out) == ["scores", "values"]
    assert out.scores is out["scores"]
    torch.testing.assert_close(out["scores"], model(x, scale=2.0)["scores"])
    magi_train.export(model, (x,), path, outputs=["values"])
    run = magi_train.load(path)
    assert [each.name for each in run.contract.outputs] == ["values"]
    weights = torch.export.load(path).state_dict
    assert not any(".q." in name or ".k." in name for name in weights), "dead weights stay"
    with pytest.raises(ExportError, match=r"outputs \['nothing'\] not found"):
        magi_train.export(model, (x,), path, outputs=["nothing"])


def test_masks_are_proven_for_sizes_that_change(tmp_path):
    class Attend(nn.Module):
        def __init__(self, window):
            super().__init__()
            self.window = window

        def forward(self, x):
            at = torch.arange(x.shape[1])
            mask = (at[:, None] >= at) & (at[:, None] - at < self.window)
            mask = mask[None, None].expand(x.shape[0], 1, -1, -1)
            q = x[:, None]
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    x, path = torch.randn(2, 8, WIDTH), tmp_path / "model.pt2"
    ranges = {"batch": (1, None), "sequence": (1, 32)}
    row = magi_train.export(Attend(32), (x,), path, dynamic=ranges).rows[0]
    assert row.plan["causal"] == ["scaled_dot_product_attention"]
    for size in ((1, 1), (3, 32)):
        y = torch.randn(*size, WIDTH)
        torch.testing.assert_close(magi_train.load(path)(y), Attend(32)(y))
    # a window that only the longest sequence shows
    row = magi_train.export(Attend(31), (x,), path, dynamic=ranges).rows[0]
    assert not row.plan["causal"]
    y = torch.randn(1, 32, WIDTH)
    torch.testing.assert_close(magi_train.load(path)(y), Attend(31)(y))
    row = magi_train.export(Attend(32), (x,), path, dynamic="auto").rows[0]
    assert "largest sequence is not declared" in row.plan["left_alone"][0][1]


def test_errors_say_what_is_wrong_and_leave_nothing(tmp_path, monkeypatch):
    class Broken(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum().item() > 0 else x

    path, x = tmp_path / "model.pt2", torch.ones(2)
    for module, inputs, words in (
        (Broken(), (x,), r"torch\.export cannot capture Broken"),
        (nn.ReLU(), x, "must be a tuple or a mapping"),
        (nn.ReLU(), ([x],), "input is a list"),
        (nn.ReLU(), {"other": x}, "cannot be called so"),
        (nn.Linear(3, 3), (x,), "Linear itself fails on example_inputs"),
        (nn.ReLU(), (), "cannot be called so"),
    ):
        with pytest.raises(ExportError, match=words):
            magi_train.export(module, inputs, path)
    with pytest.raises(ValueError, match="must be one of"):
        magi_train.export(nn.ReLU(), (x,), path, target="tensorflow")

    def fails(program, name):
        name.write_bytes(b"half")
        raise OSError("disk full")

    path.write_text("as it was")
    monkeypatch.setattr(torch.export, "save", fails)
    with pytest.raises(ExportError, match=r"cannot write .*model\.pt2 as 'program': disk full"):
        magi_train.export(nn.ReLU(), (x,), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "as it was"
