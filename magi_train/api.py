"""The verbs of a plain training loop: prepare(), prepare_step(), report(), and DataParallel."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from magi_train.core import settings
from magi_train.core.config import CommConfig, Config
from magi_train.core.report import Report
from magi_train.runtime import Runtime
from magi_train.sharded_region import region_for

F = TypeVar("F", bound=Callable[..., Any])


class PreparedModule(nn.Module):
    """A module that trains as under DDP, compiled; made by `prepare`.

    It shares parameters, buffers and submodules with the module it was made from, under the same
    names: `state_dict()`, `named_parameters()`, optimizers, clipping and checkpoints see no
    difference. Other attributes are looked up and set on the original, whose forward reads them. A
    copy (`copy.deepcopy`, pickle) is a copy of the original.
    """

    def __init__(self, module: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = module.__dict__[name]
        self.__dict__["_magi_module"] = module
        self.__dict__["_magi_runtime"] = runtime
        self.__dict__["_magi_region"] = region_for(runtime, module, type(module).__name__)
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; with gradients enabled, its captured form."""
        if torch.compiler.is_compiling() or self._magi_runtime.inside:
            return self._magi_module(*args, **kwargs)
        return self._magi_region(*args, **kwargs)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which forwards accumulate gradients without sending anything."""
        return self._magi_runtime.no_sync()  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> "PreparedModule":
        """Set training mode on the shared module."""
        self._magi_module.train(mode)
        self.training = mode
        self._magi_runtime.shadows.invalidate()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the original module's state, its hooks included."""
        return self._magi_module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the original module's state."""
        return self._magi_module.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_magi_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self._magi_module, name, value)
            if name == "training":
                self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self._magi_module, name)

    def _is_own(self, name: str) -> bool:
        """Return whether an attribute is the wrapper's: hooks, `forward` and other methods."""
        mine = name in self.__dict__ or hasattr(type(self), name)
        return name != "training" and mine

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self._magi_module, memo)  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._magi_module,)

    def __repr__(self) -> str:
        return f"prepared {self._magi_module!r}"


def _itself(module: nn.Module) -> nn.Module:
    return module


class DataParallel(nn.Module):
    """Drop-in for `torch.nn.parallel.DistributedDataParallel`, with capture and passes.

    As there, the wrapped module is `.module`, and `state_dict()` keys start with "module.".

    Args:
        module: The model, on its device.
        device_ids: None, or the one device of the module.
        output_device: None, or the same device.
        dim: 0.
        broadcast_buffers: Take rank 0's buffers, see `CommConfig.broadcast_buffers`.
        init_sync: True: rank 0's weights are taken and the models compared.
        process_group: None: the default group.
        bucket_cap_mb: MiB of a bucket.
        find_unused_parameters: Accepted; unused parameters are always found.
        check_reduction: Accepted, without effect in DDP as well.
        gradient_as_bucket_view: Accepted; gradients always are views of their bucket.
        static_graph: Accepted, not needed.
        config: Settings beyond DDP's.

    Raises:
        ValueError: An argument asks for what is not offered; says which.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Any = None,
        output_device: Any = None,
        dim: int = 0,
        broadcast_buffers: bool = True,
        init_sync: bool = True,
        process_group: Any = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        *,
        config: Config | None = None,
        **unsupported: Any,
    ) -> None:
        super().__init__()
        given = {k: v for k, v in unsupported.items() if v not in (None, False)}
        if given:
            raise ValueError(f"DataParallel does not take {sorted(given)}; leave them out")
        if dim != 0:
            raise ValueError(f"DataParallel.dim must be 0, got {dim}")
        if not init_sync:
            raise ValueError("DataParallel.init_sync must be True: replicas have to start equal")
        if process_group is not None and process_group is not torch.distributed.group.WORLD:
            raise ValueError("DataParallel.process_group must be the default group (None)")
        if device_ids is not None and len(device_ids) != 1:
            raise ValueError(f"DataParallel.device_ids must name one device, got {device_ids}")
        if config is None:
            comm = CommConfig(bucket_mib=bucket_cap_mb, broadcast_buffers=broadcast_buffers)
            config = Config(comm=comm)
        elif bucket_cap_mb is not None:
            raise ValueError("give DataParallel either bucket_cap_mb or config, not both")
        _needs_optimizer(
            config,
            "which DataParallel does not get; use magi_train.prepare(model, optimizer, config=...)",
        )
        self.module = module
        runtime = Runtime(module, config)
        self.__dict__["_magi_runtime"] = runtime
        self.__dict__["_magi_region"] = region_for(runtime, module, type(module).__name__)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; with gradients enabled, its captured form."""
        if torch.compiler.is_compiling() or self.__dict__["_magi_runtime"].inside:
            return self.module(*args, **kwargs)
        return self.__dict__["_magi_region"](*args, **kwargs)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which forwards accumulate gradients without sending anything."""
        return self.__dict__["_magi_runtime"].no_sync()

    def register_comm_hook(self, state: object, hook: Callable[..., Any]) -> None:
        """Refuse: the wire format is a setting.

        Raises:
            ValueError: Always; says which setting does what the known hooks do.
        """
        raise ValueError(
            f"DataParallel has no communication hooks (got {getattr(hook, '__name__', hook)}); for "
            "bf16_compress_hook use Config(comm=CommConfig(compression='bfloat16'))"
        )

    @contextlib.contextmanager
    def join(self, *_: Any, **__: Any) -> Iterator[None]:
        """Refuse: every rank must take the same number of steps.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "DataParallel has no join(); give every rank the same number of batches "
            "(DistributedSampler pads or drops)"
        )
        yield

    def __getstate__(self) -> Any:
        raise TypeError("a DataParallel cannot be copied or pickled; use its .module")


@overload
def prepare(
    model: nn.Module,
    *,
    config: Config | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
) -> PreparedModule: ...
@overload
def prepare(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    config: Config | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
) -> tuple[PreparedModule, Optimizer]: ...
def prepare(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    config: Config | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
) -> Any:
    """Make a model train on all ranks, captured and optimized.

    Under torchrun or `magi run` this joins the process group if the script has not. The model must
    already be on its device. Rank 0's weights and buffers are given to all ranks.

    Args:
        model: Any module. It is not changed; the result shares its parameters. With
            `Config(engine="fsdp2")` it is: its parameters become DTensors, and it may lie on the
            host or the meta device (docs/engines.md).
        optimizer: Over the model's parameters. The same object is returned; its step may run in a
            kernel of ours, see `FusionConfig.optimizer`.
        config: What to do; `Config()` by default.
        grad_scaler: What scales the loss, if anything. Gradient compression with error feedback
            (`CommConfig.compression`) keeps its residuals in the loss's own units by it.

    Returns:
        The prepared module, or module and optimizer if one was given.

    Raises:
        PlanMismatchError: Ranks hold different models or settings; names the parameter.
        ValueError: The model is prepared already, spread over devices, or not the optimizer's; or
            `Config.shard_optimizer` without an optimizer.
    """
    if isinstance(model, PreparedModule | DataParallel):
        raise ValueError(f"this {type(model).__name__} is prepared already; prepare a model once")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("prepare() takes the model itself, not a DistributedDataParallel; drop it")
    if optimizer is not None:
        mine = {id(p) for p in model.parameters()}
        if not any(id(p) in mine for g in optimizer.param_groups for p in g["params"]):
            raise ValueError("the optimizer holds no parameter of this model; build it from them")
    else:
        _needs_optimizer(config or Config(), "as in prepare(model, optimizer, config=...)")
    optimizers = [] if optimizer is None else [optimizer]
    runtime = Runtime(model, config or Config(), optimizers)
    runtime.scale_by(grad_scaler)
    prepared = PreparedModule(model, runtime)
    if optimizer is None:
        return prepared
    runtime.take_over([optimizer])
    return prepared, optimizer


def _needs_optimizer(config: Config, where: str) -> None:
    """Raise if Config, or what is set from outside, asks for what needs the optimizer."""
    outside = settings.from_environment()
    wanted = settings.apply(config, outside)[0]
    for name, asked in {
        "shard_optimizer": wanted.shard_optimizer,
        "comm.early_step": wanted.comm.early_step,
    }.items():
        if asked:
            source = f" ({outside[name].source})" if name in outside else ""
            raise ValueError(f"Config.{name}{source} needs the optimizer, {where}")


def prepare_step(function: F, module: PreparedModule) -> F:
    """Capture a function that uses a prepared module as one region.

    Only what the function returns leaves the graph: a step that returns its loss never keeps the
    logits. Call `.backward()` on the result outside.

    Args:
        function: Forward and loss; calls `module` as often as it likes.
        module: What `prepare` returned.
    """
    runtime = _runtime_of(module)
    name = getattr(function, "__name__", "step")
    return region_for(runtime, function, name)  # type: ignore[return-value]


def report(module: nn.Module) -> Report:
    """Return the report of a module that `prepare` or `DataParallel` made, as of now."""
    runtime = _runtime_of(module)
    runtime.recorder.flush()
    return runtime.report


def compression_state(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return what gradient compression carries from step to step, for a checkpoint.

    Call it on all ranks, between steps; all get the same. Empty without error feedback and without
    `CommConfig.outer_steps`; with the latter it makes the outer step first, as `exchange_weights`,
    so take the weights after it.

    Returns:
        For each parameter's name: "residual", what was not sent yet, shaped as the parameter, the
        mean over ranks; for powersgd also "basis", `[columns, low_rank]`; of the outer loop
        "outer_momentum", shaped as the parameter. On the CPU.
    """
    return _runtime_of(module).reducer.compression_state()


def exchange_weights(module: nn.Module) -> None:
    """Give all ranks the same weights now, with `CommConfig.outer_steps`: make the outer step.

    Call it on all ranks, between steps, before weights are saved or evaluated. Does nothing without
    an outer loop, and where no step was taken since the last exchange.
    """
    _runtime_of(module).reducer.exchange_weights()


def load_compression_state(module: nn.Module, state: dict[str, dict[str, Tensor]]) -> None:
    """Go on from what `compression_state` returned, on any number of ranks and in any codec.

    Call it on all ranks, between steps. Parameters that `state` does not name start afresh.

    Raises:
        ValueError: A residual does not have its parameter's shape; names it.
    """
    _runtime_of(module).reducer.load_compression_state(state)


def _runtime_of(module: nn.Module) -> Runtime:
    runtime = module.__dict__.get("_magi_runtime")
    if not isinstance(runtime, Runtime):
        raise TypeError(
            f"expected a module from magi_train.prepare() or DataParallel, got "
            f"{type(module).__name__}"
        )
    return runtime
