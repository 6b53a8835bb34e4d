"""Microseconds of what is changed in generated code, beside what PyTorch makes of the same.

    python -m benchmarks.generated_code --commit HASH --output benchmarks/results/NAME.json

GELU of 12608 x 4096 numbers of bfloat16 and its backward (fusion/narrow_erf.py) beside the exact
ones and a copy; the sums of two matrices of partial sums (fusion/kernels/column_sums.py); the patch
embedding of ViT-L/16 for 64 images as a convolution and as a product (fusion/patches.py); and the
products of a loss with BERT's vocabulary, as it is and with columns of zeros (fusion/chunked.py);
dropout's bits (fusion/dropout.py); the backward of max-pooling (fusion/max_pool.py).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import records
from benchmarks.bandwidth import median_ms
from magi_train.fusion.narrow_erf import exponential, one_plus_erf

FACTOR = 0.5**0.5


def short_gelu(x: Tensor) -> Tensor:
    """Return what narrow_erf makes of a GELU."""
    wide = x.float()
    return (wide * 0.5 * one_plus_erf(wide, FACTOR)).to(x.dtype)


def short_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Return what narrow_erf makes of its derivative."""
    wide = x.float()
    density = exponential(wide, FACTOR) / math.sqrt(2 * math.pi)
    return (gradient.float() * (0.5 * one_plus_erf(wide, FACTOR) + wide * density)).to(x.dtype)


def gelus() -> dict[str, Callable[[], Any]]:
    """GELU, forward and backward."""
    x = torch.randn(12608, 4096, device="cuda", dtype=torch.bfloat16)
    dy, out = torch.randn_like(x), torch.empty_like(x)
    forward, backward = torch.compile(F.gelu), torch.compile(torch.ops.aten.gelu_backward)
    short, short_back = torch.compile(short_gelu), torch.compile(short_backward)
    return {
        "copy": lambda: out.copy_(x),
        "gelu, Inductor": lambda: forward(x),
        "gelu, short erf": lambda: short(x),
        "gelu backward, Inductor": lambda: backward(dy, x),
        "gelu backward, short erf": lambda: short_back(dy, x),
    }


def sums() -> dict[str, Callable[[], Any]]:
    """Sums of the columns of two matrices; many in a graph, as launching takes longer."""
    from magi_train.fusion.kernels.column_sums import column_sums

    found: dict[str, Callable[[], Any]] = {}
    for rows, columns in ((788, 1024), (1024, 768), (512, 2048)):
        pair = torch.randn(2, rows, columns, device="cuda")
        for name, function in (("torch", lambda x: x.sum(0)), ("ours", column_sums)):
            function(pair[0])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(20):
                    function(pair[0])
                    function(pair[1])
            found[f"20 times two sums of {rows} x {columns}, {name}"] = graph.replay
    return found


def stems() -> dict[str, Callable[[], Any]]:
    """The patch embedding, forward alone and with its backward."""
    conv = nn.Conv2d(3, 1024, 16, 16).cuda()
    images = torch.randn(64, 3, 224, 224, device="cuda")
    dy = torch.randn(64, 196, 1024, device="cuda", dtype=torch.bfloat16)

    def convolution(x: Tensor) -> Tensor:
        return conv(x).flatten(2).transpose(1, 2)

    def product(x: Tensor) -> Tensor:
        patches = x.unflatten(2, (14, 16)).unflatten(4, (14, 16)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(1, 2).flatten(2), conv.weight.flatten(1), conv.bias)

    def forward(function: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            function(images)

    def both(function: Callable[[Tensor], Tensor]) -> None:
        conv.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            out = function(images)
        out.backward(dy)

    compiled = {f.__name__: torch.compile(f) for f in (convolution, product)}
    return {
        f"stem as {name}, {what.__name__}": lambda what=what, f=f: what(f)  # type: ignore[misc]
        for name, f in compiled.items()
        for what in (forward, both)
    }


def products() -> dict[str, Callable[[], Any]]:
    """The two products behind a loss."""
    x = torch.randn(16384, 768, device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(16384, 30528, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(30528, 768, device="cuda", dtype=torch.bfloat16)
    odd, few = wide[:, :30522], weight[:30522]
    return {
        "dW of 30522": lambda: odd.t() @ x,
        "dW of 30528": lambda: wide.t() @ x,
        "dx of 30522": lambda: odd @ few,
        "dx of 30522, padded where it is read": lambda: F.pad(odd, (0, 6)) @ weight,
        "dx of 30528": lambda: wide @ weight,
    }


def masks() -> dict[str, Callable[[], Any]]:
    """Dropout of 16384 x 768 numbers and a norm behind it; its mask drawn there, or read."""
    from magi_train.fusion.kernels.dropout_bits import dropout_bits

    seeds = torch.zeros(1, dtype=torch.int64, device="cuda")
    x = torch.randn(16384, 768, device="cuda", dtype=torch.bfloat16)
    places = torch.arange(8, device="cuda")

    @torch.compile
    def usual(x: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.rand_like(x) > 0.1
        return F.layer_norm((x * kept / 0.9).float(), (768,)), kept

    @torch.compile
    def unpacked(x: Tensor, bits: Tensor) -> Tensor:
        kept = ((bits.unsqueeze(-1) >> places) & 1 != 0).view(x.shape)
        return F.layer_norm((x * kept / 0.9).float(), (768,))

    bits = dropout_bits(seeds, 0, [16384, 96], 0.1)
    return {
        "dropout's bits": lambda: dropout_bits(seeds, 0, [16384, 96], 0.1),
        "dropout and norm, with bits": lambda: unpacked(x, bits),
        "dropout and norm, Inductor": lambda: usual(x),
    }


def pools() -> dict[str, Callable[[], Any]]:
    """The backward of a ResNet's max-pooling for 256 images."""
    from torch._inductor import inductor_prims  # noqa: F401  (defines the op)

    from magi_train.fusion.kernels.max_pool_backward import max_pool_backward

    window = ((3, 3), (2, 2), (1, 1))
    x = torch.randn(256, 64, 112, 112, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    y, offsets = torch.ops.prims._low_memory_max_pool_with_offsets(x, *window, (1, 1), False)
    dy, indices = torch.randn_like(y), F.max_pool2d(x, *window, return_indices=True)[1]
    out = torch.empty_like(x)
    eager = torch.ops.aten.max_pool2d_with_indices_backward
    return {
        "copy of what is pooled": lambda: out.copy_(x),
        "max-pooling's backward, ours": lambda: max_pool_backward(dy, offsets, (112, 112), *window),
        "max-pooling's backward, eager": lambda: eager(dy, x, *window, (1, 1), False, indices),
    }


def main() -> None:
    """Measure all, print them, write JSON."""
    options = records.parser_of(__doc__).parse_args()
    rows = []
    for make in (gelus, sums, stems, products, masks, pools):
        for name, function in make().items():
            rows.append({"what": name, "microseconds": 1e3 * median_ms(function)})
            print(f"{rows[-1]['microseconds']:9.1f} us  {name}", flush=True)
    records.save("generated_code", options, rows=rows)


if __name__ == "__main__":
    main()
