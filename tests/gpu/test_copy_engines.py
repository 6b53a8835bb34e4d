"""Averages by copy engines on two GPUs, beside NCCL's."""

import copy

import torch
import torch.distributed as dist

import magi_train
from magi_train import CommConfig, Config
from magi_train.comm.copy_engines import PIECE_BYTES, copy_engines
from magi_train.core.world import World
from tests.close import difference, tolerance
from tests.gpu.test_devices import on_device, on_two_gpus, two_gpus
from tests.models import MODELS


def averages(rank):
    """Both ways' averages of buckets of several sizes, begun beside a computation."""
    device = torch.device("cuda", rank)
    engines = copy_engines(CommConfig(copy_engines=True), World.current(), device, 60)
    busy = torch.randn(4096, 4096, device=device)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for numel in (1, 1000, PIECE_BYTES // 4 + 12345, PIECE_BYTES + 1):
            x = torch.randn(numel, device=device).to(dtype)
            theirs, flat = x.clone(), torch.empty(numel, device=device)
            dist.all_reduce(theirs, dist.ReduceOp.AVG)
            on_way = []
            for _ in range(3):
                busy = busy @ busy * 1e-2
                on_way.append(engines.start(x.clone(), flat, "a test"))
            for each in on_way:
                each.wait()
            found.append((dtype, numel, torch.equal(flat, theirs.float())))
    return found


@two_gpus
def test_averages_of_two_are_those_of_nccl_to_the_bit():
    for found in on_two_gpus(averages):
        assert all(same for *_, same in found), found


def trained(rank):
    """Three steps under autocast, by copy engines and by NCCL: how far the weights differ."""
    weights = []
    torch.manual_seed(0)
    model = MODELS["llama"][0]().cuda().train()
    for engines in (True, False):
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        comm = CommConfig(copy_engines=engines, bucket_mib=0.02)
        ours = magi_train.prepare(twin, config=Config(tier="graph", comm=comm))
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = ours(**on_device(MODELS["llama"][1](10 * step + rank))).loss
            loss.backward()
            optimizer.step()
        assert magi_train.report(ours).tier == "graph"
        weights.append({n: p.detach() for n, p in twin.named_parameters()})
    return difference(*weights)


@two_gpus
def test_training_is_that_of_nccl():
    # an embedding's gradient is summed in any order, so not to the bit
    assert max(on_two_gpus(trained)) <= tolerance(torch.bfloat16, 64)
