"""Capture where others keep the weights: inside of FSDP2's hooks, and of DeepSpeed's.

FSDP2 gathers a block's weights in a hook before its forward and frees them in a hook behind it, so
the whole forward cannot be one graph: a weight is whole only between these hooks. Each block's
`forward` is compiled, which lies inside of them, where the weights are plain tensors; hooks, the
collectives they start and their autograd nodes stay outside. (The REGION tier of a replica compiles
`__call__`, hooks included.) Blocks of one class and equal parameter shapes share a graph.

DeepSpeed's stage 3 does the same around the blocks that comm/zero.py makes its leaves. Below it
weights are whole, and any tier may be reached; there DeepSpeed's forward is put around the region.

No vote is needed. A captured block holds no collective, so a rank whose capture fails runs that
block uncompiled, in step with the others, and its report says so.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from magi_train.capture import Region, RegionBackend, own_code
from magi_train.comm.fully_shard import FullyShard
from magi_train.comm.zero import Zero
from magi_train.core import compat
from magi_train.core.errors import CaptureError
from magi_train.runtime import Runtime

logger = logging.getLogger(__name__)

_ordinals = itertools.count()


def region_for(
    runtime: Runtime, function: Callable[..., Any], name: str, hooks_because: str = ""
) -> Region:
    """Return the region that suits where the model's weights live; arguments as of Region."""
    kind = ShardedRegion if runtime.sharded else Region
    if isinstance(runtime.reducer, Zero):
        kind = ShardedZeroRegion if runtime.sharded else ZeroRegion
    return kind(runtime, function, name, hooks_because)


class ShardedRegion(Region):
    """A function of a model whose weights are sharded; the model's blocks are compiled."""

    takes_sharded_weights = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function, its blocks compiled; without gradients with rank 0's buffers."""
        runtime = self.runtime
        if isinstance(runtime.reducer, FullyShard) and not torch.is_grad_enabled():
            if not runtime.inside and not runtime.closed:
                runtime.reducer.begin_evaluation()
        return super().__call__(*args, **kwargs)

    def _first(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        problems = compat.problems()
        if problems:
            self._must_not_be_forced("region", reason=f"this torch lacks {'; '.join(problems)}")
        eager = bool(problems) or self.runtime.config.tier == "eager"
        if not eager and not any(other.tier for other in self.runtime.regions):
            self._compile_forwards()
        why = f"this torch lacks {'; '.join(problems)}" if problems else ""
        return self._take("eager" if eager else "region", why, self._next(args, kwargs))

    def _next(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self.runtime.reducer.begin(in_graph=False)
        with self.runtime.entered():
            return self._function(*args, **kwargs)

    def close(self) -> None:
        """Give the blocks their own forward back."""
        for block in self._blocks:
            block.__dict__.pop("forward", None)
        self._blocks, self.tier = [], ""

    def _compile_forwards(self) -> None:
        reducer = self.runtime.reducer
        assert isinstance(reducer, FullyShard | Zero)
        blocks = reducer.blocks or [self.runtime.module]
        kinds: dict[Any, list[nn.Module]] = {}
        for block in blocks:
            if "forward" in block.__dict__:
                self.runtime.report.note(
                    f"a {type(block).__name__} runs uncompiled: its forward was replaced"
                )
                continue
            shapes = tuple(tuple(p.shape) for p in block.parameters())
            kinds.setdefault((type(block), shapes), []).append(block)
        for (kind, _), members in kinds.items():
            shared = _Shared(self, kind, len(members))
            for block in members:
                block.__dict__["forward"] = shared.forward_of(block)
                self._blocks.append(block)
        self.runtime.report.note(
            f"{len(self._blocks)} sharded blocks are compiled in {len(kinds)} kinds, the rest is "
            "eager"
        )


class _InDeepSpeed(Region):
    """A region that runs inside of DeepSpeed's forward, which starts and ends a backward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function, compiled as far as all ranks can."""
        reducer = self.runtime.reducer
        assert isinstance(reducer, Zero)
        if self.runtime.inside:
            return super().__call__(*args, **kwargs)
        return reducer.call(super().__call__, *args, **kwargs)


class ZeroRegion(_InDeepSpeed):
    """A function of a model that DeepSpeed trains with whole weights: stages 1 and 2."""


class ShardedZeroRegion(_InDeepSpeed, ShardedRegion):
    """A function of a model whose weights DeepSpeed shards: stage 3."""


class _Shared:
    """The compiled forward of equal blocks."""

    def __init__(self, region: ShardedRegion, kind: type[nn.Module], members: int) -> None:
        forward = kind.forward

        def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return forward(block, *args, **kwargs)

        self._runtime, self._failed = region.runtime, False
        self._name = kind.__name__.removeprefix("FSDP")
        self._compiled = torch.compile(
            own_code(call, f"magi_{kind.__name__}_{next(_ordinals)}"),
            backend=RegionBackend(region, members),
            dynamic=region.runtime.config.dynamic,
        )

    def forward_of(self, block: nn.Module) -> Callable[..., Any]:
        """Return what stands in for `block.forward`; it has the signature of the original."""
        original = block.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._failed or not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return original(*args, **kwargs)
            failures: list[Exception] = []
            try:
                output = compat.call_captured(
                    self._compiled, (block, *args), kwargs, failures=failures
                )
            except compat.CAPTURE_ERRORS as error:
                raise compat.inner_backend_error(error) from error
            if failures:
                self._give_up(compat.inner_backend_error(failures[0]))
            return output

        return forward

    def _give_up(self, error: BaseException) -> None:
        """Leave these blocks uncompiled on this rank, unless that must not be."""
        why = compat.capture_failure_text(error)
        if self._runtime.config.tier == "region":
            raise CaptureError(
                f"Config.tier is 'region', but {self._name} cannot be compiled: {why}. Change that "
                "line, or use tier='auto'"
            ) from error
        self._failed = True
        self._runtime.report.note(f"blocks of class {self._name} run uncompiled: {why}")
        logger.warning("magi-train: blocks of class %s run uncompiled: %s", self._name, why)
