"""ExportConfig: what is done to a model on its way into a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

WeightOnly = Literal["int8", "float8"]
Precision = Literal["bfloat16", "float16", "int8", "float8"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Passes over the inference graph; each can be turned off. None: on where it gains."""

    attention: bool = True
    """Drop attention masks that are proven trivial, and repeated keys and values."""

    remove_no_ops: bool = True
    """Take out dropout, conversions that convert nothing, and assertions about metadata."""

    fold_batch_norm: bool = True
    """Put BatchNorm into the weights of the convolution or linear before it."""

    fold_constants: bool = True
    """Compute once what depends on weights alone."""

    merge_linears: bool | None = None
    """Run linears of one input as one. None: on accelerators, where it saves launches."""

    patches: bool | None = None
    """Run convolutions of few input channels whose windows do not overlap, the stem of vision
    transformers, as matrix products over patches. None: on accelerators, where the result is
    bfloat16 or float16 and the target is torch's. True: wherever it can be done."""

    channels_last: bool | None = None
    """Store the weights of convolutions with the channels innermost. None: where it gains."""

    precision: Precision | None = None
    """Run in this dtype, with inputs and outputs as they were. The report says how far the results
    move. Position tables and other floating buffers without parameters beside them stay, if the
    model takes that. "int8" and "float8" are those of the weights of linears alone, by torchao."""

    max_error: float | None = None
    """Refuse to write if the results move by more than this (relative, Euclidean norm). None: half
    of the digits of the dtype without `precision`, no limit with it."""

    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Options of torch's compiler for target "pt2", for example {"max_autotune": True}."""

    def __post_init__(self) -> None:
        if self.precision not in (None, *get_args(Precision)):
            raise ValueError(
                f"ExportConfig.precision must be None or one of {get_args(Precision)}, got "
                f"{self.precision!r}"
            )
        if self.max_error is not None and not self.max_error > 0:
            raise ValueError(f"ExportConfig.max_error must be positive, got {self.max_error!r}")

    @staticmethod
    def switches() -> tuple[str, ...]:
        """Return the names of the passes."""
        return tuple(f.name for f in fields(ExportConfig) if "bool" in str(f.type))
