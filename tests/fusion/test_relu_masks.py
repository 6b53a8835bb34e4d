"""A ReLU's mask from the input of the norm in front: where, what it gives, where it is not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import magi_train
from magi_train import Config, FusionConfig
from tests.close import difference, relative_error, tolerance
from tests.generated import code_of


class Net(nn.Module):
    """Convolutions with a norm and a ReLU; `middle` is between them, and may use another tensor."""

    def __init__(self, middle, norm=nn.BatchNorm2d):
        super().__init__()
        self.first, self.other = (nn.Conv2d(3, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.middle = norm(8), middle
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.first(x)
        return self.second(self.middle(self.norm(y), y, self.other(x))).square().mean()


def train(model, x, wanted=True, dtype=torch.bfloat16):
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    config = Config(fusion=FusionConfig(relu_masks=wanted), progress=False)
    prepared = magi_train.prepare(model, config=config)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        loss = prepared(x)
    loss.backward()
    rows = {r.name: r.plan for r in magi_train.report(prepared).rows}
    return {n: p.grad for n, p in model.named_parameters()}, rows


def exact(model, x):
    wide = copy.deepcopy(model).double()
    wide(x.double()).backward()
    return {n: p.grad for n, p in wide.named_parameters()}


def near_zero(model, x):
    """Set the norm so that many of its results are 0, of either sign, or next to it."""
    with torch.no_grad():
        model.norm.weight[::2] = 0.0
        model.norm.bias[:2] = torch.tensor([0.0, -0.0])
    return model, x


def far_from_zero(model, x):
    """Let means be 30 times the deviations of what is normed."""
    return model, 30 + x


@pytest.mark.parametrize("change", [lambda model, x: (model, x), near_zero, far_from_zero])
def test_gradients_are_as_near_float64_as_without(change):
    torch.manual_seed(0)
    model, x = change(Net(lambda p, y, z: F.relu(p) + z), torch.randn(16, 3, 16, 16))
    got, rows = train(model, x)
    assert len(rows["relu_masks"]["from_input"]) == 1
    usual, others = train(model, x, wanted=False)
    assert "relu_masks" not in others
    vectors = 2 * 8 * 4 / 2**20
    more = rows["saved_activations"]["saved_mib"] - others["saved_activations"]["saved_mib"]
    assert more <= vectors + 0.001, "scale and shift of each channel"
    eager = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = eager(x)
    loss.backward()
    plain = {n: p.grad for n, p in eager.named_parameters()}
    want = exact(model, x)
    # On the CPU, and there only, PyTorch's backward rounds the statistics to 16 bits, unless code
    # keeps them in registers: usually it does, as it computes the mask of them. tests/gpu compares.
    worse = max(relative_error(usual, want), relative_error(plain, want))
    assert relative_error(got, want) < 2 * worse


def test_forward_and_backward_take_the_same_side():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    y = (10 + torch.randn(16, 8, 16, 16)).to(torch.bfloat16).requires_grad_()
    prepared = magi_train.prepare(
        nn.ModuleDict({"norm": norm}), config=Config(fusion=FusionConfig(relu_masks=True))
    )
    seen = {}

    def loss(y):
        z = F.relu(norm(y))
        seen["z"] = z.detach()
        return (z.float() ** 2 / 2).sum(), z

    step = magi_train.prepare_step(loss, prepared)
    value, z = step(y)
    value.backward()
    # The bias's gradient sums z where it is above 0; the norm's own gradients count no other.
    want = z.detach().double().sum((0, 2, 3))
    limit = tolerance(torch.float32, y[:, 0].numel())
    assert difference({"": norm.bias.grad}, {"": want}) < limit


def test_what_is_not_a_number_stays_so():
    torch.manual_seed(0)
    x = torch.randn(16, 3, 16, 16)
    x[0, 0, 0, 0] = torch.nan
    got, _ = train(Net(lambda p, y, z: F.relu(p)), x)
    assert all(got[n].isnan().any() for n in ("first.weight", "norm.weight", "second.weight"))


def rounded(p):
    return p.to(torch.bfloat16)


def norm_of_rows(channels):
    """A norm whose factors, of rows times of columns, are as many as the elements."""
    return nn.LayerNorm(2 * channels)


@pytest.mark.parametrize(
    ("middle", "norm", "dtype", "said"),
    [
        (lambda p, y, z: F.relu(p + z), nn.BatchNorm2d, torch.bfloat16, "no multiple"),
        pytest.param(
            lambda p, y, z: F.relu(F.avg_pool2d(p, 3, 1, 1)),
            nn.BatchNorm2d,
            torch.bfloat16,
            "no multiple",
            marks=pytest.mark.full,
        ),
        (lambda p, y, z: F.relu(p.tanh()), nn.BatchNorm2d, torch.bfloat16, "no multiple"),
        (lambda p, y, z: F.relu(rounded(p) + p.mean()), nn.BatchNorm2d, torch.bfloat16, "no mu"),
        (lambda p, y, z: F.relu(1 - p), nn.BatchNorm2d, torch.bfloat16, "no multiple"),
        (lambda p, y, z: F.relu(p) + z, lambda c: nn.Identity(), torch.bfloat16, "no multiple"),
        (lambda p, y, z: F.relu(p) + z, norm_of_rows, torch.bfloat16, "no multiple"),
        (lambda p, y, z: F.relu(p) + z, nn.BatchNorm2d, torch.float32, "float32, not from 16"),
    ],
    ids=["residual", "pooled", "curved", "rounded", "negated", "no norm", "of rows", "float32"],
)
@pytest.mark.usefixtures("idle_kernels")
def test_what_is_left_alone(middle, norm, dtype, said):
    torch.manual_seed(0)
    model, x = Net(middle, norm), torch.randn(16, 3, 16, 16)
    (_, rows), got = code_of(lambda: train(model, x, dtype=dtype))
    assert not rows["relu_masks"]["from_input"]
    ((_, reason),) = rows["relu_masks"]["left_alone"]
    assert said in reason
    _, usual = code_of(lambda: train(model, x, wanted=False, dtype=dtype))
    assert got == usual


def test_a_mask_of_the_models_own_is_left_alone():
    def counted(p, y, z):
        kept = F.relu(p)
        return kept + z + (kept <= 0).float().mean()

    torch.manual_seed(0)
    model, x = Net(counted), torch.randn(16, 3, 16, 16)
    got, rows = train(model, x)
    assert len(rows["relu_masks"]["from_input"]) == 1
    assert not rows["relu_masks"]["left_alone"]
    usual, others = train(model, x, wanted=False)
    vectors = 2 * 8 * 4 / 2**20
    more = rows["saved_activations"]["saved_mib"] - others["saved_activations"]["saved_mib"]
    assert more <= vectors + 0.001, "no mask"
    want = exact(model, x)
    assert relative_error(got, want) < 2 * relative_error(usual, want)


@pytest.mark.usefixtures("idle_kernels")
def test_of_a_sum_that_code_may_not_round():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other = (nn.Conv2d(3, 8, 3, bias=False) for _ in range(2))
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            return F.relu(self.norm(self.first(x) + self.other(x))).square().sum()

    _, rows = train(Summed(), torch.randn(16, 3, 16, 16))
    ((_, reason),) = rows["relu_masks"]["left_alone"]
    assert "may not round" in reason


@pytest.mark.usefixtures("idle_kernels")
def test_of_a_tensor_that_the_backward_does_not_read():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.register_buffer("scale", torch.ones(8, 1, 1))

        def forward(self, x):
            return F.relu(self.conv(x) * self.scale + self.scale).sum()

    _, rows = train(Scaled(), torch.randn(16, 3, 16, 16))
    ((_, reason),) = rows["relu_masks"]["left_alone"]
    assert "does not read" in reason
