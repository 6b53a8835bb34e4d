"""The memory budget against what the device's allocator counted. Needs CUDA."""

import gc
import itertools

import pytest
import torch

import magi_train
from magi_train import Config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GIB, TOLERANCE, BUDGETS = 2**30, 0.03, 10


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000}
    return LlamaForCausalLM(LlamaConfig(use_cache=False, **sizes, **heads))


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(num_hidden_layers=8))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_hidden_layers=8, num_labels=10))


def text(rows, length, vocabulary):
    ids = torch.randint(0, vocabulary, (rows, length), device="cuda")
    return {"input_ids": ids, "labels": ids}


def images():
    labels = torch.randint(0, 10, (64,), device="cuda")
    return {"pixel_values": torch.randn(64, 3, 224, 224, device="cuda"), "labels": labels}


CASES = {
    "llama": (llama, lambda: text(2, 4096, 32000)),
    "bert": (bert, lambda: text(32, 512, 30522)),
    "vit": (vit, images),
}


def train(name, budget_gib, steps=14):
    """Return the plans, the one in force last, and the measured peak in GiB."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    make, batch = CASES[name]
    model = make().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    config = Config(tier="graph", memory_budget_gib=budget_gib)
    prepared, optimizer = magi_train.prepare(model, optimizer, config=config)
    step = magi_train.prepare_step(lambda b: prepared(**b).loss, prepared)
    given = batch()
    for i in range(steps):
        if i == steps - 2:
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = step(given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    rows = [r.plan for r in magi_train.report(prepared).rows if r.name == "fit_budget"]
    return rows, torch.cuda.max_memory_allocated() / GIB


@pytest.mark.parametrize("name", list(CASES))
def test_planned_and_measured_peak(name):
    rows, free = train(name, 1000.0)
    assert rows[-1]["planned_gib"] == pytest.approx(free, rel=2 * TOLERANCE + 2 / free)
    held = sum(rows[-1]["resident_gib"].values()) - rows[-1]["resident_gib"].get("rounding", 0)
    peaks, times = [], []
    for i in range(BUDGETS):
        budget = held + (free - held) * (0.55 + 0.5 * i / (BUDGETS - 1))
        rows, peak = train(name, budget)
        peaks.append(peak)
        times.append(rows[-1]["recompute_ms"])
        planned = [r["planned_gib"] for r in rows]  # the last one, if it was planned anew
        assert peak <= budget, (budget, planned, peak)
        assert planned[-1] == pytest.approx(peak, rel=TOLERANCE), (budget, planned, peak)
    assert all(b >= a * (1 - TOLERANCE) for a, b in itertools.pairwise(peaks))
    assert all(b <= a * (1 + TOLERANCE) for a, b in itertools.pairwise(times))
