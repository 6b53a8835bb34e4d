"""An exported file computes what the module does, and the module stays as it was."""

import operator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import magi_train
from magi_train import ExportConfig
from magi_train.core.errors import ExportError
from magi_train.exporter.contract import Size, always_holds, holds


class Function(nn.Module):
    """Calls a function with a linear of its own."""

    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(8, 8)

    def forward(self, x):
        """Return what the function makes of the linear's result."""
        return self.function(self.linear(x))


class Ordered(nn.Module):
    def forward(self, ids, mask, types):
        return ids + 10 * mask + 100 * types


def test_a_mapping_in_another_order_is_called_as_the_signature_says(tmp_path):
    given = {name: torch.full((2, 3), float(i)) for i, name in enumerate(["types", "ids", "mask"])}
    path = tmp_path / "m.pt2"
    magi_train.export(Ordered(), given, path, target="program")
    wanted = Ordered()(given["ids"], given["mask"], given["types"])
    got = magi_train.load(path)(given["ids"], given["mask"], given["types"])
    assert torch.equal(got, wanted)


class Merging(nn.Linear):
    """Rewrites its weight when its mode changes, as adapters do, and counts its calls."""

    def __init__(self):
        super().__init__(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def train(self, mode=True):
        with torch.no_grad():
            self.weight.add_(1.0 if mode else -1.0)
        return super().train(mode)

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x) + self.calls


def test_the_module_is_left_as_it_was(tmp_path):
    module = nn.Sequential(Merging(), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x, path = torch.randn(2, 8), tmp_path / "m.pt2"
    magi_train.export(module, (x,), path, target="program")
    assert all(m.training for m in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.allclose(magi_train.load(path)(x), module[0](x))


def test_a_branch_on_a_size_is_not_promised(tmp_path):
    module = Function(lambda y: y * 2 if y.shape[0] > 4 else y * 3)
    x, path = torch.randn(8, 8), tmp_path / "m.pt2"
    with pytest.raises(ExportError, match=r"batch must lie in 5\.\.64"):
        magi_train.export(module, (x,), path, target="program", dynamic={"batch": (1, 64)})
    magi_train.export(module, (x,), path, target="program", dynamic={"batch": (5, 64)})
    assert torch.allclose(magi_train.load(path)(x[:5]), module(x[:5]))


def test_a_size_of_one_that_the_code_tells_apart_is_not_promised(tmp_path):
    module = Function(lambda y: y - y.mean(0) if y.shape[0] > 1 else y)
    x, path = torch.randn(8, 8), tmp_path / "m.pt2"
    magi_train.export(module, (x,), path, target="program", dynamic={"batch": (1, 64)})
    run = magi_train.load(path)
    with pytest.raises(ExportError, match="2"):
        run(x[:1])
    assert torch.allclose(run(x[:2]), module(x[:2]), atol=1e-6)


BRANCHES = {  # what the code asks, a batch that is captured, one that takes the other branch
    "a remainder": (lambda x: x.shape[0] % 2 == 1, (5, 4), (6, 4)),
    "one size": (lambda x: x.shape[0] != 7, (5, 4), (7, 4)),
    "a product": (lambda x: x.shape[0] * x.shape[1] > 20, (5, 6), (5, 3)),
    "fractions": (lambda x: 1.5 * x.shape[0] + x.shape[1] > 10, (5, 4), (3, 4)),
    "a bound of a declared size": (lambda x: x.shape[1] > 4, (5, 6), (5, 4)),
    "a declared size of one": (lambda x: x.shape[1] > 1, (5, 6), (5, 1)),
}


class Branching(nn.Module):
    def __init__(self, asks):
        super().__init__()
        self.asks = asks

    def forward(self, x):
        return x * 2 if self.asks(x) else x * 3


@pytest.mark.parametrize("name", BRANCHES)
def test_no_size_takes_a_branch_that_was_not_captured(name, tmp_path):
    asks, shape, other = BRANCHES[name]
    path, sizes = tmp_path / "m.pt2", {"x": {1: torch.export.Dim.AUTO(min=1, max=64)}}
    module, x = Branching(asks), torch.randn(shape)
    report = magi_train.export(module, (x,), path, dynamic="batch", dynamic_shapes=sizes)
    assert any("must" in note for note in report.notes)
    run = magi_train.load(path)
    assert torch.equal(run(x), module(x))
    with pytest.raises(ExportError, match="must"):
        run(torch.randn(other))


def test_sizes_of_one_are_tried_together(tmp_path):
    """PyTorch takes all for at least 2, so that it does not even note what was asked."""
    path, module = tmp_path / "m.pt2", Branching(lambda x: x.shape[0] * x.shape[1] > 1)
    sizes = {"x": dict.fromkeys(range(2), torch.export.Dim.AUTO)}
    magi_train.export(module, (torch.randn(5, 6),), path, dynamic_shapes=sizes)
    run, x = magi_train.load(path), torch.randn(1, 6)
    assert torch.equal(run(x), module(x))
    with pytest.raises(ExportError, match=r"must fulfil max\(x_0, x_1\) > 1"):
        run(x[:, :1])


def test_of_sizes_that_are_fixed_nothing_is_asked(tmp_path):
    path, module = tmp_path / "m.pt2", Two(lambda x, y: (x.reshape(-1, 5) + y)[:, :1])
    x, y = torch.ones(3, 5, dtype=torch.long), torch.ones(1, 1)
    magi_train.export(module, (x, y), path, dynamic="auto")
    assert magi_train.load(path)(x[:2], y).shape == (2, 1)


def test_a_size_of_one_may_give_fewer_results(tmp_path):
    module = Function(lambda y: (y,) if y.shape[0] == 1 else (y, y + 1))
    report = magi_train.export(module, (torch.randn(4, 8),), tmp_path / "m.pt2", dynamic="batch")
    assert any("batch must lie in 2.." in note for note in report.notes)


class Pairs(nn.Module):
    def forward(self, x, y):
        return x.repeat_interleave(2, 0) + y if y.shape[0] == 2 * x.shape[0] else x


def test_sizes_that_depend_on_each_other_are_checked(tmp_path):
    path, auto = tmp_path / "m.pt2", {0: torch.export.Dim.AUTO}
    x, y = torch.randn(3, 4), torch.randn(6, 4)
    magi_train.export(Pairs(), (x, y), path, dynamic_shapes={"x": auto, "y": auto})
    run = magi_train.load(path)
    assert torch.equal(run(x[:2], y[:4]), Pairs()(x[:2], y[:4]))
    with pytest.raises(ExportError, match=r"y_0 == 2\*x_0.*got {'x_0': 2, 'y_0': 6}"):
        run(x[:2], y)


@pytest.mark.parametrize("name", ["lambda", "float"])
def test_names_that_no_condition_can_hold(name, tmp_path):
    path, module = tmp_path / "m.pt2", Branching(BRANCHES["a product"][0])
    sizes = {"x": {0: torch.export.Dim(name, min=2, max=64), 1: torch.export.Dim.AUTO}}
    magi_train.export(module, (torch.randn(5, 6),), path, dynamic_shapes=sizes)
    with pytest.raises(ExportError, match=r"must fulfil x_0\*x_1 > 20"):
        magi_train.load(path)(torch.randn(5, 3))


def test_what_code_asks_about_a_multiple(tmp_path):
    path, module = tmp_path / "m.pt2", Branching(lambda x: x.shape[0] % 4 != 0)
    sizes = {"x": {0: 2 * torch.export.Dim("pairs", min=2, max=64)}}
    magi_train.export(module, (torch.randn(6, 4),), path, dynamic_shapes=sizes)
    run, x = magi_train.load(path), torch.randn(10, 4)
    assert torch.equal(run(x), module(x))
    for rows, asked in ((8, r"x_0 // 2.* % 4\) != 0"), (7, "x_0 % 2 == 0")):
        with pytest.raises(ExportError, match=f"must fulfil .*{asked}"):
            run(x[:rows])


class Two(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


def test_a_declared_size_is_another_of_that_name(tmp_path):
    path, module = tmp_path / "m.pt2", Two(lambda x, y: x.sum() + y.sum())
    sizes = {"y": {0: torch.export.Dim("batch")}}
    magi_train.export(
        module, (torch.ones(3, 5), torch.ones(4)), path, dynamic="batch", dynamic_shapes=sizes
    )
    assert float(magi_train.load(path)(torch.ones(2, 5), torch.ones(3))) == 13


def test_a_declared_size_is_the_one_that_it_must_be_equal_to(tmp_path):
    """A bias of (batch, 1, sequence, sequence) beside tokens."""
    path, module = tmp_path / "m.pt2", Two(lambda x, y: x[:, None, :, None] + y)
    inputs = torch.ones(3, 5, dtype=torch.long), torch.ones(3, 1, 5, 5)
    auto = torch.export.Dim.AUTO
    report = magi_train.export(
        module, inputs, path, dynamic=("batch", "sequence"),
        dynamic_shapes={"y": {2: auto(min=1), 3: auto}},
    )  # fmt: skip
    run = magi_train.load(path)
    assert run(inputs[0][:, :1], inputs[1][:, :, :1, :1]).shape == (3, 1, 1, 1)
    with pytest.raises(ExportError, match="sequence is 5 in x and 4 in y"):
        run(inputs[0], inputs[1][:, :, :4])
    assert not report.notes


@pytest.mark.parametrize(
    ("condition", "want"),
    [
        ("min(8*n, 32*n) == 8*n", True),
        ("n % 8 == 0", True),  # all that it may be
        ("n + m < 42", True),
        ("n + m < 41", False),
        ("m != 7", False),
        ("n < 2**32 + k", False),  # k has no end: not tried
    ],
)
def test_a_condition_that_all_sizes_fulfil_is_none(condition, want):
    sizes = {s.name: s for s in (Size("n", 2, 32, 8), Size("m", 1, 9), Size("k", 1, None))}
    assert always_holds(condition, sizes) == want


@pytest.mark.parametrize("text", ["().__class__", "__import__('os')", "[x for x in (1,)]", "n ="])
def test_a_condition_of_a_file_is_arithmetic(text):
    assert holds("(n % 2) == 1 and math.floor(n / 2) < max(n, 3)", {"n": 5})
    with pytest.raises(ExportError, match="cannot be computed"):
        holds(text, {"n": 5})


def test_a_size_of_one_is_compared_closely(tmp_path):
    module = Function(lambda y: y * 1.05 if y.shape[0] == 1 else y)
    path, x = tmp_path / "m.pt2", torch.randn(4, 8)
    magi_train.export(module, (x,), path, dynamic="batch")
    with pytest.raises(ExportError, match=r"batch in 2\.\."):
        magi_train.load(path)(x[:1])


def test_a_module_that_counts_its_calls_takes_a_size_of_one(tmp_path):
    path, x = tmp_path / "m.pt2", torch.randn(4, 8)
    magi_train.export(Merging(), (x,), path, dynamic="batch")
    assert magi_train.load(path)(x[:1]).shape == (1, 8)


class Shifted(nn.Module):
    """Scores of relative positions, moved as attention does it; torch guards on 2n - 1 and n."""

    def forward(self, x):
        batch, n = x.shape
        scores = x[..., None] * torch.arange(2.0 * n - 1)
        scores = scores.reshape(batch, 2 * n - 1, n)[:, 1:].reshape(batch, n, 2 * n - 2)
        return scores[..., :n] + x.sum()


def test_no_size_of_one_is_promised_that_a_guard_forbids(tmp_path):
    path, module = tmp_path / "m.pt2", Shifted()
    sizes = {"x": {1: torch.export.Dim.AUTO(max=64)}}
    magi_train.export(module, (torch.randn(2, 5),), path, dynamic="batch", dynamic_shapes=sizes)
    run = magi_train.load(path)
    assert torch.equal(run(torch.ones(1, 4)), module(torch.ones(1, 4)))
    with pytest.raises(ExportError, match=r"x must be float32 \[batch in 1\.\., x_1 in 2\.\.64"):
        run(torch.ones(3, 1))


class Drifting(nn.Module):
    """Writes to a buffer that its BatchNorm, linears or convolution read, a little in each call."""

    def __init__(self, owner, name):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
        self.a, self.b = nn.Linear(32, 8), nn.Linear(32, 8)
        self.written = operator.attrgetter(f"{owner}.{name}")
        value = self.written(self).detach()
        delattr(self.get_submodule(owner), name)
        self.get_submodule(owner).register_buffer(name, value)

    def forward(self, x):
        y = self.norm(self.conv(x)).mean((2, 3))
        y = self.a(y) * self.b(y)
        self.written(self).add_(1e-2)
        return y


WRITTEN = [("norm", "running_var"), ("norm", "weight"), ("conv", "weight"), ("b", "bias")]


@pytest.mark.parametrize(("owner", "name"), WRITTEN)
def test_weights_that_change_in_each_call_are_not_folded(owner, name, tmp_path):
    module, x, path = Drifting(owner, name).eval(), torch.randn(2, 32, 4, 4), tmp_path / "m.pt2"
    config = ExportConfig(merge_linears=True, channels_last=True)
    magi_train.export(module, (x,), path, dynamic="batch", config=config)
    run = magi_train.load(path)
    with torch.no_grad():
        pairs = [(run(x), module(x)) for _ in range(20)]
    assert not torch.allclose(pairs[0][1], pairs[-1][1], rtol=1e-2), "the module itself drifts"
    assert torch.allclose(*pairs[-1], atol=1e-5)


@pytest.mark.parametrize("target", ["pt2", "onnx", "executorch"])
def test_a_target_that_keeps_nothing_refuses_what_is_written(target, tmp_path):
    with pytest.raises(ExportError, match=r"Merging writes to its buffers .*'program'"):
        magi_train.export(Merging(), (torch.ones(2, 8),), tmp_path / "m.pt2", target=target)
    assert not [*tmp_path.iterdir()]


def test_each_shape_would_write_to_buffers_of_its_own(tmp_path):
    magi_train.export(Merging(), (torch.ones(2, 8),), tmp_path / "m.pt2")
    with pytest.raises(ExportError, match=r"writes to its buffers.*without `compile`"):
        magi_train.load(tmp_path / "m.pt2", compile=True)


class Tabulates(nn.Module):
    """Makes tensors from numbers in each call, and writes to one of them."""

    def forward(self, x):
        factors = torch.tensor([1.0, 2.0])
        factors[0] = torch.tensor(5.0)
        return x * factors.mul_(3)


@pytest.mark.parametrize(
    ("target", "compiled"), [("program", False), ("program", True), ("pt2", False)]
)
def test_a_tensor_that_each_call_makes_anew_is_no_buffer(target, compiled, tmp_path):
    path = tmp_path / "m.pt2"
    magi_train.export(Tabulates(), (torch.ones(3, 2),), path, target=target)
    run = magi_train.load(path, compile=compiled)
    for i in range(3):
        x = torch.full((3, 2), float(i))
        assert torch.equal(run(x), Tabulates()(x))


class Replacing(nn.Module):
    """Puts another tensor into a buffer's place, grown (a table) or changed (a count)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(2.0))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, count=False):
        self.table = torch.arange(float(x.shape[1]))
        if count:
            self.count = self.count + 1
        return x * self.table + self.count


def test_buffers_that_are_replaced(tmp_path):
    module, x, path = Replacing(), torch.randn(2, 5), tmp_path / "m.pt2"
    magi_train.export(module, (x,), path)
    assert torch.equal(magi_train.load(path)(x), module(x))
    with pytest.raises(ExportError, match=r"replaces its buffer count .*add_\(\)"):
        magi_train.export(module, (x, True), path)
    assert float(module.count) == 0.0


class Adding(nn.Module):
    def forward(self, x):
        return x.add_(1) * 2


def test_an_input_that_is_written_to_is_the_callers(tmp_path):
    path = tmp_path / "m.pt2"
    magi_train.export(Adding(), (torch.ones(2, 3),), path, dynamic="batch")
    for run in (magi_train.load(path), magi_train.load(path, buckets=(8,))):
        for x in (torch.ones(4, 3), torch.ones(3, 4).t()):
            assert torch.equal(run(x), torch.full((4, 3), 4.0))
            assert torch.equal(x, torch.full((4, 3), 2.0))


@dataclass
class Found:
    """What a module may return."""

    scores: torch.Tensor
    parts: tuple[torch.Tensor, ...]


def test_dataclasses_are_results_by_name(tmp_path):
    module = Function(lambda y: Found(y, (y + 1, y + 2)))
    x, path = torch.randn(2, 8), tmp_path / "m.pt2"
    magi_train.export(module, (x,), path)
    got, wanted = magi_train.load(path)(x), module(x)
    assert torch.equal(got.scores, wanted.scores)
    assert torch.equal(got.parts[1], wanted.parts[1])
    magi_train.export(module, (x,), path, outputs=["scores"])
    assert [*magi_train.load(path)(x)] == ["scores"]
    with pytest.raises(ExportError, match=r"outputs \['other'\] not found: .*Found"):
        magi_train.export(module, (x,), path, outputs=["other"])
    with pytest.raises(ExportError, match="returns a str, and no tensor: results must be"):
        magi_train.export(Function(lambda y: "text"), (x,), path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused(tmp_path):
    x = torch.ones(2, 8)
    with pytest.raises(ExportError, match="TorchScript module, whose code cannot be captured"):
        magi_train.export(torch.jit.trace(nn.Linear(8, 8), x), (x,), tmp_path / "m.pt2")


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_pass_is_blamed_for_what_tracing_changes(tmp_path):
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    inputs, path = (torch.randn(2, 5, 8), padding), tmp_path / "m.pt2"
    with pytest.raises(ExportError, match=r"captured, before any pass.*moved.*nested_tensor"):
        magi_train.export(Padded(), inputs, path)
    random = Function(lambda y: torch.dropout(y, 0.5, train=True))
    with pytest.raises(ExportError, match="captured, before any pass"):
        magi_train.export(random, (torch.randn(2, 8),), path)


class ThroughAView(nn.Module):
    """Changes what two linears share, between them, through a view."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        """Return both."""
        x = x * 1
        q = self.a(x)
        x[:, 0].add_(1)
        return q + self.b(x)


def test_linears_stay_apart_where_their_input_changes_through_a_view(tmp_path):
    module, x, path = ThroughAView(), torch.randn(4, 8), tmp_path / "m.pt2"
    config = ExportConfig(merge_linears=True)
    magi_train.export(module, (x,), path, target="program", config=config)
    assert torch.allclose(magi_train.load(path)(x), module(x), atol=1e-6)


class Scaled(nn.Module):
    def forward(self, x, scale):
        return x * scale


def test_buckets_take_inputs_without_dimensions(tmp_path):
    x, scale, path = torch.randn(4, 8), torch.tensor(2.0), tmp_path / "m.pt2"
    magi_train.export(Scaled(), (x, scale), path, target="program", dynamic="batch")
    run = magi_train.load(path, buckets=(4,))
    assert torch.equal(run(x[:3], scale), x[:3] * 2)


def test_a_convolution_without_a_batch_exports(tmp_path):
    module, x, path = nn.Conv2d(32, 32, 3), torch.ones(32, 8, 8), tmp_path / "m.pt2"
    magi_train.export(module, (x,), path, target="program")
    assert torch.allclose(magi_train.load(path)(x), module(x), atol=1e-5)


def test_compiled_code_loads_and_runs(tmp_path):
    module, x, path = nn.Linear(8, 8), torch.randn(4, 8), tmp_path / "m.pt2"
    magi_train.export(module, (x,), path, target="pt2")
    for runners in (1, 2):
        assert torch.allclose(magi_train.load(path, runners=runners)(x), module(x), atol=1e-6)
