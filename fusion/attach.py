"""attach_gradients: an op that gives a scalar the gradients that were computed along with it.

The forward of a fused loss knows its gradients already. This op ties them to the inputs:

    out = loss,    d out / d inputs[i] = scale * gradients[i]

It is composite, so AOTAutograd traces through it: neither the forward nor the backward graph has a
node of it, only a copy of a scalar and one multiplication per input, which Inductor fuses with what
follows. In a graph before autograd it is one call of a `torch.ops` op, which keeps that graph
cacheable; a function of ours there would not be. `gradients` and `scale` are constants to autograd:
a second derivative is not defined.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_library = torch.library.Library("magi_train", "FRAGMENT")
_library.define(
    "attach_gradients(Tensor loss, Tensor scale, Tensor[] inputs, Tensor[] gradients) -> Tensor"
)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(scale, *tensors[count:])
        ctx.dtypes = [t.dtype for t in tensors[:count]]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale, *gradients = ctx.saved_tensors
        factor = upstream.to(scale.dtype) * scale
        # [] does not widen a tensor: generated code makes the product in float32 and rounds it to
        # what came, so a gradient of bfloat16 stays one, widened, as autocast's are
        scaled = [(g * factor).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, None, *scaled, *([None] * len(gradients))


def _attach_gradients(
    loss: Tensor, scale: Tensor, inputs: list[Tensor], gradients: list[Tensor]
) -> Tensor:
    return _Attach.apply(loss, scale, len(inputs), *inputs, *gradients)


_library.impl("attach_gradients", _attach_gradients, "CompositeImplicitAutograd")

attach_gradients = torch.ops.magi_train.attach_gradients.default
"""`(loss [], scale [], inputs, gradients) -> []`; each gradient has the shape of its input."""
