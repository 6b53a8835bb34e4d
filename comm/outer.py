"""The outer loop: ranks train alone for some steps, then one exchange brings them together.

For links so slow that even compressed gradients of every step do not fit. No gradient is sent;
after H local steps every rank gives how far its weights have come, and all take one outer step:

    delta = mean over ranks of (weights H steps ago - weights now)     in the buckets and codec of
    momentum = outer_momentum * momentum + delta                       CommConfig.compression
    weights = weights H steps ago - outer_lr * (delta + outer_momentum * momentum)

Then all ranks hold the same weights, bit for bit. The inner optimizer keeps its state, of each rank
its own. It is another algorithm than data-parallel training, so it is never chosen, only asked for.

* A step is a backward outside of `no_sync`. The exchange happens at the first forward with
  gradients after H steps, when the optimizer has used the last gradients, or in `exchange`.
* The weights at that forward, or at the first after loading a state, are those the next H steps
  are measured from. So what the user does to weights between `exchange` and it counts for nothing.
* If the mean of the ways is not finite (one rank diverged), all ranks go back to the weights of H
  steps ago, and momentum and residuals stay as they were; a note in the report counts these.
* Buffers are rank 0's after an exchange. Every rank must take the same number of steps: a rank
  that waits for one that ended raises RemoteRankError.

Source: Douillard et al. (2023), DiLoCo (arXiv:2311.08105), with its outer Nesterov SGD.
Differs: what travels may be compressed with error feedback, and a way that is not finite is not
taken.
"""

import weakref

import torch
from torch import Tensor, nn

from magi_train.comm.broadcast import broadcast
from magi_train.comm.codecs.compressor import Compressor
from magi_train.comm.host_memory import HostMemory
from magi_train.comm.plan import CommPlan
from magi_train.core.config import CommConfig
from magi_train.core.report import Report
from magi_train.core.world import World

MOMENTUM = "outer_momentum"
NO_AUTOCAST = (False, "")


class OuterLoop:
    """Counts local steps of one module, and makes the outer ones.

    Args:
        module: Whose parameters are trained.
        world: The ranks.
        config: With `outer_steps`.
        report: Gets notes.

    Attributes:
        steps: Local steps since the ranks' weights were equal.
    """

    def __init__(self, module: nn.Module, world: World, config: CommConfig, report: Report) -> None:
        self._module, self._world, self._config, self._report = module, world, config, report
        self._parameters = dict(module.named_parameters())
        self._momentum: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._memory = HostMemory()
        self._refused = 0
        self.steps = 0
        mine = weakref.ref(self)

        def loaded(*_: object) -> None:  # weights that were loaded are no way that was trained
            loop = mine()
            if loop is not None:
                loop.steps = 0

        module.register_load_state_dict_post_hook(loaded)

    def begin(self, compressor: Compressor) -> None:
        """At a forward with gradients: exchange if it is time, and note where a round begins."""
        assert self._config.outer_steps is not None
        if self.steps >= self._config.outer_steps:
            self.exchange(compressor)
        if self.steps == 0:
            self._note(compressor.plan)

    def count(self) -> None:
        """Note that a local step has its gradients."""
        self.steps += 1

    def _note(self, plan: CommPlan) -> None:
        """Copy the weights that the next steps are measured from."""
        names = [s.name for b in plan.buckets for s in b.slots]
        with torch.no_grad():
            for name in self._before.keys() - set(names):
                del self._before[name]
            for name in names:
                weight = self._parameters[name].detach()
                if name not in self._before:
                    self._before[name] = torch.empty_like(weight)
                self._before[name].copy_(weight)

    def exchange(self, compressor: Compressor) -> None:
        """Make the outer step now, of whatever steps were taken; a collective. Nothing after none.

        Args:
            compressor: Whose plan is of the parameters that train.
        """
        if self.steps == 0:
            return
        self.steps = 0
        with torch.no_grad():
            flats = [
                self._start(index, compressor) for index in range(len(compressor.plan.buckets))
            ]
            finite = all([bool(flat.isfinite().all()) for flat in flats])
            compressor.settle()
            self._memory.end_round()
            for bucket, flat in zip(compressor.plan.buckets, flats, strict=True):
                for slot in bucket.slots:
                    self._step(slot.name, slot.view(flat) if finite else None)
        if not finite:
            self._refused += 1
            self._report.note(
                f"outer step {self._refused} of those that were not taken: the mean of the ranks' "
                "ways is not finite, so all ranks went back to where the round began"
            )
        if self._config.broadcast_buffers:
            broadcast(self._world, [b for _, b in self._module.named_buffers()])

    def _start(self, index: int, compressor: Compressor) -> Tensor:
        """Send one bucket of ways, and wait: nothing is left to hide it behind."""
        bucket = compressor.plan.buckets[index]
        device = self._parameters[bucket.slots[0].name].device
        flat = self._memory.empty(bucket.numel, dtype=bucket.torch_dtype(), device=device)
        flat.zero_()
        flat[bucket.flags_offset :] = 1
        factor = compressor.factor(index, NO_AUTOCAST)
        for slot in bucket.slots:
            way = self._before[slot.name] - self._parameters[slot.name].detach()
            slot.view(flat).copy_(way.mul_(factor))
        names = {s.name for s in bucket.slots}
        compressor.start(index, flat, names, 1.0, NO_AUTOCAST).wait()
        return flat

    def _step(self, name: str, delta: Tensor | None) -> None:
        weight, before = self._parameters[name], self._before[name]
        if delta is not None:
            factor = self._config.outer_momentum
            momentum = self._momentum.setdefault(name, torch.zeros_like(before))
            momentum.mul_(factor).add_(delta)
            before.sub_(delta.add(momentum, alpha=factor), alpha=self._config.outer_lr)
        weight.copy_(before)

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return the momentum by parameter, on the CPU; the same on all ranks."""
        return {name: m.detach().cpu().clone() for name, m in self._momentum.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned, and from the weights as they are.

        Raises:
            ValueError: A momentum does not have its parameter's shape; names it.
        """
        self.steps, self._momentum = 0, {}
        for name, momentum in state.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                continue
            if momentum.shape != parameter.shape:
                raise ValueError(
                    f"the outer momentum of {name} has shape {list(momentum.shape)}, the parameter "
                    f"{list(parameter.shape)}; load a state that was saved for this model"
                )
            self._momentum[name] = torch.empty_like(parameter.detach()).copy_(momentum)
