"""Chunked linear + cross-entropy: what it plans, computes, refuses; no full logits are left."""

import copy
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import magi_train
from magi_train import Config
from magi_train.core import compat
from magi_train.core.config import FusionConfig
from magi_train.core.graph import before_widening, example_value, num_bytes, saved_for_backward
from magi_train.core.passes import PassContext, Stage
from magi_train.fusion.chunked import (
    Recipe,
    chunk_bounds,
    chunked_cross_entropy,
    copy_after,
    cross_entropy,
)
from magi_train.fusion.kernels import cross_entropy as kernels
from magi_train.fusion.loss import ChunkLinearCrossEntropy
from tests.close import difference, tolerance
from tests.models import Small, UnusedFrozenTied, bert, gpt2, llama, t5, tokens

TOKENS, WIDTH, VOCABULARY = 37, 19, 53  # no size divides another
CPU = PassContext("cpu")
GPU = PassContext("cuda")  # decides what is planned; what runs is the host's form of the op
CHUNK_BYTES = 3000
"""Three chunks or more at these sizes, in any dtype."""
ROOT = Path(__file__).parents[2]
RECIPE = Recipe(
    ignore_index=-100, mean=True, smoothing=0.0, slices=(), steps=(), vocabulary=VOCABULARY,
    transposed=False, differentiated=(True, True, False), compute=torch.bfloat16,
    wide=torch.float32, out=torch.float32,
)  # fmt: skip


class Head(nn.Module):
    """A layer, a head and a loss of the hidden states; what the tests vary are the arguments."""

    def __init__(self, bias=False, loss=F.cross_entropy, logits=lambda z: z, **settings):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        self.loss, self.logits, self.settings = loss, logits, settings

    def forward(self, x, labels):
        return self.loss(self.logits(self.head(self.layer(x))), labels, **self.settings)


def batch(ignored=-100, every=4, dtype=torch.float32):
    torch.manual_seed(1)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[::every] = ignored
    return torch.randn(TOKENS, WIDTH, dtype=dtype), labels


class Backend:
    """Runs the pass in a Dynamo backend, where ambient autocast is what it is in training."""

    def __init__(self, chunk_bytes=CHUNK_BYTES, context=CPU):
        self.work, self.context = ChunkLinearCrossEntropy(chunk_bytes), context
        self.plan = self.gm = None

    def __call__(self, gm, inputs):
        self.gm, self.plan = gm, self.work.plan(gm, self.context)
        if self.plan is not None:
            self.work.apply(gm, self.plan, self.context)
            gm.graph.lint()
            gm.recompile()
        return gm.forward


def compiled(function, *inputs, dynamic=False, chunk_bytes=CHUNK_BYTES, context=CPU):
    """Return the output of `function` with the pass applied, and the backend."""
    backend = Backend(chunk_bytes, context)
    torch._dynamo.reset()
    with compat.capture_settings():
        run = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
        return run(*inputs), backend


def reason(function, *inputs):
    """Return why the loss of `function` is left alone."""
    _, backend = compiled(function, *inputs)
    assert not backend.plan.chunked
    ((_, why),) = backend.plan.left_alone
    return why


def gradients(loss, model, *others):
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    return {"loss": loss.detach(), **found, **{f"input {i}": o.grad for i, o in enumerate(others)}}


def truth(model, x, labels, upstream=1.0):
    """Loss and every gradient in float64."""
    exact = copy.deepcopy(model).double()
    y = x.detach().double().requires_grad_()
    return gradients(exact(y, labels) * upstream, exact, y)


def check(model, x, labels, limit, upstream=1.0, autocast=False, **how):
    want = truth(model, x, labels, upstream)
    y = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, backend = compiled(model, y, labels, **how)
    assert backend.plan.chunked, backend.plan
    got = gradients(loss * upstream, model, y)
    assert difference(got, want) < limit
    return backend


def nll(z, labels, **settings):
    return F.nll_loss(F.log_softmax(z, dim=-1), labels, **settings)


def over_items(z, labels, **settings):
    return F.cross_entropy(z, labels, reduction="sum", **settings) / torch.tensor(11)


FORMS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "bias": {"bias": True},
    "smoothing": {"label_smoothing": 0.1},
    "smoothed sum with bias": {"label_smoothing": 0.3, "reduction": "sum", "bias": True},
    "ignored class": {"ignore_index": 7},
    "items in batch": {"loss": over_items},
    "log_softmax and nll": {"loss": nll, "ignore_index": -1},
    "upcast": {"logits": lambda z: z.float().contiguous().view(-1, VOCABULARY)},
    "scaled": {"logits": lambda z: z * 0.5 / 3},
    "softcapped": {"logits": lambda z: torch.tanh(z / 2) * 2},
}


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_equal_float64(form):
    torch.manual_seed(0)
    x, labels = batch(FORMS[form].get("ignore_index", -100))
    limit = tolerance(torch.float32, TOKENS)
    backend = check(Head(**FORMS[form]), x, labels, limit, upstream=5.0)
    sizes = {tuple(v.shape) for n in backend.gm.graph.nodes if (v := tensor(n)) is not None}
    assert (TOKENS, VOCABULARY) not in sizes, "the full logits still exist"
    assert any(len(s) == 2 and s[1] == VOCABULARY for s in sizes), "chunks of logits were expected"


def tensor(node):
    value = example_value(node)
    return value if isinstance(value, torch.Tensor) else None


@pytest.mark.parametrize("form", ["mean", "bias", "smoothing", "items in batch", "upcast"])
@pytest.mark.parametrize("by", ["plain ops", "kernel", "kernel, whole"])
def test_under_bf16_autocast_it_is_no_worse_than_eager(form, by, monkeypatch):
    monkeypatch.setattr("magi_train.fusion.loss.KERNEL_LEAST_MIB", 0.0)
    how = {} if by == "plain ops" else {"context": GPU}
    how |= {"chunk_bytes": 10**9} if by == "kernel, whole" else {}
    torch.manual_seed(0)
    x, labels = batch()
    model = Head(**FORMS[form])
    want = truth(model, x, labels)
    eager, y = copy.deepcopy(model), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = eager(y, labels)
    floor = difference(gradients(loss, eager, y), want)
    limit = tolerance(torch.bfloat16, 1)
    assert floor < limit
    backend = check(model, x, labels, limit, autocast=True, **how)
    (loss,) = backend.plan.chunked
    assert (loss.chunks == 1, loss.kernel) == (by == "kernel, whole", by != "plain ops")
    ops = [n for n in backend.gm.graph.nodes if n.target is cross_entropy]
    assert len(ops) == (loss.chunks if loss.kernel else 0)


BODIES = {
    "mean": {},
    "sum": {"mean": False},
    "smoothing": {"smoothing": 0.1},
    "scaled": {"steps": (("scale", 0.5),)},
    "softcapped": {"steps": (("scale", 0.5), ("tanh", 0), ("scale", 3.0)), "smoothing": 0.2},
    "transposed": {"transposed": True},
    "picked": {"slices": ((slice(None), slice(1, None)),)},
    "one label": {},
}


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("how", ["", "dynamic", "kernel"])
@pytest.mark.parametrize("form", BODIES)
def test_the_body_equals_cross_entropy(form, how, chunks):
    """In float64, on tensors: the loss and the gradients of input, weight and bias."""
    wide = torch.float64
    exact = replace(
        RECIPE, compute=wide, wide=wide, out=wide, differentiated=(True, True, True),
        kernel=how == "kernel",
    )  # fmt: skip
    recipe = replace(exact, **BODIES[form])
    shape = (WIDTH, VOCABULARY) if recipe.transposed else (VOCABULARY, WIDTH)
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=wide, requires_grad=True) for s in ((3, 7, WIDTH), shape)]
    leaves.append(torch.randn(VOCABULARY, dtype=wide, requires_grad=True))
    x, weight, bias = leaves
    kept = x[:, 1:] if recipe.slices else x
    labels = torch.randint(0, VOCABULARY, (kept[..., 0].numel(),))
    labels[slice(1, None) if form == "one label" else slice(0, None, 4)] = -100
    z = kept.flatten(0, 1) @ (weight if recipe.transposed else weight.t()) + bias
    for kind, factor in recipe.steps:
        z = torch.tanh(z) if kind == "tanh" else z * factor
    reduction = "mean" if recipe.mean else "sum"
    want = F.cross_entropy(z, labels, reduction=reduction, label_smoothing=recipe.smoothing)
    size = None if how == "dynamic" else len(labels)
    columns = torch.arange(VOCABULARY)
    got = chunked_cross_entropy(x, weight, bias, labels, columns, recipe, chunks, size)
    pairs = [
        dict(zip("lxwb", (loss, *torch.autograd.grad(loss * 5, leaves)), strict=True))
        for loss in (got, want)
    ]
    assert difference(*pairs) < tolerance(wide, WIDTH)


def test_the_kernels_results_are_laid_out_as_a_graph_takes_them_to_be():
    logits, labels = torch.randn(5, 53), torch.arange(5)
    real = cross_entropy(logits, labels, -100, 0.0, 1.0, None, 50)
    fake = cross_entropy(logits.to("meta"), labels.to("meta"), -100, 0.0, 1.0, None, 50)
    for made, want in zip(fake, real, strict=True):
        assert (made.shape, made.stride(), made.dtype) == (want.shape, want.stride(), want.dtype)


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        ((), (1.0, None)),
        ((("scale", 0.5), ("scale", 0.25)), (0.125, None)),
        ((("tanh", 0),), (1.0, 1.0)),
        ((("scale", 0.5), ("tanh", 0), ("scale", 8.0), ("scale", 2.0)), (0.5, 16.0)),
        ((("tanh", 0), ("scale", 2.0), ("tanh", 0)), None),
    ],
)
def test_steps_that_are_a_soft_cap(steps, want):
    """Those of c tanh(a x), as (a, c)."""
    assert replace(RECIPE, steps=steps).soft_cap() == want


def test_what_the_kernel_is_not_for():
    x, labels = batch()
    model = Head(logits=lambda z: torch.tanh(torch.tanh(z)))
    with torch.autocast("cpu", torch.bfloat16):
        _, backend = compiled(model, x, labels, context=GPU)
    assert [each.kernel for each in backend.plan.chunked] == [False]
    _, backend = compiled(Head(), x, labels, context=GPU)  # float32
    assert [each.kernel for each in backend.plan.chunked] == [False]
    with torch.autocast("cpu", torch.bfloat16):
        _, backend = compiled(Head(), x, labels, context=GPU, chunk_bytes=10**9)
    assert not backend.plan.chunked, "logits of a few KiB are not worth a rewrite"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 61), (3, 8192), (2, 20001), (50, 2)])
@pytest.mark.parametrize(
    "settings", [(0.0, 1.0, None), (0.1, 1.0, None), (0.0, -0.3, None), (0.2, 1 / 30, 30.0)]
)
def test_the_kernel_equals_float64(dtype, shape, settings, padded):
    torch.manual_seed(0)
    logits = (torch.randn(shape) * 8).to(dtype)
    labels = torch.randint(0, shape[1], (2 * shape[0],))[::2]
    labels[0] = -100
    if padded:  # as generated code lays logits out
        logits = F.pad(logits, (0, -shape[1] % 64))[:, : shape[1]]
    got = kernels.cross_entropy(logits, labels, -100, *settings)
    want = kernels.cross_entropy_reference(logits.double(), labels, -100, *settings)
    if padded:  # columns behind the vocabulary change nothing, whatever they hold
        wider = F.pad(logits, (0, -shape[1] % 64), value=torch.inf)
        loss, gradient = kernels.cross_entropy(wider, labels, -100, *settings, shape[1])
        assert torch.equal(loss, got[0])
        assert torch.equal(gradient[:, : shape[1]], got[1])
        assert gradient[:, shape[1] :].isfinite().all(), "0 times it is 0"
    # sums of a row in float32, then one rounding to the dtype of the logits; Triton's interpreter
    # truncates to bfloat16, which is off by twice as much
    wide = tolerance(torch.float32, max(shape[1], 16))
    assert difference({"": got[0]}, {"": want[0]}) < wide
    assert difference({"": got[1]}, {"": want[1]}) < wide + tolerance(dtype, 1, 2)
    assert got[1].dtype is dtype
    assert not got[1][0].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter
def test_the_kernel_carries_what_is_not_finite_and_marks_wrong_labels():
    logits = torch.randn(6, 300)
    logits[1, 3], logits[2, 250], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[3, 299] = 1.0
    labels = torch.tensor([0, 1, 2, 299, 300, -1])
    losses, gradients = kernels.cross_entropy(logits, labels, -100)
    assert losses.isnan().tolist() == [False, True, True, False, True, True]
    assert losses[3] == 0, "a row of -inf but for its label is certain"
    assert gradients.isnan().any(1).tolist() == [False, True, True, False, True, True]
    want = kernels.cross_entropy_reference(logits, labels, -100)
    assert torch.equal(want[0].isfinite(), losses.isfinite())


def test_bf16_weights_without_autocast():
    torch.manual_seed(0)
    x, labels = batch()
    check(Head(bias=True).bfloat16(), x.bfloat16(), labels, tolerance(torch.bfloat16, 1))


def test_a_batch_without_a_label_is_nan_with_the_gradients_of_eager():
    x, _ = batch()
    labels = torch.full((TOKENS,), -100)
    model = Head()
    want = copy.deepcopy(model)
    eager = gradients(want(x, labels), want)
    loss, backend = compiled(model, x, labels)
    got = gradients(loss, model)
    assert backend.plan.chunked
    assert got["loss"].isnan()
    assert eager["loss"].isnan()
    for name, gradient in eager.items():
        assert torch.equal(got[name].isnan(), gradient.isnan()), name
        assert torch.equal(got[name].nan_to_num(), gradient.nan_to_num()), name


@pytest.mark.parametrize("frozen", ["head", "layer"])
def test_frozen_parts_get_no_gradient_and_cost_none(frozen):
    model = Head(bias=True)
    getattr(model, frozen).requires_grad_(False)
    x, labels = batch()
    exact = copy.deepcopy(model).double()
    want = gradients(exact(x.double(), labels), exact)
    loss, backend = compiled(model, x, labels)
    assert backend.plan.chunked
    got = gradients(loss, model)
    assert difference(got, want) < tolerance(torch.float32, TOKENS)
    attach = next(n for n in backend.gm.graph.nodes if "attach" in n.name)
    shapes = [tuple(tensor(n).shape) for n in attach.args[2]]
    assert shapes == (
        [(TOKENS, WIDTH)] if frozen == "head" else [(VOCABULARY, WIDTH), (VOCABULARY,)]
    )


def test_a_weight_that_is_also_the_embedding_adds_up():
    torch.manual_seed(0)
    model, ids = UnusedFrozenTied(), tokens(0)
    exact = copy.deepcopy(model).double()
    want = gradients(exact(ids, ids), exact)
    loss, backend = compiled(model, ids, ids)
    assert backend.plan.chunked
    assert difference(gradients(loss, model), want) < tolerance(torch.float32)


def shifted(x, weight, labels):
    z = (x @ weight.t())[:, :-1, :].contiguous()
    return F.cross_entropy(z.view(-1, z.size(-1)), labels[:, 1:].reshape(-1))


def shifted_first(x, weight, labels):  # the weight lies the other way round, tokens are skipped
    z = torch.matmul(x, weight.T.contiguous())[..., 1:-1:2, :]
    return F.cross_entropy(z.flatten(0, 1).float(), labels[:, 1:-1:2].flatten(), reduction="sum")


@pytest.mark.parametrize("function", [shifted, shifted_first])
@pytest.mark.parametrize("dynamic", [False, True])
def test_tokens_that_are_picked_from_the_logits(function, dynamic):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 21, WIDTH), torch.randn(VOCABULARY, WIDTH)
    labels = torch.randint(0, VOCABULARY, (3, 21))
    leaves = [x.clone().requires_grad_(), nn.Parameter(weight)]
    loss, backend = compiled(function, *leaves, labels, dynamic=dynamic)
    assert backend.plan.chunked, backend.plan
    got = torch.autograd.grad(loss, leaves)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    want = torch.autograd.grad(function(*exact, labels), exact)
    pairs = [dict(zip("xw", g, strict=True)) for g in (got, want)]
    assert difference(*pairs) < tolerance(torch.float32, 63)


def test_dynamic_sizes_are_not_fixed():
    torch._dynamo.reset()
    model, backend = Head(bias=True), Backend()
    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    graphs = set()
    for size in (TOKENS, 23, 64):
        x, labels = torch.randn(size, WIDTH), torch.randint(0, VOCABULARY, (size,))
        exact = copy.deepcopy(model).double()
        want = gradients(exact(x.double(), labels), exact)
        model.zero_grad()
        got = gradients(run(x, labels), model)
        assert difference(got, want) < tolerance(torch.float32, 64)
        graphs.add(id(backend.gm))
    assert len(graphs) == 1
    assert backend.plan.chunked


def test_logits_that_are_read_for_nothing_are_not_kept():
    def function(x, w, labels):
        logits = F.linear(x, w)
        logits.float().mul(2)  # as a wrapper around a model casts all that it returns
        return F.cross_entropy(logits, labels)

    x, labels = batch(ignored=3)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    _, backend = compiled(function, x, weight, labels)
    assert backend.plan.chunked, backend.plan


# -- refusals -------------------------------------------------------------------------------------


def returned(x, w, labels):
    z = F.linear(x, w)
    return F.cross_entropy(z, labels), z


def also_read(x, w, labels):
    z = F.linear(x, w)
    return F.cross_entropy(z, labels) + 1e-4 * torch.logsumexp(z, -1).square().mean()


def changed(x, w, labels):
    z = F.linear(x, w)
    z[:, 0] = -1.0
    return F.cross_entropy(z, labels)


def changed_input(x, w, labels):
    h = x * 1.0
    z = F.linear(h, w)
    h.detach().mul_(2.0)
    return F.cross_entropy(z, labels)


def dropped_out(x, w, labels):
    return F.cross_entropy(F.dropout(F.linear(x, w), 0.1), labels)


def not_a_linear(x, w, labels):
    return F.cross_entropy(torch.relu(x)[:, :5] * w[0, 0], labels % 5)


def rolled(x, w, labels):
    return F.cross_entropy(F.linear(x, w).roll(1, 0), labels)


def wide(x, w, labels):
    return F.cross_entropy(F.linear(x, w).t()[None], labels[None])


def soft(x, w, labels):
    return F.cross_entropy(F.linear(x, w), F.one_hot(labels, VOCABULARY).float())


def half(x, w, labels):
    return F.cross_entropy(F.linear(x.half(), w.half()).float(), labels)


def mixed(x, w, labels):
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, w)
    return F.cross_entropy(z.float(), labels)


def part_of_the_vocabulary(x, w, labels):
    return F.cross_entropy(F.linear(x, w)[:, :50], labels % 50)


def with_settings(**settings):
    return lambda x, w, labels: F.cross_entropy(F.linear(x, w), labels, **settings).sum()


REFUSED = {
    "returned": (returned, "also read by output"),
    "also read": (also_read, "is also read by"),
    "changed in place": (changed, "is also read by|changes a tensor in place"),
    "input changed in place": (changed_input, "changes a tensor in place"),
    "random": (dropped_out, "neither a linear nor"),
    "no linear": (not_a_linear, "neither a linear nor"),
    "tokens in another order": (rolled, "neither a linear nor"),
    "class dimension in the middle": (wide, "3-dimensional"),
    "soft targets": (soft, "probabilities"),
    "float16": (half, "loss scale"),
    "autocast ends": (mixed, "autocast changes"),
    "columns picked": (part_of_the_vocabulary, "neither a linear nor"),
    "class weights": (with_settings(weight=torch.ones(VOCABULARY)), "weighs classes"),
    "no reduction": (with_settings(reduction="none"), "reduction is 'none'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_alone_has_a_reason(case):
    function, expected = REFUSED[case]
    x, labels = batch(ignored=3)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    why = reason(function, x, weight, labels)
    assert any(part in why for part in expected.split("|")), why


def test_small_losses_stay_whole_by_default():
    model, ids = Small(), tokens(0)
    chunk_bytes = int(FusionConfig().loss_chunk_mib * 2**20)
    _, backend = compiled(lambda x: model(x, x), ids, chunk_bytes=chunk_bytes)
    assert not backend.plan.chunked
    assert "fits one chunk of 8192 MiB" in backend.plan.left_alone[0][1]


def test_inference_and_exported_programs_are_left_alone():
    model, ids = llama().eval(), tokens(0)
    program = torch.export.export(model, (), {"input_ids": ids, "labels": ids, "use_cache": False})
    work = ChunkLinearCrossEntropy(CHUNK_BYTES)
    assert work.plan(program.graph_module, PassContext(training=False)) is None
    plan = work.plan(program.graph_module, CPU)
    assert plan.left_alone[0][1]
    assert not plan.chunked


@pytest.mark.parametrize(("size", "chunks"), [(7, 3), (4099, 4), (8192, 3), (5, 5)])
def test_chunks_cover_every_token_once(size, chunks):
    bounds = chunk_bounds(size, chunks, static=True)
    assert [i for low, high in bounds for i in range(low, high)] == list(range(size))
    assert len(bounds) == chunks
    dynamic = chunk_bounds(size, chunks, static=False)
    assert [i for low, high in dynamic for i in range(low, high)] == list(range(size))
    if size // chunks >= 1024:
        assert all(low % 128 == 0 for low, _ in bounds)


def test_a_plan_is_what_the_report_shows():
    x, labels = batch()
    _, backend = compiled(Head(), x, labels)
    (loss,) = backend.plan.chunked
    assert (loss.node, loss.linear, loss.chunks) == ("cross_entropy", "linear_1", 6)
    assert loss.logits_mib == round(TOKENS * VOCABULARY * 4 / 2**20, 3)
    assert ChunkLinearCrossEntropy.stage is Stage.PRE_GRAD


# -- whole steps ----------------------------------------------------------------------------------

CHUNKED = FusionConfig(loss_chunk_mib=CHUNK_BYTES * 4 / 2**20)


def rows(prepared):
    return {r.name: r.plan for r in magi_train.report(prepared).rows}


def step_of(make, lowering, logits=False, autocast=False, tier="auto"):
    """Return (plan, loss and gradients) of one prepared step of a library model, and eager's."""
    torch.manual_seed(0)
    plain, ids = make(), tokens(0)
    model = copy.deepcopy(plain)
    config = Config(lowering=lowering, fusion=CHUNKED, tier=tier)

    def function(of):
        def step(input_ids):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = of(input_ids=input_ids, labels=input_ids)
            return (output.loss, output.logits) if logits else output.loss

        return step

    prepared = magi_train.prepare(model, config=config)
    step = magi_train.prepare_step(function(prepared), prepared)
    got, want = step(ids), function(plain)(ids)
    if logits:
        got, want = got[0], want[0]
    plan = rows(prepared).get(ChunkLinearCrossEntropy.name, {})
    return plan, gradients(got, model), gradients(want, plain)


@pytest.mark.parametrize(
    "make",
    [*(pytest.param(m, marks=pytest.mark.full) for m in (gpt2, t5)), llama, bert],
)
def test_steps_of_unmodified_library_models(make):
    plan, got, want = step_of(make, "aot_eager")
    assert len(plan["chunked"]) == 1, plan
    assert difference(got, want) < tolerance(torch.float32)


@pytest.mark.full
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_steps(autocast):
    plan, got, want = step_of(gpt2, "inductor", autocast=autocast)
    assert len(plan["chunked"]) == 1, plan
    dtype = torch.bfloat16 if autocast else torch.float32
    assert difference(got, want) < tolerance(dtype, 1 if autocast else 4096)


def test_logits_that_are_returned_are_kept():
    plan, got, want = step_of(llama, "aot_eager", logits=True)
    assert "also read by output" in plan["left_alone"][0][1]
    assert difference(got, want) < tolerance(torch.float32)


def test_the_region_tier_is_not_touched():
    plan, got, want = step_of(llama, "aot_eager", tier="region")
    assert not plan
    assert difference(got, want) < tolerance(torch.float32)


def test_it_can_be_switched_off_and_its_budget_is_checked():
    torch._dynamo.reset()
    model, ids = Small(), tokens(0)
    config = Config(lowering="aot_eager", fusion=FusionConfig(loss=False))
    model = magi_train.prepare(model, config=config)
    step = magi_train.prepare_step(lambda x: model(x, x), model)
    step(ids).backward()
    assert ChunkLinearCrossEntropy.name not in rows(model)
    with pytest.raises(ValueError, match="loss_chunk_mib must be positive, got 0"):
        FusionConfig(loss_chunk_mib=0)


def saved(chunk_bytes):
    """Return the bytes that AOTAutograd's forward keeps, and the largest tensor of both graphs."""
    torch._dynamo.reset()
    kept, largest = [], []

    def measure(gm, _):
        sizes = [
            v.numel() for n in gm.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)
        ]
        largest.append(max(sizes))
        if not kept:
            kept.append(sum(num_bytes(n.meta["val"]) for n in saved_for_backward(gm)))
        return compat.make_boxed(gm.forward)

    work = ChunkLinearCrossEntropy(chunk_bytes)

    def backend(gm, inputs):
        work.apply(gm, work.plan(gm, CPU), CPU)
        gm.recompile()
        return compat.aot_autograd(fw_compiler=measure, bw_compiler=measure)(gm, inputs)

    model = nn.Linear(WIDTH, 997, bias=False)
    x, labels = torch.randn(512, WIDTH), torch.randint(0, 997, (512,))
    run = torch.compile(lambda: F.cross_entropy(model(x), labels), backend=backend)
    run().backward()
    return kept[0], max(largest)


def test_the_saved_bytes_are_those_of_the_gradients():
    whole, largest = saved(2**40)
    assert whole >= 512 * 997 * 4
    assert largest == 512 * 997
    chunked, largest = saved(512 * 997)
    assert chunked <= 997 * WIDTH * 4 + 64
    assert largest <= 512 * 997 // 4


def most_alive(code, shape):
    """Return how many bfloat16 buffers of a shape generated code holds at once."""
    made = re.compile(
        rf"(buf\d+) = empty_strided_cpu\(\({shape[0]}, {shape[1]}\), .*bfloat16"
        r"|(buf\d+) = (buf\d+); del"
    )
    alive, most = set(), 0
    for line in code.splitlines():
        found = made.search(line)
        if found and (found[1] or found[3] in alive):
            alive.add(found[1] or found[2])
        alive -= set(re.findall(r"del (buf\d+)", line))
        most = max(most, len(alive))
    return most


@pytest.fixture
def traced_chunks():
    """The graph of a loss in 4 chunks and of its weight's gradient, and its inputs."""
    rows, vocabulary, chunks = 1024, 512, 4
    recipe = replace(RECIPE, vocabulary=vocabulary, differentiated=(False, True, False))

    def loss_and_gradient(weight, x, labels, columns):
        loss = chunked_cross_entropy(x, weight, None, labels, columns, recipe, chunks, rows)
        return loss, *torch.autograd.grad(loss, weight)

    weight = torch.randn(vocabulary, WIDTH, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    inputs = (weight, torch.randn(rows, WIDTH), labels, torch.arange(vocabulary))
    return make_fx(loss_and_gradient, tracing_mode="fake")(*inputs), inputs


def test_a_weights_gradient_of_one_chunk_is_bfloat16_that_is_widened():
    """So that it may travel, or stay, in bfloat16, as the gradient that autocast makes."""
    rows, vocabulary = 64, 128
    recipe = replace(RECIPE, vocabulary=vocabulary, differentiated=(False, True, False))

    def gradient(weight, x, labels, columns, upstream):
        loss = chunked_cross_entropy(x, weight, None, labels, columns, recipe, 1, rows)
        return torch.autograd.grad(loss * upstream, weight)

    torch.manual_seed(0)
    weight = torch.randn(vocabulary, WIDTH, requires_grad=True)
    x, upstream = torch.randn(rows, WIDTH), torch.tensor(0.3)
    labels = torch.randint(0, vocabulary, (rows,))
    inputs = (weight, x, labels, torch.arange(vocabulary), upstream)
    graph = make_fx(gradient, tracing_mode="fake")(*inputs)
    (result,) = graph.graph.output_node().args[0]
    assert result.meta["val"].dtype is torch.float32
    assert before_widening(result).meta["val"].dtype is torch.bfloat16
    (got,) = graph(*inputs)
    exact = (x.double() @ weight.detach().double().t()).requires_grad_()
    (dz,) = torch.autograd.grad(F.cross_entropy(exact, labels) * 0.3, exact)
    # products of numbers rounded to bfloat16, and the gradient rounded twice
    limit = tolerance(torch.bfloat16, 1)
    assert difference({"": got}, {"": dz.t() @ x.double()}) < limit


def test_chunks_do_not_wait_for_each_other_in_generated_code(traced_chunks):
    graph, inputs = traced_chunks
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(graph), *inputs)
    assert most_alive(code, (256, 512)) == 2  # logits and their gradient
    assert most_alive(code, (512, WIDTH)) == 3  # the weight and two parts of its gradient


def test_a_chunk_starts_behind_all_that_reads_the_logits_of_the_last(traced_chunks):
    graph, _ = traced_chunks
    before = {}
    for node in graph.graph.nodes:
        before[node] = set().union(*({n} | before[n] for n in node.all_input_nodes))
    starts = [n for n in graph.graph.nodes if n.target is copy_after and n.meta["val"].dim() == 2]
    assert len(starts) == 3
    (end,) = (n for n in graph.graph.nodes if n.target is copy_after and n.meta["val"].dim() == 0)
    (last,) = end.args[1]
    assert last.meta["val"].shape == (512, WIDTH), "the loss is there once all of the gradient is"
    readers = 0
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        chunk = sum(start in before[node] for start in starts)
        if not isinstance(value, torch.Tensor) or chunk == 3:
            continue
        if value.shape == (256, 512) and value.is_floating_point():
            readers += len(node.users)
            assert not set(node.users) - before[starts[chunk]], node
    assert readers > 20


CACHED = """
import torch, magi_train
from torch._dynamo.utils import counters
from magi_train import Config
from magi_train.core.config import FusionConfig
from tests.models import Small, tokens
torch.manual_seed(0)
model, ids = Small(), tokens(0)
fusion = FusionConfig(loss_chunk_mib=0.01)
model = magi_train.prepare(model, config=Config(fusion=fusion))
step = magi_train.prepare_step(lambda x: model(x, x), model)
loss = step(ids)
loss.backward()
(plan,) = [r.plan for r in magi_train.report(model).rows if r.name.startswith("chunk_linear")]
assert plan["chunked"], plan
seen = counters["aot_autograd"]
print(
    seen["autograd_cache_hit"], seen["autograd_cache_miss"], seen["autograd_cache_bypass"],
    float(loss), float(model.head.weight.grad.norm()), float(model.a.weight.grad.norm()),
)
"""


@pytest.mark.full
def test_a_second_process_takes_the_code_from_the_cache(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CACHED],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert outputs[0][:3] == ["0", "1", "0"]
    assert outputs[1][:3] == ["1", "0", "0"]
    assert outputs[0][3:] == outputs[1][3:]


def test_products_around_the_kernel_have_sizes_for_which_there_are_fast_ones():
    """Those of an odd vocabulary have not, nor have rows that begin at odd places."""
    rows, width, vocabulary, padded = 512, 64, 3050, 3072
    recipe = replace(RECIPE, vocabulary=vocabulary, kernel=True, differentiated=(True, True, False))

    def function(x, weight, labels):
        columns = torch.arange(vocabulary)
        return chunked_cross_entropy(x, weight, None, labels, columns, recipe, 1, rows)

    inputs = [torch.randn(n, width, requires_grad=True) for n in (rows, vocabulary)]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    labels = torch.zeros(rows, dtype=torch.int64)
    _, (code, *_) = run_and_get_code(compiled, *inputs, labels)
    products = re.findall(r"extern_kernels\.mm\((.*)\)", code)
    assert len(products) == 3
    assert not any(str(vocabulary) in each for each in products)
    assert re.search(rf"\({rows}, {padded}\), \({padded}, 1\).*magi_train.cross_entropy", code)
