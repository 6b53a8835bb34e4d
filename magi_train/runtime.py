"""Runtime: what belongs to one model, whatever is captured of it: ranks, reducer, report."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from magi_train.comm.codecs.compressor import STATEFUL
from magi_train.comm.fully_shard import FullyShard, device_for, explain_mixed, local_part
from magi_train.comm.link import link_for
from magi_train.comm.plan import CommPlan, num_bytes
from magi_train.comm.reducer import Reducer
from magi_train.comm.zero import Zero, one_of
from magi_train.comm.zero_config import must_be_installed, stage_of, zero_config
from magi_train.core import compat, hardware, settings
from magi_train.core.config import Config
from magi_train.core.device_graphs import device_graphs
from magi_train.core.passes import registered_passes
from magi_train.core.progress import Progress
from magi_train.core.record import Recorder
from magi_train.core.report import FILE_NAME, Report
from magi_train.core.world import World, join_from_environment
from magi_train.fusion.narrow_gradients import NarrowGradients
from magi_train.fusion.optimizer import compile_steps, take_over, taken_parameters
from magi_train.fusion.shadow import WeightShadows
from magi_train.memory.engine import choose, replica
from magi_train.memory.exhausted import explain, is_exhausted
from magi_train.memory.sharded_optimizer import is_sharded, shard, why_not_sharded
from magi_train.memory.shards import Shards
from magi_train.memory.step import StepMemory
from magi_train.replay import ReplayMemory

logger = logging.getLogger(__name__)

MIB = 2**20

_runtimes: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Runtime]]" = (
    weakref.WeakKeyDictionary()
)


class Runtime:
    """What the regions of one model share.

    Args:
        module: The model, already on its device; the user's own object.
        config: What to do; settings from the environment fill in what it leaves at the default.

    Attributes:
        fp8: Whether linears may run in fp8: asked for, and possible on every rank.

    Raises:
        PlanMismatchError: Ranks hold different models or settings.
        ValueError: The parameters lie on several devices.
    """

    def __init__(
        self, module: nn.Module, config: Config, optimizers: Sequence[Optimizer] = ()
    ) -> None:
        compat.warn_about_version()
        outside = settings.from_environment()
        config, overruled = settings.apply(config, outside)
        earlier = _runtimes.get(module, lambda: None)()
        if earlier is not None:
            earlier.close()
            if isinstance(earlier.reducer, Zero):
                earlier.reducer.destroy()
        _runtimes[module] = weakref.ref(self)
        self.module = module
        self.closed = False
        self.regions: weakref.WeakSet[Any] = weakref.WeakSet()  # capture.Region, one layer up
        self.inside = False
        self.record_path: Path | None = None
        self.region_ordinals = itertools.count()
        self.world: World = join_from_environment()
        _explain_uncaught()
        parameters = dict(module.named_parameters())
        every = itertools.chain(parameters.items(), module.named_buffers())
        lazy = [n for n, tensor in every if nn.parameter.is_lazy(tensor)]
        if lazy:
            raise ValueError(
                f"{lazy[0]} of {type(module).__name__} has no shape yet, as it belongs to a lazy "
                "layer; run one batch through the model before it is prepared"
            )
        devices = {p.device for p in parameters.values()}
        if len(devices) > 1:
            raise ValueError(
                f"the parameters of {type(module).__name__} lie on {sorted(map(str, devices))}; "
                "magi-train trains a model on one device a rank: move it to one"
            )
        device = next(iter(devices), torch.device("cpu"))
        self.report = Report(world_size=self.world.size, settings=config.as_dict())
        self.config = config = self._with_engine(config, device, optimizers)
        if config.engine == "fsdp2":
            device = device_for(module, self.world)
        self.device_type = device.type
        self.report.versions |= hardware.devices_in_use()
        self.report.sources = settings.sources(config, outside)
        self.optimizers: list[weakref.ref[Optimizer]] = []
        self._record(device)
        if outside:
            self._tell_outside(settings.to_words(outside), overruled)
        self._agree(parameters)
        gradient_bytes = sum(num_bytes(p) for p in parameters.values() if p.requires_grad)
        del parameters  # of whole weights, which sharding frees one block after the other
        self.fp8 = config.precision == "fp8" and self._fp8_everywhere()
        self.reducer: Reducer | FullyShard | Zero
        if config.engine == "fsdp2":
            self.reducer = FullyShard(module, self.world, config, self.report, optimizers)
        elif config.engine == "deepspeed":
            self.reducer = self._with_deepspeed(config, optimizers)
        else:
            seconds = config.timeout_seconds
            link = link_for(config.comm, gradient_bytes, self.world, device, seconds, self.report)
            self.reducer = Reducer(module, self.world, config.comm, seconds, self.report, link)
        self.reducer.broadcast_state()
        self.shadows = WeightShadows()
        self.narrow_gradients = NarrowGradients([])
        # a plan for the memory of a step does not cover a second pool
        replay = config.cuda_graphs != "off" and config.memory_budget_gib is None
        replay &= isinstance(self.reducer, Reducer)  # others' hooks run in the backward
        graphs = device_graphs(device) if replay else None
        self.replays = None if graphs is None else ReplayMemory(graphs, self.report)
        self.memory: StepMemory | None = None
        if config.memory_budget_gib is not None:
            self.memory = StepMemory(
                module,
                config.memory_budget_gib,
                self.device_type,
                self.world,
                config.timeout_seconds,
                self.report,
                offload=config.offload_activations,
            )
            assert isinstance(self.reducer, Reducer), "a budget is refused for sharded weights"
            self.reducer.pin_plan()  # the budget counts its largest bucket

    @property
    def sharded(self) -> bool:
        """Whether weights live sharded, so that a whole one exists only while its block runs."""
        reducer = self.reducer
        return isinstance(reducer, FullyShard) or (isinstance(reducer, Zero) and reducer.stage == 3)

    def _with_deepspeed(self, config: Config, optimizers: Sequence[Optimizer]) -> Zero:
        """Set up DeepSpeed's engine around the model."""
        optimizer = one_of(optimizers)
        settings = zero_config(config)
        if config.tier == "graph" and stage_of(settings) == 3:
            raise ValueError(
                "Config.tier is 'graph', but at ZeRO stage 3 a weight is whole only while its "
                "block runs; leave tier at 'auto', or use a lower stage"
            )
        return Zero(self.module, optimizer, self.world, settings, self.report, config)

    def _with_engine(
        self, config: Config, device: torch.device, optimizers: Sequence[Optimizer]
    ) -> Config:
        """Return `config` with the engine that is used, and note why."""
        engine, why = config.engine, ""
        if engine == "auto":
            need = replica(self.module, optimizers)
            kind = "cuda" if torch.cuda.is_available() else device.type
            world, seconds = self.world, config.timeout_seconds
            engine, why = choose(need, config.sharding, kind, world, seconds)
        elif engine == "fsdp2" and self.world.size == 1:
            engine, why = "replicate", "one rank has nobody to shard with"
        if engine == "deepspeed":
            must_be_installed()
            comm = dataclasses.replace(config.comm, in_graph=False)  # DeepSpeed's hooks reduce
            return dataclasses.replace(config, comm=comm)
        if why:
            self.report.note(f"Config.engine is {config.engine!r}: {engine!r} is used, as {why}")
        if engine == "replicate" and device.type == "meta":
            raise ValueError(
                f"{type(self.module).__name__} lies on the meta device and engine 'replicate' is "
                "used, which fills nothing in; build the model on a real device"
            )
        return dataclasses.replace(config, engine=engine) if why else config

    def _record(self, device: torch.device) -> None:
        """Keep a record of the steps, written by rank 0 where that was asked for."""
        self.progress = Progress(self.config.progress and self.world.rank == 0)
        self.recorder = Recorder(self.report.steps, device.type)
        if self.config.run_folder is not None:
            self.record_to(Path(self.config.run_folder) / FILE_NAME)
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.recorder.joules = hardware.energy_counter()
        self.recorder.tell = self.progress.tell if self.progress.shown else None
        self.recorder.resident = functools.partial(
            _resident_mib, weakref.ref(self.module), self.optimizers
        )
        weakref.finalize(self, _end_record, self.recorder, self.progress)

    def record_to(self, path: Path) -> None:
        """Let rank 0 write the report to `path` from time to time and at the end.

        A second model of the process that is to be written to the same place gets another name.
        """
        if self.world.rank != 0:
            return
        taken = {runtime.record_path for runtime in live_runtimes()}
        names = (path.with_stem(f"{path.stem}_{i}") for i in itertools.count(2))
        while path in taken:
            path = next(names)
        self.record_path = path
        self.recorder.write = functools.partial(_write, self.report, path)

    def _agree(self, parameters: dict[str, nn.Parameter]) -> None:
        ask, seconds = self.world.agree, self.config.timeout_seconds
        passes = [f"{each.name} ({each.stage}): {each.uuid()}" for each in registered_passes()]
        more = {"torch": torch.__version__, "registered passes": passes}
        own = ("run_folder", "progress")  # what rank 0 writes and shows changes no training
        shared = {k: v for k, v in self.config.as_dict().items() if k not in own}
        ask("settings", {**shared, **more}, seconds)
        shapes = {
            n: [list(p.shape), str(p.dtype), p.requires_grad, *_meta(p)]
            for n, p in parameters.items()
        }
        buffers = {
            n: [list(b.shape), str(b.dtype), *_meta(b)] for n, b in self.module.named_buffers()
        }
        ask("model", {"parameters": shapes, "buffers": buffers}, seconds)

    def _tell_outside(self, words: str, overruled: Sequence[str]) -> None:
        self.report.note(f"{settings.VARIABLE}: {words}")
        for sentence in overruled:
            self._warn(sentence)

    def _warn(self, sentence: str) -> None:
        self.report.note(sentence)
        if self.world.rank == 0:
            logger.warning("magi-train: %s", sentence)

    def _fp8_everywhere(self) -> bool:
        mine = hardware.no_fp8_because(self.device_type)
        reasons = self.world.gather("fp8", mine, self.config.timeout_seconds)
        why = next(filter(None, reasons), "")
        if why:
            self._warn(f"Config.precision is 'fp8', but linears stay as they are: {why}")
        return not why

    def scale_by(self, scaler: torch.amp.GradScaler | None) -> None:
        """Let residuals of gradient compression be kept without `scaler`'s loss scale."""
        if scaler is not None and isinstance(self.reducer, Zero):
            raise ValueError(
                "engine 'deepspeed' takes no grad_scaler: DeepSpeed scales the loss by itself; use "
                "bfloat16, or Lightning's precision='16-mixed' with strategy='magi_deepspeed'"
            )
        if scaler is not None:
            self.reducer.loss_scale = lambda: compat.loss_scale(scaler)

    def take_over(self, optimizers: Sequence[Optimizer]) -> None:
        """Shard the state of `optimizers`, and let one kernel take their steps, as asked for.

        Raises:
            ValueError: An optimizer is sharded, and the Config says that none shall be.
        """
        if not self.config.shard_optimizer and any(map(is_sharded, optimizers)):
            raise ValueError(
                "the state of this optimizer is sharded by an earlier prepare(); keep "
                "Config(shard_optimizer=True), or load its state_dict() into a new optimizer"
            )
        if isinstance(self.reducer, Zero):
            self.reducer.take_over(optimizers[0])
        if self.memory is not None:
            self.memory.know(optimizers)
        self.optimizers[:] = [weakref.ref(each) for each in optimizers]
        refused = [why_not_sharded(optimizer) for optimizer in optimizers]
        self._take_steps(optimizers)
        for optimizer, why in zip(optimizers, refused, strict=True):
            if self.config.comm.early_step and isinstance(self.reducer, Reducer):
                self.reducer.step_early(optimizer, why)
        if not self.config.shard_optimizer:
            return
        names = {id(p): name for name, p in self.reducer.parameters.items()}
        for optimizer, why in zip(optimizers, refused, strict=True):
            timeout = self.config.timeout_seconds
            shards = shard(optimizer, self.world, names, timeout, self.report, why)
            if shards is not None and taken_parameters(optimizer):
                self._keep_shadows(optimizer, shards)

    def _take_steps(self, optimizers: Sequence[Optimizer]) -> None:
        fusion = self.config.fusion
        if not isinstance(self.reducer, Reducer):
            self.report.note("steps are not ours: each rank steps on its parts of the weights")
            return
        if fusion is None or not fusion.optimizer:
            return
        for optimizer in optimizers:
            take_over(optimizer, self.report)
        ids = {id(p) for optimizer in optimizers for p in taken_parameters(optimizer)}
        taken = [p for p in self.module.parameters() if id(p) in ids]
        if fusion.narrow_gradients and self.world.size > 1:
            self.report.note("narrow_gradients is off: gradients travel between ranks in float32")
        elif fusion.narrow_gradients:
            self.narrow_gradients.close()
            self.narrow_gradients = NarrowGradients(taken)
        if not fusion.weight_shadows:
            return
        shadows = self.shadows
        shadows.manage(taken)
        if shadows.drift is None:
            return
        for optimizer in optimizers:
            take_over(
                optimizer,
                self.report,
                shadows.before_step,
                on_written=shadows.after_step,
                drift=shadows.drift.flag,
            )

    def compile_steps(self, shadows: torch.dtype | None, *, narrow: bool) -> None:
        """Let the optimizers' kernels compile while a graph does.

        Args:
            shadows: Of which dtype the graph reads shadows.
            narrow: Whether it gives gradients in that dtype, too.
        """
        dtypes: list[tuple[torch.dtype, torch.dtype | None]] = []
        if shadows is not None:
            dtypes += [(shadows, shadows)] * narrow + [(torch.float32, shadows)]
        dtypes.append((torch.float32, None))
        for optimizer in filter(None, (reference() for reference in self.optimizers)):
            compile_steps(optimizer, dtypes)

    def _keep_shadows(self, optimizer: Optimizer, shards: Shards) -> None:
        """Let the kernel write pieces of shadows; the rest is cast from what is gathered."""
        if self.shadows.drift is None:
            return
        shards.shadows = self.shadows
        take_over(
            optimizer,
            self.report,
            shards.shadow_of_piece,
            on_written=shards.on_pieces_written,
            drift=self.shadows.drift.flag,
        )

    def begin_memory(self, batch: Any) -> None:
        """Let the memory budget, if there is one, look at what a first step begins with."""
        if self.memory is None:
            return
        assert isinstance(self.reducer, Reducer), "a budget is refused for sharded weights"
        self.memory.begin(batch, self.shadows.num_bytes, buffer_bytes(self.reducer.plan))

    def reopen(self) -> None:
        """Go on after `close`: hooks are on the parameters again, and steps are recorded."""
        self.closed, path, self.record_path = False, self.record_path, None
        self._record(torch.device(self.device_type))
        if path is not None and self.record_path is None:
            self.record_to(path)
        if isinstance(self.reducer, Reducer):
            self.reducer.refresh()
        self.narrow_gradients = self.narrow_gradients.again()

    def close(self) -> None:
        """Take everything of ours off the model: it is a plain module again."""
        self.closed = True
        _end_record(self.recorder, self.progress)
        self.reducer.close()
        self.narrow_gradients.close()
        if self.replays is not None:
            self.replays.clear()
        for region in self.regions:
            region.close()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forwards in this context accumulate their gradients without sending anything."""
        before, self.reducer.sync = self.reducer.sync, False
        try:
            yield
        finally:
            self.reducer.sync = before

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """While a region of this model runs, the prepared module is a plain one."""
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before


def _meta(tensor: torch.Tensor) -> list[str]:
    """Return what tells a tensor without data from one with: ranks must not mix them."""
    return ["on the meta device"] if tensor.is_meta else []


def _write(report: Report, path: Path) -> None:
    if report.tier:  # else nothing has run
        report.save(path)


def live_runtimes() -> list[Runtime]:
    """Return the runtimes of this process that are not closed, the newest last."""
    alive = [runtime for ref in _runtimes.values() if (runtime := ref()) is not None]
    return [runtime for runtime in alive if not runtime.closed]


def _end_record(recorder: Recorder, progress: Progress) -> None:
    recorder.close()
    recorder.write = recorder.resident = recorder.tell = None
    progress.close()


def _resident_mib(
    module: "weakref.ref[nn.Module]", optimizers: Sequence["weakref.ref[Optimizer]"]
) -> dict[str, float]:
    """Return what a model and its optimizers hold all the time, in MiB; {} once they are gone."""
    alive = module()
    if alive is None:
        return {}
    state = [o.state for ref in optimizers if (o := ref()) is not None]
    held: dict[str, Any] = {
        "parameters": list(alive.parameters()),
        "buffers": list(alive.buffers()),
        "optimizer state": pytree.tree_leaves([list(each.values()) for each in state]),
    }
    sizes = {
        n: compat.bytes_of(local_part(x) for x in xs if torch.is_tensor(x))
        for n, xs in held.items()
    }
    return {name: round(size / MIB, 6) for name, size in sizes.items() if size}


@functools.cache
def _explain_uncaught() -> None:
    """Explain errors that leave a program; behind World, whose hook then tells the rest.

    Allocations that fail in a backward, and computing with parts of weights.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        trained = live_runtimes()
        if is_exhausted(error) and trained:
            explain(
                error, getattr(trained[-1], "memory", None)
            )  # one that failed half-way has none
        if any(isinstance(getattr(each, "reducer", None), FullyShard) for each in trained):
            explain_mixed(error)
        previous(kind, error, trace)

    sys.excepthook = hook


def buffer_bytes(plan: CommPlan) -> int:
    """Return what communication needs on each rank besides the gradients."""
    buckets = plan.buckets if plan.world_size > 1 else ()
    sizes = [b.numel * b.torch_dtype().itemsize for b in buckets]
    encoded = [b for b in buckets if b.codec != b.dtype]
    residuals = [b.numel * b.torch_dtype().itemsize for b in encoded if b.codec in STATEFUL]
    wires = [b.numel * 2 if b.codec == "safe" else b.wire_bytes() for b in encoded]
    # one is packed while its gradients live
    return max(sizes, default=0) + sum(wires) + sum(residuals)
