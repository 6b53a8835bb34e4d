"""Machine code: an exported program through AOTInductor, and a loader that may not survive it."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from magi_train.core import compat
from magi_train.core.errors import ExportError
from magi_train.core.graph import written
from magi_train.exporter.compare import allowed, check_same
from magi_train.memory.cost import is_repeatable

logger = logging.getLogger(__name__)

LOAD = "import sys; from magi_train.core import compat; compat.aoti_load(sys.argv[1])"


def compile_program(
    program: torch.export.ExportedProgram, file: Path, options: Mapping[str, Any]
) -> None:
    """Write machine code for `program`.

    Args:
        program: What torch exported.
        file: Ends in ".pt2", the only suffix that torch writes.
        options: Of torch's compiler.

    Raises:
        ExportError: This torch writes what it cannot load, or what computes something else.
    """
    with compat.writes_are_kept():
        compat.aoti_compile(program, package_path=str(file), inductor_configs=dict(options))
    if compat.AOTI_LOADER_MAY_CRASH:
        check_loader(file)
    elif all(is_repeatable(node) for node in program.graph.nodes):
        check_code(file, program)


def check_code(file: Path, program: torch.export.ExportedProgram) -> None:
    """Run machine code on the program's example inputs, and the program beside it.

    Where the device has no room for both, a warning says so.

    Raises:
        ExportError: They differ.
    """
    signature = program.graph_signature
    changed = set(signature.user_inputs_to_mutate.values())  # of a graph that writes at its end
    changed |= {node.name for node in written(program.graph)}
    given, structure = pytree.tree_flatten(program.example_inputs)

    def results_of(run: Callable[..., Any]) -> list[Tensor]:
        """Return what `run` returns, and the inputs that it may write to: others stay as they are.

        Only those are copied, as a decoder's weights are inputs.
        """
        mine = [x.clone() if name in changed else x
                for name, x in zip(signature.user_inputs, given, strict=True)]  # fmt: skip
        args, options = pytree.tree_unflatten(mine, structure)
        got = pytree.tree_leaves(run(*args, **options))
        moved = [x for x, before in zip(mine, given, strict=True) if x is not before]
        return [x for x in (*got, *moved) if isinstance(x, Tensor)]

    try:
        wanted = results_of(program.module())
        results = results_of(compat.aoti_load(str(file)))
    except torch.OutOfMemoryError:
        logger.warning("machine code was not run beside its program: the device has no room")
        return
    check_same(results, wanted, allowed(program), "as machine code",
               "export with target='program', and report it")  # fmt: skip


def check_loader(file: Path) -> None:
    """Load machine code in a process of its own, which may crash.

    Whatever else goes wrong there (operators of the user's that it does not know, a device that
    belongs to one process) is left to the real load, which names it.

    Raises:
        ExportError: It crashed.
    """
    found = subprocess.run(
        [sys.executable, "-c", LOAD, str(file)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
    )
    if found.returncode < 0:
        raise ExportError(
            f"torch {torch.__version__} compiles, but its loader ends with "
            f"{signal.Signals(-found.returncode).name} here; export with target='program', or with "
            "torch 2.13 or newer"
        )
