"""Patch products: numbers, strides behind them, refusals, other passes beside them, exports."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magi_train
from magi_train import Config, ExportConfig, FusionConfig
from magi_train.capture import pre_grad_passes
from magi_train.core import compat, hardware
from magi_train.core.graph import example_value, op_name
from magi_train.core.passes import PassContext
from magi_train.exporter.write import inference_passes
from magi_train.fusion import fp8_match
from magi_train.fusion.patches import PatchConvolutions
from tests.close import difference, relative_error, tolerance
from tests.models import BATCH, WIDTH, images, tokens, vit

FULL = pytest.mark.full


def patched(function, plans, always=True, dynamic=None):
    """Return `function`, captured, with the pass run over its graph."""
    torch._dynamo.reset()
    context = PassContext("cuda")  # the graph itself is traced and run on the CPU

    def backend(gm, _):
        the_pass = PatchConvolutions(always)
        plans.append(the_pass.plan(gm, context))
        if plans[-1] is not None:
            the_pass.apply(gm, plans[-1], context)
        gm.graph.lint()
        gm.recompile()
        return gm.forward

    def run(*inputs):
        with compat.capture_settings():
            return compiled(*inputs)

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    return run


def plan_of(function, *inputs, **how):
    plans = []
    patched(function, plans, **how)(*inputs)
    assert len(plans) == 1
    return plans[0]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_tokens(y):
    """What vision transformers do behind their stem, and a loss that no two elements share."""
    out = y.flatten(2).transpose(1, 2).sin()
    return (out * torch.arange(out.shape[1]).add(1)[:, None]).sum()


STEMS = {
    "1d": (lambda **k: nn.Conv1d(2, 6, 16, 16, **k), (3, 2, 64)),
    "1d of one channel": (lambda **k: nn.Conv1d(1, 6, 32, 32, **k), (3, 1, 96)),
    "2d": (lambda **k: nn.Conv2d(3, 8, 4, 4, **k), (2, 3, 16, 12)),
    "2d, oblong": (lambda **k: nn.Conv2d(3, 8, (2, 8), (2, 8), **k), (2, 3, 6, 16)),
    "2d, rows": (lambda **k: nn.Conv2d(4, 8, (1, 8), (1, 8), **k), (2, 4, 3, 16)),
    "2d, one patch": (lambda **k: nn.Conv2d(3, 8, 4, 4, **k), (2, 3, 4, 4)),
    "2d, valid": (lambda **k: nn.Conv2d(3, 8, 4, 4, padding="valid", **k), (2, 3, 8, 8)),
    "3d": (lambda **k: nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4), **k), (2, 3, 4, 8, 12)),
}


def results(function, stem, x):
    """Return the result and every gradient."""
    stem.zero_grad(set_to_none=True)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(x)
    loss.backward()
    grads = {name: p.grad for name, p in stem.named_parameters()}
    return {"loss": loss.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", STEMS)
def test_numbers(kind, bias, dtype):
    make, shape = STEMS[kind]
    stem, x = make(bias=bias).to(dtype), random(*shape, dtype=dtype)
    function = lambda x: as_tokens(stem(x))  # noqa: E731
    want, plans = results(function, stem, x), []
    got = results(patched(function, plans), stem, x)
    assert len(plans[0].products) == 1
    assert plans[0].copied == plans[0].left_alone == ()
    assert difference(got, want) < tolerance(dtype, x.numel())


@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "float16"])
@pytest.mark.parametrize("stem", ["1d", "2d", "3d"])
def test_half_precision_rounds_no_more_than_the_convolution(stem, kind):
    make, shape = STEMS[stem]
    stem, x = make(), random(*shape)
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    if kind != "autocast":
        stem, x = stem.to(dtype), x.to(dtype)

    def function(x):
        with torch.autocast("cpu", dtype, enabled=kind == "autocast"):
            y = stem(x)
        assert y.dtype == dtype
        return as_tokens(y.double())

    plain, plans = results(function, stem, x), []
    got = results(patched(function, plans, always=False), stem, x)
    assert len(plans[0].products) == 1
    assert all(got[name].dtype == plain[name].dtype for name in plain)
    stem = stem.double()
    want = results(lambda x: as_tokens(stem(x)), stem, x.double())
    assert relative_error(got, want) < 1.1 * relative_error(plain, want)


def test_frozen_weights_and_channels_last():
    make, shape = STEMS["2d"]
    stem = make().requires_grad_(False).to(memory_format=torch.channels_last)
    x = random(*shape).to(memory_format=torch.channels_last)
    function = lambda x: as_tokens(stem(x))  # noqa: E731
    want, plans = results(function, stem, x), []
    got = results(patched(function, plans), stem, x)
    assert len(plans[0].products) == 1
    assert got["weight"] is got["bias"] is None
    assert difference(got, want) < tolerance(torch.float32, x.numel())


def test_a_dynamic_batch_is_one_graph():
    make, shape = STEMS["2d"]
    stem, plans = make(), []
    function = lambda x: as_tokens(stem(x))  # noqa: E731
    run = patched(function, plans)
    for rows in (2, 3, 7):
        x = random(rows, *shape[1:], seed=rows)
        torch._dynamo.mark_dynamic(x, 0)
        assert difference({"y": run(x)}, {"y": function(x)}) < tolerance(torch.float32, x.numel())
    assert [len(plan.products) for plan in plans] == [1]


# -- strides -------------------------------------------------------------------------------------


@torch.library.custom_op("magi_tests::reads_memory", mutates_args=())
def reads_memory(x: torch.Tensor) -> torch.Tensor:
    """Sum; another library's op, which may take its argument for dense."""
    return x.sum()


@reads_memory.register_fake
def _(x):
    return x.new_empty(())


BEHIND = {
    "tokens": (as_tokens, False),
    "normed image": (lambda y: F.layer_norm(y.permute(0, 2, 3, 1), (8,)).sin().sum(), False),
    "returned": (lambda y: y, True),
    "returned by a view": (lambda y: y.flatten(2).transpose(1, 2), True),
    "viewed": (lambda y: y.view(2, -1).sin().sum(), True),
    "viewed behind another op": (lambda y: y.exp().view(2, -1).sin().sum(), True),
    "written": (lambda y: y.mul_(2).sum(), True),
    "written through a view": (lambda y: (y.flatten(2).mul_(2).sum(), y.sum())[1], True),
    "as_strided": (lambda y: y.as_strided((3, 5), (7, 1)).sum(), True),
    "of another library": (lambda y: reads_memory(y.exp()), True),
}  # fmt: skip


@pytest.mark.parametrize("behind", BEHIND)
def test_what_needs_the_old_layout_gets_it(behind):
    after, copied = BEHIND[behind]
    (make, shape), plans = STEMS["2d"], []
    stem, x = make(), random(*shape)
    function = lambda x: after(stem(x))  # noqa: E731
    got, want = patched(function, plans)(x), function(x)
    assert len(plans[0].products) == 1
    assert plans[0].copied == (plans[0].products if copied else ())
    assert got.stride() == want.stride()
    assert difference({"y": got}, {"y": want}) < tolerance(torch.float32, x.numel())


class Beside(nn.Module):
    """Ops behind a stem whose trial on fake values must leave nothing behind."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.stem = kind, nn.Conv2d(3, 8, 4, 4)
        self.register_buffer("mean", torch.zeros(2, 8, 4, 3))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        y = self.stem(x)
        if self.kind == "data-dependent":
            return (y > 0).nonzero().float().mean() * y[y > 0].sin().sum()
        if self.kind == "buffer":
            self.mean.mul_(0.9).add_(self.scale * y)
            return (y + self.mean).sin().sum()
        return torch.utils.checkpoint.checkpoint(torch.sin, y, use_reentrant=False).sum()


@pytest.mark.parametrize("kind", ["data-dependent", "buffer", "checkpointed"])
def test_trying_leaves_nothing_behind(kind):
    got = []
    for patches in (False, True):
        torch.manual_seed(0)
        model, x = Beside(kind), random(2, 3, 16, 12)
        got.append(run(model, {"x": x}, patches))
        got[-1][0]["mean"] = model.mean.detach()
    assert len(got[1][1]["patch_convolutions"]["products"]) == 1
    assert difference(got[1][0], got[0][0]) < tolerance(torch.float32)


def test_a_channels_last_image_keeps_its_layout_for_nothing():
    make, shape = STEMS["2d"]
    stem, x = make(), random(*shape).to(memory_format=torch.channels_last)
    plans = []
    got, want = patched(stem.forward, plans)(x), stem(x)
    assert plans[0].products
    assert plans[0].copied == ()
    assert got.stride() == want.stride()
    assert not got.is_contiguous()
    torch.testing.assert_close(got, want)


def test_two_products_are_tried_together():
    make, shape = STEMS["2d"]
    one, two, x = make(), make(), random(*shape)
    # alone, either is made contiguous by the concatenation
    function = lambda x: torch.cat([one(x), two(x)], 1).view(2, -1).sin().sum()  # noqa: E731
    plans = []
    got, want = patched(function, plans)(x), function(x)
    assert len(plans[0].products) == 2
    assert len(plans[0].copied) == 1
    torch.testing.assert_close(got, want)


def test_another_layout_that_must_stay():
    make, shape = STEMS["2d"]
    stem, graphs = make(), []
    keep = lambda gm, _: graphs.append(gm) or gm.forward  # noqa: E731
    torch._dynamo.reset()
    with compat.capture_settings():
        torch.compile(lambda x: stem(x).exp(), backend=keep)(random(*shape))
    node = next(n for n in graphs[0].graph.nodes if op_name(n) == "conv2d")
    fake = example_value(node)
    with fake.fake_mode:
        node.meta["example_value"] = fake.new_empty(fake.shape[::-1]).permute(3, 2, 1, 0)
    plan = PatchConvolutions(True).plan(graphs[0], PassContext())
    assert plan.products == ()
    assert plan.left_alone[0][1].startswith("its layout must stay: ")


# -- refusals ------------------------------------------------------------------------------------


REFUSED = {
    "overlap": (nn.Conv2d(3, 8, 4, 2), (2, 3, 16, 16), "stride 2x2 is not its kernel's size 4x4"),
    "gaps": (nn.Conv1d(3, 8, 12, 13), (2, 3, 52), "stride 13 is not its kernel's size 12"),
    "padding": (nn.Conv2d(3, 8, 4, 4, padding=2), (2, 3, 16, 16), "it pads its input"),
    "same": (nn.Conv2d(3, 8, 1, padding="same"), (2, 3, 16, 16), "it pads its input"),
    "dilation": (nn.Conv2d(3, 8, 4, 4, dilation=2), (2, 3, 16, 16), "it is dilated"),
    "groups": (nn.Conv2d(4, 8, 4, 4, groups=2), (2, 4, 16, 16), "it has 2 groups"),
    "channels": (nn.Conv2d(16, 8, 4, 4), (2, 16, 16, 16), "16 input channels are many"),
    "small": (nn.Conv2d(3, 8, 3, 3), (2, 3, 9, 9), "patches have 27 numbers, fewer than 32"),
    "no batch": (nn.Conv2d(3, 8, 4, 4), (3, 16, 16), "its input has no batch dimension"),
    "a rest": (nn.Conv2d(3, 8, 4, 4), (2, 3, 16, 18), "kernel 4x4 does not divide its input 16x18"),
    "complex": (nn.Conv1d(3, 8, 12, 12, dtype=torch.complex64), (2, 3, 24), "it yields torch.comp"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_refusals_have_reasons(why):
    stem, shape, reason = REFUSED[why]
    x = random(*shape).to(stem.weight.dtype)
    plan, plans = plan_of(stem.forward, x), []
    assert plan.products == ()
    assert reason in plan.left_alone[0][1]
    assert torch.equal(patched(stem.forward, plans)(x), stem(x))


def test_dynamic_spatial_sizes_are_refused():
    make, shape = STEMS["2d"]
    plan = plan_of(make().forward, random(*shape), dynamic=True)
    assert [reason for _, reason in plan.left_alone] == ["a spatial size of its input is dynamic"]


def test_unknown_shapes_are_refused():
    stem, graph = nn.Conv2d(3, 8, 4, 4), torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    graph.output(graph.call_function(torch.conv2d, (x, weight), {"stride": 4}))
    plan = PatchConvolutions(True).plan(torch.fx.GraphModule(stem, graph), PassContext())
    assert plan.left_alone == (("conv2d", "the shapes of its tensors are not known"),)


def test_only_half_precision_unless_asked():
    make, shape = STEMS["2d"]
    plan = plan_of(make().forward, random(*shape), always=False)
    assert plan.products == ()
    assert "torch.float32 may lose" in plan.left_alone[0][1]


def test_a_graph_without_convolutions_has_no_plan():
    assert plan_of(torch.sin, random(2)) is None


# -- where it runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "device", "runs"),
    [(None, "cpu", False), (None, "cuda", True), (True, "cpu", True), (False, "cuda", False)],
)
def test_accelerators_unless_asked(wanted, device, runs):
    training = Config(fusion=FusionConfig(patches=wanted))
    for passes in (
        pre_grad_passes(training, device, budgeted=False),
        inference_passes(ExportConfig(patches=wanted), device, "program"),
    ):
        found = [p for p in passes if isinstance(p, PatchConvolutions)]
        assert [p.always for p in found] == [wanted is True] * runs
    elsewhere = inference_passes(ExportConfig(patches=wanted), device, "onnx")
    assert any(isinstance(p, PatchConvolutions) for p in elsewhere) == (wanted is True)
    assert not pre_grad_passes(Config(fusion=None), device, budgeted=False)


# -- training ------------------------------------------------------------------------------------


def clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    return CLIPVisionModel(CLIPVisionConfig(**sizes))


def swin():
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32}
    sizes |= {"window_size": 4, "hidden_size": 32, "drop_path_rate": 0.0}
    return SwinForImageClassification(SwinConfig(num_labels=5, **sizes))


def convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "image_size": 32}
    return ConvNextForImageClassification(ConvNextConfig(num_labels=5, **sizes))


def videomae():
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "image_size": 16, "patch_size": 8, "num_frames": 4}
    return VideoMAEForVideoClassification(VideoMAEConfig(num_labels=5, **sizes))


def labelled(seed=0, pixels=images):
    return {"pixel_values": pixels(seed), "labels": tokens(seed)[:, 0] % 5}


MODELS = {
    "vit": (vit, labelled),
    "clip": (clip, lambda seed=0: {"pixel_values": images(seed)}),
    "swin": (swin, labelled),
    "convnext": (convnext, labelled),
    "videomae": (videomae, lambda seed=0: labelled(seed, lambda s: random(BATCH, 4, 3, 16, 16))),
}


def run(model, batch, patches=True, autocast=False, tier="graph", **config):
    """Return loss and gradients, and the plans by the name of their pass."""
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    fusion = FusionConfig(patches=patches)
    config = Config(tier=tier, fusion=fusion, **{"lowering": "aot_eager", **config})
    prepared = magi_train.prepare(model, config=config)
    prepared._magi_runtime.shadows.manage(model.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = prepared(**batch)
    assert magi_train.report(prepared).tier == tier
    loss = loss_of_any(out)
    loss.backward()
    got = {"loss": loss.detach(), **gradients(model)}
    return got, {row.name: row.plan for row in magi_train.report(prepared).rows}


def loss_of_any(out):
    if isinstance(out, torch.Tensor):
        return out
    return out.loss if "loss" in out else out.last_hidden_state.double().sin().square().mean()


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def eager(model, batch):
    model.zero_grad(set_to_none=True)
    loss = loss_of_any(model(**batch))
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("name", MODELS)
def test_library_models(name):
    model, batch = MODELS[name][0](), MODELS[name][1]()
    want = eager(model, batch)
    keys = list(model.state_dict())
    got, plans = run(model, batch)
    plan = plans["patch_convolutions"]
    assert len(plan["products"]) == 1
    assert plan["copied"] == []
    assert (len(plan["left_alone"]) > 0) == (name == "convnext")
    assert difference(got, want) < tolerance(torch.float32)
    assert list(model.state_dict()) == keys
    weights = [p for p in model.parameters() if p.dim() > 3]
    assert weights
    assert all(p.grad.shape == p.shape for p in weights)


def test_under_autocast_the_weight_keeps_its_shadow():
    model, batch = vit(), labelled()
    _, without = run(model, batch, patches=False, autocast=True)
    got, plans = run(model, batch, autocast=True)
    assert "patch_convolutions" not in without
    assert len(plans["patch_convolutions"]["products"]) == 1
    shadowed = plans["use_weight_shadows"]
    assert shadowed == without["use_weight_shadows"]
    kept = model.vit.embeddings.patch_embeddings.projection.weight.numel() * 2 / 2**20
    assert shadowed["mib_not_written"] > kept
    plain, _ = run(model, batch, patches=False, autocast=True)
    want = eager(model.double(), {**batch, "pixel_values": batch["pixel_values"].double()})
    assert relative_error(got, want) < 1.1 * relative_error(plain, want)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.stem(x).flatten(2).transpose(1, 2).sin().mean(1))


class Towers(nn.Module):
    """Two blocks with a stem each, which REGION compiles one by one."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList(Tower() for _ in range(2))

    def forward(self, pixel_values):
        one, two = (tower(pixel_values) for tower in self.towers)
        return (one * two.cos()).square().mean()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tier", ["graph", "region"])
def test_training_in_both_tiers(tier, autocast):
    model, batch = Towers(), {"pixel_values": images(0).requires_grad_()}
    plain, _ = run(model, batch, patches=False, autocast=autocast, tier=tier)
    plain["x"], batch["pixel_values"].grad = batch["pixel_values"].grad, None
    got, plans = run(model, batch, autocast=autocast, tier=tier)
    got["x"], batch["pixel_values"].grad = batch["pixel_values"].grad, None
    count = {"graph": 2, "region": 1}[tier]  # REGION: one graph for both blocks
    assert len(plans["patch_convolutions"]["products"]) == count
    double = {"pixel_values": images(0).double().requires_grad_()}
    want = eager(model.double(), double)
    want["x"] = double["pixel_values"].grad
    limit = tolerance(torch.bfloat16 if autocast else torch.float32, images(0).numel())
    assert difference(got, want) < limit
    assert relative_error(got, want) < 1.1 * relative_error(plain, want) or not autocast


@FULL
def test_generated_code():
    model, batch = vit(), labelled()
    want = eager(model, batch)
    got, _ = run(model, batch, lowering="inductor")
    assert difference(got, want) < tolerance(torch.float32)


def test_off_on_the_cpu_by_default():
    _, plans = run(vit(), labelled(), patches=None, autocast=True)
    assert "patch_convolutions" not in plans


def test_fp8_leaves_the_product_in_bfloat16(monkeypatch):
    monkeypatch.setattr(hardware, "no_fp8_because", lambda _: "")
    free = fp8_match.Machine(1.0, 2.0, 1e12, 0.0)  # on which every linear gains
    monkeypatch.setattr(fp8_match, "MACHINE", free)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, WIDTH, 8, 8)
            self.up, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16)

        def forward(self, pixel_values):
            x = self.stem(pixel_values).flatten(2).transpose(1, 2)
            return self.head(self.up(x).sin()).square().mean()

    _, plans = run(Net(), {"pixel_values": images(0)}, autocast=True, precision="fp8")
    assert len(plans["patch_convolutions"]["products"]) == 1
    assert len(plans["fp8_linears"]["linears"]) == 1
    reasons = [left[-1] for left in plans["fp8_linears"]["left_alone"]]
    assert "its weight has 4 dimensions: a convolution, no linear" in reasons


# -- export --------------------------------------------------------------------------------------


def exported(model, path, **settings):
    """Return the plans that the manifest of the new file holds, and what the program calls."""
    config = ExportConfig(patches=True, **settings)
    inputs = {"pixel_values": images(0)}
    magi_train.export(model, inputs, path, dynamic={"batch": (1, 8)}, config=config)
    rows = magi_train.load(path).manifest["passes"]
    program = torch.export.load(path)
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    return {row["name"]: row["plan"] for row in rows}, called


@pytest.mark.parametrize("name", ["vit", "clip", "swin", "convnext"])
def test_exported_programs(name, tmp_path):
    model, path = MODELS[name][0]().eval(), tmp_path / "model.pt2"
    plans, called = exported(model, path, merge_linears=True, channels_last=True)
    assert len(plans["patch_convolutions"]["products"]) == 1
    assert plans["patch_convolutions"]["copied"] == []
    assert any("conv2d" in each for each in called) == (name == "convnext")
    file = magi_train.load(path)
    for rows in (1, 3):
        x = images(1)[:rows]
        with torch.no_grad():
            want = model(pixel_values=x)
        got = file(pixel_values=x)
        for key in ("logits", "last_hidden_state"):
            if key in want:
                value = got if isinstance(got, torch.Tensor) else got[key]
                assert difference({key: value}, {key: want[key]}) < tolerance(torch.float32)


class Normed(nn.Module):
    """A stem with BatchNorm behind it, which returns an image."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4, bias=False), nn.BatchNorm2d(8)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, pixel_values):
        return self.norm(self.stem(pixel_values)).relu()


def test_batch_norm_is_folded_first(tmp_path):
    model, path = Normed().eval(), tmp_path / "model.pt2"
    plans, called = exported(model, path)
    assert len(plans["fold_batch_norm"]["folded"]) == 1
    plan = plans["patch_convolutions"]
    assert plan["products"] == plan["copied"]
    assert len(plan["products"]) == 1
    assert not any("batch_norm" in each or "conv" in each for each in called)
    with torch.no_grad():
        want = model(images(1))
    got = magi_train.load(path)(images(1))
    assert got.stride() == want.stride()
    assert difference({"y": got}, {"y": want}) < tolerance(torch.float32, 48)


@FULL
@pytest.mark.filterwarnings("ignore")  # of torchao, as it is imported
def test_narrow_weights_are_those_of_linears(tmp_path):
    pytest.importorskip("torchao")
    path = tmp_path / "model.pt2"
    model = vit().eval()
    plans, _ = exported(model, path, precision="int8")
    assert len(plans["patch_convolutions"]["products"]) == 1
    shape = model.vit.embeddings.patch_embeddings.projection.weight.shape
    weights = [t for t in torch.export.load(path).state_dict.values() if t.shape == shape]
    assert [w.dtype for w in weights] == [torch.float32]
