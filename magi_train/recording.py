"""Recording: one forward and its backward as two device graphs in one memory pool.

What is recorded is the compiled callable as a whole, autograd included: the forward runs it on
inputs of our own, the backward calls `torch.autograd.grad` on its outputs. So whatever the lowering
does inside (in-place epilogues of buffers, donated saved tensors) is in the graphs exactly once,
and saved tensors have the memory and the life that they have in a plain step: the backward reuses
what it has consumed, and the next forward overwrites the gradients. The idea is that of
`torch.cuda.make_graphed_callables`, which however assumes that nothing handed out outlives its use.

Inputs with a stable address (parameters, buffers, shadows) are read where they are; all others are
copied into inputs of the recording. What is handed out are new tensors over the recording's memory;
the use count of that memory tells whether anybody still holds one, whatever way it is held: a
variable, `.grad`, a saved tensor, a view. A `Slot` that was found alive is copied out from then on.

A backward may turn out not to fit: the graph is retained for a second backward, or other outputs
have gradients than before. It then computes its own forward again, from the inputs, the random
numbers and the buffers as they were, and goes on as a plain step does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from magi_train.core import compat
from magi_train.core.device_graphs import DeviceGraphs, Results
from magi_train.core.slots import Layout, RefusedError, Slot, is_small

GONE = (
    "Trying to backward through the graph a second time: its first backward was run without "
    "retain_graph=True, which freed what it needs"
)


class Recording:
    """One forward and backward of a compiled callable, recorded.

    Args:
        compiled: Takes tensors, returns tensors; has been called with these arguments before.
        args: Tensors, accepted by `refusal`.
        stable: Positions of arguments that stay where they are.
        written: Positions of arguments that a call writes.
        tangents: Layout of the gradient that each output got, by its position.
        device: That records.

    Attributes:
        stream: On which it may be replayed.
        dropped: Its memory is given back, or about to be: never replay it.
        bytes: Of its memory.
        renewals: Of the device, when it was made.

    Raises:
        RefusedError: The outputs cannot be handed out.
        Exception: The device could not capture it.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        args: Sequence[Tensor],
        stable: frozenset[int],
        written: Sequence[int],
        tangents: Mapping[int, Layout],
        device: DeviceGraphs,
    ) -> None:
        self.compiled, self.device, self.written = compiled, device, list(written)
        self.stream, self.dropped = device.stream(), False
        self._addresses = {i: args[i].data_ptr() for i in stable}
        self._copied = [i for i in range(len(args)) if i not in stable]
        self._inputs = [
            (a.detach() if i in stable else Layout.of(a).make()).requires_grad_(a.requires_grad)
            for i, a in enumerate(args)
        ]
        self._before = [Layout.of(args[i]).make() for i in written]
        self.leaves = [i for i, a in enumerate(args) if a.requires_grad]
        self._tangents = {i: layout.make() for i, layout in tangents.items()}
        self._live: list[Any] = []  # outputs with their autograd graph, from forward to backward
        held = device.reserved()
        results, self._replay_forward = device.capture(self._forward)
        self._constants = {i: x for i, x in enumerate(self._live) if not isinstance(x, Tensor)}
        self._returned = {
            i: position
            for i, x in enumerate(self._live)
            for position, given in enumerate(self._inputs)
            if x is given
        }
        self.differentiable = [isinstance(x, Tensor) and x.requires_grad for x in self._live]
        self.saved_inputs, self.saved_outputs = self._saved(results)
        self.outputs = self._output_slots(results)
        gradients, self._replay_backward = device.capture(self._backward)
        self.gradients = self._gradient_slots(gradients)
        self.bytes, self.renewals = device.reserved() - held, device.renewals()
        self._live = []
        del results, gradients
        for slot in self.slots():
            slot.rest()

    # -- what is recorded ------------------------------------------------------------------------

    def _forward(self) -> Results:
        pairs = [(b, self._inputs[i]) for b, i in zip(self._before, self.written, strict=True)]
        for dtype in {b.dtype for b in self._before}:  # a mixed list would be copied one by one
            same = [(b, x) for b, x in pairs if b.dtype is dtype]
            torch._foreach_copy_([b for b, _ in same], [x for _, x in same])
        with torch.enable_grad():
            self._live = list(self.compiled(*self._inputs))
        mine = {id(x) for x in self._inputs}  # `self.steps += 1` in a model returns the buffer
        return [
            x.detach() if isinstance(x, Tensor) and id(x) not in mine else None for x in self._live
        ]

    def _backward(self) -> Results:
        # the loop calls backward() outside of autocast
        with torch.enable_grad(), torch.autocast(self.device.device.type, enabled=False):
            found = torch.autograd.grad(
                [self._live[i] for i in self._tangents],
                [self._inputs[i] for i in self.leaves],
                list(self._tangents.values()),
                allow_unused=True,
            )
        self._live = []
        return list(found)

    def _saved(self, results: Results) -> tuple[list[int], list[int]]:
        """Return which inputs and outputs the backward reads: they must not change before it."""
        saved: set[int] = set()
        nodes = [x.grad_fn for x in self._live if isinstance(x, Tensor)]
        seen: set[Any] = set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            tensors = getattr(node, "saved_tensors", ())  # of functions written in Python
            saved |= {t.untyped_storage().data_ptr() for t in tensors if t is not None}
            nodes += [following for following, _ in node.next_functions]
        inputs = [i for i in self._addresses if _memory(self._inputs[i]) in saved]
        return inputs, [i for i, x in enumerate(results) if x is not None and _memory(x) in saved]

    def _output_slots(self, results: Results) -> list[Slot | None]:
        taken = {_memory(x) for x in self._inputs}
        for position, x in enumerate(results):
            if x is None:
                continue
            if type(x) is not Tensor or x.device != self.device.device:
                raise RefusedError(f"output {position} is a {type(x).__name__} on {x.device}")
            if x.numel() and _memory(x) in taken:
                raise RefusedError(f"output {position} shares its memory with another tensor")
            taken.add(_memory(x))
        return [None if x is None else Slot(x, is_small(x)) for x in results]

    def _gradient_slots(self, gradients: Results) -> list[Slot | None]:
        """Two gradients, or one and a tangent, may be one memory: autograd would add into both."""
        taken = {_memory(x) for x in (*self._inputs, *self._tangents.values())}
        slots: list[Slot | None] = []
        for g in gradients:
            slots.append(None if g is None else Slot(g.detach(), _memory(g) in taken))
            if g is not None:
                taken.add(_memory(g))
        return slots

    # -- what is replayed ------------------------------------------------------------------------

    def slots(self) -> list[Slot]:
        """Return the memory that is handed out."""
        return [slot for slot in (*self.outputs, *self.gradients) if slot is not None]

    def reads_output(self, position: int) -> bool:
        """Return whether the backward reads the very memory that is handed out for an output."""
        slot = self.outputs[position]
        return position in self.saved_outputs and slot is not None and not slot.copied

    def moved(self, args: Sequence[Tensor]) -> bool:
        """Return whether something with a stable address lies elsewhere now."""
        return any(args[i].data_ptr() != address for i, address in self._addresses.items())

    def run(self, args: Sequence[Tensor]) -> tuple[tuple[Any, ...], Call]:
        """Replay the forward; return its outputs, and what the backward will need."""
        call = Call(self, args)
        computed = iter(_Replayed.apply(call, *(args[i] for i in self.leaves)))
        outputs = []
        for i, slot in enumerate(self.outputs):
            if slot is not None:
                outputs.append(next(computed))
            else:
                outputs.append(args[self._returned[i]] if i in self._returned
                               else self._constants[i])  # fmt: skip
        return tuple(outputs), call

    def forward(self, args: Sequence[Tensor]) -> list[Tensor]:
        """Replay the forward."""
        for i in self._copied:
            self._inputs[i].detach().copy_(args[i], non_blocking=True)
        self._replay_forward()
        if self.written:
            torch.autograd.graph.increment_version([args[i] for i in self.written])
        return [
            slot.tensor.clone() if slot.copied else _alias(slot.tensor)
            for slot in self.outputs
            if slot is not None
        ]

    def fits(self, tangents: Sequence[Tensor | None]) -> bool:
        """Return whether the recorded backward takes these gradients of the outputs."""
        return all(t is None or i in self._tangents for i, t in self.positioned(tangents))

    def positioned(self, tangents: Sequence[Tensor | None]) -> Iterable[tuple[int, Tensor | None]]:
        """Yield each gradient with the position of its output."""
        positions = (i for i, slot in enumerate(self.outputs) if slot is not None)
        return zip(positions, tangents, strict=True)

    def backward(self, args: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Results:
        """Replay the backward; return the gradient of each leaf."""
        for i, given in self.positioned(tangents):
            if i in self._tangents:
                static = self._tangents[i]
                static.zero_() if given is None else static.copy_(given, non_blocking=True)
        self._replay_backward()
        given_out: Results = []
        copies: tuple[list[Tensor], list[Tensor]] = [], []
        for slot, i in zip(self.gradients, self.leaves, strict=True):
            if slot is None:
                given_out.append(None)
                continue
            leaf = args[i]
            # what is added into a gradient that exists is not kept
            if slot.copied and not (leaf.is_leaf and leaf.grad is not None):
                copy = torch.empty_like(slot.tensor)
                given_out.append(copy)
                copies[0].append(copy)
                copies[1].append(slot.tensor)
            else:
                given_out.append(slot.tensor.detach())
        if copies[0]:
            torch._foreach_copy_(*copies)
        return given_out

    def again(self, state: Tensor) -> tuple[list[Any], list[Tensor]]:
        """Compute the last forward once more, plainly; return its outputs, and its leaves.

        It leaves no trace: buffers are copies of what they were before it.

        Args:
            state: The random numbers it began with.
        """
        inputs = [x.detach().clone() if i in self._copied else x.detach()
                  for i, x in enumerate(self._inputs)]  # fmt: skip
        for i, before in zip(self.written, self._before, strict=True):
            inputs[i] = before.clone()
        for i in self.leaves:
            inputs[i].requires_grad_()
        with self.device.randomly(state), torch.enable_grad():
            outputs = list(self.compiled(*inputs))
        return outputs, [inputs[i] for i in self.leaves]


class Call:
    """One replayed forward, until its backward.

    Attributes:
        done: Its memory is not needed any more.
    """

    def __init__(self, recording: Recording, args: Sequence[Tensor]) -> None:
        self.recording, self.done = recording, False
        self._args: Sequence[Tensor] | None = args
        self._state = recording.device.random_state()
        self._plain: tuple[list[Any], list[Tensor]] | None = None

    def saved_inputs(self) -> list[Tensor]:
        """Return the arguments that the backward reads."""
        return [] if self._args is None else [self._args[i] for i in self.recording.saved_inputs]

    def forward(self) -> list[Tensor]:
        """Replay."""
        assert self._args is not None
        return self.recording.forward(self._args)

    def backward(self, tangents: Sequence[Tensor | None]) -> Results:
        """Return the gradients of the leaves; replayed if that is right."""
        recording, kept = self.recording, compat.graph_is_retained()
        if self._plain is None and self._args is None:
            raise RuntimeError(GONE)
        if self._plain is None and (kept or not recording.fits(tangents)):
            self._plain = recording.again(self._state)
            self._args, self.done = None, True
        if self._plain is not None:
            outputs, leaves = self._plain
            given = [(outputs[i], t) for i, t in recording.positioned(tangents) if t is not None]
            with torch.enable_grad():
                found = torch.autograd.grad(
                    [output for output, _ in given], leaves, [t for _, t in given],
                    retain_graph=kept, allow_unused=True,
                )  # fmt: skip
            return list(found)
        assert self._args is not None
        gradients = recording.backward(self._args, tangents)
        self._args, self.done = None, True
        return gradients


class _Replayed(torch.autograd.Function):
    """The replay as autograd sees it. Saving what the backward reads makes it watch for writes."""

    @staticmethod
    def forward(ctx: Any, call: Call, *leaves: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs that are tensors."""
        recording = call.recording
        inputs = call.saved_inputs()
        outputs = call.forward()
        ctx.call = call
        by_position = dict(
            zip((i for i, s in enumerate(recording.outputs) if s is not None), outputs, strict=True)
        )
        watched = [x for i, x in by_position.items() if recording.reads_output(i)]
        ctx.save_for_backward(*inputs, *watched)
        ctx.mark_non_differentiable(
            *(x for i, x in by_position.items() if not recording.differentiable[i])
        )
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the leaves."""
        with contextlib.nullcontext(ctx.saved_tensors):  # raises where one was written
            return (None, *ctx.call.backward(tangents))


def is_replayed(node: Any) -> bool:
    """Return whether an autograd node is that of a replayed graph."""
    return type(node).__name__ == f"{_Replayed.__name__}Backward"


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _alias(tensor: Tensor) -> Tensor:
    """Return another tensor over the same memory that is no view, and counts its own versions."""
    new = tensor.new_empty(0)
    return new.set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
