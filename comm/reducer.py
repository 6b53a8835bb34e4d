"""The reducer: executes the communication plan at run time, for every tier.

Two callers start a bucket's all-reduce, and both end up in `launch`:

* the compiled backward (GRAPH tier), through the ops of `comm.in_graph`, as soon as the bucket's
  gradients exist, while the rest of the backward still computes;
* gradient hooks (REGION and EAGER), when the last gradient of a bucket has been accumulated.

Buckets leave strictly in plan order, so a compiled and an eager rank stay in step. What one
backward does, in order:

1. `begin` (at the forward) notes whether this backward synchronises, as DDP does, and takes rank
   0's buffers.
2. `launch` packs the gradients of a bucket, adds what earlier unsynchronised backwards left in
   `.grad`, and starts the all-reduce, or the exchange of the bucket's codec (`comm.codecs`): once a
   step, after local accumulation. Without sync it only packs.
3. `wait` ends it. `.grad` then is a view into the bucket (as DDP's gradient_as_bucket_view).
4. `_finish`, a callback at the end of the backward: launches what no gradient came for, gives
   parameters that only other ranks used their average, leaves parameters that no rank used alone,
   takes rank 0's buffers, and checks that every gradient was reduced exactly once. What codecs
   keep for the next step counts from here, if every gradient is finite.

Where hooks launch on the CPU and the link is known, the first backwards are watched, and the ranks
then agree once on buckets for the times at which gradients appear. A captured graph has its buckets
inside, so there the first plan stays (`pin_plan`).

The check at 4: after an in-graph reduction `.grad` must be the very memory of the bucket. If not,
the parameter has another contribution, outside of the captured graph. On the first synchronised
backward the ranks then agree to reduce everything from hooks from now on, and reduce once more:
averaging is linear and leaves averaged addends alone, so the result is right. Later it is an error.
"""

import contextlib
import itertools
import logging
import operator
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from magi_train.comm import replicas
from magi_train.comm.broadcast import broadcast
from magi_train.comm.codecs import Scale
from magi_train.comm.codecs.compressor import STATEFUL, Compressor, Handle
from magi_train.comm.codecs.exact import ExactBuckets
from magi_train.comm.copy_engines import copy_engines
from magi_train.comm.early_step import Pending, step_early
from magi_train.comm.host_memory import HostMemory
from magi_train.comm.link import Link
from magi_train.comm.nodes import node_size
from magi_train.comm.outer import MOMENTUM, OuterLoop
from magi_train.comm.plan import LEVELS, Bucket, CommPlan, plan_buckets, predict
from magi_train.comm.schedule import Meter, Profile
from magi_train.comm.trial import CODEC, FORMS, Trial
from magi_train.core import compat
from magi_train.core.config import CommConfig
from magi_train.core.errors import MagiError, UnreducedGradientError
from magi_train.core.report import PassRow, Report
from magi_train.core.world import World

logger = logging.getLogger(__name__)

LEAST_GAIN = 0.02
"""Part of the backward that another plan must be predicted to save."""

_Signature = tuple[tuple[bool, torch.dtype], ...]

_reducers: "weakref.WeakValueDictionary[int, Reducer]" = weakref.WeakValueDictionary()
_ordinals = itertools.count()


def reducer_of(ordinal: int) -> "Reducer":
    """Return the reducer that a compiled graph names by its ordinal.

    Raises:
        MagiError: The model that the graph was compiled for no longer exists.
    """
    try:
        return _reducers[ordinal]
    except KeyError:
        raise MagiError(
            f"a compiled graph needs reducer {ordinal}, which is gone; keep the prepared module "
            "alive as long as its graphs are used"
        ) from None


@dataclass
class _Backward:
    """What happened so far in the backward that is running."""

    sync: bool
    in_graph: bool
    ready: set[str] = field(default_factory=set)
    next_bucket: int = 0
    flats: list[tuple[int, Tensor, list[str], set[str]]] = field(default_factory=list)
    works: dict[int, Handle] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    sent: set[str] = field(default_factory=set)  # by hooks: `.grad` is on its way


class Reducer:
    """Averages the gradients of one module over all ranks.

    Args:
        module: Whose parameters are trained.
        world: The ranks.
        config: Buckets and wire format.
        timeout_seconds: For agreements between ranks.
        report: Gets the plan.
        link: What the plan shall be best for; None for sizes by rule.

    Attributes:
        steps_early: Whether an optimizer of ours waits for gradients; see `comm.early_step`.
        pending: The gradients that it is to wait for.
        plan_key: Tells the plan from others, for what was compiled to follow it.
        loss_scale: Returns what the loss is multiplied with before a backward.
    """

    def __init__(
        self,
        module: nn.Module,
        world: World,
        config: CommConfig,
        timeout_seconds: float,
        report: Report,
        link: Link | None = None,
    ) -> None:
        self.ordinal = next(_ordinals)
        _reducers[self.ordinal] = self
        self.parameters = dict(module.named_parameters())
        self._module = module
        self.world, self.config, self.report = world, config, report
        self.sync = True
        self.hooks_only = False
        self.steps_early, self.pending = False, cast("Pending | None", None)
        self._timeout_seconds = timeout_seconds
        self._plans: dict[_Signature, CommPlan] = {}
        self.loss_scale: Callable[[], Scale] = lambda: 1.0
        self.compressor: Compressor | None = None
        self._link = link
        self._ready: dict[str, float] | None = None
        watched = link is not None and world.size > 1 and self._device().type == "cpu"
        self._profile = Profile() if watched and config.bucket_mib is None else None
        self._meter = Meter() if watched else None
        level = config.compression in LEVELS and config.trial and world.size > 1
        self._trial = Trial() if level else None
        self._memory = HostMemory()
        self._synchronised = 0
        self.outer: OuterLoop | None = None
        if config.outer_steps is not None and world.size > 1:
            self.outer = OuterLoop(module, world, config, report)
            self._trial = self._profile = self._meter = None  # these are about every step
            row = {"steps": config.outer_steps, "lr": config.outer_lr}
            row["momentum"] = config.outer_momentum
            report.add(PassRow("outer_loop", "run_time", row, 0.0))
        self._node_size = node_size(config, world, timeout_seconds, report)
        self._engines = copy_engines(config, world, self._device(), timeout_seconds)
        self._autocast = (False, "")
        self._armed, self._counts = (True, False), True
        self._buffers_due, self._buffers_wait = True, False
        self._backward: _Backward | None = None
        self._proven = False
        self._flag_cache: dict[tuple[int, tuple[str, ...]], Tensor] = {}
        self._exact: dict[str, ExactBuckets] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._structure = _Structure(module)
        self.refresh()

    def close(self) -> None:
        """Take the hooks off the parameters: their gradients are the user's own again."""
        pending, self.steps_early = self.pending, False
        try:
            self.arrive()
        except Exception:  # of a job that has failed, as it has said already
            logger.warning("gradients that were on their way are lost", exc_info=True)
            if pending is not None:
                pending.drop()
            self.pending = None
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    # -- the plan ------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Make and agree on the plan for the parameters that are trainable now."""
        signature = self._trainable()
        if signature not in self._plans:
            self._plans[signature] = self._agreed(self._new_plan())
        self._signature, self.plan = signature, self._plans[signature]
        self.plan_key = self.plan.fingerprint()
        self._make_compressor()
        self.planned = frozenset(s.name for b in self.plan.buckets for s in b.slots)
        for name in self.planned - self._hooks.keys() if self.world.size > 1 else ():
            parameter = self.parameters[name]
            self._hooks[name] = parameter.register_post_accumulate_grad_hook(self._hook_for(name))

    def _take_over_anew(self) -> None:
        """Go on with the parameters that the module has now, as if it were prepared again."""
        named = dict(self._module.named_parameters())
        self._structure = _Structure(self._module)
        if {n: id(p) for n, p in named.items()} == {n: id(p) for n, p in self.parameters.items()}:
            return
        if self.outer is not None or self.steps_early:
            raise MagiError(
                "parameters of the model were replaced or added since it was prepared, which "
                "CommConfig.outer_steps and early_step do not follow; prepare it again"
            )
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self.parameters, self._plans, self._exact = named, {}, {}
        self._flag_cache.clear()  # by the identity of buckets
        self._memory.forget()
        self.report.note("parameters of the model were replaced or added: rank 0's are taken again")
        self.refresh()
        self.broadcast_state()

    def _new_plan(self) -> CommPlan:
        named, size = self.parameters.items(), self.world.size
        nodes = self._node_size
        return plan_buckets(named, self.config, size, self._link, self._ready, nodes)

    def _agreed(self, plan: CommPlan) -> CommPlan:
        trainable = sum(p.requires_grad for p in self.parameters.values())
        self.world.agree(
            "communication plan",
            {"fingerprint": plan.fingerprint(), "trainable": trainable},
            self._timeout_seconds,
        )
        row = _summary(plan, self._link, self._ready)
        self.report.add(PassRow("communication_plan", "run_time", row, 0.0))
        return plan

    def pin_plan(self) -> None:
        """Keep the buckets of the plan as they are: something was made for them."""
        self._profile = None

    def _plan_anew(self) -> None:
        """Once enough was seen of when gradients appear, agree on buckets for that."""
        profile = self._profile
        if profile is None or self._link is None:
            return
        profile.end()
        if not profile.done:
            return
        self._profile = None
        mine = profile.ready()
        answers = self.world.gather("when gradients appear", mine, self._timeout_seconds)
        names = {name for answer in answers for name in answer}
        ready = {n: max(answer.get(n, 0.0) for answer in answers) for n in sorted(names)}
        before, self._ready = predict(self.plan.buckets, self._link, ready), ready
        plan = self._new_plan()
        gain = before - predict(plan.buckets, self._link, ready)
        if gain <= LEAST_GAIN * max(ready.values(), default=0.0):
            self.report.note(
                f"the first communication plan stays: another would save {1e3 * gain:.1f} ms of "
                f"{1e3 * before:.1f} ms exposed, as predicted"
            )
            return
        self._plans = {self._signature: self._agreed(plan)}
        self._flag_cache.clear()  # by the identity of buckets
        self._memory.forget()  # buckets of other sizes
        if self._meter is not None:
            self._meter.forget()
        self.refresh()

    def _make_compressor(self) -> None:
        """Make the codecs of the plan; what those of another plan kept goes on in them."""
        before = self.compressor
        if self.world.size == 1 or (before is not None and before.plan is self.plan):
            return
        self.compressor = Compressor(self.plan, self.world, self._device(), self._engines)
        self.compressor.know(self._exact.setdefault(self.plan_key, self.compressor.exact))
        self._follow_trial(self.compressor)
        if before is not None and before.stateful:
            self.compressor.load(before.state())

    def _trainable(self) -> _Signature:
        """Return what a plan depends on: `Module.to` gives the same parameters another dtype."""
        return tuple((p.requires_grad, p.dtype) for p in self.parameters.values())

    def broadcast_state(self) -> None:
        """Give every rank the parameters and buffers of rank 0."""
        broadcast(self.world, [p.detach() for p in self.parameters.values()] + self._buffers())

    def _buffers(self) -> list[Tensor]:
        """Return the buffers as they are now: a forward may assign new ones."""
        return [b for _, b in self._module.named_buffers()]

    # -- one backward --------------------------------------------------------------------------

    def begin(self, in_graph: bool) -> None:
        """Note, at a forward with gradients, how its backward reduces.

        Args:
            in_graph: The forward is a captured graph whose backward launches the buckets.
        """
        if self.world.size == 1:
            return
        self.arrive()
        self.world.check()
        if World.current() is not self.world:
            raise MagiError(
                "the process group that this model was prepared for is gone; prepare it again"
            )
        self._go_on_after_error()
        if self._structure.changed():
            self._take_over_anew()
        if self._trainable() != self._signature:
            self.exchange_weights()  # what is frozen now has been trained
            self.refresh()
        if self.outer is not None:
            assert self.compressor is not None
            self.outer.begin(self.compressor)
        self._counts = self.sync
        sends = self.sync and self.outer is None
        in_graph &= not self.hooks_only and not any(map(compat.is_hooked, self.parameters.values()))
        self._armed = (sends, in_graph)
        device = self._device().type
        enabled = self.config.compression == "safe" and torch.is_autocast_enabled(device)
        self._autocast = (enabled, str(torch.get_autocast_dtype(device)) if enabled else "")
        self._take_written_buffers()

    def _go_on_after_error(self) -> None:
        """Leave a backward that raised before its end, and whose error was caught.

        Gradients of micro-batches before it are lost with it. The buckets it sent must have
        partners: ranks that sent different numbers of them would from now on add up different
        parameters.

        Raises:
            MagiError: Other ranks have sent more, or fewer.
        """
        state, self._backward = self._backward, None
        if state is None or not state.sync:
            return
        sent = len(state.flats)
        answers = self.world.gather_after_error(sent, self._timeout_seconds)
        if any(answer != sent for answer in answers):
            raise MagiError(
                "the last backward ended with an error that was caught, at another place on each "
                f"rank: ranks had sent {answers} of {len(self.plan.buckets)} buckets of gradients, "
                "and what they send next would be added to the wrong ones; let the error end the "
                "program, or let it come before the backward"
            )
        for handle in state.works.values():
            handle.wait()
        if self.compressor is not None:
            self.compressor.forget()

    def _take_written_buffers(self) -> None:
        """Take rank 0's buffers at the first forward of a step: the program may have written them.

        Only in training, so that one rank may run the model alone. Not before a second forward
        whose backward is still to come: what the first one saved would be overwritten.
        """
        if self._buffers_due and self._module.training and self.outer is None:  # it exchanges them
            self.take_buffers()
            self._buffers_due = False

    def take_buffers(self) -> None:
        """Take rank 0's buffers, unless the settings say that they are each rank's own."""
        if self.config.broadcast_buffers and self.world.size > 1:  # to look for them takes time
            broadcast(self.world, self._buffers())

    @contextlib.contextmanager
    def one_step(self) -> Iterator[None]:
        """Count the backwards in this context as one step: buffers are taken behind the last one.

        A forward before the first of them may have saved a buffer for a backward after it.
        """
        before, self._buffers_wait = self._synchronised, True
        try:
            yield
        finally:
            self._buffers_wait = False
        if self._synchronised != before:
            self._share_buffers()

    def _share_buffers(self) -> None:
        """Take rank 0's buffers behind a backward; until the next forward they may be written."""
        self.take_buffers()
        self._buffers_due = True

    def launch(self, index: int, grads: list[Tensor], names: list[str]) -> Tensor:
        """Pack `grads` into bucket `index` and, on a synchronising backward, start its all-reduce.

        Args:
            index: Bucket in the plan.
            grads: One gradient for each of `names`, shaped as its parameter; a lower precision
                than the parameter's is converted while packing.
            names: Parameters that have a gradient; the others of the bucket count as unused.

        Returns:
            The bucket's flat tensor, `[bucket.numel]`. Its content is final after `wait`.
        """
        state = self._state()
        bucket = self.plan.buckets[index]
        flat = self._new_flat(bucket)
        reduce_now = state.sync and state.in_graph
        for name, grad in zip(names, grads, strict=True) if state.in_graph else ():
            self._see(name, grad)
        with torch.no_grad():
            gradients = dict(zip(names, grads, strict=True))
            if reduce_now:
                packed = self._new_packed(index, flat)
                used = self._pack(packed, index, gradients, state.folded, self._factor(index))
                self._start(state, index, flat, used, packed)
            else:
                used = self._pack(flat, index, gradients, None)
        state.flats.append((index, flat, list(names), used))
        return flat

    def wait(self, index: int, flat: Tensor) -> None:
        """Wait until `flat`, which `launch` returned, holds the averages."""
        if self._backward is None or flat.data_ptr() not in self._backward.works:
            return
        wait = self._backward.works.pop(flat.data_ptr()).wait
        wait() if self._meter is None else self._meter.wait(wait)

    def _state(self) -> _Backward:
        if self._backward is None:
            self.arrive()
            stays = self._armed[1] or self.outer is not None
            if not stays and self._trainable() != self._signature:
                self.refresh()  # toggled since the forward; a graph keeps the plan it has
            self._backward = _Backward(*self._armed)
            compat.queue_backward_callback(self._finish)
        return self._backward

    def _pack(
        self,
        flat: Tensor,
        index: int,
        grads: dict[str, Tensor],
        folded: dict[str, Tensor] | None,
        factor: float = 1.0,
    ) -> set[str]:
        """Fill `flat` for bucket `index`; return the parameters that this rank has a gradient of.

        With `folded`, what earlier backwards left in `.grad` is added, and kept there by name.
        All of it is multiplied by `factor` on its way.
        """
        bucket = self.plan.buckets[index]
        views, values, used = [], [], set(grads)
        for slot in bucket.slots:
            view = slot.view(flat)
            old = None if folded is None else self.parameters[slot.name].grad
            if slot.name in grads:
                views.append(view)
                values.append(grads[slot.name])
            elif old is not None:
                torch.mul(old, factor, out=view)
                used.add(slot.name)
            else:
                view.zero_()
        if factor != 1.0 and all(v.dtype is flat.dtype for v in values):
            for view, value in zip(views, values, strict=True):
                torch.mul(value, factor, out=view)
        elif views:
            torch._foreach_copy_(views, values)
            for view in views if factor != 1.0 else ():  # a product of halves would be a half
                view.mul_(factor)
        for slot in bucket.slots if folded is not None else ():
            p = self.parameters[slot.name]
            if folded is not None and slot.name in grads and p.grad is not None:
                slot.view(flat).add_(p.grad, alpha=factor)
                folded[slot.name], p.grad = p.grad, None
        flat[bucket.flags_offset :].copy_(self._flags(bucket, used))
        return used

    def _flags(self, bucket: Bucket, used: set[str]) -> Tensor:
        pattern = tuple(s.name for s in bucket.slots if s.name in used)
        key = (id(bucket), pattern)
        if key not in self._flag_cache:
            values = [1.0 if s.name in used else 0.0 for s in bucket.slots]
            self._flag_cache[key] = torch.tensor(
                values, dtype=bucket.torch_dtype(), device=self._device()
            )
        return self._flag_cache[key]

    def _new_flat(self, bucket: Bucket) -> Tensor:
        """Return memory for a bucket, with zeros between slots where all of it is looked at."""
        flat = self._memory.empty(bucket.numel, dtype=bucket.torch_dtype(), device=self._device())
        if self.compressor is not None and self.compressor.stateful:
            ends = [*(s.offset for s in bucket.slots[1:]), bucket.flags_offset]
            for slot, end in zip(bucket.slots, ends, strict=True):
                flat[slot.offset + slot.numel() : end].zero_()
        return flat

    def _new_packed(self, index: int, flat: Tensor) -> Tensor:
        """Return what the gradients of a bucket are packed into: what travels, where that is known.

        Gradients that a captured backward made in bfloat16 then reach the wire in one copy. What
        earlier backwards left is added in float32, so it is packed in `flat`, as without this.
        """
        assert self.compressor is not None, "nothing is reduced on one rank"
        dtype = self.compressor.wire_dtype(index, self._autocast)
        slots = self.plan.buckets[index].slots
        if dtype is flat.dtype or self.compressor.stateful:  # which looks at all of a bucket
            return flat
        if any(self.parameters[s.name].grad is not None for s in slots):
            return flat
        return torch.empty_like(flat, dtype=dtype)

    def _see(self, name: str, gradient: Tensor) -> None:
        if self.compressor is None or self.outer is not None:
            return
        if self.compressor.exact.undecided(self._autocast):
            self.compressor.exact.see(self._autocast, name, gradient)

    def _start(
        self,
        state: _Backward,
        index: int,
        flat: Tensor,
        used: set[str],
        packed: Tensor | None = None,
    ) -> None:
        assert self.compressor is not None, "nothing is reduced on one rank"
        scale = self.loss_scale() if self.compressor.stateful else 1.0
        handle = self.compressor.start(index, flat, used, scale, self._autocast, packed)
        state.works[flat.data_ptr()] = handle

    def _factor(self, index: int) -> float:
        assert self.compressor is not None, "nothing is reduced on one rank"
        return self.compressor.factor(index, self._autocast)

    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    # -- hooks: REGION, EAGER, and whatever the graph does not cover -----------------------------

    def _hook_for(self, name: str) -> Callable[[Tensor], None]:
        self_ref = weakref.ref(self)

        @compat.untraced
        def hook(_: Tensor) -> None:
            reducer = self_ref()
            if reducer is not None:
                reducer._accumulated(name)

        return hook

    def _accumulated(self, name: str) -> None:
        state = self._state()
        if name in state.sent:
            raise MagiError(
                f"{name} got a second gradient in one backward after the first was sent; does a "
                "reentrant checkpoint use it twice? Use checkpoint(use_reentrant=False)"
            )
        state.ready.add(name)
        if self._profile is not None and state.sync:
            self._profile.mark(name)
        state.folded.pop(name, None)  # it is in the bucket, and will not be needed again
        grad = self.parameters[name].grad
        if grad is not None and not state.in_graph:
            self._see(name, grad)
        if not state.sync or state.in_graph or name not in self.planned:
            return
        buckets = self.plan.buckets
        while state.next_bucket < len(buckets) and all(
            s.name in state.ready for s in buckets[state.next_bucket].slots
        ):
            self._launch_from_grads(state)

    def _launch_from_grads(self, state: _Backward) -> None:
        index = state.next_bucket
        state.next_bucket += 1
        bucket = self.plan.buckets[index]
        grads = {s.name: g for s in bucket.slots if (g := self.parameters[s.name].grad) is not None}
        for name, g in grads.items():
            if g.is_sparse:
                raise MagiError(
                    f"the gradient of {name} is sparse; magi-train reduces dense gradients only: "
                    "use Embedding(sparse=False)"
                )
        flat = self._new_flat(bucket)
        with torch.no_grad():
            used = self._pack(flat, index, grads, None, self._factor(index))
        for slot in bucket.slots:  # frees what the backward made: the next gradient takes its place
            if slot.name in used:
                self.parameters[slot.name].grad = slot.view(flat)
        state.sent |= used
        self._start(state, index, flat, used)
        state.flats.append((index, flat, list(grads), used))

    @compat.untraced
    def _finish(self) -> None:
        """End of a backward: see the head of this module, point 4."""
        state = self._backward
        self._armed = (self._armed[0], False)  # a backward without a new forward goes by hooks
        if state is None or not state.sync:
            if self.outer is not None and self._counts and state is not None and state.ready:
                self.outer.count()
            self._backward = None
            return
        try:
            if state.in_graph and not state.ready:
                self._restore(state)
                return
            irregular = self._irregular(state) if state.in_graph else None
            if irregular and self._proven:
                raise UnreducedGradientError(
                    f"{irregular}. The first step had no such gradient, so ranks are reducing "
                    "inside the graph; use Config(tier='region'), or put the whole loss into the "
                    "captured function (prepare_step)"
                )
            if self._leave(state):
                return
            self._complete(state)
            if not self._proven and self._prove(irregular):
                if self.compressor is not None:  # it saw the part of gradients in the graph
                    self.compressor.exact.forget(self._autocast)
                self._settle()
                self._backward = state = _Backward(sync=True, in_graph=False)
                self._complete(state)
            self._settle()
            self._end_step()
        except BaseException as error:
            self.world.fail(error)
            raise
        finally:
            self._backward = None

    def _leave(self, state: _Backward) -> bool:
        """Let gradients arrive after the backward, for an early step; return whether they do.

        Not while anything is measured, chosen or agreed on at the end of backwards.
        """
        if not self.steps_early or not self._proven:
            return False
        if state.in_graph:
            self.steps_early = False
            self.report.note(
                "CommConfig.early_step changes nothing: the captured graph waits for gradients; "
                "use Config(tier='region') or 'eager'"
            )
            return False
        undecided = self.compressor is None or self.compressor.exact.undecided(self._autocast)
        trying = self._trial is not None and not self._trial.done
        if undecided or trying or self._profile is not None or self._ends_with_collectives():
            return False
        self._launch_rest(state)
        if any(len(used) < len(self.plan.buckets[i].slots) for i, _, _, used in state.flats):
            return False  # whether others use it is known at the end
        pending = Pending(self._arrived, self._wait_late)
        for index, flat, *_ in state.flats:
            slots = self.plan.buckets[index].slots
            gradients = [(self.parameters[s.name], s.view(flat)) for s in slots]
            pending.add(state.works.pop(flat.data_ptr()), gradients)
        self.pending = pending
        return True

    def _ends_with_collectives(self) -> bool:
        if self.config.check_replicas is not None:
            return True
        return self.config.broadcast_buffers and any(True for _ in self._module.buffers())

    def _wait_late(self, wait: Callable[[], None]) -> None:
        try:
            wait() if self._meter is None else self._meter.wait(wait)
        except BaseException as error:
            self.world.fail(error)
            raise

    def _arrived(self) -> None:
        """End of a backward whose gradients arrived after it."""
        self.pending = None
        self._settle()
        self._end_step()

    def step_early(self, optimizer: Optimizer, refused: str) -> None:
        """Let an optimizer's step begin with the gradients that have arrived, unless `refused`.

        Any optimizer may step on gradients that are on their way: those without this class wait.
        """
        if not refused:
            refused = self._why_not_early()
        me = weakref.ref(self)

        def pending() -> Pending | None:
            reducer = me()
            return None if reducer is None else reducer.pending

        self.steps_early |= step_early(optimizer, pending, self.report, refused)

    def _why_not_early(self) -> str:
        if self.world.size == 1:
            return "there is one rank"
        if self._device().type != "cpu":
            return "on a GPU streams wait for gradients, the host does not"
        if self.config.check_replicas is not None:
            return "a backward ends with a look at all weights; set CommConfig.check_replicas=None"
        if self._ends_with_collectives():
            return (
                "a backward ends with the broadcast of the module's buffers; set "
                "CommConfig.broadcast_buffers=False if they are alike on all ranks"
            )
        return ""

    def arrive(self) -> None:
        """Wait for the gradients that are still on their way, if there are any."""
        if self.pending is not None:
            self.pending.arrive()

    def _end_step(self) -> None:
        """What a synchronised backward does when its gradients are there; collectives."""
        if not self._buffers_wait:
            self._share_buffers()
        if self._meter is not None:
            self.report.measured |= self._meter.end()
        self._memory.end_round()
        self._synchronised += 1
        every = self.config.check_replicas
        if every is not None and self._synchronised % every == 0:
            replicas.compare(self.parameters, self.world, self._device())
        self._try_codec()
        self._plan_anew()

    def _try_codec(self) -> None:
        """Let the codec of a level take turns with more exact forms, and choose in the end."""
        trial = self._trial
        if trial is None or trial.done or self.compressor is None or not self.compressor.stateful:
            return
        if trial.step():
            answers = self.world.gather("the codec's gain", trial.medians(), self._timeout_seconds)
            worst = {form: round(1e3 * s, 3) for form, s in trial.choose(answers).items()}
            codecs = [c for c in self.plan.codecs() if c in STATEFUL]
            chosen = codecs[0] if trial.form == CODEC else trial.form
            row = {"codec": codecs[0], "milliseconds": worst, "chosen": chosen}
            self.report.add(PassRow("codec_trial", "run_time", row, 0.0))
        self._follow_trial(self.compressor)

    def _follow_trial(self, compressor: Compressor) -> None:
        """Let `compressor` send what the trial says; once another form is chosen, for good."""
        trial = self._trial
        instead = None if trial is None else FORMS[trial.form]
        if trial is not None and trial.done and instead is not None:
            compressor.drop(instead)
        else:
            compressor.instead = instead

    def _restore(self, state: _Backward) -> None:
        """After torch.autograd.grad, which accumulates nothing: leave every `.grad` as it was."""
        for index, flat, *_ in state.flats:
            self.wait(index, flat)
        if self.compressor is not None:
            self.compressor.forget()
        for name, grad in state.folded.items():
            self.parameters[name].grad = grad

    def _complete(self, state: _Backward) -> None:
        """Launch the buckets that are left, wait for all, and fill in `.grad`."""
        self._launch_rest(state)
        self._collect(state)

    def _launch_rest(self, state: _Backward) -> None:
        while not state.in_graph and state.next_bucket < len(self.plan.buckets):
            self._launch_from_grads(state)

    def _settle(self) -> None:
        """Let what the codecs kept count, and agree on what is safe to shorten, if that is due."""
        if self.compressor is None:
            return
        self.compressor.settle()
        exact, autocast = self.compressor.exact, self._autocast
        if exact.undecided(autocast):
            question = f"gradients that bfloat16 holds exactly, autocast {autocast}"
            mine = exact.mine(autocast)
            answers = self.world.gather(question, mine, self._timeout_seconds)
            chosen = exact.choose(autocast, answers)
            if chosen:
                self.compressor.open_lanes()
            row = {"autocast": autocast[1] or "off", "bfloat16_buckets": chosen}
            self.report.add(PassRow("safe_compression", "run_time", row, 0.0))

    def compression_state(self) -> dict[str, dict[str, Tensor]]:
        """Return what codecs and the outer loop keep, by parameter; see Compressor.state."""
        if self.compressor is None:
            return {}
        self.arrive()
        self.exchange_weights()
        found = self.compressor.state()
        for name, momentum in ({} if self.outer is None else self.outer.state()).items():
            found.setdefault(name, {})[MOMENTUM] = momentum
        return found

    def exchange_weights(self) -> None:
        """Make the outer step of an outer loop now, if there is one; a collective."""
        if self.outer is not None and self.compressor is not None:
            self.outer.exchange(self.compressor)

    def load_compression_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go on from what `compression_state` returned."""
        self.arrive()
        if self.compressor is not None:
            self.compressor.load(state)
        if self.outer is not None:
            self.outer.load({n: kept[MOMENTUM] for n, kept in state.items() if MOMENTUM in kept})

    def _prove(self, irregular: str | None) -> str | None:
        """Agree, once, whether in-graph reduction covers everything; return why it does not."""
        self._proven = True
        answers = self.world.gather("reduced exactly once", irregular, self._timeout_seconds)
        reasons = [f"on rank {r}, {a}" for r, a in enumerate(answers) if a]
        if not reasons:
            return None
        self.hooks_only = True
        self.report.tier, self.report.reason = "region", reasons[0]
        logger.warning("magi-train reduces from hooks: %s", reasons[0])
        return reasons[0]

    def _irregular(self, state: _Backward) -> str | None:
        """Return which gradient is not the in-graph average, or None."""
        launched = [index for index, *_ in state.flats]
        if launched != list(range(len(self.plan.buckets))):
            return f"the backward graphs launched buckets {launched}, not each once in order"
        for index, flat, names, _ in state.flats:
            outside = [s.name for s in self.plan.buckets[index].slots if s.name in state.ready]
            outside = [name for name in outside if name not in names]
            if outside:
                return f"{outside[0]} got a gradient from outside the captured graph"
            slots = {s.name: s for s in self.plan.buckets[index].slots}
            for name in names:
                grad, slot = self.parameters[name].grad, slots[name]
                want = flat.data_ptr() + slot.offset * flat.element_size()
                if grad is None or grad.data_ptr() == want:
                    continue
                # autograd copies a gradient that somebody else holds: a debugger, a profiler
                if not torch.allclose(grad, slot.view(flat), rtol=0, atol=0, equal_nan=True):
                    return f"{name} got a gradient from outside the captured graph"
        return None

    def _collect(self, state: _Backward) -> None:
        """Wait for what is left and put the averages into `.grad` where the graph did not."""
        for index, flat, names, used in state.flats:
            self.wait(index, flat)
            bucket = self.plan.buckets[index]
            flags: list[float] | None = None
            for i, slot in enumerate(bucket.slots):
                if state.in_graph and (slot.name in names or slot.name in state.ready):
                    continue  # the graph gave it, or it is local still and reduced again
                if slot.name not in used:
                    if flags is None:  # a device synchronisation, only where something is unused
                        flags = flat[bucket.flags_offset :].tolist()
                    if flags[i] == 0:
                        continue
                self.parameters[slot.name].grad = slot.view(flat)


class _Structure:
    """The submodules and parameters of a module, to see quickly whether they are still the same."""

    def __init__(self, module: nn.Module) -> None:
        self._dicts = [d for m in module.modules() for d in (m._modules, m._parameters)]
        self._held = self._now()

    def _now(self) -> list[object]:
        return list(
            itertools.chain.from_iterable(map(operator.methodcaller("values"), self._dicts))
        )

    def changed(self) -> bool:
        """Return whether one was added, removed or replaced; 0.1 ms for 250 modules."""
        now = self._now()
        return len(now) != len(self._held) or not all(map(operator.is_, now, self._held))


def _summary(
    plan: CommPlan, link: Link | None, ready: dict[str, float] | None
) -> dict[str, object]:
    row: dict[str, object] = {
        "buckets": len(plan.buckets),
        "wire_bytes": plan.wire_bytes(),
        "parameters_by_codec": plan.codecs(),
        "world_size": plan.world_size,
        "fingerprint": plan.fingerprint(),
    }
    if link is None or not plan.buckets:
        return row
    largest = max(b.flags_offset * b.torch_dtype().itemsize for b in plan.buckets)
    row["largest_bucket_bytes"] = largest
    row["backward"] = "assumed" if ready is None else "measured"
    row["predicted_exposed_ms"] = round(1e3 * predict(plan.buckets, link, ready), 3)
    return row
