"""`strategy="magi_fsdp"`: what we add to Lightning's ModelParallelStrategy, for models too large.

Lightning's strategy leaves the cutting to the user's `configure_model`; here engine "fsdp2" does it
in `setup`, when the model is whole or on the meta device (`trainer.init_module(empty_init=True)`),
and before the optimizers are made. Lightning's own code for DTensors is kept: clipping, distributed
checkpoints (a folder; `save_distributed_checkpoint=False` for one file) and their loading on any
number of ranks. The steps of the LightningModule count as its forward, so that weights of its own
are gathered for them. Blocks are compiled; `self.log` runs as it is, outside of them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.distributed.fsdp import register_fsdp_forward_method

from magi_train.capture import Region
from magi_train.comm.fully_shard import FullyShard
from magi_train.core.config import Config
from magi_train.core.report import Report
from magi_train.integrations.options import is_alone
from magi_train.runtime import Runtime
from magi_train.sharded_region import region_for

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class MagiFullyShardedMixin:
    """Train with weights, gradients and optimizer state sharded over all ranks.

    Args:
        config: What to do; its `engine` must be "fsdp2", which is the default here.
        **options: Those of Lightning's ModelParallelStrategy, without its two sizes: all ranks
            shard.

    Raises:
        ValueError: Another engine, or one of the sizes.
    """

    def __init__(self, *, config: Config | None = None, **options: Any) -> None:
        self.magi_config = config or Config(engine="fsdp2")
        if self.magi_config.engine != "fsdp2":
            raise ValueError(
                "MagiFullyShardedStrategy is for Config(engine='fsdp2'), got "
                f"{self.magi_config.engine!r}; strategy='magi' replicates"
            )
        sizes = sorted({"data_parallel_size", "tensor_parallel_size"} & options.keys())
        if sizes:
            raise ValueError(f"MagiFullyShardedStrategy does not take {sizes}: all ranks shard")
        super().__init__(**options)
        self.runtime: Runtime | None = None
        self._region: Region | None = None

    @property
    def report(self) -> Report:
        """What was done to the model.

        Raises:
            RuntimeError: Nothing has been set up yet.
        """
        if self.runtime is None:
            raise RuntimeError("the strategy has a report once trainer.fit() has begun")
        return self.runtime.report

    def setup_environment(self) -> None:
        """Join the process group; all its ranks shard."""
        strategy: Any = self
        strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
        strategy._tensor_parallel_size = 1
        super().setup_environment()  # type: ignore[misc]

    def setup(self, trainer: Any) -> None:
        """Cut the model, then make the optimizers, as ModelParallelStrategy does."""
        strategy: Any = self
        strategy.accelerator.setup(trainer)
        strategy.model = strategy.precision_plugin.convert_module(strategy.model)
        if is_alone(self):  # a replica: planned for where it lies
            strategy.model_to_device()
        self._shard(strategy.model)
        strategy.model_to_device()
        strategy.barrier()
        if trainer.state.fn == "fit":
            strategy.setup_optimizers(trainer)
        strategy.setup_precision_plugin()

    def _shard(self, module: Any) -> None:
        if self.runtime is not None and self.runtime.module is module:
            self.runtime.reopen()  # fit, then test or fit: it is cut already
        else:
            self.runtime = Runtime(module, self.magi_config)
            for name in STEPS:
                register_fsdp_forward_method(module, name)
        self._region = region_for(self.runtime, module.training_step, "training_step")

    def model_to_device(self) -> None:
        """Move what is not sharded, unless weights stay on the host."""
        if not self.magi_config.sharding.offload:
            super().model_to_device()  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the training step with its blocks compiled."""
        assert self._region is not None, "setup has not run"
        with self.precision_plugin.train_step_context():  # type: ignore[attr-defined]
            return self._region(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the validation step with rank 0's buffers."""
        self._begin_evaluation()
        return super().validation_step(*args, **kwargs)  # type: ignore[misc]

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the test step with rank 0's buffers."""
        self._begin_evaluation()
        return super().test_step(*args, **kwargs)  # type: ignore[misc]

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the predict step with rank 0's buffers."""
        self._begin_evaluation()
        return super().predict_step(*args, **kwargs)  # type: ignore[misc]

    def _begin_evaluation(self) -> None:
        if self.runtime is not None and isinstance(self.runtime.reducer, FullyShard):
            self.runtime.reducer.begin_evaluation()

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate without sending anything."""
        assert self.runtime is not None, "setup has not run"
        with self.runtime.no_sync():
            yield

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks why this one ends."""
        if self.runtime is not None:
            self.runtime.world.fail(exception)
        super().on_exception(exception)  # type: ignore[misc]

    def teardown(self) -> None:
        """Give the blocks their own forward back; the model stays sharded."""
        if self.runtime is not None:
            self.runtime.close()
        super().teardown()  # type: ignore[misc]
