"""ExecuTorch: a program for phones and other small machines, whose products XNNPACK computes.

Lowered and run by the package of that name, seen with 1.5.1 and torch 2.13. Memory is planned for
the largest sizes, so each size that may change needs a limit. The manifest lies behind the program,
as a zip archive of its own: the runtime reads a file from its beginning, zip from its end. Every
file is run once before it counts as written, since an op without a kernel shows only then.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magi_train.core.errors import ExportError
from magi_train.core.graph import copy_where_no_view_is
from magi_train.exporter import artifact
from magi_train.exporter.capture import Captured

METHOD = "forward"


def write_executorch(captured: Captured, path: Path, manifest: Mapping[str, Any]) -> None:
    """Write an ExecuTorch program, and run it on the examples.

    Raises:
        ExportError: The package is missing, the model is not on the CPU or has a size without
            limit, or an op has no kernel; says which.
    """
    contract = captured.contract
    if contract.device != "cpu":
        raise ExportError(
            f"target 'executorch' is for the CPU, and the model is on {contract.device!r}; move "
            "the module and the example inputs to the CPU"
        )
    open_ended = [str(size) for size in contract.sizes().values() if size.maximum is None]
    if open_ended:
        raise ExportError(
            f"target 'executorch' plans memory for the largest sizes, and {', '.join(open_ended)} "
            "has no limit; give dynamic={name: (lowest, highest)}"
        )
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise _missing(error, "target 'executorch'") from error
    program = torch.export.export(captured.graph, captured.inputs, dynamic_shapes=captured.specs)
    copy_where_no_view_is(program.graph_module)  # attention taken apart lies otherwise in memory
    apart = torch.export.default_decompositions()
    attention = {op: taken for op, taken in apart.items() if "scaled_dot_product" in str(op)}
    program = program.run_decompositions(attention)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    artifact.append_manifest(path, manifest)
    executorch_runner(path)(*captured.inputs)


def executorch_runner(path: Path) -> Callable[..., Sequence[Tensor]]:
    """Return a function of tensors that ExecuTorch's runtime computes, one call at a time.

    Raises:
        ExportError: The package is missing.
    """
    try:
        from executorch.runtime import Runtime
    except ImportError as error:
        raise _missing(error, f"running {path}") from error
    program, lock = Runtime.get().load_program(path), threading.Lock()

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        with lock:  # its memory is planned once: it serves one call at a time
            method = program.load_method(METHOD)
            results: Sequence[Tensor] = method.execute(tensors)
        return results

    return run


def _missing(error: ImportError, what: str) -> ExportError:
    return ExportError(
        f"{what} needs {error.name or 'executorch'}; pip install 'magi-train[executorch]' ({error})"
    )
