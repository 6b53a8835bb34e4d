"""`strategy="magi_fsdp"`: what we add to Lightning's ModelParallelStrategy, for models too large.

Lightning's strategy leaves the cutting to the user's `configure_model`; here engine "fsdp2" does it
in `setup`, when the model is whole or on the meta device (`trainer.init_module(empty_init=True)`),
and before the optimizers are made. Lightning's clipping of DTensors is kept, and the formats of
its checkpoints: a folder, or with `save_distributed_checkpoint=False` a file as DDP's. What is in
them is taken and put back here, on any number of ranks: Lightning takes a file's optimizer state to
be in the order of the model's parameters, which is not always the optimizer's. The steps of the
LightningModule count as its forward, so that weights of its own are gathered for them. Blocks are
compiled; `self.log` runs as it is, outside of them.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from magi_train.capture import Region
from magi_train.checkpoint import module_state, optimizer_state, read_folder
from magi_train.comm.fully_shard import FullyShard, part_of
from magi_train.core.config import Config
from magi_train.core.errors import MagiError
from magi_train.core.report import Report
from magi_train.integrations.options import is_alone, named_if_damaged
from magi_train.runtime import Runtime
from magi_train.sharded_region import region_for

METADATA = "meta.pt"
"""What Lightning calls the file of a checkpoint's folder that holds everything but tensors."""

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
        if not is_alone(self):
            _refuse_averaging(trainer.callbacks)
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

    # -- checkpoints ---------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the model's state with rank 0's buffers: this rank's parts, or whole on rank 0."""
        strategy: Any = self
        if self.runtime is not None and isinstance(self.runtime.reducer, FullyShard):
            self.runtime.reducer.take_buffers()
        if strategy._save_distributed_checkpoint:
            return module_state(strategy.model)
        state: dict[str, Any] = strategy.model.state_dict()
        return _whole_on(strategy.global_rank == 0, state)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the optimizer's state: this rank's parts by name, or torch's format on rank 0."""
        strategy: Any = self
        own = getattr(optimizer, "_optimizer", optimizer)  # LightningOptimizer holds it so
        if strategy._save_distributed_checkpoint:
            return optimizer_state(strategy.model, own)
        state: dict[str, Any] = own.state_dict()
        mine = strategy.global_rank == 0
        numbers = sorted(state["state"])  # whole tensors are made in the same order on all ranks
        parts = {number: _whole_on(mine, state["state"][number]) for number in numbers}
        return {**state, "state": parts} if mine else {}

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a folder or a file, of this strategy or of DDP, into the model and its optimizers.

        Returns:
            What else is in it.

        Raises:
            MagiError: It was cut short, is no checkpoint of Lightning's, or holds the state of
                other optimizers; names it.
        """
        strategy: Any = self
        path = Path(strategy.broadcast(checkpoint_path))
        strict = strategy.lightning_module.strict_loading
        if not path.is_dir():
            with named_if_damaged(path):
                found: dict[str, Any] = torch.load(
                    path, map_location="cpu", mmap=True, weights_only=weights_only
                )
            self._fill(path, found, strict)
            return found
        if not (path / METADATA).is_file():
            raise MagiError(
                f"{path} holds no checkpoint of Lightning's: it has no {METADATA}; name a folder "
                "that trainer.save_checkpoint() or ModelCheckpoint wrote"
            )
        optimizers = {f"optimizer_{i}": each for i, each in enumerate(strategy.optimizers)}
        read_folder(path, strategy.model, optimizers, "state_dict", strict=strict)
        rest: dict[str, Any] = torch.load(path / METADATA, weights_only=weights_only)
        return rest

    def _fill(self, path: Path, found: dict[str, Any], strict: bool) -> None:
        """Take weights and optimizer state out of a file that holds them whole."""
        strategy: Any = self
        held = strategy.model.state_dict()
        cut = {
            name: part_of(value, held.get(name)) for name, value in found.pop("state_dict").items()
        }
        strategy.model.load_state_dict(cut, strict=strict)
        saved = found.pop("optimizer_states", [])
        if len(saved) < len(strategy.optimizers):
            raise MagiError(
                f"{path} holds the state of {len(saved)} optimizers, and configure_optimizers made "
                f"{len(strategy.optimizers)}; a file of save_weights_only=True has none: load it "
                "with load_state_dict() before fit, without ckpt_path"
            )
        for optimizer, whole in zip(strategy.optimizers, saved, strict=False):
            optimizer.load_state_dict(_cut_state(whole, optimizer))

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


def _refuse_averaging(callbacks: Sequence[Any]) -> None:
    """Refuse callbacks that copied the model while it was whole, and average what is cut into it.

    Raises:
        ValueError: There is one; names it.
    """
    for each in callbacks:
        kinds = {kind.__name__ for kind in type(each).__mro__}
        if kinds & {"WeightAveraging", "StochasticWeightAveraging"}:
            raise ValueError(
                f"{type(each).__name__} averages whole weights, which strategy='magi_fsdp' shards; "
                "leave the callback out, or use strategy='magi'"
            )


def _whole_on(wanted: bool, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return whole tensors in host memory, on the ranks where they are wanted; a collective."""
    whole = {}
    for name, value in parts.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if wanted:
            whole[name] = full.detach().cpu() if isinstance(full, Tensor) else full
    return whole


def _cut_state(whole: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's whole state with this rank's parts, none of it in the file's memory."""
    numbers = [n for group in whole["param_groups"] for n in group["params"]]
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    owner = dict(zip(numbers, mine, strict=False))  # torch refuses what does not match

    def own(value: Any, p: Any) -> Any:
        part = part_of(value, p)
        return part.clone() if part is value and isinstance(value, Tensor) else part

    parts = {
        number: {name: own(value, owner.get(number)) for name, value in state.items()}
        for number, state in whole["state"].items()
    }
    return {**whole, "state": parts}
