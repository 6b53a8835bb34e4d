"""The estimate without a GPU against what the device's allocator counted. Needs CUDA."""

import gc

import pytest
import torch

import magi_train
from magi_train import Config
from magi_train.core.hardware import OTHER_GPU, Gpu
from magi_train.fits import Setup, estimate
from tests.gpu.test_memory_budget import GIB, bert, llama, vit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = 0.05


def text(rows, length):
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def images():
    labels = torch.zeros(64, dtype=torch.long)
    return {"pixel_values": torch.zeros(64, 3, 224, 224), "labels": labels}


CASES = {
    "llama": (llama, lambda: text(2, 4096)),
    "bert": (bert, lambda: text(32, 512)),
    "vit": (vit, images),
}


def measured(make, batch, config):
    """Return the peak of a step in GiB, of tensors, on the device."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    model = make().cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    prepared, optimizer = magi_train.prepare(model, optimizer, config=config)
    step = magi_train.prepare_step(lambda b: prepared(**b).loss, prepared)
    given = magi_train.to_device(batch(), torch.device("cuda"))
    for i in range(6):
        if i == 4:
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = step(given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB


@pytest.mark.parametrize("name", list(CASES))
def test_the_estimate_is_within_5_percent(name):
    make, batch = CASES[name]
    config = Config(tier="graph", cuda_graphs="off")
    gpu = Gpu("this one", 80.0, OTHER_GPU, torch.cuda.get_device_capability())
    setup = Setup(gpu, 1, config, torch.bfloat16)
    found = estimate(lambda: (make(), batch()), setup)
    assert found.without_gib == pytest.approx(measured(make, batch, config), rel=TOLERANCE)
