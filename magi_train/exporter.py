"""The same passes on an inference graph, written as a file that loads without the model's code.

torch.export captures the module, the PRE_GRAD passes run on its graph, and the result is saved as
an exported program or compiled ahead of time. A manifest inside the file says which passes ran,
with which torch, and what the inputs look like.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from magi_train.capture import pre_grad_passes
from magi_train.core import compat
from magi_train.core.config import Config
from magi_train.core.errors import ExportError
from magi_train.core.passes import PassContext, run_passes
from magi_train.core.report import Report

MANIFEST = "magi_manifest.json"
Target = Literal["program", "pt2"]


def export(
    module: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    target: Target = "program",
    dynamic_shapes: Any = None,
    config: Config | None = None,
) -> Report:
    """Write a module for inference.

    Args:
        module: A plain or prepared module; exported in evaluation mode, left as it was.
        example_inputs: Positional arguments, or keyword arguments as a mapping.
        path: The file to write; replaced in one step, or not at all.
        target: "program" for a torch.export program, which any torch of about this version runs;
            "pt2" for machine code of this device, compiled ahead of time.
        dynamic_shapes: As in torch.export.export.
        config: Which passes run; `Config()` by default.

    Returns:
        What the passes did.

    Raises:
        ExportError: The module cannot be exported; says why. Nothing is written.
    """
    if target not in ("program", "pt2"):
        raise ValueError(f"export target must be 'program' or 'pt2', got {target!r}")
    args = () if isinstance(example_inputs, Mapping) else tuple(example_inputs)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    plain = module.__dict__.get("_magi_module", module)
    config = config or Config()
    report = Report(tier="graph", settings=config.as_dict())
    training = [m for m in plain.modules() if m.training]
    plain.eval()
    try:
        with torch.no_grad():
            program = torch.export.export(plain, args, kwargs, dynamic_shapes=dynamic_shapes)
    except Exception as error:
        raise ExportError(f"torch.export cannot capture {type(plain).__name__}: {error}") from error
    finally:
        for m in training:
            m.training = True
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    context = PassContext(device, training=False)
    run_passes(pre_grad_passes(config), program.graph_module, context, report)
    manifest = {
        "format": 1,
        "target": target,
        "torch": torch.__version__,
        "device": device,
        "inputs": [{"shape": list(t.shape), "dtype": str(t.dtype)} for t in tensors],
        "passes": [asdict(row) for row in report.rows],
    }
    _write(program, Path(path), target, json.dumps(manifest))
    return report


def _write(program: Any, path: Path, target: Target, manifest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".pt2")
    os.close(handle)
    try:
        if target == "program":
            torch.export.save(program, name, extra_files={MANIFEST: manifest})
        else:
            options = {"aot_inductor.metadata": {MANIFEST: manifest}}
            compat.aoti_compile(program, package_path=name, inductor_configs=options)
        os.replace(name, path)
    except Exception as error:
        raise ExportError(f"cannot write {path} as {target!r}: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Load what `export` wrote.

    Returns:
        A callable that takes the arguments the module was exported with, and the manifest.

    Raises:
        ExportError: The file is missing, cut short or not an artifact of magi-train.
    """
    if not Path(path).is_file():
        raise ExportError(f"{path} does not exist; magi_train.export() writes such a file")
    extra = {MANIFEST: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        return program.module(), json.loads(extra[MANIFEST])
    except Exception as not_a_program:  # noqa: BLE001  torch raises many kinds; the other is tried
        try:
            compiled = compat.aoti_load(str(path))
            return compiled, json.loads(compiled.get_metadata()[MANIFEST])
        except Exception as error:
            raise ExportError(
                f"{path} is no artifact of magi-train that torch {torch.__version__} can load: as "
                f"a program: {not_a_program}; as compiled code: {error}"
            ) from error
