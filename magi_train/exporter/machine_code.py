"""Machine code: an exported program through AOTInductor, and a loader that may not survive it."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from magi_train.core import compat
from magi_train.core.errors import ExportError

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
        ExportError: This torch writes what it cannot load.
    """
    compat.aoti_compile(program, package_path=str(file), inductor_configs=dict(options))
    if compat.AOTI_LOADER_MAY_CRASH:
        check_loader(file)


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
