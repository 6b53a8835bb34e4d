"""What `benchmarks.inference` measures: a model run for inference in one way, in this process.

`python -m benchmarks.inference_runners FOLDER` reads FOLDER/task.json, measures each of its batch
sizes, and appends a line to FOLDER/rows.jsonl for each as it comes. The model is made from a seed;
its results in float32 are the reference; it is then run in the task's dtype. The modules hold what
begins as zeros (biases, the last norms of residual branches) at small random numbers, so that every
branch counts in the results.

Peak memory is above what is held once the model is loaded: the most that torch's allocator gave
out during later calls, and all memory of recorded CUDA graphs. ONNX Runtime's is not known here.
"""

import faulthandler
import gc
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magi_train.core import compat
from magi_train.core.errors import MagiError
from magi_train.exporter.bench import Latency, measure
from magi_train.exporter.contract import flatten
from magi_train.exporter.decoder import export_decoder
from magi_train.exporter.generate import load_decoder
from magi_train.exporter.loaded import load
from magi_train.exporter.write import export
from magi_train.integrations.cases import case_of, from_transformers

TUNED = {"max_autotune": True, "coordinate_descent_tuning": True}
"""Options of Inductor: what torch.compile(mode="max-autotune") sets, but for CUDA graphs."""

Inputs = dict[str, Tensor]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A model and its inputs.

    Attributes:
        build: Makes the model with random weights.
        inputs: Makes the arguments of a batch of so many rows.
        batches: The small and the large number of rows.
        generates: Whether tokens are generated, in place of one forward.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    batches: tuple[int, ...]
    generates: bool = False


def _images(name: str, size: int) -> Callable[[int], Inputs]:
    return lambda rows: {name: torch.randn(rows, 3, size, size)}


def _tokens(length: int, vocabulary: int) -> Callable[[int], Inputs]:
    return lambda rows: {"input_ids": torch.randint(0, vocabulary, (rows, length))}


_TOY_TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 96,
}  # fmt: skip
_TOY_IMAGES: dict[str, Any] = {
    "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic",
}  # fmt: skip
CASES = {
    "resnet50": Case(case_of("resnet50").build, _images("x", 224), (1, 128)),
    "bert": Case(from_transformers("bert", "AutoModel"), _tokens(128, 30522), (1, 32)),
    "vit-l": Case(case_of("vit-l").build, _images("x", 224), (1, 32)),
    "llama-1b": Case(case_of("llama-1b").build, _tokens(0, 128256), (1,), generates=True),
}
TOYS = {
    "toy-resnet": Case(
        from_transformers("resnet", "AutoModelForImageClassification", **_TOY_IMAGES),
        _images("pixel_values", 32), (1, 4),
    ),
    "toy-bert": Case(from_transformers("bert", "AutoModel", **_TOY_TEXT), _tokens(16, 96), (1, 4)),
    "toy-llama": Case(case_of("toy").build, _tokens(0, 256), (1,), generates=True),
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One process: a case run in one way.

    Attributes:
        case: Of CASES or TOYS.
        variant: Of RUNNERS or GENERATORS.
        device: "cuda" or "cpu".
        seconds: Of measuring each batch size, about.
        prompt: Tokens of a prompt.
        tokens: Generated after it.
        cache: Tokens that the cache of a decoder holds.
    """

    case: str
    variant: str
    device: str
    seconds: float
    prompt: int
    tokens: int
    cache: int


# -- ways to run a module --------------------------------------------------------------------------


def _eager(module: nn.Module, inputs: Inputs, folder: Path) -> Run:
    return lambda: module(**inputs)


def _compiled(module: nn.Module, inputs: Inputs, folder: Path) -> Run:
    compiled = torch.compile(module, mode="max-autotune")
    return lambda: compiled(**inputs)


def _ahead_of_time(module: nn.Module, inputs: Inputs, folder: Path) -> Run:
    program = torch.export.export(module, (), inputs)
    file = str(folder / "plain.pt2")
    compat.aoti_compile(program, package_path=file)
    run = compat.aoti_load(file)
    return lambda: run(**inputs)


def _onnx_runtime(module: nn.Module, inputs: Inputs, folder: Path) -> Run:
    import onnxruntime

    device = next(iter(inputs.values())).device.type
    wanted = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device]
    have = onnxruntime.get_available_providers()
    if wanted not in have:
        raise MagiError(f"this ONNX Runtime has no {wanted}, only {', '.join(have)}")
    file = folder / "plain.onnx"
    torch.onnx.export(module, (), str(file), kwargs=inputs, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(file), providers=[wanted])
    binding = session.io_binding()
    for spec in session.get_inputs():
        tensor = inputs[spec.name].contiguous()
        kind = str(tensor.dtype).removeprefix("torch.")
        binding.bind_input(spec.name, device, 0, kind, tuple(tensor.shape), tensor.data_ptr())
    for spec in session.get_outputs():
        binding.bind_output(spec.name, device, 0)

    def run() -> list[Any]:
        session.run_with_iobinding(binding)
        return binding.get_outputs()

    return run


def _ours(target: Any, compile: Any = False) -> Callable[[nn.Module, Inputs, Path], Run]:
    def make(module: nn.Module, inputs: Inputs, folder: Path) -> Run:
        file = folder / "ours.pt2"
        first = next(iter(inputs.values()))
        export(module, inputs, file, target=target)
        loaded = load(file, cuda_graphs="auto" if first.is_cuda else False, compile=compile)
        return lambda: loaded(**inputs)

    return make


RUNNERS: dict[str, Callable[[nn.Module, Inputs, Path], Run]] = {
    "eager": _eager,
    "magi-compiled": _ours("program", True),
    "magi-max-autotune": _ours("program", TUNED),
    "magi-program": _ours("program"),
    "magi-pt2": _ours("pt2"),
    "compile-max-autotune": _compiled,
    "aotinductor": _ahead_of_time,
    "onnxruntime": _onnx_runtime,
}


# -- ways to generate ------------------------------------------------------------------------------


Generate = Callable[[Tensor, int], Tensor]


def _generate(compiled: bool) -> Callable[[Any, Task, Path], Generate]:
    def make(model: Any, task: Task, folder: Path) -> Generate:
        if compiled and task.device == "cpu":
            raise MagiError("generate compiles decode steps on accelerators only")
        given: dict[str, Any] = {"do_sample": False, "use_cache": True,
                                 "cache_implementation": "static", "max_cache_len": task.cache,
                                 "disable_compile": not compiled}  # fmt: skip

        def run(ids: Tensor, count: int) -> Tensor:
            mask = torch.ones_like(ids)
            return model.generate(ids, attention_mask=mask, max_new_tokens=count, **given)

        return run

    return make


def _our_decoder(target: Any, compile: Any = False) -> Callable[[Any, Task, Path], Generate]:
    def make(model: Any, task: Task, folder: Path) -> Generate:
        file = folder / "decoder.pt2"
        export_decoder(model, file, length=task.cache, batch=1, target=target)
        decoder = load_decoder(file, cuda_graphs=task.device == "cuda", compile=compile)
        return lambda ids, count: decoder.generate(ids, max_new_tokens=count)

    return make


GENERATORS: dict[str, Callable[[Any, Task, Path], Generate]] = {
    "eager": _generate(False),
    "magi-compiled": _our_decoder("program", True),
    "magi-max-autotune": _our_decoder("program", TUNED),
    "magi-program": _our_decoder("program"),
    "magi-pt2": _our_decoder("pt2"),
    "compile": _generate(True),
}


def variants(case: Case) -> list[str]:
    """Return the ways to run a case: eager and ours first."""
    return [*(GENERATORS if case.generates else RUNNERS)]


# -- measuring -------------------------------------------------------------------------------------


def fresh(case: Case, device: str) -> nn.Module:
    """Return the case's module in evaluation mode, the same at each call."""
    torch.manual_seed(0)
    with torch.device(device):
        module = case.build().eval().requires_grad_(False)
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return module


def dtype_of(variant: str, device: str) -> torch.dtype:
    """Return what a variant runs in; ONNX Runtime has no kernels for bfloat16 convolutions."""
    if variant == "onnxruntime":
        return torch.float16 if device == "cuda" else torch.float32
    return torch.bfloat16


def off(got: Any, wanted: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest value of that result."""
    found = got if isinstance(got, list) else flatten(got)[0]
    tensors = [t if isinstance(t, Tensor) else torch.from_numpy(t.numpy()) for t in found]
    worst = 0.0
    for a, b in zip(tensors, wanted, strict=False):
        far = (a.double().cpu() - b).abs().max() / b.abs().max()
        worst = max(worst, float("inf") if far.isnan() else float(far))
    return worst


def measured(run: Run, rows: int, seconds: float) -> Latency:
    """Return the latency of `run`, called for about so many seconds."""
    first = measure({"": run}, 5, rows)[0]
    calls = int(1e3 * seconds / max(first.p50_ms, 1e-3))
    return measure({"": run}, min(max(calls, 10), 1000), rows)[0]


def peak(run: Run, held: int) -> dict[str, float]:
    """Return the most memory of a few calls in MiB, above the `held` bytes; {} without a GPU."""
    if not torch.cuda.is_available():
        return {}
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - held
    for segment in torch.cuda.memory_snapshot():
        if tuple(segment["segment_pool_id"]) != (0, 0):  # a graph's memory
            most += segment["total_size"] - segment["allocated_size"]
    return {"peak_mib": most / 2**20}


def forward_row(task: Task, rows: int, folder: Path) -> dict[str, Any]:
    """Return the figures of a forward of `rows` rows."""
    case = {**CASES, **TOYS}[task.case]
    module = fresh(case, task.device)
    dtype = dtype_of(task.variant, task.device)
    given = {name: t.to(task.device) for name, t in case.inputs(rows).items()}
    wanted = [t.double().cpu() for t in flatten(module(**given))[0]]
    module.to(dtype)
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}
    del given
    run = RUNNERS[task.variant](module, inputs, folder)
    del module
    held = _held()
    for _ in range(3):
        result = run()
    row = {"dtype": str(dtype).removeprefix("torch."), "max_relative_error": off(result, wanted)}
    del result
    if task.variant != "onnxruntime":
        row |= peak(run, held)
    return row | _figures(measured(run, rows, task.seconds))


def generation_row(task: Task, folder: Path) -> dict[str, Any]:
    """Return the figures of a generation; rows a second are tokens, the error counts tokens."""
    case = {**CASES, **TOYS}[task.case]
    model: Any = fresh(case, task.device)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.randint(0, model.config.vocab_size, (1, task.prompt), device=task.device)
    wanted = _generate(False)(model, task, folder)(ids, task.tokens)[0, task.prompt :]
    model.__dict__.pop("_cache", None)
    model.to(torch.bfloat16)
    run = GENERATORS[task.variant](model, task, folder)
    del model
    held = _held()
    for _ in range(3):
        got = run(ids, task.tokens)[0, task.prompt :]
    same = int((got == wanted).long().cumprod(0).sum())
    row = {"dtype": "bfloat16", "first_tokens_as_float32": same}
    row |= peak(lambda: run(ids, task.tokens), held)
    whole = measured(lambda: run(ids, task.tokens), task.tokens, task.seconds)
    one = measured(lambda: run(ids, 1), 1, task.seconds / 4)
    each = (whole.p50_ms - one.p50_ms) / (task.tokens - 1)
    return row | _figures(whole) | {"prefill_ms": one.p50_ms, "ms_per_token": each}


def _figures(found: Latency) -> dict[str, float]:
    return {name: value for name, value in asdict(found).items() if name != "name"}


def _held() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def main() -> None:
    """Run the task of a folder."""
    faulthandler.enable()
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    folder = Path(sys.argv[1])
    task = Task(**json.loads((folder / "task.json").read_text()))
    case = {**CASES, **TOYS}[task.case]
    for rows in case.batches:
        row: dict[str, Any] = {"batch": rows}
        try:
            with torch.no_grad(), tempfile.TemporaryDirectory(dir=folder) as own:
                row |= (
                    generation_row(task, Path(own))
                    if case.generates
                    else forward_row(task, rows, Path(own))
                )
        except Exception as error:
            row["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        with (folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        torch._dynamo.reset()
        gc.collect()


if __name__ == "__main__":
    main()
