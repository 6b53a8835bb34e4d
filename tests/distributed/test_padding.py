"""One rank pads and another does not: they run different graphs and one communication plan."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import magi_train
from magi_train import CommConfig, Config
from tests.close import difference, tolerance
from tests.models import SEQUENCE, Small, bert, llama, loss_of, tokens
from tests.ranks import values


class Tiny(Small):
    """Attention under a padding mask between the layers."""

    def forward(self, input_ids, attention_mask, labels):
        h = self.hidden(input_ids)[:, None]
        h = F.scaled_dot_product_attention(
            h, h, h, attn_mask=attention_mask.bool()[:, None, None, :]
        )
        return F.cross_entropy(self.head(h).flatten(0, 2), labels.flatten())


MAKE = {"tiny": Tiny, "llama": llama, "bert": bert}
PADDED = {
    "first step apart": [(1,), (0,), (), (0, 1)],
    "first step without": [(), (1,), (0, 1)],
}
"""Which ranks have a padded batch, step by step."""


def batch(step, rank, padded):
    ids = tokens(10 * step + rank)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, SEQUENCE // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def gradients(model):
    named = model.named_parameters()
    return {n.removeprefix("module."): p.grad for n, p in named}


def train(rank, world_size, name, order, config):
    """Return the largest difference from DDP, the tier, and which plans this rank has."""
    torch.manual_seed(0)
    model = MAKE[name]().train()
    twin = copy.deepcopy(model)
    theirs = DistributedDataParallel(model, find_unused_parameters=True)
    ours = magi_train.prepare(twin, config=config)
    apart = []
    for step, padded in enumerate(PADDED[order]):
        given = batch(step, rank, rank in padded)
        for m in (theirs, ours):
            m.zero_grad()
            loss_of(m(**given)).backward()
        apart.append(difference(gradients(twin), gradients(model)))
    report = magi_train.report(ours)
    plans = [r.plan for r in report.rows if r.name == "canonicalize_attention"]
    return max(apart), report.tier, [bool(p["assumed"]) for p in plans], report.notes


@pytest.mark.parametrize(
    ("name", "order", "config"),
    [
        ("tiny", "first step apart", Config(lowering="aot_eager")),
        ("tiny", "first step without", Config(lowering="aot_eager")),
        pytest.param(
            *("llama", "first step without", Config(lowering="aot_eager")), marks=pytest.mark.full
        ),
        pytest.param(
            *("bert", "first step apart", Config(comm=CommConfig(bucket_mib=0.02))),
            marks=pytest.mark.full,
        ),
    ],
    ids=["apart", "together", "llama", "generated code"],
)
def test_ranks_with_and_without_padding_train_like_ddp(name, order, config, two_ranks):
    for rank, got in enumerate(values(two_ranks(train, name, order, config))):
        apart, tier, assumed, notes = got
        assert apart <= tolerance(torch.float32, 64)
        assert tier == "graph"
        first_padded = rank in PADDED[order][0]
        forms = [True, False] if any(rank not in p for p in PADDED[order]) else [False]
        assert sorted(assumed) == sorted(forms)
        assert assumed[0] is not first_padded, "each rank begins with its own form"
        assert not notes
