"""Toy sizes of library models, and small models with one awkward property each.

A case is a function that returns (module, batch): `module(**batch)` has a loss, or is one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, SEQUENCE, BATCH = 96, 32, 16, 4


def tokens(seed: int, batch: int = BATCH) -> Tensor:
    """Return random token ids, `[batch, SEQUENCE]`."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, SEQUENCE), generator=g)


def images(seed: int, batch: int = BATCH) -> Tensor:
    """Return random images, `[batch, 3, 32, 32]`."""
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _text(seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(seed), "labels": tokens(seed)}


def _vision(seed: int) -> dict[str, Tensor]:
    return {"pixel_values": images(seed), "labels": tokens(seed)[:, 0] % 5}


def llama(**config: Any) -> nn.Module:
    """Grouped-query attention, untied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **config}))


def gpt2(dropout: float = 0.0) -> nn.Module:
    """Tied embedding and head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(
        GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=VOCABULARY, **drops)
    )


def bert() -> nn.Module:
    """Encoder; the pooler is missing, position ids are buffers."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    """Encoder and decoder with one shared embedding and learned position biases."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            d_model=WIDTH, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=VOCABULARY,
            dropout_rate=0.0, decoder_start_token_id=0,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    """Images, no mask."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            image_size=32, patch_size=8, num_labels=5,
        )
    )  # fmt: skip


def resnet() -> nn.Module:
    """Convolutions and BatchNorm."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=5)
    )


class Small(nn.Module):
    """An embedding, two blocks and a head; subclasses add one property each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        """Return what goes into the head."""
        return torch.relu(self.b(torch.relu(self.a(self.embedding(x)))))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        logits = self.head(self.hidden(input_ids))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class GraphBreak(Small):
    """A print in the middle."""

    def hidden(self, x: Tensor) -> Tensor:
        """Break the graph after the first layer."""
        h = torch.relu(self.a(self.embedding(x)))
        torch._dynamo.graph_break()
        return torch.relu(self.b(h))


class DataDependent(Small):
    """A branch on a value; both sides are taken."""

    def hidden(self, x: Tensor) -> Tensor:
        """Skip a layer for every other batch."""
        h = torch.relu(self.a(self.embedding(x)))
        return torch.relu(self.b(h)) if int(x.sum()) % 2 == 0 else h


class UsedTwice(Small):
    """One layer, two places."""

    def hidden(self, x: Tensor) -> Tensor:
        """Use `a` again at the end."""
        return self.a(super().hidden(x))


class UnusedFrozenTied(Small):
    """A layer nobody calls, a frozen one, a tied head, a submodule without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.frozen = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.head.weight = self.embedding.weight
        self.nothing = nn.Identity()

    def hidden(self, x: Tensor) -> Tensor:
        """Pass the frozen layer."""
        return self.nothing(self.frozen(super().hidden(x)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]]]] = {
    "llama": (llama, _text),
    "gpt2": (gpt2, _text),
    "bert": (bert, _text),
    "t5": (t5, _text),
    "vit": (vit, _vision),
    "resnet": (resnet, _vision),
    "graph_break": (GraphBreak, _text),
    "data_dependent": (DataDependent, _text),
    "used_twice": (UsedTwice, _text),
    "unused_frozen_tied": (UnusedFrozenTied, _text),
}
NOT_WHOLE = {"graph_break", "data_dependent"}


def loss_of(output: Any) -> Tensor:
    """Return the loss in a model's output."""
    return output if isinstance(output, Tensor) else output.loss
