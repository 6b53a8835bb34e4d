"""Engine "deepspeed": DeepSpeed's ZeRO in the place of the reducer, configured from our settings.

ZeRO (Rajbhandari et al., arXiv:1910.02054) keeps a part of the optimizer's state (stage 1), of the
gradients (2) and of the weights (3) on each rank; DeepSpeed is its authors' implementation, with
offloading to the host. All of that is DeepSpeed's; what is ours:

* DeepSpeed gets a shell: a module with the parameters, buffers and submodules of the user's one,
  under the same names. Its forward calls what it is given, so that a captured function runs inside
  of DeepSpeed's forward, and DeepSpeed's hooks on the root stay outside of what is captured.
* At stage 3 a weight is whole only between the hooks of the module that DeepSpeed takes for a leaf.
  The blocks that comm/shard_blocks.py finds are made such leaves, so that a block gathers its
  weights once and its forward can be captured (comm/zero_leaves.py says what that asks of them).
* The user's optimizer stays the object in the loop: its `step` is DeepSpeed's, which in turn calls
  the optimizer's own on this rank's parts.

Where it differs from DDP: gradients are not in `.grad` (clipping is a setting of DeepSpeed's,
`gradient_clipping`; see comm/zero_clipping.py), and the optimizer's state is saved by
`magi_train.save_checkpoint` only.
"""

import argparse
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from magi_train.comm import zero_alone, zero_clipping
from magi_train.comm.broadcast import broadcast
from magi_train.comm.shard_blocks import blocks_to_shard
from magi_train.comm.zero_config import must_be_installed, stage_of
from magi_train.comm.zero_leaves import Leaves
from magi_train.core.config import Config
from magi_train.core.errors import MagiError
from magi_train.core.report import PassRow, Report
from magi_train.core.world import World

_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_live: "weakref.WeakSet[Zero]" = weakref.WeakSet()


class _Shell(nn.Module):
    """What DeepSpeed takes for the model; calling it runs a function of the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name in _SHARED:
            self.__dict__[name] = module.__dict__[name]
        self.training = module.training

    def forward(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


class Zero:
    """DeepSpeed's engine around a model, with the reducer's methods.

    Args:
        module: On the host or the device; DeepSpeed moves it. Its parameters stay the objects they
            are; at stage 3 each holds nothing while its module does not run.
        optimizer: Over the module's parameters; DeepSpeed makes it step on this rank's parts.
        world: One rank or more.
        settings: DeepSpeed's, from `zero_config`.
        report: Gets the plan.
        config: Ours. Tier "eager" makes no block a leaf.

    Attributes:
        engine: DeepSpeed's.
        module: The user's, whose parameters and buffers the engine's has.
        stage: 1, 2 or 3.
        blocks: What is gathered as one at stage 3, without the root; else empty.
        parameters: The parameters by name.
        sync: False under no_sync(). Gradients add up all the same until `step()`: stage 1 sends
            them then, stages 2 and 3 in each backward, onto the rank that owns them.

    Raises:
        MagiError: DeepSpeed is not installed.
    """

    planned: frozenset[str] = frozenset()
    """Parameters that a captured backward reduces: none, DeepSpeed's hooks do."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        world: World,
        settings: dict[str, Any],
        report: Report,
        config: Config,
    ) -> None:
        must_be_installed()
        self.world, self.sync = world, True
        self._broadcasts, self._synced = config.comm.broadcast_buffers, True
        self.loss_scale: Any = None  # of codecs, which this engine has none of
        self.stage, self.module = stage_of(settings), module
        self.parameters = dict(module.named_parameters())
        sizes = {n: p.numel() * p.element_size() for n, p in self.parameters.items()}
        leaves = self.stage == 3 and config.tier != "eager"
        self.blocks = blocks_to_shard(module) if leaves else []
        self._leaves = Leaves(module, self.blocks)
        self.engine = _initialize(_Shell(module), self.blocks, optimizer, settings)
        if self.stage < 3 and not any(other.stage == 3 for other in _live):
            zero_alone.drop_variable()
        self.device: torch.device = self.engine.device
        self._inside = False
        _live.add(self)
        zero_clipping.watch(_live)
        broadcast(world, list(module.buffers()))
        plan = {
            "stage": self.stage,
            "blocks": len(self.blocks),
            "ranks": world.size,
            "weight_bytes": sum(sizes.values()),
            "settings": settings,
        }
        report.add(PassRow("deepspeed", "run_time", plan, 0.0))

    # -- one step ------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function of the model as DeepSpeed's forward: its outputs start its backward."""
        self._leaves.begin()
        try:
            return self.engine(function, *args, **kwargs)
        finally:
            self._leaves.end()

    def begin(self, in_graph: bool) -> None:
        """Make buffers equal before a forward, as DDP does.

        Args:
            in_graph: Must be False: DeepSpeed's hooks reduce.
        """
        assert not in_graph
        self.world.check()
        if self._broadcasts and self._synced:  # as DDP, once a step
            broadcast(self.world, list(self.module.buffers()))
        self._synced = self.sync

    def take_over(self, optimizer: Optimizer) -> None:
        """Let `optimizer.step()` be DeepSpeed's step, and refuse what would see a part only."""
        own = optimizer.step
        zero = self

        def step(self: Optimizer, closure: None = None) -> Any:
            if zero._inside:  # DeepSpeed steps on this rank's parts
                return own()
            if closure is not None:
                raise MagiError("a step of engine 'deepspeed' takes no closure")
            zero.world.check()
            with zero.inside():
                return zero.engine.step()

        def zero_grad(self: Optimizer, set_to_none: bool = True) -> None:
            zero.engine.optimizer.zero_grad(set_to_none=set_to_none)
            if zero.stage == 2:
                _drop_averaged(zero.engine.optimizer)

        def refused(name: str) -> Callable[..., Any]:
            original = getattr(optimizer, name)

            def method(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
                if zero._inside:
                    return original(*args, **kwargs)
                raise MagiError(
                    f"{type(optimizer).__name__}.{name}() would see this rank's part only under "
                    "engine 'deepspeed'; use magi_train.save_checkpoint() and load_checkpoint(), "
                    "and make all groups before prepare()"
                )

            return method

        methods: dict[str, Callable[..., Any]] = {"step": step, "zero_grad": zero_grad}
        methods |= {n: refused(n) for n in ("state_dict", "load_state_dict", "add_param_group")}
        for name, method in methods.items():
            setattr(optimizer, name, types.MethodType(method, optimizer))

    def inside(self) -> "_Inside":
        """Return a context in which the optimizer's methods are its own, for DeepSpeed."""
        return _Inside(self)

    # -- what a reducer has, and DeepSpeed needs not ---------------------------------------------

    def broadcast_state(self) -> None:
        """Do nothing: DeepSpeed made the weights equal."""

    def pin_plan(self) -> None:
        """DeepSpeed has its own buckets."""

    def compression_state(self) -> dict[str, dict[str, Tensor]]:
        """Return nothing: no codec keeps a residual here."""
        return {}

    def exchange_weights(self) -> None:
        """Do nothing: this engine has no outer loop."""

    def load_compression_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Ignore `state`: this engine has no codecs with residuals."""

    def close(self) -> None:
        """Do nothing: the engine lives as long as its model is tested or saved."""

    def destroy(self) -> None:
        """Take DeepSpeed's hooks off the model, for another engine; weights stay where they are."""
        _live.discard(self)
        self._leaves.close()
        self.engine.destroy()
        if not _live:
            zero_alone.leave()


class _Inside:
    def __init__(self, zero: Zero) -> None:
        self._zero = zero

    def __enter__(self) -> None:
        self._before, self._zero._inside = self._zero._inside, True

    def __exit__(self, *_: object) -> None:
        self._zero._inside = self._before


def _initialize(
    shell: nn.Module, leaves: Sequence[nn.Module], optimizer: Optimizer, settings: dict[str, Any]
) -> Any:
    import deepspeed

    for leaf in leaves:
        deepspeed.utils.set_z3_leaf_module(leaf, True)
    try:
        return deepspeed.initialize(
            args=argparse.Namespace(device_rank=zero_alone.join()),
            model=shell,
            model_parameters=[p for p in shell.parameters() if p.requires_grad],
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )[0]
    except BaseException:
        if not _live:
            zero_alone.leave()
        raise


def one_of(optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return the only one.

    Raises:
        ValueError: There are none, or several.
    """
    if len(optimizers) != 1:
        raise ValueError(
            f"engine 'deepspeed' needs one optimizer, got {len(optimizers)}: "
            "prepare(model, optimizer, config=...)"
        )
    return optimizers[0]


def _drop_averaged(partitioned: Any) -> None:
    """Forget the gradients that DeepSpeed's stage 2 has averaged and not stepped with.

    Its own `zero_grad` clears `.grad` alone, so a batch that the user skips would still count.

    Raises:
        MagiError: There are some, and they were offloaded.
    """
    if getattr(partitioned, "micro_step_id", -1) < 0:
        return
    if partitioned.cpu_offload:
        raise MagiError(
            "zero_grad() cannot drop the gradients of a backward that no step() followed, at ZeRO "
            "stage 2 with offload; use stage 1 or 3, or step"
        )
    partitioned.micro_step_id = -1
    for kept in (partitioned.averaged_gradients, partitioned.all_grad_tensors):
        for group in kept:
            kept[group] = None
