"""Runtime: what belongs to one model, whatever is captured of it: ranks, reducer, report."""

import contextlib
import itertools
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from magi_train.comm.reducer import Reducer
from magi_train.core import compat, hardware
from magi_train.core.config import Config
from magi_train.core.device_graphs import device_graphs
from magi_train.core.passes import registered_passes
from magi_train.core.report import Report
from magi_train.core.world import World, join_from_environment
from magi_train.fusion.narrow_gradients import NarrowGradients
from magi_train.fusion.optimizer import take_over, taken_parameters
from magi_train.fusion.shadow import WeightShadows
from magi_train.replay import ReplayMemory

logger = logging.getLogger(__name__)

_runtimes: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Runtime]]" = (
    weakref.WeakKeyDictionary()
)


class Runtime:
    """What the regions of one model share.

    Args:
        module: The model, already on its device; the user's own object.
        config: What to do.

    Attributes:
        fp8: Whether linears may run in fp8: asked for, and possible on every rank.

    Raises:
        PlanMismatchError: Ranks hold different models or settings.
        ValueError: The parameters lie on several devices.
    """

    def __init__(self, module: nn.Module, config: Config) -> None:
        compat.warn_about_version()
        earlier = _runtimes.get(module, lambda: None)()
        if earlier is not None:
            earlier.close()
        _runtimes[module] = weakref.ref(self)
        self.module, self.config = module, config
        self.closed = False
        self.regions: weakref.WeakSet[Any] = weakref.WeakSet()  # capture.Region, one layer up
        self.inside = False
        self.region_ordinals = itertools.count()
        self.world: World = join_from_environment()
        parameters = dict(module.named_parameters())
        devices = {p.device for p in parameters.values()}
        if len(devices) > 1:
            raise ValueError(
                f"the parameters of {type(module).__name__} lie on {sorted(map(str, devices))}; "
                "magi-train replicates a model on one device a rank: move it to one"
            )
        device = next(iter(devices), torch.device("cpu"))
        self.device_type = device.type
        self.report = Report(world_size=self.world.size, settings=config.as_dict())
        self.report.versions |= hardware.devices_in_use()
        self._agree(parameters)
        self.fp8 = config.precision == "fp8" and self._fp8_everywhere()
        self.reducer = Reducer(
            module,
            self.world,
            config.comm,
            config.timeout_seconds,
            self.report,
        )
        self.reducer.broadcast_state()
        self.shadows = WeightShadows()
        self.narrow_gradients = NarrowGradients([])
        graphs = device_graphs(device) if config.cuda_graphs != "off" else None
        self.replays = None if graphs is None else ReplayMemory(graphs, self.report)

    def _agree(self, parameters: dict[str, nn.Parameter]) -> None:
        ask, seconds = self.world.agree, self.config.timeout_seconds
        passes = [f"{each.name} ({each.stage}): {each.uuid()}" for each in registered_passes()]
        settings = {"torch": torch.__version__, "registered passes": passes}
        ask("settings", {**self.config.as_dict(), **settings}, seconds)
        shapes = {n: [list(p.shape), str(p.dtype), p.requires_grad] for n, p in parameters.items()}
        buffers = {n: [list(b.shape), str(b.dtype)] for n, b in self.module.named_buffers()}
        ask("model", {"parameters": shapes, "buffers": buffers}, seconds)

    def _fp8_everywhere(self) -> bool:
        mine = hardware.no_fp8_because(self.device_type)
        reasons = self.world.gather("fp8", mine, self.config.timeout_seconds)
        why = next(filter(None, reasons), "")
        if why:
            text = f"Config.precision is 'fp8', but linears stay as they are: {why}"
            self.report.note(text)
            if self.world.rank == 0:
                logger.warning("magi-train: %s", text)
        return not why

    def scale_by(self, scaler: torch.amp.GradScaler | None) -> None:
        """Let residuals of gradient compression be kept without `scaler`'s loss scale."""
        if scaler is not None:
            self.reducer.loss_scale = lambda: compat.loss_scale(scaler)

    def take_over(self, optimizers: Sequence[Optimizer]) -> None:
        """Let one kernel take the steps of `optimizers` and keep the weights' shadows."""
        fusion = self.config.fusion
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
        drift = shadows.drift
        for optimizer in optimizers if drift is not None else ():
            take_over(
                optimizer,
                self.report,
                shadows.before_step,
                on_written=shadows.after_step,
                drift=None if drift is None else drift.flag,
            )

    def close(self) -> None:
        """Take everything of ours off the model: it is a plain module again."""
        self.closed = True
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
