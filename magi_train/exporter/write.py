"""`export`: capture, inference passes, a check of the numbers, and a file, whole or not there.

torch.export captures the module in evaluation mode. The passes run on that graph before autograd's
place (the PRE_GRAD stage); passes of a training step that need a backward have no place here. The
rewritten graph is run beside the module and captured again, which proves that it is well formed,
and written: as a program of torch.export, as machine code (AOTInductor), as ONNX or for ExecuTorch.
A manifest inside the file says which passes ran, with which versions, and what goes in and comes
out.
"""

import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from magi_train.core.errors import ExportError, PassError
from magi_train.core.graph import drop_unread, spell_out, written
from magi_train.core.passes import Pass, PassContext, Stage, registered_passes, run_passes
from magi_train.core.report import Report
from magi_train.core.versions import own
from magi_train.exporter import artifact, shapes, sources
from magi_train.exporter.capture import Captured, capture, evaluating
from magi_train.exporter.compare import relative_error, rounding
from magi_train.exporter.machine_code import compile_program
from magi_train.exporter.settings import ExportConfig
from magi_train.fusion.attention import CanonicalizeAttention
from magi_train.fusion.constants import FoldConstants, RemoveNoOps
from magi_train.fusion.convolutions import ChannelsLast, FoldBatchNorm
from magi_train.fusion.merged_linears import MergeLinears
from magi_train.fusion.patches import PatchConvolutions

Target = Literal["program", "pt2", "onnx", "executorch"]


def export(
    module: nn.Module | sources.Source,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    target: Target = "program",
    dynamic: shapes.Dynamic = None,
    dynamic_shapes: Any = None,
    outputs: Sequence[str] | None = None,
    model: sources.Model | None = None,
    config: ExportConfig | None = None,
) -> Report:
    """Write a module for inference.

    Args:
        module: A plain or prepared module; exported in evaluation mode, left as it was. Or where
            its weights are: a state_dict, a file of one, a Lightning checkpoint, a folder of a
            distributed checkpoint; then `model` is what takes them.
        example_inputs: Positional arguments, or keyword arguments as a mapping: tensors, and
            constants that become part of the file.
        path: The file to write; replaced in one step, or not at all.
        target: "program" for a torch.export program, which any torch of this version or newer runs;
            "pt2" for machine code of this device, compiled ahead of time; "onnx" for other
            runtimes; "executorch" for small machines.
        dynamic: Sizes that may change: "batch", "sequence", both, or a mapping of these to (lowest,
            highest). "auto": whatever of the two the model leaves open.
        dynamic_shapes: Others, as in torch.export.export, by input.
        outputs: Names of the results to keep, where the module returns a mapping; None for all.
        model: A module, or a function or class that makes one, for weights from a checkpoint.
        config: Passes and precision; `ExportConfig()` by default.

    Returns:
        What the passes did, and the measured error beside the module itself.

    Raises:
        ExportError: The module cannot be exported, the weights do not fit, or the results moved too
            far; says why. Nothing is written.
    """
    if target not in get_args(Target):
        raise ValueError(f"export target must be one of {get_args(Target)}, got {target!r}")
    config = config or ExportConfig()
    source = module if isinstance(module, nn.Module) else sources.load_module(module, model)
    plain = source.__dict__.get("_magi_module", source)
    what = (plain, example_inputs, dynamic, dynamic_shapes, outputs, config.precision)
    captured = capture(*what)
    report = Report(tier="graph", settings=asdict(config))
    for sentence in captured.notes:
        report.note(sentence)
    optimize(captured, config, target, report)
    writes = _writes(captured)
    _check_writes(writes, type(plain).__name__, target)
    try:
        check_numbers(captured, config, report)
    except ExportError:
        if config.precision is None:
            _check_capture(capture(*what), config)
        raise
    manifest = {
        "format": artifact.FORMAT,
        "target": target,
        "versions": versions(),
        "hardware": artifact.hardware(captured.contract.device),
        "contract": captured.contract.as_dict(),
        "passes": [asdict(row) for row in report.rows],
        "measured": report.measured,
        "notes": report.notes,
        "writes": writes,
        "settings": report.settings,
    }
    write(captured, Path(path), target, manifest, config)
    return report


def _writes(captured: Captured) -> dict[str, Any]:
    """Return the inputs that the graph writes to, by name, and whether it writes to its buffers."""
    graph = captured.graph.graph
    changed = written(graph)
    given = zip(graph.find_nodes(op="placeholder"), captured.contract.inputs, strict=True)
    inputs = [spec.name for node, spec in given if node in changed]
    return {"inputs": inputs, "buffers": any(n.op == "get_attr" for n in changed)}


def _check_writes(writes: Mapping[str, Any], name: str, target: str) -> None:
    """Make sure that what a model writes is written by a file of this target, too."""
    lost = [f"its input {each}" for each in writes["inputs"] if target in ("onnx", "executorch")]
    if writes["buffers"] and target != "program":
        lost.append("its buffers")
    if lost:
        raise ExportError(
            f"{name} writes to {', '.join(lost)} while it is evaluated, which a file of target "
            f"{target!r} would not do; export with target='program', or return the new values"
        )


def inference_passes(config: ExportConfig, device: str, target: str) -> list[Pass[Any]]:
    """Return the passes that `config` asks for, in their order."""
    ours = target in ("program", "pt2")
    chosen: list[tuple[bool | None, Pass[Any]]] = [
        (config.attention, CanonicalizeAttention()),
        (config.remove_no_ops, RemoveNoOps()),
        (config.fold_batch_norm, FoldBatchNorm()),
        (device != "cpu" if config.merge_linears is None else config.merge_linears, MergeLinears()),
        # behind FoldBatchNorm, which looks for convolutions
        (device != "cpu" and ours if config.patches is None else config.patches,
         PatchConvolutions(always=config.patches is True)),
        (config.fold_constants, FoldConstants()),
        # graphs for other runtimes have one layout; they choose their own inside
        (config.channels_last is not False and ours,
         ChannelsLast(always=config.channels_last is True)),
    ]  # fmt: skip
    return [each for wanted, each in chosen if wanted] + [*registered_passes(Stage.PRE_GRAD)]


def optimize(captured: Captured, config: ExportConfig, target: str, report: Report) -> None:
    """Run the passes over a captured graph, and drop what it no longer reads."""
    device = captured.contract.device
    context = PassContext(device, training=False)
    try:
        run_passes(inference_passes(config, device, target), captured.graph, context, report)
    except PassError as error:
        raise ExportError(f"{error}; turn the pass off in ExportConfig, and report it") from error
    if target == "pt2":  # Inductor reads it; a program that is compiled later is spelled out then
        spell_out(captured.graph.graph)
    captured.graph.graph.eliminate_dead_code()
    drop_unread(captured.graph)
    captured.graph.recompile()


def check_numbers(captured: Captured, config: ExportConfig, report: Report) -> None:
    """Run the graph on the examples, and measure how far its results are from the module's.

    Raises:
        ExportError: Further than the settings allow.
    """
    with evaluating(captured.graph):
        got = captured.graph(*(t.clone() for t in captured.inputs))
    limit = config.max_error
    for spec, result, wanted in zip(
        captured.contract.outputs, got, captured.reference, strict=True
    ):
        error = relative_error(result, wanted)
        report.measured[f"error_{spec.name}"] = error
        if wanted.is_floating_point() and wanted.dim() > 1 and wanted.shape[-1] > 1:
            same = (result.argmax(-1) == wanted.argmax(-1)).double().mean()
            report.measured[f"same_argmax_{spec.name}"] = float(same)
        allowed = rounding(wanted) if limit is None else limit
        checked = limit is not None or config.precision is None or error == float("inf")
        if checked and not error <= allowed:
            raise ExportError(
                f"{spec.name} moved by {error:.1e} (relative), and {allowed:.1e} is allowed; set "
                "ExportConfig.max_error, or turn passes off one by one to find the one that did it"
            )


def _check_capture(untouched: Captured, config: ExportConfig) -> None:
    """Make sure that a graph which no pass has touched computes what the module does.

    Raises:
        ExportError: It does not, so that no pass is to blame.
    """
    try:
        check_numbers(untouched, config, Report(tier="graph"))
    except ExportError as error:
        raise ExportError(
            "what torch.export captured, before any pass, is not what the module computes "
            f"({str(error).partition(';')[0]}): it draws random numbers, depends on earlier "
            "calls, or takes another way while it is traced, as nn.TransformerEncoder with a "
            "padding mask (enable_nested_tensor=False, "
            "torch.backends.mha.set_fastpath_enabled(False))"
        ) from error


def versions() -> dict[str, str]:
    """Return the versions that the file depends on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "magi_train": own(),
    }


def write(
    captured: Captured,
    path: Path,
    target: str,
    manifest: Mapping[str, Any],
    config: ExportConfig,
) -> None:
    """Write a captured graph, whole or not at all.

    Raises:
        ExportError: torch could not write it; says why.
    """
    try:
        with artifact.replacing(path) as name, torch.no_grad(), warnings.catch_warnings():
            for kind in (UserWarning, FutureWarning):  # of torch's writers, about themselves
                warnings.simplefilter("ignore", kind)
            if target == "onnx":
                from magi_train.exporter.onnx_file import write_onnx

                write_onnx(captured, name, manifest)
                return
            if target == "executorch":
                from magi_train.exporter.executorch_file import write_executorch

                write_executorch(captured, name, manifest)
                return
            program = torch.export.export(
                captured.graph, captured.inputs, dynamic_shapes=captured.specs
            )
            package = name.with_suffix(".pt2")  # the only suffix that torch writes
            if target == "program":
                torch.export.save(program, package)
            else:
                compile_program(program, package, config.inductor)
            artifact.append_manifest(package, manifest)
            os.replace(package, name)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"cannot write {path} as {target!r}: {error}") from error
