"""Decoders: prefill and one-token decode as two graphs over one static cache, in one file.

Generation runs a model twice over: once for the whole prompt, then once a token. Both are captured
from the unmodified model (a causal language model of transformers, whose StaticCache is a public
class), with keys and values as inputs that the graph writes in place: the caller owns them, so any
number of generations may run at a time. Weights are inputs as well; the file holds them once, for
both graphs. Layers that keep something other than all keys and values (sliding windows, recurrent
states) are refused.
"""

import hashlib
import inspect
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from magi_train.core.errors import ExportError
from magi_train.core.report import Report
from magi_train.exporter import artifact
from magi_train.exporter.capture import Captured, capture, evaluating, in_precision
from magi_train.exporter.compare import relative_error, rounding
from magi_train.exporter.few_queries import spread
from magi_train.exporter.machine_code import compile_program
from magi_train.exporter.quantized import with_narrow_weights
from magi_train.exporter.settings import ExportConfig
from magi_train.exporter.write import check_numbers, optimize, versions

GRAPHS = ("prefill", "decode")
PROBE = 3
"""Tokens of the example prompt."""


class Step(nn.Module):
    """A causal model over a cache that it is given.

    Args:
        model: Called with `input_ids`, `attention_mask`, `position_ids` and `past_key_values`.
        length: Tokens that the cache holds.
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        self.model, self.length = model, length
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._only_last = {"logits_to_keep": 1} if keeps else {}

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, start: Tensor, *cache: Tensor
    ) -> Tensor:
        """Return the logits of the last token.

        Args:
            ids: Tokens, `[batch, new]`.
            mask: 0 where the cache holds padding, `[batch, length]`.
            positions: `[batch, new]`.
            start: How many tokens the cache holds, `[]`.
            cache: Keys and values of each layer, `[batch, heads, length, size]`; written in place.

        Returns:
            `[batch, vocabulary]`.
        """
        held = static_cache(self.model, self.length)
        for i, layer in enumerate(held.layers):
            layer.keys, layer.values = cache[2 * i], cache[2 * i + 1]
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
            layer.cumulative_length = start.clone()
            layer.is_initialized = True
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=held,
            use_cache=True, **self._only_last,
        )  # fmt: skip
        return out.logits[:, -1].float()


def static_cache(model: nn.Module, length: int) -> Any:
    """Return an empty static cache for `model`.

    Raises:
        ExportError: transformers is missing, or the model keeps something else.
    """
    try:
        from transformers import StaticCache
    except ImportError as error:
        raise ExportError(
            "decoders need transformers; pip install 'magi-train[transformers]'"
        ) from error
    config: Any = model.config
    cache: Any = StaticCache(config=config, max_cache_len=length)
    for number, layer in enumerate(cache.layers):
        if not hasattr(layer, "cumulative_length") or layer.is_sliding:
            raise ExportError(
                f"layer {number} of {type(model).__name__} keeps a {type(layer).__name__}, and "
                "decoders are captured with all keys and values only"
            )
    return cache


def export_decoder(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    length: int,
    batch: int | tuple[int, int | None] = (1, None),
    target: Literal["program", "pt2"] = "program",
    config: ExportConfig | None = None,
) -> Report:
    """Write a causal language model of transformers for generation.

    Args:
        model: The module; exported in evaluation mode, left as it was.
        path: The file to write; replaced in one step, or not at all.
        length: Tokens of prompt and answer together that the cache holds.
        batch: Sequences at a time: a number, or the lowest and the highest. A number lets more be
            known (grouped heads are then not repeated, and `few_queries` changes attention).
        target: "program" or "pt2", as in `export`.
        config: As in `export`; `precision` changes the weights and the cache.

    Returns:
        What the passes did on both graphs.

    Raises:
        ExportError: The model cannot be captured so; says why. Nothing is written.
    """
    if target not in ("program", "pt2"):
        raise ValueError(f"a decoder's target must be 'program' or 'pt2', got {target!r}")
    if length <= PROBE + 1:
        raise ValueError(f"length must be more than {PROBE + 1}, got {length}")
    config = config or ExportConfig()
    plain = model.__dict__.get("_magi_module", model)
    report = Report(tier="graph", settings=asdict(config))
    if config.precision == "int8" or config.precision == "float8":
        plain, done = with_narrow_weights(plain, config.precision)
        report.note(done)
    elif config.precision:
        plain = in_precision(plain, getattr(torch, config.precision), buffers=False)
    step = Step(plain, length)
    limits = (batch, batch) if isinstance(batch, int) else batch
    with evaluating(plain):
        cache = _example_cache(plain, length, batch if isinstance(batch, int) else 2)
    graphs = {}
    for name in GRAPHS:
        inputs = _example(cache, length, PROBE if name == "prefill" else 1)
        dynamic: dict[str, Any] = {} if isinstance(batch, int) else {"batch": limits}
        if name == "prefill":
            dynamic["sequence"] = (2, length)
        captured = capture(step, inputs, dynamic, None, None, None)
        if captured.contract.conditions:
            raise ExportError(
                f"{type(plain).__name__} takes another branch for other sizes: those of the "
                f"{name} must fulfil {', '.join(captured.contract.conditions)}, which generation "
                "does not; give `batch` as a number, or take the branch out of the model's code"
            )
        optimize(captured, config, target, report)
        if target == "pt2" and captured.contract.device != "cpu":
            found = spread(captured.graph)
            report.note(f"{name}: attention of few queries by the kernel, calls: {found}")
        check_numbers(captured, config, report)
        graphs[name] = captured
    _check_steps(plain, graphs, config.max_error, report)
    settings = getattr(plain, "generation_config", None) or plain.config
    unheeded = _unheeded(settings)
    if unheeded:
        report.note(
            f"transformers' generate would follow {', '.join(unheeded)} of this model's "
            "generation_config, and the file's generate does not"
        )
    manifest = {
        "format": artifact.FORMAT,
        "target": target,
        "versions": versions(),
        "hardware": artifact.hardware(cache[0].device.type),
        "contract": {"device": cache[0].device.type},
        "passes": [asdict(row) for row in report.rows],
        "measured": report.measured,
        "settings": report.settings,
        "decoder": {
            "length": length,
            "batch": list(limits),
            "cache": [[list(t.shape[1:]), str(t.dtype).removeprefix("torch.")] for t in cache],
            "eos": _numbers(getattr(settings, "eos_token_id", None)),
            "pad": getattr(settings, "pad_token_id", None),
        },
    }
    _write(graphs, Path(path), target, manifest, config)
    return report


def _example_cache(model: nn.Module, length: int, batch: int) -> list[Tensor]:
    """Return an empty cache as the model itself makes it."""
    held = static_cache(model, length)
    device = next(model.parameters()).device
    ids = torch.zeros(batch, PROBE, dtype=torch.long, device=device)
    places = torch.arange(PROBE, device=device).expand(batch, PROBE)
    mask = ids.new_ones(batch, length)  # as `Step` gives it: of all that the cache holds
    try:
        model(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=held,
            use_cache=True,
        )  # fmt: skip
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot run over a static cache of {length} tokens "
            f"({type(error).__name__}: {error}), so it cannot be exported for generation"
        ) from error
    return [torch.zeros_like(t) for layer in held.layers for t in (layer.keys, layer.values)]


def _check_steps(
    model: nn.Module, graphs: Mapping[str, Captured], limit: float | None, report: Report
) -> None:
    """Make sure that a prompt and a decode step behind it are what the model makes of the whole.

    Raises:
        ExportError: They are not: the model is not causal, or what it keeps is more than a cache.
    """
    _, mask, _, _, *cache = (t.clone() for t in graphs["prefill"].inputs)
    ids = torch.arange(PROBE + 1, device=mask.device).expand(mask.shape[0], -1).contiguous()
    cuts = {"prefill": (0, PROBE), "decode": (PROBE, PROBE + 1)}
    for name, (start, end) in cuts.items():
        graph = graphs[name].graph
        new, at = ids[:, start:end].contiguous(), torch.tensor(start, device=mask.device)
        with evaluating(model):
            whole = model(input_ids=ids[:, :end], attention_mask=mask[:, :end], use_cache=False)
        with evaluating(graph):
            (got,) = graph(new, mask, new.clone(), at, *cache)
        wanted = whole.logits[:, -1]
        error = relative_error(got, wanted.float())
        report.measured[f"error_{name}"] = error
        allowed = rounding(wanted) if limit is None else limit
        if not error <= allowed:
            raise ExportError(
                f"{type(model).__name__} gives other logits for {end} tokens at once than over a "
                f"cache ({name}: off by {error:.1e}, relative, and {allowed:.1e} is allowed); a "
                "decoder's tokens must not depend on later ones (is_decoder=True in some "
                "configurations); if it is rounding, set ExportConfig.max_error"
            )


_NO_MATTER = (
    "_", "transformers_version", "use_cache", "cache_", "output_", "return_", "eos_token_id",
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "max_length", "max_new_tokens",
)  # fmt: skip
"""How names in a GenerationConfig begin that are heeded, or that change no token."""


def _unheeded(settings: Any) -> list[str]:
    """Return what a GenerationConfig asks for that `Decoder.generate` does not do by itself."""
    if not hasattr(settings, "max_new_tokens"):
        return []  # a model's configuration
    changed = settings.to_diff_dict()
    return [
        f"{name}={value!r}"
        for name, value in changed.items()
        if value is not None and not name.startswith(_NO_MATTER)
    ]


def _example(cache: Sequence[Tensor], length: int, new: int) -> tuple[Tensor, ...]:
    batch, device = cache[0].shape[0], cache[0].device
    ids = torch.arange(new, device=device).expand(batch, new).contiguous()
    start = torch.zeros((), dtype=torch.long, device=device)
    mask = torch.ones(batch, length, dtype=torch.long, device=device)
    return (ids, mask, ids.clone(), start, *(t.clone() for t in cache))


class _Lifted(nn.Module):
    """A graph that takes its weights as inputs, in front of the others."""

    def __init__(self, graph: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._call = lambda weights, rest: torch.func.functional_call(graph, weights, rest)
        self._names = names

    def forward(self, weights: list[Tensor], *rest: Tensor) -> tuple[Tensor, ...]:
        """Run the graph."""
        return self._call(dict(zip(self._names, weights, strict=True)), rest)


def _write(
    graphs: dict[str, Captured],
    path: Path,
    target: str,
    manifest: dict[str, Any],
    config: ExportConfig,
) -> None:
    weights: dict[str, Tensor] = {}
    used: dict[str, list[str]] = {}
    try:
        with (
            artifact.replacing(path) as name,
            torch.no_grad(),
            zipfile.ZipFile(name, "w") as archive,
        ):
            for title, captured in graphs.items():
                file = name.with_name(f"{title}.pt2")
                used[title] = _write_graph(captured, file, target, weights, config)
                archive.write(file, f"decoder/{file.name}")
                file.unlink()
            file = name.with_name("weights.pt")
            torch.save(weights, file)
            archive.write(file, "decoder/weights.pt")
            file.unlink()
            manifest["decoder"]["weights"] = used
            archive.writestr(f"decoder/extra/{artifact.MANIFEST}", json.dumps(manifest))
    except Exception as error:
        raise ExportError(f"cannot write {path} as {target!r}: {error}") from error


def _write_graph(
    captured: Captured, file: Path, target: str, weights: dict[str, Tensor], config: ExportConfig
) -> list[str]:
    """Write one graph; add its weights to `weights`, and return their keys in order."""
    graph = captured.graph
    own = {n: t.detach() for n, t in (*graph.named_parameters(), *graph.named_buffers())}
    keys = []
    for tensor in own.values():
        keys.append(_digest(tensor))
        weights.setdefault(keys[-1], tensor)
    fixed: Any = ([{}] * len(own), tuple(captured.specs))
    program = torch.export.export(
        _Lifted(graph, list(own)), (list(own.values()), *captured.inputs), dynamic_shapes=fixed
    )
    if target == "program":
        program.example_inputs = None  # the weights among them would be saved once more
        torch.export.save(program, file)
    else:
        compile_program(program, file, config.inductor)
    return keys


def _digest(tensor: Tensor) -> str:
    """Return a name that equal tensors share."""
    digest = hashlib.sha256(str((tensor.shape, tensor.stride(), tensor.dtype)).encode())
    if tensor.numel():
        digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()[:24]


def _numbers(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
