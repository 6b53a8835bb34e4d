"""Does a replica fit? The choice of `Config(engine="auto")`, made by all ranks together.

A replica keeps its weights, buffers, gradients and the optimizer's state all the time. These are
counted, not measured: shapes are known before anything is on the device, also for a model on the
meta device. Activations are not: they depend on the batch. A stated share of the memory is left for
them (`ShardingConfig.activation_share`). The smallest device of all ranks decides.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import nn
from torch.optim import Optimizer

from magi_train.core.config import Engine, ShardingConfig
from magi_train.core.hardware import device_memory_bytes
from magi_train.core.world import World
from magi_train.memory.step import GIB, state_copies


@dataclass(frozen=True)
class Replica:
    """Bytes that one replica keeps on every rank all the time."""

    weights: int
    buffers: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(asdict(self).values())


def replica(module: nn.Module, optimizers: Sequence[Optimizer]) -> Replica:
    """Count what a replica of `module` keeps.

    Args:
        module: On any device, also "meta".
        optimizers: Over its parameters. None given: two numbers a trainable parameter, as Adam's.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    groups = [(o, group) for o in optimizers for group in o.param_groups]
    state = sum(
        state_copies(o, group) * p.numel() * p.element_size()
        for o, group in groups
        for p in group["params"]
        if p.requires_grad
    )
    return Replica(
        weights=sum(p.numel() * p.element_size() for p in module.parameters()),
        buffers=sum(b.numel() * b.element_size() for b in module.buffers()),
        gradients=gradients,
        optimizer=state if groups else 2 * gradients,
    )


def choose(
    need: Replica, config: ShardingConfig, device_type: str, world: World, timeout_seconds: float
) -> tuple[Engine, str]:
    """Return the engine that "auto" means here, and why, the same on all ranks.

    Raises:
        ValueError: The memory of a rank's device is not known.
    """
    capacity = config.device_memory_gib
    if capacity is None and device_type != "cuda":
        raise ValueError(
            f"Config.engine is 'auto', but how much memory a {device_type!r} device has is not "
            "known; set ShardingConfig(device_memory_gib=...), or name an engine"
        )
    mine = device_memory_bytes() if capacity is None else int(capacity * GIB)
    asked = "memory of the device"
    smallest = min(world.gather(asked, mine, timeout_seconds))
    room = int(smallest * (1 - config.activation_share))
    parts = ", ".join(f"{name} {size}" for name, size in asdict(need).items())
    fits = need.total <= room
    engine: Engine = "replicate" if fits or world.size == 1 else "fsdp2"
    why = (
        f"a replica keeps {need.total} bytes ({parts}), which {'fit' if fits else 'do not fit'} "
        f"into {room}: {1 - config.activation_share:.0%} of the {smallest} bytes of the smallest "
        "device"
    )
    if not fits and world.size == 1:
        why += "; one rank has nobody to shard with"
    return engine, why
