"""One strategy class for each Lightning namespace, made on demand, and its names in the registry.

`pytorch_lightning` and `lightning.pytorch` are two copies with separate base classes, so each needs
a class of its own; so do `lightning.fabric` and `lightning_fabric`. A spawned process unpickles the
strategy before it looks up any name: the module `__getattr__` makes the class then.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
FABRICS = ("lightning.fabric", "lightning_fabric")
VARIANTS: dict[str, dict[str, Any]] = {
    "magi": {},
    "magi_spawn": {"start_method": "spawn"},
    "magi_fork": {"start_method": "fork"},
    "magi_notebook": {"start_method": "fork"},
    "magi_find_unused_parameters_true": {"find_unused_parameters": True},
    "magi_find_unused_parameters_false": {"find_unused_parameters": False},
}
FULLY_SHARDED = "magi_fsdp"
DEEPSPEED = "magi_deepspeed"
"""These two of Trainer only: Fabric makes the optimizer before the weights are cut."""


def _class_name(namespace: str) -> str:
    return "MagiStrategy_" + namespace.replace(".", "__")  # "_" would let two names collide


@functools.cache
def strategy_class(namespace: str) -> type:
    """Return MagiStrategy for one of `NAMESPACES` or `FABRICS`."""
    mixin: type
    if namespace in FABRICS:
        from magi_train.integrations.fabric import MagiFabricMixin as mixin
    else:
        from magi_train.integrations.strategy import MagiStrategyMixin as mixin
    module = importlib.import_module(namespace + ".strategies.ddp")
    body = {"__module__": __name__, "__doc__": mixin.__doc__, "_base_module": module}
    return type(_class_name(namespace), (mixin, module.DDPStrategy), body)


@functools.cache
def fully_sharded_class(namespace: str) -> type:
    """Return MagiFullyShardedStrategy for one of `NAMESPACES`."""
    from magi_train.integrations.fully_sharded import MagiFullyShardedMixin

    module = importlib.import_module(namespace + ".strategies.model_parallel")
    body = {"__module__": __name__, "__doc__": MagiFullyShardedMixin.__doc__}
    name = _class_name(namespace).replace("Magi", "MagiFullySharded", 1)
    return type(name, (MagiFullyShardedMixin, module.ModelParallelStrategy), body)


def create_fully_sharded(namespace: str, **options: Any) -> Any:
    """Return a strategy for "magi_fsdp"."""
    return fully_sharded_class(namespace)(**options)


@functools.cache
def deepspeed_class(namespace: str) -> type:
    """Return MagiDeepSpeedStrategy for one of `NAMESPACES`."""
    from magi_train.integrations.zero_strategy import MagiDeepSpeedMixin

    module = importlib.import_module(namespace + ".strategies.deepspeed")
    body = {"__module__": __name__, "__doc__": MagiDeepSpeedMixin.__doc__}
    name = _class_name(namespace).replace("Magi", "MagiDeepSpeed", 1)
    return type(name, (MagiDeepSpeedMixin, module.DeepSpeedStrategy), body)


def create_deepspeed(namespace: str, **options: Any) -> Any:
    """Return a strategy for "magi_deepspeed"."""
    return deepspeed_class(namespace)(**options)


def create(namespace: str, **options: Any) -> Any:
    """Return a strategy; what the registry calls when a name is used."""
    return strategy_class(namespace)(**options)


def register_into(namespace: str, strategies: ModuleType) -> None:
    """Add our names to the registry of a Lightning's `strategies` module."""
    name = "STRATEGY_REGISTRY" if namespace in FABRICS else "StrategyRegistry"
    registry = getattr(strategies, name)
    for name, options in VARIANTS.items():
        if name not in registry:
            registry.register(
                name,
                functools.partial(create, namespace),
                description="data-parallel training through captured graphs (magi-train)",
                **options,
            )
    if namespace in NAMESPACES and FULLY_SHARDED not in registry:
        registry.register(
            FULLY_SHARDED,
            functools.partial(create_fully_sharded, namespace),
            description="training with weights sharded by fully_shard (magi-train)",
        )
    if namespace in NAMESPACES and DEEPSPEED not in registry:
        registry.register(
            DEEPSPEED,
            functools.partial(create_deepspeed, namespace),
            description="training with DeepSpeed's ZeRO through captured graphs (magi-train)",
        )


def __getattr__(name: str) -> Any:
    for namespace in (*NAMESPACES, *FABRICS):
        if name == _class_name(namespace):
            return strategy_class(namespace)
        if name == _class_name(namespace).replace("Magi", "MagiFullySharded", 1):
            return fully_sharded_class(namespace)
        if name == _class_name(namespace).replace("Magi", "MagiDeepSpeed", 1):
            return deepspeed_class(namespace)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
