"""Toy sizes of any transformers model, from its configuration alone.

`build(family, model_type)` takes the default configuration of a model type, makes every size in it
small by the names that the library's configurations share, turns off all randomness of training
(dropout, stochastic depth, masking of audio), and returns the module and a function that makes
batches. What a model type needs beyond that stands in `MORE`. No weights are loaded. The family
"timm" has one model of each module of timm, where that is installed, with its own sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, SEQUENCE, VOCABULARY, PIXELS, SAMPLES = 4, 16, 96, 32, 1600
Batch = dict[str, Tensor]

SIZES: dict[str, Any] = {
    "attention_head_dim": 8, "attention_head_size": 8, "char_ngrams": 2,
    "attention_hidden_size": 32, "attention_heads": 4, "bos_token_id": 1,
    "classifier_proj_size": 32, "cls_token_id": 1, "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "use_cache": False,
    "d_ff": 64, "d_inner": 64, "d_kv": 8, "d_model": 32, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64, "decoder_layers": 2, "decoder_start_token_id": 2, "depths": [1, 1],
    "dim": 32, "dim_ff": 64, "embed_dim": 32, "embedding_size": 32, "emb_dim": 32,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "encoder_layers": 2, "eos_token_id": 2,
    "expert_ffn_hidden_size": 32, "feat_extract_dim": 32, "ffn_dim": 64, "ffn_hidden_size": 64,
    "first_k_dense_replace": 1, "global_attn_every_n_layers": 2, "head_dim": 8, "hidden_dim": 64,
    "hidden_size": 32, "hidden_size_per_layer_input": 8, "image_size": PIXELS, "index_head_dim": 8,
    "index_n_heads": 2, "index_topk": 8, "intermediate_size": 64, "kv_channels": 8,
    "kv_lora_rank": 8, "local_attention": 8, "mamba_chunk_size": 8, "mamba_d_head": 16,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mask_token_id": 3, "max_position_embeddings": 64,
    "max_source_positions": 64, "max_target_positions": 64, "moe_intermediate_size": 32,
    "moe_num_experts": 4, "n_ctx": 64, "n_embd": 32, "n_groups": 1, "n_head": 4, "n_heads": 4,
    "n_inner": 64, "n_layer": 2, "n_layers": 2, "n_positions": 64, "n_routed_experts": 4,
    "num_attention_heads": 4, "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 16,
    "num_decoder_layers": 2, "num_encoder_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "num_feat_extract_layers": 3, "num_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "num_kv_heads": 2, "num_layers": 2, "num_local_experts": 4,
    "num_mel_bins": 16, "max_length": 64, "num_query_heads": 4, "pad_token_id": 0, "patch_size": 8,
    "projection_dim": 32, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "rotary_dim": 4, "sep_token_id": 2, "shared_expert_intermediate_size": 32,
    "sliding_window": 8, "state_size": 8, "topk_group": 1, "n_group": 1, "unk_token_id": 3,
    "v_head_dim": 8, "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
"""Values by name. A model type overrides some of them in `MORE`."""

MORE: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 32], "depths": [1, 1]},
    "convnext": {"hidden_sizes": [16, 32], "patch_size": 4, "num_stages": 2},
    "convnextv2": {"hidden_sizes": [16, 32], "patch_size": 4, "num_stages": 2},
    "cvt": {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 1, 1]},
    "donut-swin": {"embed_dim": 16, "num_heads": [2, 2], "window_size": 2, "patch_size": 4},
    "falcon": {"new_decoder_architecture": False},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 8},
    "poolformer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "pvt": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "pvt_v2": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "regnet": {"hidden_sizes": [16, 32], "embedding_size": 8, "groups_width": 8},
    "resnet": {"hidden_sizes": [16, 32], "embedding_size": 8},
    "segformer": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "swin": {"embed_dim": 16, "num_heads": [2, 2], "window_size": 2, "patch_size": 4},
    "swinv2": {"embed_dim": 16, "num_heads": [2, 2], "window_size": 2, "patch_size": 4},
    "focalnet": {"embed_dim": 16, "patch_size": 4, "depths": [1, 1], "focal_levels": [1, 1],
                 "focal_windows": [3, 3]},
}  # fmt: skip

RANDOM = ("dropout", "pdrop", "drop_path", "layerdrop", "mask_time_prob", "mask_feature_prob")
OFF = {"apply_spec_augment": False, "router_jitter_noise": 0.0, "jitter_noise": 0.0}


def _small(kind: Any, more: dict[str, Any]) -> Any:
    """Return a configuration of class `kind` with every size small, its parts included."""
    default = kind()
    known = default.to_dict()
    words = {n: v for n, v in {**SIZES, **OFF}.items() if n in known and _fits(v, known[n])}
    for name, value in known.items():
        if isinstance(value, float) and any(r in name for r in RANDOM):
            words[name] = 0.0
    for name in getattr(kind, "sub_configs", {}):
        inner = type(getattr(default, name, None))
        if hasattr(inner, "to_dict"):
            words[name] = _small(inner, more.get(name, {})).to_dict()
    words |= {name: value for name, value in more.items() if not isinstance(value, dict)}
    return kind(**words)


def _fits(small: Any, default: Any) -> bool:
    lists = isinstance(small, list | tuple), isinstance(default, list | tuple)
    return default is None or lists[0] == lists[1]


def _quiet(module: nn.Module) -> nn.Module:
    for each in module.modules():
        if isinstance(each, nn.modules.dropout._DropoutNd):
            each.p = 0.0
    return module.train()


def _tokens(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(4, VOCABULARY, shape, generator=generator)


def _padding(generator: torch.Generator) -> Tensor:
    """Rows of several lengths, the first one full."""
    lengths = torch.randint(SEQUENCE // 2, SEQUENCE + 1, (BATCH, 1), generator=generator)
    lengths[0] = SEQUENCE
    return (torch.arange(SEQUENCE) < lengths).long()


def _text(g: torch.Generator) -> Batch:
    ids = _tokens(g, BATCH, SEQUENCE)
    return {"input_ids": ids, "labels": ids}


def _padded(g: torch.Generator) -> Batch:
    ids, mask = _tokens(g, BATCH, SEQUENCE), _padding(g)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _pair(g: torch.Generator) -> Batch:
    mask = _padding(g)
    return {
        "input_ids": _tokens(g, BATCH, SEQUENCE),
        "attention_mask": mask,
        "labels": _tokens(g, BATCH, SEQUENCE // 2),
    }


def _images(g: torch.Generator) -> Batch:
    pixels = torch.randn(BATCH, 3, PIXELS, PIXELS, generator=g)
    return {"pixel_values": pixels, "labels": torch.randint(0, 2, (BATCH,), generator=g)}


def _segments(g: torch.Generator) -> Batch:
    pixels = torch.randn(BATCH, 3, PIXELS, PIXELS, generator=g)
    return {
        "pixel_values": pixels,
        "labels": torch.randint(0, 2, (BATCH, PIXELS, PIXELS), generator=g),
    }


def _sound(g: torch.Generator) -> Batch:
    return {
        "input_values": torch.randn(BATCH, SAMPLES, generator=g),
        "labels": torch.randint(0, 2, (BATCH,), generator=g),
    }


def _speech(g: torch.Generator) -> Batch:
    return {
        "input_values": torch.randn(BATCH, SAMPLES, generator=g),
        "labels": _tokens(g, BATCH, 5),
    }


@dataclass(frozen=True)
class Family:
    """One head: the transformers Auto class, its table of models, and the batches it takes."""

    auto: str
    table: str
    batch: Callable[[torch.Generator], Batch]


FAMILIES = {
    "causal": Family("AutoModelForCausalLM", "CAUSAL_LM", _text),
    "causal-padded": Family("AutoModelForCausalLM", "CAUSAL_LM", _padded),
    "masked": Family("AutoModelForMaskedLM", "MASKED_LM", _padded),
    "pair": Family("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", _pair),
    "image": Family("AutoModelForImageClassification", "IMAGE_CLASSIFICATION", _images),
    "segments": Family("AutoModelForSemanticSegmentation", "SEMANTIC_SEGMENTATION", _segments),
    "sound": Family("AutoModelForAudioClassification", "AUDIO_CLASSIFICATION", _sound),
    "speech": Family("AutoModelForCTC", "CTC", _speech),
}


TIMM = "timm"
SMALL_WORDS = ("atto", "femto", "pico", "nano", "xxs", "xx_small", "tiny", "mini", "small", "_s",
               "_b0", "050")  # fmt: skip
SMALL_PICTURE = 64


class _Classifier(nn.Module):
    """A timm model with its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (nn.functional.cross_entropy(self.model(pixels), labels),)


def _timm_models() -> list[str]:
    """Return a model of each module of timm: by its name the smallest, as far as that says so."""
    import timm

    def by_size(name: str) -> tuple[int, str]:
        words = (i for i, word in enumerate(SMALL_WORDS) if word in name)
        return next(words, len(SMALL_WORDS)), name

    listed = (timm.list_models(module=module) for module in timm.list_modules())
    return [min(names, key=by_size) for names in listed if names]


def _timm_model(name: str) -> tuple[nn.Module, Callable[[int], Batch]]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2)
    given = model.pretrained_cfg
    size = given["input_size"][-1]
    if not given.get("fixed_input_size"):
        size = min(size, max(SMALL_PICTURE, *given.get("min_input_size", (0, 0))[-2:]))

    def batch(seed: int) -> Batch:
        g = torch.Generator().manual_seed(seed)
        pixels = torch.randn(BATCH, 3, size, size, generator=g)
        return {"pixels": pixels, "labels": torch.randint(0, 2, (BATCH,), generator=g)}

    return _quiet(_Classifier(model)), batch


def model_types(family: str) -> list[str]:
    """Return the model types that the library lists for a family."""
    if family == TIMM:
        return _timm_models()
    from transformers.models.auto import modeling_auto

    return list(getattr(modeling_auto, f"MODEL_FOR_{FAMILIES[family].table}_MAPPING_NAMES"))


def build(family: str, model_type: str) -> tuple[nn.Module, Callable[[int], Batch]]:
    """Return a toy model in training mode and a function from a seed to a batch.

    Raises:
        Exception: Whatever the library raises where a configuration cannot be made small this way.
    """
    if family == TIMM:
        return _timm_model(model_type)
    import transformers

    kind = transformers.CONFIG_MAPPING[model_type]
    config = _small(kind, MORE.get(model_type, {}))
    if family == "pair" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 2
    torch.manual_seed(0)
    module = getattr(transformers, FAMILIES[family].auto).from_config(config)
    module = _quiet(module.float())

    def batch(seed: int) -> Batch:
        return FAMILIES[family].batch(torch.Generator().manual_seed(seed))

    return module, batch
