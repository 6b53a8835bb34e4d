"""Real devices: parity with eager on one GPU, with DDP on two, kernels and memory. Needs CUDA."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import magi_train
from magi_train import CommConfig, Config
from magi_train.core import compat
from tests.close import difference, tolerance
from tests.models import MODELS, loss_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    """Convolutions would use TF32, whose rounding is not float32's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_device(batch):
    return {k: v.cuda() for k, v in batch.items()}


def gradients(model):
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()
            if p.grad is not None}  # fmt: skip


def backward(model, batch, bf16):
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        loss = loss_of(model(**batch))
    loss.backward()
    return float(loss)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_graph_tier_equals_eager(name, bf16):
    model = MODELS[name][0]().cuda().train()
    twin = copy.deepcopy(model)
    batch = on_device(MODELS[name][1](0))
    want = backward(model, batch, bf16)
    # Dynamo of torch 2.11 cannot trace the copy.deepcopy in T5's forward
    whole = name != "t5" or compat.torch_version() > (2, 11)
    prepared = magi_train.prepare(twin, config=Config(tier="graph" if whole else "auto"))
    got = backward(prepared, batch, bf16)
    limit = tolerance(torch.bfloat16 if bf16 else torch.float32, 64)
    assert abs(got - want) <= limit * abs(want)
    assert difference(gradients(twin), gradients(model)) <= limit


def test_the_mask_is_gone_and_heads_are_grouped():
    model = magi_train.prepare(MODELS["llama"][0]().cuda().train())
    backward(model, on_device(MODELS["llama"][1](0)), True)
    plan = next(r.plan for r in magi_train.report(model).rows if r.name == "canonicalize_attention")
    assert len(plan["causal"]) == 2
    assert len(plan["grouped"]) == 2


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_timm_models(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10).cuda().train()
    if name != "resnet18":
        model.eval()  # without drop path
    twin = copy.deepcopy(model)
    x = torch.randn(8, 3, 224, 224, device="cuda")
    prepared = magi_train.prepare(twin, config=Config(tier="graph"))
    for m in (model, prepared):
        m(x).square().mean().backward()
    assert difference(gradients(twin), gradients(model)) <= tolerance(torch.float32, 224 * 224)


def _two(rank, fn, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2, device_id=torch.device("cuda", rank))
    out[rank] = fn(rank)
    dist.barrier(device_ids=[rank])
    dist.destroy_process_group()


def on_two_gpus(fn):
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(_two, args=(fn, out), nprocs=2)
        return [out[0], out[1]]


def nccl_parity(rank):
    results = {}
    torch.backends.cudnn.allow_tf32 = False
    for name in ("llama", "gpt2", "resnet"):
        for tier in ("graph", "region", "eager"):
            torch.manual_seed(0)
            torch._dynamo.reset()
            model = MODELS[name][0]().cuda().train()
            twin = copy.deepcopy(model)
            theirs = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank])
            ours = magi_train.prepare(twin, config=Config(tier=tier))
            for step in range(2):
                batch = on_device(MODELS[name][1](10 * step + rank))
                for m in (theirs, ours):
                    m.zero_grad()
                    backward(m, batch, False)
            assert magi_train.report(ours).tier == tier
            results[name, tier] = difference(gradients(twin), gradients(model))
    return results


@two_gpus
def test_two_gpus_equal_ddp():
    torch.set_float32_matmul_precision("highest")
    for results in on_two_gpus(nccl_parity):
        for case, apart in results.items():
            assert apart <= tolerance(torch.float32, 4096), case


def accumulate(rank):
    torch.manual_seed(0)
    model = MODELS["llama"][0]().cuda().train()
    twin = copy.deepcopy(model)
    theirs = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank])
    ours = magi_train.prepare(twin, config=Config(comm=CommConfig(compression="bfloat16")))
    for m in (theirs, ours):
        with m.no_sync():
            backward(m, on_device(MODELS["llama"][1](rank)), False)
        backward(m, on_device(MODELS["llama"][1](5 + rank)), False)
    return difference(gradients(twin), gradients(model))


@two_gpus
def test_two_gpus_accumulate_with_bf16_on_the_wire():
    for apart in on_two_gpus(accumulate):
        assert apart <= 3 * torch.finfo(torch.bfloat16).eps


def raises(rank):
    model = magi_train.prepare(MODELS["used_twice"][0]().cuda(), config=Config(tier="eager"))
    for step in range(4):
        if rank == 1 and step == 2:
            model._magi_runtime.world.fail(ValueError("rank 1 is broken"))
            raise ValueError("rank 1 is broken")
        backward(model, on_device(MODELS["used_twice"][1](rank)), False)
        torch.cuda.synchronize()


@two_gpus
def test_a_failing_rank_ends_both_under_nccl():
    with pytest.raises(Exception, match=r"rank 1 is broken|exit code 1"):
        on_two_gpus(raises)
