"""Programs compiled where they are loaded: Inductor's code for each shape, proven at first.

A program runs op by op, which is what any machine and any later torch can do. Compiled, it is as
fast as machine code made ahead of time, and pays for it once a shape, at the first call; PyTorch
keeps the code on disk (TORCHINDUCTOR_CACHE_DIR), so that the next process starts quickly. The
graph's sizes become numbers, so a shape's code knows them. The first call of a shape also runs the
program op by op: it refuses sizes that the model does not take, and its results are what those of
the code must be.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from magi_train.core import compat
from magi_train.core.errors import ExportError
from magi_train.core.graph import spell_out
from magi_train.core.passes import PassContext
from magi_train.exporter.compare import allowed, check_same
from magi_train.exporter.few_queries import spread
from magi_train.fusion.narrow_erf import NarrowErf

logger = logging.getLogger(__name__)

MAX_SHAPES = 16
"""Further shapes run op by op: each is compiled by itself."""

WITH_KERNELS = ("cuda",)
"""Devices for which code is generated otherwise than PyTorch would: measured there."""

Shapes = tuple[tuple[int, ...], ...]


class _ShortErf(compat.CustomGraphPass):  # type: ignore[misc]
    """GELU's erf to the 16 bits that it ends in, in Inductor's slot before code is generated."""

    def __call__(self, graph: Graph) -> None:
        erf, context, owner = NarrowErf(), PassContext(training=False), graph.owning_module
        assert owner is not None, "Inductor's graphs have one"
        plan = erf.plan(owner, context)
        if plan is not None:
            erf.apply(owner, plan, context)

    def uuid(self) -> str:
        return NarrowErf().uuid()


def _without_guards(guards: Sequence[Any]) -> list[bool]:
    """Let code run unasked: its shapes are looked up, and its module belongs to nobody else."""
    return [False] * len(guards)


def _apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors over the same memory of which none is the same object as another.

    Dynamo takes two arguments that are one object for one input, and a guard would tell later calls
    that are not like that; here none does.
    """
    given = {id(t): i for i, t in reversed(list(enumerate(tensors)))}
    return [t if given[id(t)] == i else t.detach() for i, t in enumerate(tensors)]


class Compiled:
    """A runner that compiles a program for each shape that it meets.

    Args:
        program: From torch.export. Takes and returns tensors, and may write to its inputs.
        options: Of Inductor.
        first: What the program takes before the tensors of a call.
        with_kernel: Further options where attention of few queries goes to a kernel.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        options: Mapping[str, Any],
        first: Sequence[Any] = (),
        with_kernel: Mapping[str, Any] | None = None,
    ) -> None:
        self._program, self._by_op = program, program.module()
        self._options, self._first = dict(options), tuple(first)
        self._with_kernel = dict(with_kernel or {})
        self._allowed = allowed(program)
        self._lock = threading.Lock()
        self._code: dict[Shapes, Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Run the code for these shapes; compile it at their first call.

        Raises:
            ExportError: It cannot be compiled here, or computes something else.
        """
        key = tuple(tuple(t.shape) for t in tensors)
        if key not in self._code:
            with self._lock:
                if key not in self._code:
                    return self._begin(key, tensors)
        return self._code[key](*self._first, *tensors)

    def _begin(self, key: Shapes, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(self._code) == MAX_SHAPES:
            logger.warning("%s shapes are compiled; %s runs op by op", MAX_SHAPES, list(key))
        if len(self._code) >= MAX_SHAPES:
            self._code[key] = self._by_op
            return self._by_op(*self._first, *tensors)
        kept = [t.clone() for t in tensors]
        with torch.no_grad():
            wanted = self._by_op(*self._first, *kept)
            try:
                graph: Any = self._program.module(check_guards=False)
                spell_out(graph.graph)
                graph.recompile()
                options = self._options
                if tensors[0].device.type in WITH_KERNELS:
                    options = {"joint_custom_pre_pass": _ShortErf(), **options}
                    if spread(graph):
                        options = {**options, **self._with_kernel}
                code = torch.compile(
                    graph, fullgraph=True, dynamic=False,
                    options={**options, "guard_filter_fn": _without_guards},
                )  # fmt: skip
                with compat.writes_are_kept():
                    got = code(*self._first, *_apart(tensors))
            except Exception as error:
                raise ExportError(
                    f"the program cannot be compiled here ({type(error).__name__}: "
                    f"{str(error)[:500]}); load it without `compile`"
                ) from error
        check_same(
            [*got, *tensors], [*wanted, *kept], self._allowed, f"compiled for {list(key)}",
            "load it without `compile`, and report it; a model that draws random numbers cannot be "
            "compiled so",
        )  # fmt: skip
        self._code[key] = code
        return got
