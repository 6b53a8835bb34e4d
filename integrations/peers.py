"""The ways people train a module today, by name: what `magi bench` puts beside ours.

A peer is a name of parts joined by "+", in any order: "eager" (none), "compile",
"liger+block-compile", "fsdp2+block-compile". Each part is a function that changes a `Training`, in
the order of the stages: first the module is edited, then its blocks are compiled, then it is spread
over the ranks, then the loss as a whole is compiled. Where nothing spreads a module,
DistributedDataParallel does. "magi" spreads, and takes settings: "magi:precision=fp8,tier=region".

What is missing is known before a process is started (`why_not`). All peers get the same module,
batches, loss, optimizer and autocast. Where a library has its own form of mixed precision the
nearest one is taken: FSDP2 gathers in the dtype of autocast and reduces in float32; DeepSpeed runs
autocast by itself and sends weights and gradients of linears and convolutions in that dtype.
"""

import difflib
import importlib.util
import inspect
import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from magi_train.core import settings
from magi_train.core.config import Config
from magi_train.core.errors import MagiError
from magi_train.integrations.parts import PARTS, Part, Stage, Training, part

OURS, PLAIN = "magi", "eager"
HEADS = {"lm_head", "decoder", "head"}
"""Last part of the names of linears that make logits."""
DEFAULT = (
    PLAIN, "compile", "block-compile", "liger", "liger+block-compile", "torchao+compile",
    "fsdp2+block-compile", "fsdp2-reshard+block-compile", "zero1", "zero2", "zero3", OURS,
)  # fmt: skip


def parse(peer: str) -> list[tuple[Part, str]]:
    """Return a peer's parts in the order of their turns, each with what follows its ":".

    Raises:
        MagiError: No such part, two that exclude each other, or an option of no use.
    """
    found = []
    for word in peer.split("+") if peer != PLAIN else []:
        name, _, option = word.partition(":")
        if name not in PARTS:
            near = difflib.get_close_matches(name, [PLAIN, *PARTS], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "join them with '+'"
            raise MagiError(
                f"there is no peer {name!r}, only {PLAIN} and {', '.join(PARTS)}; {hint}"
            )
        if option and not PARTS[name].takes:
            raise MagiError(f"peer {name!r} takes nothing behind ':', got {option!r}")
        if name == OURS:
            our_config(option)
        found.append((PARTS[name], option))
    names = [p.name for p, _ in found]
    spread = [p.name for p, _ in found if p.stage == Stage.SPREAD]
    if len(spread) > 1 or len(set(names)) < len(names):
        raise MagiError(f"peer {peer!r}: {', '.join(spread if len(spread) > 1 else names)} in one")
    if OURS in spread and any(p.stage in (Stage.BLOCKS, Stage.WHOLE) for p, _ in found):
        raise MagiError(f"peer {peer!r}: {OURS} compiles by itself; leave the other compilers out")
    return sorted(found, key=lambda each: each[0].stage)


def is_ours(peer: str) -> bool:
    """Return whether a peer is magi, with whatever settings, or something edited for it."""
    return OURS in {word.partition(":")[0] for word in peer.split("+")}


def why_not(peer: str, ranks: int, on_gpu: bool) -> str:
    """Return why a peer cannot run here, "" if nothing is known against it."""
    for each, _ in parse(peer):
        if each.gpu and not on_gpu:
            return f"{each.name} needs a GPU"
        if ranks < each.ranks:
            return f"{each.name} needs {each.ranks} ranks or more: --nproc"
        if each.package and importlib.util.find_spec(each.package) is None:
            return f"{each.name} needs the package {each.package}, which is not installed"
    return ""


def apply(peer: str, training: Training) -> None:
    """Make a step one of a peer.

    Raises:
        MagiError: A part refuses.
    """
    parts = parse(peer)
    for each, option in parts:
        if each.stage < Stage.WHOLE:
            each.apply(training, *([option] if each.takes else []))
    if training.ranks > 1 and not any(each.stage == Stage.SPREAD for each, _ in parts):
        ids = [training.device.index] if training.device.type == "cuda" else None
        training.model = nn.parallel.DistributedDataParallel(
            training.module, device_ids=ids, gradient_as_bucket_view=True
        )
    for each, _ in parts:
        if each.stage == Stage.WHOLE:
            each.apply(training)


# -- ours --------------------------------------------------------------------------------------


def our_config(option: str) -> Config:
    """Return the Config of "key=value,key=value", over file and environment as everywhere.

    Raises:
        SettingError: A setting is wrong.
    """
    return settings.apply(Config(), settings.gather(option.split(",") if option else ()))[0]


@part(OURS, Stage.SPREAD, takes="settings of Config: key=value,key=value")
def magi(training: Training, option: str) -> None:
    """magi_train.prepare and prepare_step."""
    from magi_train import prepare, prepare_step

    config = our_config(option)
    model, training.optimizer = prepare(training.module, training.optimizer, config=config)
    training.model, loss = model, training.loss
    training.loss_of = prepare_step(lambda batch: loss(model, batch), model)


# -- editing the module --------------------------------------------------------------------------


@part("liger", Stage.EDIT, package="liger_kernel", gpu=True)
def liger(training: Training) -> None:
    """Liger's kernels patched into a model of transformers."""
    _patch_liger(training)


@part("liger-loss", Stage.EDIT, package="liger_kernel", gpu=True)
def liger_loss(training: Training) -> None:
    """Liger's linear and cross-entropy in chunks alone, in a model of transformers."""
    _patch_liger(training, only="fused_linear_cross_entropy")


def _patch_liger(training: Training, only: str = "") -> None:
    """Patch all that Liger has for a model, or one of its switches."""
    from liger_kernel.transformers import monkey_patch

    kind = getattr(getattr(training.module, "config", None), "model_type", None)
    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if kind not in known:  # it would do nothing, and not say so
        raise MagiError(f"Liger has no kernels for a model of type {kind!r}")
    options = inspect.signature(known[kind]).parameters.values()
    switches = {option.name for option in options if isinstance(option.default, bool)}
    if only and only not in switches:
        raise MagiError(f"Liger has no {only} for a model of type {kind!r}")
    chosen = {name: name == only for name in switches} if only else {}
    monkey_patch._apply_liger_kernel_to_instance(model=training.module, **chosen)


@part("torchao", Stage.EDIT, package="torchao", gpu=True)
def torchao(training: Training) -> None:
    """Linears made fp8 by torchao, tensorwise, by its advice on shapes, without the head."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    converted: list[str] = []

    def wanted(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or name.split(".")[-1] in HEADS:
            return False
        rows, columns = module.weight.shape
        if (columns <= 4096 and rows <= 1024) or rows % 16 or columns % 16:
            return False
        converted.append(name)
        return True

    config = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(training.module, config=config, module_filter_fn=wanted)
    if not converted:
        raise MagiError("torchao's advice leaves every linear as it is: none is large enough")


@part("checkpoint", Stage.EDIT)
def checkpoint(training: Training) -> None:
    """The gradient checkpointing that a model of transformers offers."""
    enable = getattr(training.module, "gradient_checkpointing_enable", None)
    if enable is None:
        raise MagiError("the module has no gradient_checkpointing_enable(), as transformers' have")
    enable({"use_reentrant": False})


@part("channels-last", Stage.EDIT)
def channels_last(training: Training) -> None:
    """Convolutions in channels_last."""
    training.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@part("fold-masks", Stage.EDIT, package="transformers")
def fold_masks(training: Training) -> None:
    """The attention mask of transformers' models folded by hand."""
    from magi_train.integrations.cases import fold_masks_by_hand

    fold_masks_by_hand()


# -- compiling -----------------------------------------------------------------------------------


@part("block-compile", Stage.BLOCKS)
def block_compile(training: Training) -> None:
    """Every repeated block compiled, the rest eager."""
    for block in _blocks(training):
        block.compile()


@part("head-compile", Stage.BLOCKS)
def head_compile(training: Training) -> None:
    """What transformers' models compute after their blocks compiled: the head and the loss."""
    module: Any = training.module
    head = getattr(module, "lm_head", None) or getattr(module, "cls", None)
    if head is None or not hasattr(module, "loss_function"):
        raise MagiError("the module has no head and loss_function, as transformers' models have")
    head.compile()
    module.loss_function = torch.compile(module.loss_function)


@part("compile", Stage.WHOLE)
def compile_whole(training: Training) -> None:
    """torch.compile of the loss function."""
    model, loss = training.model, training.loss
    training.loss_of = torch.compile(lambda batch: loss(model, batch))


def _blocks(training: Training) -> Sequence[nn.Module]:
    if not training.blocks:
        raise MagiError("the module has no repeated blocks")
    return training.blocks


# -- sharding ------------------------------------------------------------------------------------


@part("fsdp2", Stage.SPREAD, ranks=2)
def fsdp2(training: Training) -> None:
    """fully_shard of every block and the module, weights kept whole after forward."""
    _fully_shard(training, reshard=False)


@part("fsdp2-reshard", Stage.SPREAD, ranks=2)
def fsdp2_reshard(training: Training) -> None:
    """fully_shard of every block and the module, blocks resharded after forward."""
    _fully_shard(training, reshard=True)


def _fully_shard(training: Training, reshard: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    module, blocks = training.module, _blocks(training)
    before = {name: p for name, p in module.named_parameters()}
    mesh = init_device_mesh(training.device.type, (training.ranks,))
    reduced = torch.float32 if training.autocast is not None else None
    policy = MixedPrecisionPolicy(param_dtype=training.autocast, reduce_dtype=reduced)
    for each in blocks:
        fully_shard(each, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    new = {id(p): q for (_, p), q in zip(before.items(), module.parameters(), strict=True)}
    for group in training.optimizer.param_groups:
        group["params"] = [new[id(p)] for p in group["params"]]


def _zero(training: Training, stage: int) -> None:
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # for its figures only; it must have one
        "gradient_clipping": 0.0,  # its own default clips to a norm of 1
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if training.autocast is not None:  # or its forward switches the caller's autocast off
        name = str(training.autocast).removeprefix("torch.")
        config["torch_autocast"] = {"enabled": True, "dtype": name}
    engine = deepspeed.initialize(
        args=Namespace(device_rank=int(os.environ.get("LOCAL_RANK", "0"))),
        model=training.module,
        model_parameters=[p for p in training.module.parameters() if p.requires_grad],
        optimizer=training.optimizer,
        config=config,
        dist_init_required=False,
    )[0]
    training.model, training.backward, training.update = engine, engine.backward, engine.step


@part("zero1", Stage.SPREAD, package="deepspeed", ranks=2)
def zero1(training: Training) -> None:
    """DeepSpeed's ZeRO, stage 1: optimizer state sharded."""
    _zero(training, 1)


@part("zero2", Stage.SPREAD, package="deepspeed", ranks=2)
def zero2(training: Training) -> None:
    """DeepSpeed's ZeRO, stage 2: gradients, too."""
    _zero(training, 2)


@part("zero3", Stage.SPREAD, package="deepspeed", ranks=2)
def zero3(training: Training) -> None:
    """DeepSpeed's ZeRO, stage 3: weights, too."""
    _zero(training, 3)
