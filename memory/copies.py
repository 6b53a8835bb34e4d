"""Copies: activations that wait on the host, as three ops in the graph.

    forward     host = send(x)                          a copy to the host begins
                ... compute ...
                host = arrived(host, x)                 it is done; behind this, x is free
    backward    back = fetch(host, device)              a copy to the device begins
                ... compute ...
                back = arrived(back, host)              it is done, and may be read

Copies run on a stream for each direction, so that the two copy engines of a GPU work beside its
kernels. The compute stream waits for a copy in `arrived`, and only there. What is copied is held
until then, so its memory goes back in the order of the compute stream: no memory waits for an event
that the allocator has to ask for, and the peak is where the graph says. (`record_stream` would free
it in the allocator's count at once, and in truth some time later.) A graph that ends in an error
between two of these ops leaves its copies to the next one, which lets them go once they are done.

Host memory is pinned and torch's own: its caching allocator keeps blocks from step to step, rounds
them to powers of two, and gives none out again that a copy still uses. So a backward that never
runs, runs twice, or behind other forwards, needs nothing: the host's copy is a saved tensor like
any other.

On other devices the same ops copy at once. The ops are opaque, take no sizes and name no object, so
compiled code that holds them can be cached.

Source: `torch._functorch._activation_offloading` (seen on 2.13) has ops of the same form. Differs:
    the host's copy survives a backward (`retain_graph=True`), an error leaves nothing behind, and
    nothing private is needed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from magi_train.core import compat
from magi_train.core.errors import MagiError

MIB = 2**20
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@dataclass(frozen=True)
class _Flight:
    """A copy that has begun, and what it must not lose until it is done."""

    done: torch.cuda.Event
    device: torch.device
    source: Tensor
    copy: Tensor


_flying: dict[int, _Flight] = {}
"""By the address of the copy. Nothing here: it has arrived."""
_streams: dict[tuple[str, torch.device], torch.cuda.Stream] = {}


@torch.library.custom_op("magi_train::offload_send", mutates_args=(), tags=_TAGS)
def _send(x: Tensor) -> Tensor:
    """Return the copy of `x` on the host, which begins now; same shape and strides."""
    if x.device.type != "cuda":
        return x.clone()
    try:
        host = torch.empty_strided(
            x.shape, x.stride(), dtype=x.dtype, device="cpu", pin_memory=True
        )
    except RuntimeError as error:
        raise MagiError(
            f"the host has no {x.nbytes / MIB:.4g} MiB of pinned memory left for an activation "
            f"that waits there ({error}); run fewer ranks on this host, or set "
            "Config(offload_activations=False)"
        ) from error
    _begin(x, host, "out", x.device)
    return host


@_send.register_fake
def _(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")


@torch.library.custom_op("magi_train::offload_fetch", mutates_args=(), tags=_TAGS)
def _fetch(host: Tensor, device: torch.device) -> Tensor:
    """Return the copy of `host` on `device`, which begins now; same shape and strides."""
    if device.type != "cuda":
        return host.clone()
    back = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)
    _begin(host, back, "back", device)
    return back


@_fetch.register_fake
def _(host, device):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)


def _begin(source: Tensor, copy: Tensor, way: str, device: torch.device) -> None:
    """Copy on the stream of a direction, behind what the current stream has to do."""
    for address, flight in list(_flying.items()):  # what nobody waits for any more, after an error
        if flight.done.query():
            _flying.pop(address, None)
    stream = _streams.get((way, device))
    if stream is None:
        stream = _streams[way, device] = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        copy.copy_(source, non_blocking=True)
    _flying[copy.data_ptr()] = _Flight(stream.record_event(), device, source, copy)


def _arrived(copy: Tensor, source: Tensor) -> Tensor:
    flight = _flying.pop(copy.data_ptr(), None)
    if flight is not None:
        torch.cuda.current_stream(flight.device).wait_event(flight.done)
        if not copy.is_cuda and compat.saved_tensors_are_hooked():
            flight.done.synchronize()  # the host itself may read what it is given to save
    return copy


_library = torch.library.Library("magi_train", "FRAGMENT")
_library.define("offload_arrived(Tensor(a) copy, Tensor source) -> Tensor(a)", tags=_TAGS)
_library.impl("offload_arrived", _arrived, "CompositeExplicitAutograd")
torch.library.register_fake("magi_train::offload_arrived", lambda copy, source: copy, lib=_library)

SEND = torch.ops.magi_train.offload_send.default
"""`(x) -> host`."""
FETCH = torch.ops.magi_train.offload_fetch.default
"""`(host, device) -> back`."""
ARRIVED = torch.ops.magi_train.offload_arrived.default
"""`(copy, source) -> copy`: what runs behind it on the current stream may read `copy`, and may have
the memory of `source`."""
OPS = (SEND, FETCH, ARRIVED)
