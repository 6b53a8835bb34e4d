"""Does it fit? What a training step takes on a GPU, answered on a machine without one.

A script's function builds module and batch from tensors without data (PyTorch's FakeTensorMode: no
memory, no arithmetic), the step is captured and run through the passes as training does, and the
planner of the memory budget (memory/budget.py) says what every budget would give. Nothing runs.

The tensors lie on the CPU, as PyTorch builds without CUDA cannot differentiate fake CUDA tensors.
What that changes is put right where it is known: cuBLAS's and attention's workspaces, the speed,
the optimizer's kernel with its weight shadows, autocast's list of float32 ops, and attention with
dropout, which has no fused kernel on the CPU alone. Not known: workspaces of convolutions, fp8,
narrow gradients, merged projections, patch products, and the memory of CUDA graphs.
"""

import contextlib
import dataclasses
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from magi_train.api import prepare, prepare_step
from magi_train.comm.plan import plan_buckets
from magi_train.core import compat
from magi_train.core.config import Config
from magi_train.core.errors import CaptureError, MagiError
from magi_train.core.hardware import Gpu
from magi_train.core.passes import PassContext, Plan, Stage, register_pass, unregister_pass
from magi_train.fusion.attention import ATTENTION, attention_arguments
from magi_train.fusion.loss import BUDGET_CHUNK_MIB
from magi_train.memory.budget import SurveyedError
from magi_train.memory.step import GIB, MIB
from magi_train.memory.survey import SurveyMemory
from magi_train.runtime import Runtime, buffer_bytes

Build = Callable[[], Any]
FORM = (
    "build() must return (module, batch), (module, batch, loss) or (module, batch, loss, optimizer)"
)


@dataclass(frozen=True)
class Setup:
    """For what a step is planned.

    Attributes:
        gpu: On which GPU; None: this host's CPU.
        ranks: How many of them train together, each with a batch of its own.
        config: The settings of the training.
        autocast: What autocast computes in; None without.
    """

    gpu: Gpu | None
    ranks: int = 1
    config: Config = dataclasses.field(default_factory=Config)
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Estimate:
    """What a step takes at its peak, on each rank.

    Attributes:
        model: Class of the module.
        parameters: Their number.
        batch: Size of dimension 0.
        without_gib: Predicted peak without a budget; if `Setup.config` has one, with the passes of
            a step that has one, which cut large logits into more chunks.
        least_gib: Predicted peak when as much as possible is recomputed: the smallest budget.
        least_recompute_ms: Predicted time of that recomputation, a step, and of copies to the host.
        step_ms: Predicted time of forward and backward without it.
        gradients_gib: All gradients, which the peak contains only if it lies late.
        resident_gib: {what is there all the time: how much}.
        at: The node that runs at the peak without a budget.
        largest: The largest tensors then: MiB, node, the user's line.
        frontier: [peak in GiB, recomputation in ms] of what a budget can choose from.
        notes: What the estimate assumes.
    """

    model: str
    parameters: int
    batch: int
    without_gib: float
    least_gib: float
    least_recompute_ms: float
    step_ms: float
    gradients_gib: float
    resident_gib: dict[str, float]
    at: str
    largest: list[str]
    frontier: list[list[float]]
    notes: list[str]

    def under(self, budget_gib: float) -> tuple[float, float] | None:
        """Return peak in GiB and recomputation in ms under a budget; None if it is too small."""
        fitting = [(peak, again) for peak, again in self.frontier if peak <= budget_gib]
        return fitting[0] if fitting else None


def estimate(build: Build, setup: Setup, batch_size: int | None = None) -> Estimate:
    """Return what one step takes.

    Args:
        build: Returns (module, batch), and a loss and an optimizer if it likes to:
            `loss(module, batch)` is a scalar; without, it is what the module returns, or `.loss` or
            `["loss"]` of that. Without an optimizer it is AdamW. A dict is given to the module by
            name, a tuple or list by position.
        setup: For what.
        batch_size: What dimension 0 of the batch is set to; None leaves it.

    Raises:
        MagiError: What `build` returns is of no use, or the step cannot be captured whole.
    """
    with compat.without_data():
        module, batch, loss, optimizer = built(build)
        _check_tensors(module, batch)
        if batch_size is not None:
            batch = resized(batch, batch_size)
        with contextlib.ExitStack() as around:
            if setup.autocast is not None:
                around.enter_context(torch.autocast("cpu", setup.autocast))
                if setup.gpu is not None:
                    around.enter_context(compat.autocast_as_on_cuda())
            _check_loss(loss, module, batch)
            given = setup.config.memory_budget_gib is not None
            free = _captured(module, batch, loss, optimizer, setup, limits=given)
            if given or free.without_gib * GIB <= BUDGET_CHUNK_MIB * MIB:
                return free
            under = _captured(module, batch, loss, optimizer, setup, limits=True)
            return dataclasses.replace(
                free,
                least_gib=under.least_gib,
                least_recompute_ms=under.least_recompute_ms,
                frontier=under.frontier,
            )


def built(build: Build) -> tuple[nn.Module, Any, Callable[[Any, Any], Tensor], Optimizer]:
    """Return module, batch, loss and optimizer; `estimate` says what may be left out.

    Raises:
        MagiError: `build` fails, or returns something else; says what.
    """
    try:
        made = build()
    except Exception as error:
        raise MagiError(
            f"build() failed: {type(error).__name__}: {error}. It must build the model from its "
            "configuration, on the CPU; where it is run without data, it must not look at values"
        ) from error
    if not isinstance(made, tuple) or not 2 <= len(made) <= 4:
        raise MagiError(f"{FORM}; got {type(made).__name__}")
    module, batch = made[0], made[1]
    loss, optimizer = ((*made[2:], None, None))[:2]
    if not isinstance(module, nn.Module):
        raise MagiError(f"{FORM}; the first is a {type(module).__name__}, not a module")
    if loss is not None and not callable(loss):
        raise MagiError(f"{FORM}; the loss is a {type(loss).__name__}, not a function or None")
    if optimizer is None:
        optimizer = torch.optim.AdamW(module.parameters())
    return module.train(), batch, loss or _loss_of, optimizer


def _check_tensors(module: nn.Module, batch: Any) -> None:
    leaves = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
    if not leaves:
        raise MagiError(f"{FORM}; the batch, a {type(batch).__name__}, has no tensor")
    tensors: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    tensors += [("the batch", leaf) for leaf in leaves]
    for name, tensor in tensors:
        if not isinstance(tensor, compat.FakeTensor):
            raise MagiError(
                f"{name} was made before build() ran: make model and batch inside of it"
            )
        if tensor.device.type != "cpu":
            raise MagiError(
                f"{name} lies on {tensor.device}; leave model and batch on the CPU, the device is "
                "what --gpu names"
            )


def _loss_of(module: Any, batch: Any) -> Tensor:
    """Return the loss of a module that computes it."""
    if isinstance(batch, Mapping):
        output = module(**batch)
    elif isinstance(batch, tuple | list):
        output = module(*batch)
    else:
        output = module(batch)
    if isinstance(output, Tensor):
        return output
    return output["loss"] if isinstance(output, dict) else output.loss  # type: ignore[no-any-return]


def _check_loss(loss: Callable[[Any, Any], Tensor], module: nn.Module, batch: Any) -> None:
    """Run the step once without data: its own mistakes shall not look like ours."""
    try:
        with torch.no_grad():
            value = loss(module, batch)
    except Exception as error:
        raise MagiError(
            f"the step itself fails on tensors without data, {_place(error)}: "
            f"{type(error).__name__}: {error}; a step whose values are looked at (`.item()`, "
            "`if tensor`) cannot be planned without them"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise MagiError(f"the loss must be one number, got {got}; {FORM}")


def _place(error: BaseException) -> str:
    """Return the last line of neither torch nor this package that an error came through."""
    ours = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, __file__))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith((*ours, "<"))]
    return f"at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else "at an unknown line"


def _captured(
    module: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor],
    optimizer: Optimizer,
    setup: Setup,
    *,
    limits: bool,
) -> Estimate:
    on_gpu, config = setup.gpu is not None, setup.config
    if config.engine != "replicate":
        raise MagiError(
            f"--fits plans replicas, Config.engine 'replicate', and not {config.engine!r}; leave "
            "that setting out"
        )
    capture = dataclasses.replace(
        config, tier="graph", dynamic=False, tune=False, cuda_graphs="off",
        shard_optimizer=False, memory_budget_gib=None, offload_activations=False,
        precision="autocast",
    )  # fmt: skip
    prepared, _ = prepare(module, optimizer, config=capture)
    runtime: Runtime = prepared._magi_runtime  # type: ignore[assignment]
    fusion = config.fusion
    runtime.memory = memory = SurveyMemory(
        module,
        setup.gpu,
        ranks=setup.ranks,
        sharded=config.shard_optimizer,
        taken=on_gpu and fusion is not None and fusion.optimizer,
        buffer_bytes=buffer_bytes(
            plan_buckets(module.named_parameters(), config.comm, setup.ranks)
        ),
        limits=limits,
        offload=config.offload_activations and limits,
        report=runtime.report,
    )
    memory.know([optimizer])
    if fusion is not None and fusion.weight_shadows and memory.is_taken(optimizer):
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        runtime.shadows.manage(p for p in module.parameters() if id(p) in mine)
    torch.compiler.reset()
    try:
        with _without_dropout() if on_gpu else contextlib.nullcontext():
            prepare_step(lambda given: loss(prepared, given), prepared)(batch)
    except SurveyedError as found:
        return _estimate(module, batch, found, runtime.report.notes)
    except CaptureError as error:
        raise MagiError(f"only a step that is captured whole can be planned: {error}") from error
    finally:
        runtime.close()
    raise MagiError("the step has no backward to plan: no parameter gets a gradient")


def _estimate(module: nn.Module, batch: Any, found: SurveyedError, notes: list[str]) -> Estimate:
    plan, course = found.plan, found.course
    trained = [p for p in module.parameters() if p.requires_grad]
    frontier = plan.frontier
    return Estimate(
        model=type(module).__name__,
        parameters=sum(p.numel() for p in module.parameters()),
        batch=size_of(batch),
        without_gib=frontier[0][0],
        least_gib=frontier[-1][0],
        least_recompute_ms=frontier[-1][1],
        step_ms=plan.step_ms,
        gradients_gib=sum(p.nbytes for p in trained) / GIB,
        resident_gib=plan.resident_gib,
        at=course.at,
        largest=[f"{t.size_bytes / 2**20:.3f} MiB {t.node} {t.line}" for t in course.largest],
        frontier=frontier,
        notes=list(notes),
    )


@dataclass(frozen=True)
class _Dropped(Plan):
    calls: int


class _FusedAttentionDropout:
    """GPUs have fused kernels for attention with dropout, which keep a seed; the CPU has none."""

    name, stage = "fits_attention_dropout", Stage.PRE_GRAD

    def uuid(self) -> str:
        return self.name

    def plan(self, gm: GraphModule, context: PassContext) -> _Dropped | None:
        calls = sum(1 for node in gm.graph.nodes if node.target in ATTENTION)
        return _Dropped(calls) if calls else None

    def apply(self, gm: GraphModule, plan: _Dropped, context: PassContext) -> None:
        for node in [n for n in gm.graph.nodes if n.target in ATTENTION]:
            node.args, node.kwargs = (), {**attention_arguments(node), "dropout_p": 0.0}


@contextlib.contextmanager
def _without_dropout() -> Iterator[None]:
    register_pass(_FusedAttentionDropout())
    try:
        yield
    finally:
        unregister_pass(_FusedAttentionDropout.name)


def size_of(batch: Any) -> int:
    """Return dimension 0 of the first tensor of a batch that has one."""
    leaves = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim() > 0]
    return leaves[0].shape[0] if leaves else 1


def resized(batch: Any, size: int) -> Any:
    """Return a batch whose tensors have `size` in dimension 0, where they have the batch's."""
    before = size_of(batch)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != before:
            return leaf
        last = leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        shape = (size, *leaf.shape[1:])
        return torch.empty(shape, dtype=leaf.dtype, memory_format=layout)

    return pytree.tree_map(resize, batch)
