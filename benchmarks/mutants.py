"""Mutation testing: change one thing in a file at a time, and list the changes no test notices.

    python -m benchmarks.mutants [--every 2] [--output FILE] comm/plan.py tests/comm/test_plan.py

Changes: comparisons (< to <=, == to !=, in to not in), arithmetic (+ to -, * to //), `and` to `or`,
`not` dropped, whole numbers plus one, True to False; not strict= and frozen=, which only check. A
mutant runs in a fork of a process that has imported the libraries that the tests import, with the
file compiled from the changed tree: nothing on disk changes, and a mutant takes as long as its
tests. Processes that tests start see no mutant: choose tests that run the file in their own; behind
`FILE --` they may come with options of pytest. mutmut and cosmic-ray copy or rewrite the source
tree, which the links in magi_train/ do not survive. A survivor is to be looked at: some change
nothing that can be seen.
"""

import ast
import contextlib
import copy
import importlib
import importlib.machinery
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from benchmarks import records

COMPARE: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-o"]
ONLY_CHECKS = {"strict", "frozen"}
LIBRARIES = {"numpy", "sympy", "torch", "transformers", "triton"}
"""Imported once for all mutants, where the tests import them."""
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.Mult,
}  # fmt: skip


def change(node: Any) -> bool:
    """Change a node in place; return whether there was something to change."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        node.ops = [COMPARE[type(node.ops[0])](), *node.ops[1:]]
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        node.op = ARITHMETIC[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        node.op = ast.UAdd()  # +True is 1: as good as True
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
    else:
        return False
    return True


def places(tree: ast.Module) -> list[int]:
    """Return which nodes, in the order of `ast.walk`, can be changed."""
    words = [n for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg in ONLY_CHECKS]
    left = {n.value for n in words}
    nodes = enumerate(ast.walk(tree))
    return [i for i, node in nodes if node not in left and change(copy.copy(node))]


def mutant_of(tree: ast.Module, place: int) -> tuple[int, str, ast.Module]:
    """Return line, the changed line's text, and a changed copy of the tree."""
    mutant = copy.deepcopy(tree)
    node: Any = list(ast.walk(mutant))[place]
    change(node)
    around = [s for s in ast.walk(mutant) if isinstance(s, ast.stmt) and node in ast.walk(s)]
    return node.lineno, ast.unparse(around[-1]).splitlines()[0], mutant  # walk: the innermost last


def survives(
    path: Path, mutant: ast.Module, tests: list[str], seconds: int, told: Path | None = None
) -> bool:
    """Run the tests in a fork with the mutant in the file's place; `told` gets what they import."""
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of work: an endless loop is noticed, too
        real = importlib.machinery.SourceFileLoader.get_code

        def get_code(self: Any, name: str) -> CodeType | None:
            if self.path and Path(self.path).resolve() == path:
                return compile(ast.fix_missing_locations(mutant), str(path), "exec")
            return real(self, name)

        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
        status, nowhere = 1, os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        with contextlib.suppress(BaseException):
            status = int(pytest.main([*PYTEST, f"timeout={seconds}", *tests]))
        if told is not None:
            told.write_text("\n".join(sys.modules))
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def passes(path: Path, tree: ast.Module, tests: list[str], seconds: int) -> bool:
    """Run the tests without a mutant, and import the libraries they import, once for all forks."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "modules"
        if not survives(path, tree, tests, seconds, told):
            return False
        for name in told.read_text().splitlines():
            if name.split(".")[0] in LIBRARIES:
                with contextlib.suppress(Exception):  # made by the tests, or by a library
                    importlib.import_module(name)
    return survives(path, tree, tests, seconds)


def main() -> int:
    """Run the mutants of a file; return 1 if some survive."""
    parser = records.parser_of(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--every", type=int, default=1, help="take one mutant of so many")
    parser.add_argument("--seconds", type=int, default=120, help="limit for one mutant")
    options = parser.parse_args()
    path = options.file.resolve()
    tree = ast.parse(path.read_text())
    if not passes(path, tree, options.tests, options.seconds):
        sys.exit(f"{' '.join(options.tests)} fail without a mutant")
    taken = places(tree)[:: options.every]
    left = []
    for place in taken:
        line, text, mutant = mutant_of(tree, place)
        if survives(path, mutant, options.tests, options.seconds):
            left.append({"line": line, "became": text})
            print(f"{options.file}:{line}: {text}", flush=True)
    print(f"{len(taken) - len(left)} of {len(taken)} mutants were noticed")
    records.save("mutants", options, file=str(options.file), taken=len(taken), left=left)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
