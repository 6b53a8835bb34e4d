"""Weights that live sharded: torch's FSDP2 in the place of the reducer.

`fully_shard` keeps a part of every weight on each rank, gathers a block's weights before the block
runs, and sums gradients onto their owners when its backward has run: Rajbhandari et al., ZeRO
(arXiv:1910.02054), stage 3, and Zhao et al., PyTorch FSDP (arXiv:2304.11277). What is ours:

* Blocks are found by structure (comm/shard_blocks.py).
* Everything happens block by block: a block is moved to the device, gets rank 0's weights, and is
  cut before the next one is touched. A model larger than a device is sharded from the host, and one
  on the meta device is filled only after the cut, by each module's own `reset_parameters`.
* An optimizer that exists already gets the new parameters in place of the old, with its state cut.
* Without NCCL, waits are those of `World.wait`: a rank that failed, or ended early, is named.

Where it differs from DDP and from our reducer: parameters are DTensors between steps, `.grad` is
this rank's part, gradients that `no_sync` adds up stay whole in memory until the next step, and
every rank must use the same parameters in a step. All ranks take part in an evaluation, which
gathers weights: the first one behind a training forward takes rank 0's buffers, as DDP's forward
does.
"""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from magi_train.comm.broadcast import broadcast
from magi_train.comm.shard_blocks import blocks_to_shard
from magi_train.core import compat
from magi_train.core.config import Config
from magi_train.core.errors import MagiError
from magi_train.core.report import PassRow, Report
from magi_train.core.world import World

# torch < 2.13 knows the older names only, later ones warn of them
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class FullyShard:
    """Shards a model over all ranks, and keeps its gradients' traffic.

    Args:
        module: Changed in place: its parameters become DTensors, its class a subclass with FSDP2's
            methods. On the host, the device, or the meta device.
        world: More than one rank.
        config: Settings for engine "fsdp2".
        report: Gets the plan.
        optimizers: Over the module's parameters; get the new ones.

    Attributes:
        blocks: What is gathered and freed as one, in order; without the root.
        parameters: The sharded parameters by name.
        device: Where gathered weights live.
        sync: Whether the backward of the next forward sends gradients.

    Raises:
        ValueError: The model is sharded already.
        MagiError: A parameter on the meta device that no module can fill; names it.
    """

    planned: frozenset[str] = frozenset()
    """Parameters that a captured backward reduces: none, FSDP2's hooks do."""

    def __init__(
        self,
        module: nn.Module,
        world: World,
        config: Config,
        report: Report,
        optimizers: Sequence[Optimizer] = (),
    ) -> None:
        sharded = [n for n, p in module.named_parameters() if isinstance(p, DTensor)]
        if sharded:
            raise ValueError(
                f"{sharded[0]} of {type(module).__name__} is sharded already, by fully_shard or an "
                "earlier prepare(); build the model anew, and load its checkpoint"
            )
        self.world, self.sync = world, True
        self._module, self._config, self._synced = module, config, True
        self._buffers_due = True  # for an evaluation
        self.loss_scale: Any = None  # of codecs, which this engine has none of
        self.blocks = blocks_to_shard(module)
        self._replaced: list[weakref.ref[nn.Parameter]] = []
        self.device = device = device_for(module, world)
        self._options = self._make_options(device)
        for part in (*self.blocks, module):
            self._shard(part, device, optimizers)
        self._materialize(device)
        if not world.uses_nccl(device) and compat.FSDPAllGather is not object:
            for part in (*self.blocks, module):
                assert isinstance(part, FSDPModule)
                part.set_custom_all_gather(_AllGather(world))
                part.set_custom_reduce_scatter(_ReduceScatter(world))
        self.parameters = dict(module.named_parameters())
        report.add(PassRow("fully_shard", "run_time", self._summary(), 0.0))

    # -- cutting -------------------------------------------------------------------------------

    def _make_options(self, device: torch.device) -> dict[str, Any]:
        sharding = self._config.sharding
        gathered = torch.bfloat16 if sharding.gather_dtype else None
        reduced = torch.bfloat16 if self._config.comm.compression == "bfloat16" else None
        policy = MixedPrecisionPolicy(
            param_dtype=gathered,
            reduce_dtype=reduced or (torch.float32 if gathered else None),
            cast_forward_inputs=False,  # autocast casts, as it does without us
        )
        pin = device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pin) if sharding.offload else OffloadPolicy()
        mesh = init_device_mesh(device.type, (self.world.size,))
        return {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}

    def _shard(
        self, part: nn.Module, device: torch.device, optimizers: Sequence[Optimizer]
    ) -> None:
        whole = [p for p in part.parameters() if not isinstance(p, DTensor)]
        here = [t for t in (*whole, *part.buffers()) if not t.is_meta]
        before = _slots(part)
        if here:
            _move(here, device)
            broadcast(self.world, [t.detach() for t in here])
        is_block = part is not self._module
        reshard = None if self._config.sharding.reshard_after_forward else False
        fully_shard(part, reshard_after_forward=reshard if is_block else None, **self._options)
        after = _slots(part)
        new = {id(old): after[name] for name, old in before.items()}
        self._replaced += [weakref.ref(p) for n, p in before.items() if after[n] is not p]
        for optimizer in optimizers:
            _exchange(optimizer, new)

    def _materialize(self, device: torch.device) -> None:
        """Fill what lies on the meta device, after the cut."""
        owners = [m for m in self._module.modules() if _has_meta(m)]
        cannot = [m for m in owners if not callable(getattr(m, "reset_parameters", None))]
        if cannot:
            names = [n for n, m in self._module.named_modules() if m is cannot[0]]
            raise MagiError(
                f"{names[0] or 'the model'} ({type(cannot[0]).__name__}) lies on the meta device "
                "and has no reset_parameters() to fill it; give its class one, or build the model "
                "on the host"
            )
        if not owners:
            return
        place = torch.device("cpu") if self._config.sharding.offload else device
        kept = torch.get_rng_state()
        # a CPU has no generator for DTensors: equal seeds would give all parts equal values
        torch.manual_seed(torch.initial_seed() + 1 + self.world.rank)
        for owner in owners:
            owner.to_empty(device=place, recurse=False)
            owner.reset_parameters()  # type: ignore[operator]
        torch.set_rng_state(kept)
        broadcast(self.world, [b for b in self._module.buffers() if not isinstance(b, DTensor)])

    def _summary(self) -> dict[str, object]:
        whole = sum(p.numel() * p.element_size() for p in self.parameters.values())
        mine = sum(local_part(p).numel() * p.element_size() for p in self.parameters.values())
        policy = self._options["mp_policy"]
        return {
            "blocks": len(self.blocks),
            "ranks": self.world.size,
            "weight_bytes": whole,
            "weight_bytes_of_this_rank": mine,
            "gathered_as": str(policy.param_dtype or "kept"),
            "reduced_as": str(policy.reduce_dtype or "kept"),
            "offload": self._config.sharding.offload,
        }

    # -- one step ------------------------------------------------------------------------------

    def begin(self, in_graph: bool) -> None:
        """Note, at a forward with gradients, whether its backward sends them.

        Args:
            in_graph: Must be False: FSDP2's hooks reduce.

        Raises:
            MagiError: Weights are to be gathered in bfloat16, but there is no autocast to it; or
                an optimizer was made before the weights were cut; or the last backward raised.
        """
        assert not in_graph
        self.world.check()
        if compat.backward_is_open(self._module):
            raise MagiError(
                "the last backward ended with an error that was caught, and FSDP2 would add what "
                "it left to the next gradients; let the error end the program, or use "
                "Config(engine='replicate')"
            )
        self._refuse_old_optimizers()
        autocast = torch.is_autocast_enabled(self.device.type)
        if self._config.sharding.gather_dtype and not autocast:
            raise MagiError(
                "ShardingConfig.gather_dtype is 'bfloat16', but the forward runs without autocast; "
                "use torch.autocast(..., torch.bfloat16), or gather_dtype=None"
            )
        if self._synced:  # as DDP, once a step
            self.take_buffers()
        self._buffers_due = True
        if self.sync != self._synced:
            assert isinstance(self._module, FSDPModule)
            self._module.set_requires_gradient_sync(self.sync)
            self._synced = self.sync

    def begin_evaluation(self) -> None:
        """Take rank 0's buffers at the first forward without gradients since one with them."""
        if self._buffers_due:
            self._buffers_due = False
            self.take_buffers()

    def take_buffers(self) -> None:
        """Take rank 0's buffers, unless the settings say that they are each rank's own."""
        if self._config.comm.broadcast_buffers:
            broadcast(self.world, [b for b in self._module.buffers() if not isinstance(b, DTensor)])

    def _refuse_old_optimizers(self) -> None:
        """Once, look for an optimizer that would update what nobody uses any more."""
        old = {id(p) for ref in self._replaced if (p := ref()) is not None}
        self._replaced = []
        # by type(): isinstance() asks proxies, whose objects may be gone
        for each in gc.get_objects() if old else ():
            if issubclass(type(each), Optimizer):
                if any(id(p) in old for group in each.param_groups for p in group["params"]):
                    raise MagiError(
                        f"this {type(each).__name__} was made before the weights were sharded and "
                        "holds the old ones; make it afterwards, or give it to "
                        "magi_train.prepare(model, optimizer, config=...)"
                    )

    def broadcast_state(self) -> None:
        """Do nothing: the weights were made equal while they were whole."""

    def pin_plan(self) -> None:
        """FSDP2 keeps its one group a block."""

    def compression_state(self) -> dict[str, dict[str, Tensor]]:
        """Return nothing: no codec keeps a residual here."""
        return {}

    def exchange_weights(self) -> None:
        """Do nothing: this engine has no outer loop."""

    def load_compression_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Ignore `state`: this engine has no codecs with residuals."""

    def close(self) -> None:
        """Do nothing: what `fully_shard` did to a model cannot be undone."""


def _slots(part: nn.Module) -> dict[str, nn.Parameter]:
    return dict(part.named_parameters(remove_duplicate=False))


def _has_meta(module: nn.Module) -> bool:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(t.is_meta for t in own)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def device_for(module: nn.Module, world: World) -> torch.device:
    """Return where the gathered weights of a model shall live."""
    devices = {p.device for p in module.parameters()} - {torch.device("meta")}
    on_host = devices <= {torch.device("cpu")}
    if on_host and torch.cuda.is_available() and world.backend != "gloo":
        return torch.device("cuda", torch.cuda.current_device())
    return next(iter(devices), torch.device("cpu"))


def _move(tensors: Sequence[Tensor], device: torch.device) -> None:
    with torch.no_grad():
        for t in tensors:
            if t.device != device:
                t.data = t.data.to(device)


def _exchange(optimizer: Optimizer, new: dict[int, nn.Parameter]) -> None:
    """Put new parameters where `optimizer` holds old ones, and cut its state as they are cut."""
    for group in optimizer.param_groups:
        for i, old in enumerate(group["params"]):
            p = new.get(id(old))
            if p is None or p is old:
                continue
            group["params"][i] = p
            if old in optimizer.state:
                state = optimizer.state.pop(old)
                optimizer.state[p] = {k: part_of(v, p) for k, v in state.items()}


def part_of(whole: Any, like: Any) -> Any:
    """Return this rank's part, in new memory, of what is cut as `like` is; else `whole` itself.

    Args:
        whole: A tensor that all ranks hold, of the shape that `like` has on all together.
        like: A DTensor.
    """
    if not isinstance(whole, Tensor) or not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    part = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return part.clone().to(local_part(like).device)  # with offload that is the host


class _AllGather(compat.FSDPAllGather):  # type: ignore[misc]
    """FSDP2's gathering of weights, which notices a rank that failed."""

    def __init__(self, world: World) -> None:
        self.world = world

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        work = _all_gather(output_tensor, input_tensor, group=group, async_op=True)
        what = f"the weights of a block ({output_tensor.numel()} numbers)"
        self.world.wait(work, output_tensor.device, what)


class _ReduceScatter(compat.FSDPReduceScatter):  # type: ignore[misc]
    """FSDP2's sum of gradients, which notices a rank that failed."""

    def __init__(self, world: World) -> None:
        self.world = world

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        work = _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=True)
        what = f"the gradients of a block ({input_tensor.numel()} numbers)"
        self.world.wait(work, output_tensor.device, what)


def explain_mixed(error: BaseException) -> None:
    """Say, in a note, what torch's error means where whole tensors meet parts of weights."""
    if "mixed torch.Tensor and DTensor" in str(error) and not getattr(error, "__notes__", None):
        error.add_note(
            "magi-train: engine 'fsdp2' keeps parts of the weights on each rank; they are whole in "
            "the forward of their block (of the model, for weights of no block). Compute with them "
            "there, or with p.full_tensor(), on all ranks, of each that is a DTensor; under "
            "engine='magi' weights are whole"
        )
