"""What is trained by name: unmodified models of libraries, with random weights and random data.

`magi bench --case NAME`. A name is a key of CASES, a line each, or any model of a library, at the
size that its defaults have:

    timm/NAME          timm.create_model(NAME), 64 images of 224 x 224 a rank
    torchvision/NAME   torchvision.models.get_model(NAME), the same
    transformers/TYPE  the causal language model of AutoConfig.for_model(TYPE), 8 x 1024 tokens

NAME@ROWS is any of them with another number of rows in a batch. Nothing is downloaded. Batches
differ from rank to rank, weights do not.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magi_train.core.errors import MagiError

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its data and its loss.

    Attributes:
        build: Makes the model with random weights on the default device.
        batch: Makes a batch from a generator, on its device.
        loss: Loss of a (wrapped) model on a batch.
        samples: Of `unit` in a batch.
        sized: Returns the same case with so many rows in a batch.
        unit: "tokens" or "images".
        blocks: Attribute paths of the containers of repeated blocks, for models whose blocks are
            not found by structure (magi_train.comm.shard_blocks).
    """

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[[Any, Batch], Tensor]
    samples: int
    sized: Callable[[int], "Case"]
    unit: str = "tokens"
    blocks: str = ""

    def repeated(self, model: nn.Module) -> list[nn.Module]:
        """Return the blocks that `blocks` names; containers of containers are flattened."""
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


def from_transformers(
    kind: str, head: str = "AutoModelForCausalLM", **sizes: Any
) -> Callable[[], nn.Module]:
    """Return what builds a model of a type of transformers' AutoConfig, with some sizes set."""

    def build() -> nn.Module:
        import transformers

        config = transformers.AutoConfig.for_model(kind, **sizes)
        config.use_cache = False
        return getattr(transformers, head).from_config(config)

    return build


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name)

    return build


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name)

    return build


def _text(
    build: Callable[[], nn.Module], rows: int, length: int, vocabulary: int, sequences: int = 1
) -> Case:
    """Return a case of rows of tokens, which hold several sequences each if there are several."""
    batch = (
        _packed(rows, length, vocabulary, sequences)
        if sequences > 1
        else _tokens(rows, length, vocabulary)
    )
    sized = functools.partial(
        _text, build, length=length, vocabulary=vocabulary, sequences=sequences
    )
    return Case(build, batch, _own_loss, rows * length, sized)


def _pictures(build: Callable[[], nn.Module], rows: int, blocks: str = "") -> Case:
    sized = functools.partial(_pictures, build, blocks=blocks)
    return Case(build, _images(rows), _image_loss, rows, sized, "images", blocks)


_LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072,
}  # fmt: skip
_LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072,
}  # fmt: skip
_LLAMA_TOY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
_llama = functools.partial(from_transformers, "llama", tie_word_embeddings=True)
_RESNET = "layer1 layer2 layer3 layer4"
CASES = {
    "llama-1b": _text(_llama(**_LLAMA_1B), 2, 4096, 128256),
    "llama-1b-packed": _text(_llama(**_LLAMA_1B), 1, 8192, 128256, sequences=8),
    "llama-1b-32k": _text(_llama(**_LLAMA_1B), 1, 32768, 128256),
    "llama-8b": _text(from_transformers("llama", **_LLAMA_8B), 1, 8192, 128256),
    "mistral-window": _text(
        from_transformers(
            "mistral",
            **(_LLAMA_1B | {"vocab_size": 32000, "sliding_window": 1024}),
            tie_word_embeddings=True,
        ),
        1, 8192, 32000,
    ),
    "gpt2": _text(from_transformers("gpt2", vocab_size=50304), 16, 1024, 50304),
    "bert": _text(from_transformers("bert", "AutoModelForMaskedLM"), 32, 512, 30522),
    "vit-l": _pictures(_timm("vit_large_patch16_224"), 64),
    "convnext-b": _pictures(_timm("convnext_base"), 64),
    "resnet50": _pictures(_timm("resnet50"), 256, _RESNET),
    "torchvision-resnet50": _pictures(_torchvision("resnet50"), 256, _RESNET),
    "torchvision-swin-t": _pictures(_torchvision("swin_t"), 128),
    "toy": _text(_llama(**_LLAMA_TOY), 2, 64, 256),
    "toy-packed": _text(_llama(**_LLAMA_TOY), 2, 64, 256, sequences=4),
}  # fmt: skip


def case_of(name: str) -> Case:
    """Return the case of a name; the head of this file says which there are.

    Raises:
        MagiError: There is none.
    """
    name, at, rows = name.partition("@")
    if at:
        if not rows.isdecimal() or int(rows) < 1:
            raise MagiError(f"a case is NAME@ROWS, ROWS at least 1, got {name + at + rows!r}")
        return case_of(name).sized(int(rows))
    if name in CASES:
        return CASES[name]
    library, _, model = name.partition("/")
    if model and library == "timm":
        return _pictures(_timm(model), 64)
    if model and library == "torchvision":
        return _pictures(_torchvision(model), 64)
    if model and library == "transformers":
        return _text(from_transformers(model), 8, 1024, 1000)
    raise MagiError(
        f"there is no case {name!r}, only {', '.join(CASES)}, timm/NAME, torchvision/NAME and "
        "transformers/TYPE"
    )


def fold_masks_by_hand() -> None:
    """Patch transformers so that a missing padding mask means no mask tensor, while tracing too.

    What whole-model torch.compile reaches when its user does by hand, for this data only, what the
    attention pass proves. The functions are those of transformers 5.17.0, masking_utils.
    """
    from transformers import masking_utils

    names = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
    for name in names:
        if not hasattr(masking_utils, name):
            raise MagiError(f"transformers.masking_utils has no {name}; see its version")
        setattr(masking_utils, name, lambda padding_mask, *_, **__: padding_mask is None)
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
