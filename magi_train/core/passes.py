"""Stage, Plan, Pass, PassContext, and run_passes(): plan, apply, lint, report.

`plan` decides and touches nothing; `apply` obeys and decides nothing. A plan is data: it prints,
compares and travels as JSON. Plans that ranks must share (buckets) are agreed before compilation
and handed to their pass; nothing is agreed, and nothing is registered, inside a pass, because on a
compile-cache hit the JOINT and BACKWARD passes do not run.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch.fx import GraphModule

from magi_train.core.errors import PassError
from magi_train.core.facts import Fact
from magi_train.core.report import PassRow, Report


class Stage(StrEnum):
    """Which graph of a training step a pass rewrites, in the order they come to be."""

    PRE_GRAD = "pre_grad"  # Dynamo's graph or an exported program: before autograd
    JOINT = "joint"  # AOTAutograd's: forward and backward in one graph
    BACKWARD = "backward"  # the backward alone, inside Inductor, before scheduling


@dataclass(frozen=True)
class Plan:
    """What a pass decided to do."""

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """Return 16 hex digits that are the same wherever the plan is the same."""
        text = json.dumps([type(self).__name__, self.as_dict()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides its graph: nothing else, and no globals.

    Attributes:
        device_type: Where the graph runs: "cpu", "cuda", ...
        training: Whether a backward will follow.
        facts: What is known about the values of graph inputs, by name (core/facts.py). Only proofs
            may use it; the inputs stay what they are.
    """

    device_type: str = "cpu"
    training: bool = True
    facts: Mapping[str, Fact] = field(default_factory=dict)


P = TypeVar("P", bound=Plan)


class Pass(Protocol[P]):
    """One optimization, in two halves: `plan` decides and changes nothing, `apply` obeys."""

    name: str
    stage: Stage

    def plan(self, gm: GraphModule, context: PassContext) -> P | None:
        """Return what to do to `gm`, or None where there is nothing to do."""
        ...

    def apply(self, gm: GraphModule, plan: P, context: PassContext) -> None:
        """Do what `plan` says, in place."""
        ...


class CachedPass(Pass[P], Protocol[P]):
    """A pass over a graph that PyTorch's compile caches remember; what JOINT and BACKWARD need."""

    def uuid(self) -> str:
        """Return a text that changes whenever the pass would do something else to a graph."""
        ...


_registered: list[CachedPass[Any]] = []


def register_pass(new: CachedPass[Any]) -> None:
    """Add a pass of your own, behind the built-in ones of its stage.

    It runs for every model that is prepared or exported from now on (JOINT and BACKWARD passes for
    training only); its plan is in the report, and its `uuid` in the keys of PyTorch's compile
    caches. All ranks must register the same passes in the same order.

    Args:
        new: Has `name`, `stage`, `plan`, `apply` and `uuid`: see `CachedPass`.

    Raises:
        TypeError: One of these is missing; says which.
        ValueError: Another pass has that name, or the stage is unknown.
    """
    missing = [a for a in ("name", "stage", "plan", "apply", "uuid") if not hasattr(new, a)]
    if missing:
        raise TypeError(f"the pass {new!r} lacks {', '.join(missing)}; see CachedPass")
    if new.stage not in list(Stage):
        raise ValueError(
            f"pass {new.name!r}: stage must be one of {', '.join(Stage)}; got {new.stage!r}"
        )
    if any(old.name == new.name for old in _registered):
        raise ValueError(f"a pass {new.name!r} is registered already; unregister_pass() it first")
    _registered.append(new)


def unregister_pass(name: str) -> None:
    """Take a registered pass away again, for models prepared from now on.

    Raises:
        ValueError: No such pass is registered; names those that are.
    """
    found = [each for each in _registered if each.name == name]
    if not found:
        have = [each.name for each in _registered]
        raise ValueError(f"no pass named {name!r} is registered, only {have}")
    _registered.remove(found[0])


def registered_passes(stage: Stage | None = None) -> list[CachedPass[Any]]:
    """Return the registered passes of a stage, or all, in the order in which they run."""
    return [each for each in _registered if stage is None or each.stage == stage]


def run_passes(
    passes: Sequence[Pass[Any]], gm: GraphModule, context: PassContext, report: Report
) -> None:
    """Run passes over `gm` in their order: plan, apply, lint, report.

    Raises:
        PassError: A pass left a graph that is not well formed; names the pass.
    """
    for each in passes:
        start = time.perf_counter()
        plan = each.plan(gm, context)
        if plan is not None:
            dump(gm, f"{each.name}_before")
            each.apply(gm, plan, context)
            try:
                gm.graph.lint()
            except RuntimeError as error:
                raise PassError(f"pass {each.name!r} left a broken graph: {error}") from error
            gm.recompile()
            dump(gm, f"{each.name}_after")
        seconds = time.perf_counter() - start
        report.add(PassRow(each.name, str(each.stage), plan.as_dict() if plan else {}, seconds))


def dump(gm: GraphModule | None, title: str) -> None:
    """Write `gm` as readable code where MAGI_TRAIN_DUMP points, if it is set."""
    folder = os.environ.get("MAGI_TRAIN_DUMP")
    if folder and gm is not None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        number = len(list(path.glob("*.py")))
        (path / f"{number:03d}_{os.getpid()}_{title}.py").write_text(gm.print_readable(False))


def source_fingerprint(*modules: Any) -> str:
    """Return a hash of the source of `modules`, so that caches notice when a pass changes."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:16]
