"""What compiles ahead is what the first step launches. Needs CUDA."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import magi_train
from magi_train import Config
from magi_train.fusion import ahead

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOCABULARY, WIDTH, TOKENS = 8192, 256, 4096


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropouts = nn.ModuleList(nn.Dropout(0.1) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x):
        x = self.embedding(x)
        for dropout in self.dropouts:
            x = x + dropout(self.layer(self.norm(x)))
        return self.head(x)


def compiled():
    """Return the specializations of each kernel that Triton holds."""
    from magi_train.fusion.kernels.adamw import _adamw, _advance
    from magi_train.fusion.kernels.cross_entropy import _cross_entropy
    from magi_train.fusion.kernels.dropout_bits import _dropout_bits

    device = torch.cuda.current_device()
    kernels = {"adamw": _adamw, "advance": _advance, "loss": _cross_entropy, "bits": _dropout_bits}
    return {name: set(kernel.device_caches[device][0]) for name, kernel in kernels.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_the_first_step_launches_what_was_compiled_ahead(dtype):
    module = Model().cuda()
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.1)
    model, optimizer = magi_train.prepare(module, optimizer, config=Config(progress=False))

    def loss_of(x):
        return F.cross_entropy(model(x).view(-1, VOCABULARY), x.view(-1))

    step = magi_train.prepare_step(loss_of, model)
    x = torch.randint(VOCABULARY, (4, TOKENS // 4), device="cuda")
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = step(x)
    loss.backward()
    ahead.wait_for_all()
    early = compiled()
    optimizer.step()
    assert compiled() == early
    # what one case compiles, the next one finds
    assert all(early[name] for name in ("adamw", "advance"))
    assert dtype is None or all(len(early[name]) == 1 for name in ("loss", "bits"))
