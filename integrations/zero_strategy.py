"""`strategy="magi_deepspeed"`: Lightning's DeepSpeedStrategy with our passes inside.

Lightning's class is kept, since Lightning asks for it by type (precision, refusals of callbacks,
model summary). What differs from it:

* DeepSpeed's settings come from `Config` (comm/zero_config.py); the trainer's clipping and
  precision join them, and what contradicts is an error instead of being ignored.
* Accumulation is Lightning's: a step is taken when Lightning takes one.
* It runs on CPU ranks too, where Lightning's refuses.
* A checkpoint is a folder that replaces the last one when it is whole, is refused when it was cut
  short, and resumes on any number of ranks at its stage. A single file, of any other strategy,
  gives its weights.
"""

import argparse
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from magi_train.capture import Region
from magi_train.checkpoint import save_zero
from magi_train.comm import zero_files
from magi_train.comm.zero import Zero
from magi_train.comm.zero_clipping import must_clip_to
from magi_train.comm.zero_config import must_be_installed, zero_config
from magi_train.core.config import Config
from magi_train.core.errors import MagiError
from magi_train.core.report import Report
from magi_train.integrations.strategy import Recorder, recorded
from magi_train.runtime import Runtime
from magi_train.sharded_region import ShardedZeroRegion, ZeroRegion

logger = logging.getLogger(__name__)

_PRECISION = {"16-mixed": "fp16", "16-true": "fp16", "bf16-mixed": "bf16", "bf16-true": "bf16"}
_CONTEXTS = {"validation_step": "val", "test_step": "test", "predict_step": "predict"}


class MagiDeepSpeedMixin:
    """Train with DeepSpeed's ZeRO, with the training step or its blocks captured.

    Args:
        config: What to do; its `engine` must be "deepspeed", which is the default here.
        **options: Those of Lightning's DeepSpeedStrategy that are no settings of DeepSpeed:
            `accelerator`, `timeout`, `exclude_frozen_parameters` and the like.

    Raises:
        ValueError: Another engine, a setting of DeepSpeed's as an option, or a contradiction.
        MagiError: DeepSpeed is not installed.
    """

    _taken = frozenset(
        (
            *("accelerator", "parallel_devices", "cluster_environment", "precision_plugin"),
            *("process_group_backend", "timeout", "logging_level", "exclude_frozen_parameters"),
            *("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
            "min_loss_scale",
        )
    )

    def __init__(self, *, config: Config | None = None, **options: Any) -> None:
        self.magi_config = config or Config(engine="deepspeed")
        if self.magi_config.engine != "deepspeed":
            raise ValueError(
                "MagiDeepSpeedStrategy is for Config(engine='deepspeed'), got "
                f"{self.magi_config.engine!r}; strategy='magi' replicates"
            )
        unknown = sorted(options.keys() - self._taken)
        if unknown:
            raise ValueError(
                f"MagiDeepSpeedStrategy does not take {unknown}; DeepSpeed is configured by "
                "Config(engine='deepspeed', sharding=ShardingConfig(zero_stage=..., deepspeed=...))"
            )
        must_be_installed()
        super().__init__(config=zero_config(self.magi_config), **options)  # type: ignore[call-arg]
        self.runtime: Runtime | None = None
        self._region: Region | None = None
        self._recorder: Recorder | None = None

    @property
    def report(self) -> Report:
        """What was done to the model.

        Raises:
            RuntimeError: Nothing has been trained yet.
        """
        if self.runtime is None:
            raise RuntimeError("the strategy has a report once trainer.fit() has begun")
        return self.runtime.report

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning counts the batches, and scales the loss."""
        return False

    # -- setting up ----------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Join the process group, on any device that DeepSpeed runs on."""
        strategy: Any = self
        strategy.accelerator.setup_device(strategy.root_device)
        strategy.setup_distributed()

    def setup_distributed(self) -> None:
        """As Lightning's, whose check of device numbers knows CUDA only."""
        strategy: Any = self
        if strategy.root_device.type == "cuda":
            super().setup_distributed()  # type: ignore[misc]
            return
        strategy.set_world_ranks()
        strategy._init_deepspeed_distributed()

    def _format_batch_size_and_grad_accum_config(self) -> None:
        """Let the trainer's clipping join DeepSpeed's settings."""
        strategy: Any = self
        clip = float(strategy.lightning_module.trainer.gradient_clip_val or 0.0)
        there = strategy.config["gradient_clipping"]
        if clip and there not in (0.0, clip):
            raise ValueError(
                f"ShardingConfig.deepspeed has gradient_clipping = {there!r}, but "
                f"Trainer.gradient_clip_val is {clip!r}; leave one of the two out"
            )
        strategy.config["gradient_clipping"] = clip or there

    def _format_config(self) -> None:
        """Let the trainer's precision join DeepSpeed's settings."""
        strategy: Any = self
        precision = str(strategy.precision_plugin.precision)
        for key in ("fp16", "bf16"):
            there = strategy.config.get(key, {}).get("enabled")
            if there is not None and there != (_PRECISION.get(precision) == key):
                raise ValueError(
                    f"ShardingConfig.deepspeed has {key}.enabled = {there!r}, but "
                    f"Trainer.precision is {precision!r}; change one of the two"
                )
        super()._format_config()  # type: ignore[misc]

    def _initialize_deepspeed_train(self, model: Any) -> None:
        strategy: Any = self
        optimizer, scheduler = strategy._init_optimizers()
        sharding = dataclasses.replace(
            self.magi_config.sharding, zero_stage=None, offload=False, deepspeed=strategy.config
        )
        config = dataclasses.replace(self.magi_config, sharding=sharding)
        self.runtime = Runtime(model, config, [optimizer])
        zero = self.runtime.reducer
        assert isinstance(zero, Zero)
        strategy.model = zero.engine
        strategy.precision_plugin.clip_gradients = functools.partial(_clip_gradients, zero)
        strategy.optimizers = [zero.engine.optimizer]
        strategy.lr_scheduler_configs = [] if scheduler is None else [scheduler]
        strategy._set_deepspeed_activation_checkpointing()
        # a step that calls backward itself cannot be captured whole
        by_blocks = zero.stage == 3 or not model.automatic_optimization
        kind = ShardedZeroRegion if by_blocks else ZeroRegion
        self._recorder = None if by_blocks else Recorder()
        self._region = kind(self.runtime, model.training_step, "training_step")

    def _initialize_deepspeed_inference(self, model: Any) -> None:
        """As Lightning's; after a fit the model is in its engine already."""
        strategy: Any = self
        zero = self._zero(model)
        if zero is not None:
            strategy.model = zero.engine
            return
        import deepspeed

        settings = {k: v for k, v in strategy.config.items() if k in ("fp16", "bf16")}
        if strategy.zero_stage_3:
            settings["zero_optimization"] = strategy.config["zero_optimization"]
        strategy.model = deepspeed.initialize(
            args=argparse.Namespace(device_rank=strategy.local_rank),
            config={"train_micro_batch_size_per_gpu": 1, **settings},
            model=model,
            model_parameters=[],
            dist_init_required=False,
        )[0]

    def _zero(self, module: Any) -> Zero | None:
        """Return the engine that was made for `module`, if one was."""
        runtime = self.runtime
        if runtime is None or runtime.module is not module:
            return None
        return runtime.reducer if isinstance(runtime.reducer, Zero) else None

    # -- steps ---------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the training step as DeepSpeed's forward, then what it logged."""
        assert self._region is not None, "setup has not run"
        strategy: Any = self
        with strategy.precision_plugin.train_step_context():
            if self._recorder is None:
                return self._region(*args, **kwargs)
            with recorded(strategy.lightning_module, self._recorder):
                return self._region(*args, **kwargs)

    def _evaluate(self, name: str, args: Any, kwargs: Any) -> Any:
        strategy: Any = self
        module = strategy.lightning_module
        zero = self._zero(module)
        if zero is None:
            return getattr(super(), name)(*args, **kwargs)
        with getattr(strategy.precision_plugin, f"{_CONTEXTS[name]}_step_context")():
            return zero.call(getattr(module, name), *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step where weights are whole for it."""
        return self._evaluate("validation_step", args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step where weights are whole for it."""
        return self._evaluate("test_step", args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step where weights are whole for it."""
        return self._evaluate("predict_step", args, kwargs)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate: Lightning's would enter a context that DeepSpeed refuses."""
        assert self.runtime is not None, "setup has not run"
        with self.runtime.no_sync():
            yield

    # -- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write a folder, which takes the place of an earlier one when it is whole."""
        strategy: Any = self
        zero = self._zero(strategy.lightning_module)
        if storage_options is not None or zero is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)  # type: ignore[misc]
            return
        state = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        save_zero(zero, strategy.broadcast(filepath), state)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a folder of ours or DeepSpeed's, or the weights of another strategy's file.

        Raises:
            MagiError: It was cut short, or holds what DeepSpeed does not read; names it.
        """
        strategy: Any = self
        path, module = Path(strategy.broadcast(checkpoint_path)), strategy.lightning_module
        zero = self._zero(module)
        sharded, is_folder = strategy.zero_stage_3, zero_files.is_zero_checkpoint(path)
        if path.is_dir() and not is_folder:
            raise MagiError(
                f"{path} is no checkpoint of DeepSpeed's; load its weights into the model: "
                "model.load_state_dict(magi_train.plain_state_dict(folder))"
            )
        if is_folder and zero is not None and strategy.model is zero.engine:
            return zero_files.read(zero, path, strict=module.strict_loading)
        if is_folder:  # nothing is trained: any stage, any number of ranks
            found, weights = zero_files.client_state(path), zero_files.plain(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=False)
            weights = found["state_dict"]
        rank, strict = strategy.global_rank, module.strict_loading
        zero_files.load_weights(module, weights, rank, sharded=sharded, strict=strict)
        if zero is not None and strategy.model is zero.engine:
            zero.engine.optimizer._restore_from_bit16_weights()  # the optimizer's own copies
            logger.warning(
                "magi-train: %s is of another strategy: its weights are loaded, and the optimizer "
                "starts afresh",
                path,
            )
        return found

    # -- ending --------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks why this one ends."""
        if self.runtime is not None:
            self.runtime.world.fail(exception)
        super().on_exception(exception)  # type: ignore[misc]

    def teardown(self) -> None:
        """Give the blocks their own forward back; DeepSpeed keeps the model."""
        if self.runtime is not None:
            self.runtime.close()
        super().teardown()  # type: ignore[misc]


def _clip_gradients(
    zero: Zero, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm"
) -> None:
    """Leave clipping to DeepSpeed, as Lightning's plugin, if that is what it does."""
    if clip_val:
        by = getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)
        must_clip_to(zero, float(clip_val), by)
