"""What is trained: unmodified library models at a size, with random weights and random data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its data and its loss.

    Attributes:
        build: Makes the model with random weights on the default device.
        batch: Makes a batch from a generator, on its device.
        loss: Loss of a (wrapped) model on a batch.
        blocks: Attribute path of the container of repeated blocks.
        samples: Tokens or images in a batch.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[[Any, Batch], Tensor]
    blocks: str
    samples: int

    def repeated(self, model: nn.Module) -> list[nn.Module]:
        """Return the repeated blocks; containers of containers are flattened."""
        found: list[nn.Module] = []
        for path in self.blocks.split():
            found += list(model.get_submodule(path).children())
        return found


def _integers(g: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=g, device=g.device)


def _own_loss(model: Any, batch: Batch) -> Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


def _image_loss(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def _tokens(rows: int, length: int, vocabulary: int) -> Callable[[torch.Generator], Batch]:
    def batch(g: torch.Generator) -> Batch:
        x = _integers(g, vocabulary, rows, length)
        return {"input_ids": x, "labels": x}

    return batch


def _packed(
    rows: int, length: int, vocabulary: int, sequences: int
) -> Callable[[torch.Generator], Batch]:
    """Rows of several sequences: positions begin again at 0, as packing collators make them."""

    def batch(g: torch.Generator) -> Batch:
        x = _integers(g, vocabulary, rows, length)
        begins = torch.zeros(rows, length, dtype=torch.bool, device=g.device)
        begins[:, 0] = True
        begins.scatter_(1, _integers(g, length, rows, sequences - 1), True)
        number = torch.arange(length, device=g.device)
        positions = number - torch.where(begins, number, 0).cummax(-1).values
        return {"input_ids": x, "labels": x, "position_ids": positions}

    return batch


def _images(rows: int, size: int = 224, classes: int = 1000) -> Callable[[torch.Generator], Batch]:
    def batch(g: torch.Generator) -> Batch:
        x = torch.randn(rows, 3, size, size, generator=g, device=g.device)
        return {"x": x, "y": _integers(g, classes, rows)}

    return batch


def _llama(**sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, use_cache=False, **sizes))

    return build


def _mistral(**sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import MistralConfig, MistralForCausalLM

        return MistralForCausalLM(MistralConfig(tie_word_embeddings=True, use_cache=False, **sizes))

    return build


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50304, use_cache=False))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig())


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name)  # type: ignore[no-any-return]

    return build


_LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072,
}  # fmt: skip
_LLAMA_TOY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
CASES = {
    "llama-1b": Case(
        _llama(**_LLAMA_1B), _tokens(2, 4096, 128256), _own_loss, "model.layers", 8192
    ),
    "llama-1b-packed": Case(
        _llama(**_LLAMA_1B), _packed(1, 8192, 128256, 8), _own_loss, "model.layers", 8192
    ),
    "mistral-window": Case(
        _mistral(**(_LLAMA_1B | {"vocab_size": 32000, "sliding_window": 1024})),
        _tokens(1, 8192, 32000),
        _own_loss,
        "model.layers",
        8192,
    ),
    "llama-1b-32k": Case(
        _llama(**_LLAMA_1B), _tokens(1, 32768, 128256), _own_loss, "model.layers", 32768
    ),
    "gpt2": Case(_gpt2, _tokens(16, 1024, 50304), _own_loss, "transformer.h", 16 * 1024),
    "bert": Case(_bert, _tokens(32, 512, 30522), _own_loss, "bert.encoder.layer", 32 * 512),
    "vit-l": Case(_timm("vit_large_patch16_224"), _images(64), _image_loss, "blocks", 64),
    "resnet50": Case(
        _timm("resnet50"), _images(256), _image_loss, "layer1 layer2 layer3 layer4", 256
    ),
    "toy-packed": Case(
        _llama(**_LLAMA_TOY), _packed(2, 64, 256, 4), _own_loss, "model.layers", 128
    ),
    "toy": Case(_llama(**_LLAMA_TOY), _tokens(2, 64, 256), _own_loss, "model.layers", 128),
}


def fold_masks_by_hand() -> None:
    """Patch transformers so that a missing padding mask means no mask tensor, while tracing too.

    What whole-model torch.compile reaches when its user does by hand, for this data only, what the
    attention pass proves. The functions are those of transformers 5.17.0, masking_utils.
    """
    from transformers import masking_utils

    names = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
    for name in names:
        if not hasattr(masking_utils, name):
            raise RuntimeError(f"transformers.masking_utils has no {name}; see its version")
        setattr(masking_utils, name, lambda padding_mask, *_, **__: padding_mask is None)
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
