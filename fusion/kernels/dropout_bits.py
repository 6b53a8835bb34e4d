"""Which elements a dropout keeps, 1 bit each: eight of one call of Philox.

Generated code calls Philox once for each element, uses a quarter of one of its four words, and
writes a byte: for 12.6 M elements 60 us of the 101 of a norm's kernel on an H200, whose reading and
writing takes 40. A program here makes a byte of eight elements from the four words, 16 bits for
each element: it is dropped if they are below `p 2^16`, so with a probability that is off by 2^-17
at most.

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox4x32-10). The counter
is the position of the byte, the key is the dropout's seed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4
ROUNDS = 10
LEVELS = 2**16


@triton.jit
def _pair(word, limit, place: tl.constexpr):
    """Two bits, at `place` and behind it, of the halves of a word."""
    low = ((word & 0xFFFF).to(tl.int32) >= limit).to(tl.int32)
    high = ((word >> 16).to(tl.int32) >= limit).to(tl.int32)
    return (low << place) | (high << (place + 1))


@triton.jit(do_not_specialize=["index", "limit"])
def _dropout_bits(seeds, bits, index, count, limit, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """A block of bytes."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counter = at.to(tl.uint32)
    zero = counter * 0
    seed = tl.load(seeds + index)
    a, b, c, d = tl.philox(seed, counter, (at >> 32).to(tl.uint32), zero, zero, ROUNDS)
    byte = _pair(a, limit, 0) | _pair(b, limit, 2) | _pair(c, limit, 4) | _pair(d, limit, 6)
    tl.store(bits + at, byte.to(tl.uint8), mask=at < count)


def limit_of(p: float) -> int:
    """Return below which of 2^16 numbers an element is dropped."""
    return round(p * LEVELS)


def dropout_bits(seeds: Tensor, index: int, shape: list[int], p: float) -> Tensor:
    """Return the kept elements of a tensor whose last dimension is eight times `shape`'s.

    Args:
        seeds: int64, `[n]`.
        index: Of the dropout's seed.
        shape: Of the result.
        p: Probability with which an element is dropped.

    Returns:
        uint8, `shape`. Bit `i % 8` of byte `i // 8` is 1 if element `i` is kept.
    """
    bits = torch.empty(shape, dtype=torch.uint8, device=seeds.device)
    if bits.numel():
        _dropout_bits[(triton.cdiv(bits.numel(), BLOCK),)](
            seeds, bits, index, bits.numel(), limit_of(p), BLOCK, ROUNDS, num_warps=WARPS
        )
    return bits


def dropout_bits_reference(seeds: Tensor, index: int, shape: list[int], p: float) -> Tensor:
    """Do it in plain torch, with words of 32 bits in int64."""
    seed = seeds[index].expand(1)
    at = torch.arange(torch.Size(shape).numel(), device=seeds.device)
    zero = torch.zeros_like(at)
    counter = [at & _WORD, at >> 32, zero, zero]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(ROUNDS):
        high0, low0 = _product(0xD2511F53, counter[0])
        high1, low1 = _product(0xCD9E8D57, counter[2])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD]
    byte, limit = zero, limit_of(p)
    for place, word in enumerate(counter):
        for half, value in enumerate((word & 0xFFFF, word >> 16)):
            byte = byte | ((value >= limit).long() << (2 * place + half))
    return byte.to(torch.uint8).view(shape)


_WORD = 0xFFFFFFFF


def _product(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 32 bits of `factor` times 32-bit words."""
    low = (words & 0xFFFF) * factor
    middle = (words >> 16) * factor + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & _WORD
