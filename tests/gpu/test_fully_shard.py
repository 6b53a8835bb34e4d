"""Engine fsdp2 on two GPUs against DDP, from the host and with generated code. Needs both."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import magi_train
from magi_train import Config, ShardingConfig
from tests.close import difference, tolerance
from tests.gpu.test_sharded_optimizer import on_two_gpus
from tests.models import MODELS, loss_of

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

STEPS = 3


def train(model, optimizer, rank, bf16):
    for step in range(STEPS):
        batch = {k: v.cuda() for k, v in MODELS["llama"][1](10 * step + rank).items()}
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = loss_of(model(**batch))
        loss.backward()
        if step < STEPS - 1:
            optimizer.step()
            optimizer.zero_grad()
    named = [(n.removeprefix("module."), p.grad) for n, p in model.named_parameters()]
    return {n: part_of(g, rank).cpu() for n, g in named}


def part_of(gradient, rank):
    """Return this rank's part: what lies on the host cannot be gathered through NCCL."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient.chunk(2)[rank]


def gradients(rank, bf16, sharding):
    torch.manual_seed(0)
    make = MODELS["llama"][0]
    host = make().train()
    plain = make().cuda().train()
    plain.load_state_dict(host.state_dict())
    ddp = DistributedDataParallel(plain)
    want = train(ddp, torch.optim.SGD(ddp.parameters(), 0.1), rank, bf16)
    sgd = torch.optim.SGD(host.parameters(), 0.1)
    model, sgd = magi_train.prepare(host, sgd, config=Config(engine="fsdp2", sharding=sharding))
    got = train(model, sgd, rank, bf16)
    devices = {p.device.type for p in model.parameters()}
    return difference(got, want), devices, magi_train.report(model).tier


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_a_model_on_the_host_trains_as_under_ddp(bf16, offload):
    gathered = "bfloat16" if bf16 else None
    sharding = ShardingConfig(offload=offload, gather_dtype=gathered)
    for got, devices, tier in on_two_gpus(gradients, bf16, sharding):
        assert got <= tolerance(torch.bfloat16 if bf16 else torch.float32)
        assert devices == {"cpu" if offload else "cuda"}
        assert tier == "region"
