"""ONNX: written by torch's own exporter, run by ONNX Runtime to check it.

The way to runtimes of other makers (TensorRT, OpenVINO, DirectML). The manifest is in the model's
metadata. Models of more than 2 GiB keep their weights in a file beside the model, "NAME.data".
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magi_train.core.errors import ExportError
from magi_train.exporter.artifact import MANIFEST
from magi_train.exporter.capture import Captured
from magi_train.exporter.contract import Contract

LARGE = 2**31 - 2**24
"""Bytes of weights from which ONNX needs a second file: protobuf ends at 2 GiB."""


def write_onnx(captured: Captured, path: Path, manifest: Mapping[str, Any]) -> None:
    """Write an ONNX model.

    Raises:
        ExportError: A package is missing, or an op has no translation; says which.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"target 'onnx' needs {error.name}; pip install 'magi-train[onnx]'"
        ) from error
    contract, graph = captured.contract, captured.graph
    weights = sum(t.nbytes for t in [*graph.parameters(), *graph.buffers()])
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):  # the exporter prints its progress
            program = torch.export.export(
                graph, captured.inputs, dynamic_shapes=captured.specs
            ).run_decompositions({})
            model = torch.onnx.export(
                program,
                input_names=[each.name for each in contract.inputs],
                output_names=[each.name for each in contract.outputs],
                dynamo=True,
                verbose=False,
            )
    finally:
        log.setLevel(before)
    assert model is not None
    model.model.metadata_props[MANIFEST] = json.dumps(manifest)
    model.save(str(path), external_data=weights > LARGE)


def onnx_runner(path: Path, contract: Contract) -> Callable[..., Sequence[Tensor]]:
    """Return a function of tensors that ONNX Runtime computes.

    Raises:
        ExportError: onnxruntime is missing, or has no provider for the device.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            f"running {path} needs onnxruntime; pip install 'magi-train[onnx]'"
        ) from error
    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(contract.device)
    have = onnxruntime.get_available_providers()
    if wanted not in have:
        raise ExportError(f"{path} is for {contract.device!r}; onnxruntime offers {have}")
    session = onnxruntime.InferenceSession(str(path), providers=[wanted])
    names = [each.name for each in contract.inputs]

    def run(*tensors: Tensor) -> list[Tensor]:
        feeds = dict(zip(names, (t.cpu().numpy() for t in tensors), strict=True))
        device = tensors[0].device
        return [torch.from_numpy(r).to(device) for r in session.run(None, feeds)]

    return run
