"""Padding masks on a device: facts travel with the batch, and nothing waits for the device."""

import copy

import pytest
import torch

import magi_train
from magi_train import Config
from tests.close import difference, tolerance
from tests.models import bert, llama, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def batch(padded, seed=0):
    ids = tokens(seed)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, given):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**given).loss
    loss.backward()


@pytest.mark.parametrize("make", [llama, bert])
def test_batches_with_and_without_padding(make):
    model = make().cuda().train()
    twin = copy.deepcopy(model)
    ours = magi_train.prepare(twin, config=Config(tier="graph"))
    for seed, padded in enumerate((False, True, False, True)):
        given = magi_train.to_device(batch(padded, seed), "cuda")
        step(model, given)
        step(ours, given)
        # two bfloat16 runs, each its own distance from the exact one
        assert difference(gradients(twin), gradients(model)) <= tolerance(torch.bfloat16, 64)
    plans = [r.plan for r in magi_train.report(ours).rows if r.name == "canonicalize_attention"]
    assert [bool(p["causal"] or p["unmasked"]) for p in plans] == [True, False]


def test_the_choice_does_not_wait_for_the_device():
    ours = magi_train.prepare(bert().cuda().train(), config=Config(tier="graph"))
    batches = [magi_train.to_device(batch(padded), "cuda") for padded in (False, True)]
    for given in batches:
        ours(**given).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in batches:
            ours(**given).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_batch_nobody_looked_at_keeps_its_mask():
    ours = magi_train.prepare(bert().cuda().train(), config=Config(tier="graph"))
    ours(**{k: v.cuda() for k, v in batch(False).items()}).loss.backward()
    report = magi_train.report(ours)
    assert any("magi_train.to_device" in note for note in report.notes)
    plan = next(r.plan for r in report.rows if r.name == "canonicalize_attention")
    assert not plan["unmasked"]
    assert plan["left_alone"]
