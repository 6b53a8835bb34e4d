"""int8 blocks on the CPU in one pass, by a few lines of C that the machine's own compiler builds.

Written with tensors, encoding is eight passes over a bucket, and memory is what a training step on
a CPU is short of. Built once per source, compiler flags and processor into a file beside PyTorch's
compile cache, and tried on a few blocks before it is used. Without a compiler, or with a result
that is not the tensors', codecs go on with tensors: `kernels` says None, and the log says why.
What ranks decode is one product of an int8 and a float32, the same bits either way, so ranks with
and without the kernels may be mixed.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from magi_train.core import compat

logger = logging.getLogger(__name__)

BLOCK = 256
ROUNDING = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", *ROUNDING)
TIMEOUT_SECONDS = 60
SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#define BLOCK 256

/* largest magnitude as bits: ordered like the numbers, infinity above them and NaN above all */
void encode(const float *x, const float *residual, float factor, float *rest, int8_t *values,
            float *scales, long blocks, float tiny) {
  for (long b = 0; b < blocks; b++, x += BLOCK, rest += BLOCK, values += BLOCK) {
    float y[BLOCK], largest;
    uint32_t bits[BLOCK], most = 0;
    for (int i = 0; i < BLOCK; i++) y[i] = residual ? x[i] + residual[i] * factor : x[i];
    memcpy(bits, y, sizeof y);
    for (int i = 0; i < BLOCK; i++) {
      uint32_t magnitude = bits[i] & 0x7fffffffu;
      most = magnitude > most ? magnitude : most;
    }
    memcpy(&largest, &most, 4);
    float scale = (largest < tiny ? tiny : largest) / 127.0f, inverse = 1.0f / scale;
    for (int i = 0; i < BLOCK; i++) {
      float r = nearbyintf(y[i] * inverse);
      values[i] = (int8_t)(int)(r == r ? r : 0.0f);
      rest[i] = y[i] - r * scale;
    }
    scales[b] = scale;
    if (residual) residual += BLOCK;
  }
}

void decode(const int8_t *values, const float *scales, float *out, long blocks, int add) {
  for (long b = 0; b < blocks; b++, values += BLOCK, out += BLOCK) {
    float scale = scales[b];
    if (add) for (int i = 0; i < BLOCK; i++) out[i] += (float)values[i] * scale;
    else for (int i = 0; i < BLOCK; i++) out[i] = (float)values[i] * scale;
  }
}
"""


class Kernels:
    """Encodes and decodes rows of int8 blocks; all tensors are contiguous and on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, real = ctypes.c_void_p, ctypes.c_float
        self._encode, self._decode = library.encode, library.decode
        self._encode.argtypes = [pointer, pointer, real, *[pointer] * 3, ctypes.c_long, real]
        self._decode.argtypes = [*[pointer] * 3, ctypes.c_long, ctypes.c_int]
        self._encode.restype = self._decode.restype = None

    def encode(
        self,
        x: Tensor,
        residual: Tensor | None,
        factor: float,
        rest: Tensor,
        values: Tensor,
        scales: Tensor,
        tiny: float,
    ) -> None:
        """Encode `x + residual * factor`, `[elements]`; `rest` gets what rounding took away.

        Args:
            x: In float32, a multiple of BLOCK.
            residual: As `x`, or None.
            factor: Of the residual.
            rest: As `x`; may be `x`.
            values: int8, as many.
            scales: float32, one for BLOCK elements.
            tiny: Taken for the largest magnitude of a block where that is less.
        """
        old = None if residual is None else residual.data_ptr()
        to = rest.data_ptr(), values.data_ptr(), scales.data_ptr()
        self._encode(x.data_ptr(), old, factor, *to, x.numel() // BLOCK, tiny)

    def decode(self, values: Tensor, scales: Tensor, out: Tensor, *, add: bool) -> None:
        """Write, or add, the numbers that `values` and `scales` stand for to `out` `[elements]`."""
        blocks = out.numel() // BLOCK
        self._decode(values.data_ptr(), scales.data_ptr(), out.data_ptr(), blocks, int(add))


@functools.cache
def kernels() -> Kernels | None:
    """Return the kernels, built now if need be; None where that does not work."""
    try:
        found = Kernels(ctypes.CDLL(str(_library())))
        _try(found)
    except (OSError, subprocess.SubprocessError, AttributeError, ValueError) as error:
        logger.info("int8 gradients are encoded without a kernel of their own: %s", error)
        return None
    return found


def _library() -> Path:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "gcc", "clang")), None)
    if compiler is None:
        raise OSError("no g++, gcc or clang was found; install one, or name it in CXX")
    text = "\n".join([SOURCE, compiler, *FLAGS, platform.machine(), _processor()])
    name = f"int8-{hashlib.sha256(text.encode()).hexdigest()[:32]}.so"
    file = Path(compat.cache_dir()) / "magi_train" / name
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / name
        command = [compiler, "-x", "c", *FLAGS, "-o", str(made), "-", "-lm"]
        subprocess.run(
            command,
            input=SOURCE.encode(),
            capture_output=True,
            check=True,
            timeout=TIMEOUT_SECONDS,
        )
        made.replace(file)  # other ranks see all of it or nothing
    return file


def _processor() -> str:
    """Return what this processor can do, for hosts that share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _try(found: Kernels) -> None:
    """Encode and decode a few blocks.

    Raises:
        ValueError: The result is not right.
    """
    x = torch.linspace(-3.0, 5.0, 2 * BLOCK)
    rest, out = torch.empty_like(x), torch.empty_like(x)
    values, scales = torch.empty(2 * BLOCK, dtype=torch.int8), torch.empty(2)
    found.encode(x, x, 1.0, rest, values, scales, 1e-30)
    found.decode(values, scales, out, add=False)
    if (out + rest - 2 * x).abs().max() > 1e-5 or rest.abs().max() > 0.51 * scales.max():
        raise ValueError("the built kernel does not decode what it encodes")
