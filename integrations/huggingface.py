"""`attach`: train with transformers' Trainer or with Accelerate as before, captured and optimized.

    trainer = attach(Trainer(...))          # or SFTTrainer, or a Trainer of your own
    accelerator = attach(Accelerator(...))

Accelerate has no entry point for back ends: its distributed types are an enum, its handlers are
looked up by exact class. What has stayed the same since its first version is that every model goes
through `Accelerator.prepare_model` and every optimizer through `prepare_optimizer`. `attach` stands
in for these two on one object. The model comes back as the same object, not wrapped in a
DistributedDataParallel, so saving, unwrapping and resuming never meet a class of ours; only its
`forward` is the captured region, and `no_sync` is there for accumulation.

A Trainer computes its loss in `compute_loss`, whatever the user has overridden there. That method
is the region then: only the loss leaves the graph, and the logits need not be kept. Where it cannot
be captured, less is compiled, as everywhere.
"""

import contextlib
import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.optim import Optimizer

from magi_train.capture import Region
from magi_train.core.config import Config
from magi_train.core.report import Report
from magi_train.integrations.options import refuse_outer_steps
from magi_train.runtime import Runtime

T = TypeVar("T")

_ENGINES = {"FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA", "TP"}


def attach(owner: T, config: Config | None = None) -> T:
    """Let a Trainer or an Accelerator train captured models. Call it before training begins.

    Args:
        owner: A `transformers.Trainer` (or what derives from it), or an `accelerate.Accelerator`.
        config: What to do; `magi_train.Config()` by default.

    Returns:
        The same object.

    Raises:
        TypeError: It is neither of the two.
        ValueError: It has prepared a model already; another engine or torch.compile is asked for.
    """
    trainer: Any = owner if hasattr(owner, "accelerator") else None
    accelerator: Any = owner if trainer is None else trainer.accelerator
    if not all(hasattr(accelerator, n) for n in ("prepare_model", "prepare_optimizer")):
        raise TypeError(f"attach() takes a Trainer or an Accelerator, got {type(owner).__name__}")
    _Attached(accelerator, config or Config(), trainer)
    return owner


def report(owner: Any) -> Report:
    """Return the report of the model that was prepared last.

    Raises:
        RuntimeError: None has been prepared, or `attach` was not called.
    """
    accelerator = getattr(owner, "accelerator", owner)
    attached = accelerator.__dict__.get("_magi")
    if attached is None or attached.runtime is None:
        raise RuntimeError("there is a report once attach() was called and a model is prepared")
    return attached.runtime.report  # type: ignore[no-any-return]


class _Attached:
    """Stands in for three methods of an Accelerator, and one of a Trainer."""

    def __init__(self, accelerator: Any, config: Config, trainer: Any) -> None:
        _refuse(accelerator, trainer)
        self.accelerator, self.config = accelerator, _as_under_ddp(config, accelerator)
        self.trainer = None if trainer is None else weakref.ref(trainer)
        self.runtime: Runtime | None = None
        self._loss: Region | None = None
        self._waiting: list[Optimizer] = []
        self._prepare_model = accelerator.prepare_model
        self._prepare_optimizer = accelerator.prepare_optimizer
        accelerator._magi = self
        accelerator.prepare_model = self.prepare_model
        accelerator.prepare_optimizer = self.prepare_optimizer
        self._join_uneven_inputs = accelerator.join_uneven_inputs
        accelerator.join_uneven_inputs = self.join_uneven_inputs
        if trainer is not None:
            self._compute_loss = trainer.compute_loss
            trainer.compute_loss = functools.wraps(self._compute_loss)(
                lambda *args, **kwargs: self.compute_loss(*args, **kwargs)
            )

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Prepare as Accelerate does, up to the wrapper; then capture instead of wrapping."""
        prepared_before = getattr(model, "_is_accelerate_prepared", False)
        result: nn.Module = self._prepare_model(model, device_placement, evaluation_mode=True)
        if evaluation_mode or prepared_before:
            return result
        if not any(p.requires_grad for p in result.parameters()):
            return result
        self.config = _as_under_ddp(self.config, self.accelerator)  # a Trainer may say it this late
        refuse_outer_steps(self.config, "the Trainer's, or Accelerate's saving,")
        self.runtime = runtime = Runtime(result, self.config)
        self._loss = None
        forward = CapturedForward(
            Region(runtime, result.forward, type(result).__name__), result.forward
        )
        result.__dict__["forward"] = forward
        result.__dict__["no_sync"] = _NoSync(runtime)
        self._take_over()
        return result

    def join_uneven_inputs(
        self, joinables: list[Any], even_batches: bool | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Do what Accelerate's method does where it joins nothing; refuse to join.

        Raises:
            ValueError: Ranks may get other numbers of batches, and one of `joinables` is ours.
        """
        ours = [each for each in joinables if _is_ours(each)]
        even = self.accelerator.even_batches if even_batches is None else even_batches
        if ours and not even and self.accelerator.multi_device:
            raise ValueError(
                "join_uneven_inputs(even_batches=False) lets ranks take other numbers of steps, "
                f"which a {type(ours[0]).__name__} that attach() prepared does not follow; leave "
                "even_batches at True, or drop the last batches"
            )
        rest = [each for each in joinables if all(each is not mine for mine in ours)]
        context: contextlib.AbstractContextManager[None] = self._join_uneven_inputs(
            rest or [_JoinsNothing()], even_batches
        )
        return context

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> Any:
        """Prepare as Accelerate does, and let one kernel take the steps."""
        self._waiting.append(optimizer)
        self._take_over()
        return self._prepare_optimizer(optimizer, device_placement)

    def _take_over(self) -> None:
        if self.runtime is None:
            return
        ours = {id(p) for p in self.runtime.module.parameters()}
        of = [o for o in self._waiting if any(id(p) in ours for p in o.param_groups[0]["params"])]
        self.runtime.take_over(of)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's own method, captured while it trains."""
        runtime = self.runtime
        if runtime is None or model is not runtime.module or not torch.is_grad_enabled():
            return self._compute_loss(model, inputs, *args, **kwargs)
        if self._loss is None:
            self._loss = Region(runtime, self._compute_loss, "compute_loss")
        return self._loss(model, inputs, *args, **kwargs)


class CapturedForward:
    """A model's `forward`: the region, unless it runs inside another region of the model."""

    def __init__(self, region: Region, function: Callable[..., Any]) -> None:
        self.region, self.function = region, function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the region, or the plain forward inside of one."""
        if torch.compiler.is_compiling() or self.region.runtime.inside:
            return self.function(*args, **kwargs)
        return self.region(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Give a copy of the model (an average of its weights, say) its plain forward."""
        return copy.deepcopy(self.function, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the plain forward of the model that is pickled."""
        function: Any = self.function
        return getattr, (function.__self__, function.__name__)


class _NoSync:
    """A model's `no_sync`; a copy of the model sends nothing, so its own does nothing."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self) -> contextlib.AbstractContextManager[None]:
        return self.runtime.no_sync()

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_sync_of_a_copy, ()


def _is_ours(module: Any) -> bool:
    return isinstance(getattr(module, "__dict__", {}).get("no_sync"), _NoSync)


class _JoinsNothing(Joinable):
    """Stands in for a model of ours where nothing is joined."""

    def __init__(self) -> None:
        super().__init__()

    def join_hook(self, **_: Any) -> JoinHook:
        """Return a hook that does nothing."""
        return JoinHook()

    @property
    def join_device(self) -> torch.device:
        """The host: nothing is sent."""
        return torch.device("cpu")

    @property
    def join_process_group(self) -> Any:
        """The default group."""
        return torch.distributed.group.WORLD


def _no_sync_of_a_copy() -> Any:
    return contextlib.nullcontext


def _as_under_ddp(config: Config, accelerator: Any) -> Config:
    """Return `config` with what the Accelerator would have told a DistributedDataParallel.

    A Trainer's `ddp_broadcast_buffers` and `ddp_bucket_cap_mb` arrive so too.

    Raises:
        ValueError: A communication hook is asked for.
    """
    handler = getattr(accelerator, "ddp_handler", None)
    if handler is None:
        return config
    hook = getattr(handler.comm_hook, "value", handler.comm_hook)
    if hook != "no":
        raise ValueError(
            f"attach() takes no communication hook, but DistributedDataParallelKwargs.comm_hook is "
            f"{hook!r}; leave it out and use Config(comm=CommConfig(compression='bfloat16')), or "
            "'powersgd'"
        )
    asked, comm = handler.to_kwargs(), config.comm
    if not asked.get("broadcast_buffers", True):
        comm = dataclasses.replace(comm, broadcast_buffers=False)
    if "bucket_cap_mb" in asked and comm.bucket_mib is None:
        comm = dataclasses.replace(comm, bucket_mib=asked["bucket_cap_mb"])
    return dataclasses.replace(config, comm=comm)


def _refuse(accelerator: Any, trainer: Any) -> None:
    """Raise where another engine has the model."""
    kind = getattr(accelerator.distributed_type, "name", str(accelerator.distributed_type))
    if kind in _ENGINES:
        raise ValueError(
            f"attach() replicates the model, but this Accelerator is set up for {kind}; leave that "
            "setting out, or do not attach"
        )
    if "_magi" in accelerator.__dict__:
        raise ValueError("attach() was called for this object already; call it once")
    if getattr(accelerator, "_models", None):
        raise ValueError("a model is prepared already; call attach() before prepare() or train()")
    if accelerator.state.dynamo_plugin.backend.name != "NO":
        raise ValueError(
            "attach() compiles the model itself; set torch_compile=False (Trainer) or leave "
            "dynamo_backend out (Accelerator)"
        )
    if trainer is not None and trainer.args.n_gpu > 1:
        raise ValueError(
            f"this Trainer would split each batch over {trainer.args.n_gpu} GPUs in one process; "
            "start one process a GPU: magi run train.py"
        )
