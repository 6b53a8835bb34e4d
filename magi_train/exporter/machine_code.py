"""Machine code: an exported program through AOTInductor, and a loader that may not survive it."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from magi_train.core import compat
from magi_train.core.errors import ExportError
from magi_train.exporter.compare import allowed, check_same
from magi_train.memory.cost import is_repeatable

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
    compat.aoti_compile(program, package_path=str(file), inductor_configs=dict(options))
    if compat.AOTI_LOADER_MAY_CRASH:
        check_loader(file)
    elif all(is_repeatable(node) for node in program.graph.nodes):
        check_code(file, program)


def check_code(file: Path, program: torch.export.ExportedProgram) -> None:
    """Run machine code on the program's example inputs, and the program beside it.

    Raises:
        ExportError: They differ.
    """
    given, options = program.example_inputs
    kept = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, given)
    wanted = program.module()(*kept, **options)
    run = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, given)
    got = compat.aoti_load(str(file))(*run, **options)
    results, right = ([x for x in pytree.tree_leaves(each) if isinstance(x, Tensor)]
                      for each in ((got, run), (wanted, kept)))  # fmt: skip
    check_same(results, right, allowed(program), "as machine code",
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
