"""A ReLU's mask from the input of the norm in front: where, what it gives, where it is not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import magi_train
from magi_train import Config, FusionConfig
from tests.close import difference, relative_error, tolerance


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


def train(model, x, wanted=True, dtype=None):
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    config = Config(fusion=FusionConfig(relu_masks=wanted), progress=False)
    prepared = magi_train.prepare(model, config=config)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
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


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("change", [lambda model, x: (model, x), near_zero])
def test_gradients_are_as_near_float64_as_without(dtype, change):
    torch.manual_seed(0)
    model, x = change(Net(lambda p, y, z: F.relu(p) + z), torch.randn(4, 3, 16, 16))
    got, rows = train(model, x, dtype=dtype)
    assert len(rows["relu_masks"]["from_input"]) == 1
    usual, others = train(model, x, wanted=False, dtype=dtype)
    assert "relu_masks" not in others
    assert rows["saved_activations"] == others["saved_activations"]
    if dtype is None:
        assert difference(got, exact(model, x)) < tolerance(torch.float32)
    assert relative_error(got, exact(model, x)) < 1.1 * relative_error(usual, exact(model, x))


def test_what_is_not_a_number_stays_so():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    x[0, 0, 0, 0] = torch.nan
    model = Net(lambda p, y, z: F.relu(p) + z)
    got, _ = train(model, x)
    assert all(g.isnan().any() for g in got.values())


@pytest.mark.parametrize(
    ("middle", "norm", "said"),
    [
        (lambda p, y, z: F.relu(p + z), nn.BatchNorm2d, "2 tensors of its size"),
        (lambda p, y, z: F.relu(F.avg_pool2d(p, 3, 1, 1)), nn.BatchNorm2d, "does not read"),
        (lambda p, y, z: F.relu(p) + z, lambda channels: nn.Identity(), "does not read"),
    ],
    ids=["residual", "pooled", "no norm"],
)
def test_what_is_left_alone(middle, norm, said):
    torch.manual_seed(0)
    model, x = Net(middle, norm), torch.randn(4, 3, 16, 16)
    got, rows = train(model, x)
    assert not rows["relu_masks"]["from_input"]
    ((_, reason),) = rows["relu_masks"]["left_alone"]
    assert said in reason
    assert difference(got, exact(model, x)) < tolerance(torch.float32)


def test_a_residual_of_the_input_itself_is_one_tensor():
    torch.manual_seed(0)
    model, x = Net(lambda p, y, z: F.relu(p + y) + z), torch.randn(4, 3, 16, 16)
    got, rows = train(model, x)
    assert len(rows["relu_masks"]["from_input"]) == 1
    assert difference(got, exact(model, x)) < tolerance(torch.float32)
