"""What MagiStrategy adds to Lightning's DDPStrategy, without naming either copy of Lightning.

The captured region is the whole `training_step`, so the loss is in the graph and only what the step
returns leaves it. `self.log` and `self.log_dict` are stood in for by a recorder while the region
runs: the values become outputs of the graph and are logged, in order, when it has run. Under manual
optimization the backward belongs to the user: the module's forward is compiled and hooks reduce.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magi_train.capture import Region
from magi_train.comm.reducer import Reducer
from magi_train.core.config import Config
from magi_train.core.facts import recording
from magi_train.core.report import Report
from magi_train.integrations import options as opt
from magi_train.runtime import Runtime

logger = logging.getLogger(__name__)

CHECKPOINT_KEY = "magi_compression"
"""Of a checkpoint: what gradient compression carries on; absent where it carries nothing."""


class Recorder:
    """Stands in for a LightningModule's `log` and `log_dict` while its step is captured.

    Attributes:
        calls: Method name, positional and keyword arguments of each call, in order.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Note a call of `log`."""
        if isinstance(value, Tensor) and not kwargs.get("enable_graph", False):
            value = value.detach()
        self.calls.append(("log", (name, value, *args), kwargs))

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        """Note a call of `log_dict`."""
        if isinstance(dictionary, dict) and not kwargs.get("enable_graph", False):
            dictionary = {
                k: v.detach() if isinstance(v, Tensor) else v for k, v in dictionary.items()
            }
        self.calls.append(("log_dict", (dictionary, *args), kwargs))


@contextlib.contextmanager
def recorded(module: Any, recorder: Recorder) -> Iterator[None]:
    """Shadow the logging methods of a LightningModule, then replay what was recorded."""
    recorder.calls.clear()
    own = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    module.__dict__.update(log=recorder.log, log_dict=recorder.log_dict)
    try:
        yield
    finally:
        for name, before in own.items():
            if before is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before
    for method, args, kwargs in recorder.calls:
        getattr(module, method)(*args, **kwargs)
    recorder.calls.clear()


class MagiStrategyMixin:
    """Train as under DDP, with the training step captured and optimized.

    Args:
        config: What to do; `magi_train.Config()` by default.
        report_path: Where rank 0 writes the report, every ten seconds and when `fit` ends, relative
            to the trainer's `default_root_dir`; None for nowhere. `Config.run_folder` comes first.
        log_figures: Give step time and memory (and communication that nothing hides, where it is
            known) to the trainer's loggers, every `log_every_n_steps`.
        **options: Those of Lightning's DDPStrategy. `find_unused_parameters`,
            `gradient_as_bucket_view` and `static_graph` are accepted and not needed.

    Raises:
        ValueError: An option that only a DistributedDataParallel could honour.
    """

    def __init__(
        self,
        *args: Any,
        config: Config | None = None,
        report_path: str | None = "magi_report.json",
        log_figures: bool = False,
        **options: Any,
    ) -> None:
        self.magi_config = opt.take_options(config, options)
        super().__init__(*args, **options)
        opt.refuse_unknown(self)
        self.report_path = report_path
        self.log_figures = log_figures
        self._logged_at = -1
        self.runtime: Runtime | None = None
        self._region: Region | None = None
        self._recorder: Recorder | None = None
        self._compression_state: dict[str, dict[str, Tensor]] = {}

    _base_module: Any

    @property
    def report(self) -> Report:
        """What was done in the last `fit`.

        Raises:
            RuntimeError: `fit` has not been called.
        """
        if self.runtime is None:
            raise RuntimeError("MagiStrategy has a report once trainer.fit() has begun")
        return self.runtime.report

    def setup_distributed(self) -> None:
        """Join the process group; one process alone needs none."""
        if opt.is_alone(self):
            self._base_module.reset_seed()
            self.set_world_ranks()  # type: ignore[attr-defined]
        else:
            super().setup_distributed()  # type: ignore[misc]

    def setup(self, trainer: Any) -> None:
        """Set up as Lightning does; without a group there are no states to make equal."""
        if trainer.state.fn == "fit" or torch.distributed.is_initialized():
            super().setup(trainer)  # type: ignore[misc]
            return
        strategy: Any = self
        strategy.accelerator.setup(trainer)
        strategy.precision_plugin.convert_module(strategy.model)
        strategy.model_to_device()
        strategy.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Set up ranks, plan and captured region; the model stays unwrapped."""
        module: Any = self.model  # type: ignore[attr-defined]
        self.runtime = Runtime(module, self.magi_config)
        opt.refuse_outer_steps(self.runtime.config, "Lightning's")
        trainer = getattr(module, "_trainer", None)
        if self.report_path is not None and trainer is not None and not self.runtime.record_path:
            self.runtime.record_to(Path(trainer.default_root_dir) / self.report_path)
        self.runtime.scale_by(getattr(self.precision_plugin, "scaler", None))  # type: ignore[attr-defined]
        if self._compression_state:
            self.runtime.reducer.load_compression_state(self._compression_state)
            self._compression_state = {}
        if module.automatic_optimization:
            self._recorder = Recorder()
            self._region = Region(self.runtime, module.training_step, "training_step")
        else:
            self._region = Region(
                self.runtime,
                module.forward,
                "forward",
                hooks_because="optimization is manual: the user decides how often backward runs",
            )
            module.__dict__["forward"] = self._region

    def batch_to_device(self, *args: Any, **kwargs: Any) -> Any:
        """Move a batch as Lightning does, and remember which of its masks are all ones."""
        with recording():
            return super().batch_to_device(*args, **kwargs)  # type: ignore[misc]

    def setup_optimizers(self, trainer: Any) -> None:
        """Make the optimizers as Lightning does, then let one kernel take their steps."""
        super().setup_optimizers(trainer)  # type: ignore[misc]
        if self.runtime is not None:
            self.runtime.take_over(self.optimizers)  # type: ignore[attr-defined]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the captured training step, then what it logged."""
        assert self.runtime is not None, "configure_ddp has not run"
        assert self._region is not None, "the strategy was torn down"
        if self.log_figures:
            self._log_figures(self.lightning_module.trainer, self.runtime)  # type: ignore[attr-defined]
        with self.precision_plugin.train_step_context():  # type: ignore[attr-defined]
            if self._recorder is None:
                reducer = self.runtime.reducer
                assert isinstance(reducer, Reducer), "options.take_options refuses other engines"
                reducer.begin(in_graph=False)
                with reducer.one_step():
                    return self.lightning_module.training_step(*args, **kwargs)  # type: ignore[attr-defined]
            with recorded(self.lightning_module, self._recorder):  # type: ignore[attr-defined]
                return self._region(*args, **kwargs)

    def _log_figures(self, trainer: Any, runtime: Runtime) -> None:
        """Give the figures of the steps so far to the loggers: no tensors, nothing to wait for."""
        step = trainer.global_step
        if not trainer.is_global_zero or step == self._logged_at:
            return
        if step % (trainer.log_every_n_steps or 1) == 0:
            self._logged_at = step
            figures = runtime.recorder.figures()
            exposed = runtime.report.measured.get("exposed_communication_ms")
            figures |= {} if exposed is None else {"magi/exposed_comm_ms": exposed}
            for each in trainer.loggers if figures else ():
                each.log_metrics(figures, step=step)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate without sending anything."""
        if self.runtime is None:
            yield
        else:
            with self.runtime.no_sync():
                yield

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Save as Lightning does, with what gradient compression carries on, if it does."""
        state = {} if self.runtime is None else self.runtime.reducer.compression_state()
        if state:
            checkpoint = {**checkpoint, CHECKPOINT_KEY: state}
        super().save_checkpoint(checkpoint, *args, **kwargs)  # type: ignore[misc]

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load as Lightning does, and what gradient compression carried on.

        Raises:
            MagiError: The file was cut short or damaged; names it.
        """
        with opt.named_if_damaged(args[0] if args else kwargs["checkpoint_path"]):
            checkpoint: dict[str, Any] = super().load_checkpoint(*args, **kwargs)  # type: ignore[misc]
        self._compression_state = checkpoint.get(CHECKPOINT_KEY, {})  # configure_ddp comes later
        return checkpoint

    def on_validation_start(self) -> None:
        """Take rank 0's buffers, which steps without a backward (SWA's last epoch) have moved."""
        super().on_validation_start()  # type: ignore[misc]
        if self.runtime is None or self._region is None:
            return  # not in `fit`: the model that was trained may be on the host, and not be asked
        if isinstance(self.runtime.reducer, Reducer):
            self.runtime.reducer.take_buffers()

    def on_validation_end(self) -> None:
        """Cast the weights anew: averaging callbacks swap them through `.data` meanwhile."""
        super().on_validation_end()  # type: ignore[misc]
        if self.runtime is not None:
            self.runtime.shadows.invalidate()

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks why this one ends."""
        if self.runtime is not None:
            self.runtime.world.fail(exception)
        super().on_exception(exception)  # type: ignore[misc]

    def teardown(self) -> None:
        """Give the module back as it was, and write the report."""
        module: Any = self.lightning_module  # type: ignore[attr-defined]
        if self.runtime is not None and self._region is not None:
            self.runtime.close()
            if module is not None and module.__dict__.get("forward") is self._region:
                del module.__dict__["forward"]
            self._write_report()
            self._region = self._recorder = None
        super().teardown()  # type: ignore[misc]

    def _write_report(self) -> None:
        path = None if self.runtime is None else self.runtime.record_path  # rank 0 has one
        if path is not None and self.report.tier:
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated() / 2**20
                self.report.measured["peak_memory_mib"] = peak
            self.report.save(path)
            logger.info("magi-train: report in %s; `magi explain %s` shows it", path, path)
