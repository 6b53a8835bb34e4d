"""Low rank: matrices travel as two thin factors, which all-reduces can sum.

With M the mean gradient of a matrix `[n, m]` plus what is left from before, and Q `[m, r]` the
basis of the last step: P = M Q is summed over ranks and orthonormalised, then Q' = M^T P is
averaged, and P Q'^T is what every rank decodes. Both sums are linear, so no rank ever sees another
one's gradient: r (n + m) numbers travel instead of n m.

Source: Vogels et al. (2019), PowerSGD. Differs:
  * The residual of a rank is what its own projection leaves, M_r - P P^T M_r, not M_r minus the
    decoded mean, so that it does not gather what merely differs between ranks. Their mean is the
    same.
  * Residuals are kept without the loss scale; nothing is kept of a step with infinities or NaNs.
  * A direction of the basis that found nothing (a gradient of zeros) is kept, not set to zero,
    from which it could never return.
  * Matrices of one shape are one batch, and Gram-Schmidt runs twice for each direction: the
    result is orthonormal to rounding also where directions are nearly parallel.
"""

import math
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from magi_train.comm.codecs import Codec, Collective, Exchange, Scale, add_scaled, unscaled
from magi_train.comm.host_memory import HostMemory
from magi_train.comm.plan import Bucket, Slot, matrix_shape

PARALLEL = 1e-5
"""A row of which less than this part is left by Gram-Schmidt has no direction of its own."""


def orthonormal(p: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows of `p` `[batch, r, n]`; zeros where none is left.

    Elementwise products and sums only, so equal inputs give equal bits on equal machines.
    """
    rows: list[Tensor] = []
    for row in p.unbind(1):
        before = row.norm(dim=1, keepdim=True)
        for _ in range(2):
            for other in rows:
                row = row - other * (other * row).sum(1, keepdim=True)
        length = row.norm(dim=1, keepdim=True)
        none = length <= PARALLEL * before  # False for NaN, which must stay visible
        rows.append(torch.where(none, 0.0, row / length))
    return torch.stack(rows, 1)


class LowRank(Codec):
    """Exchange the matrices of a bucket as factors of `bucket.rank` columns.

    Factors are kept as rows, `[batch, r, n]` and `[batch, r, m]`: on a CPU a product with few
    columns takes five times as long as the same one with few rows (MKL).

    State, float32: a residual of each matrix and a basis `[m, r]`, as rows; as much again while an
    exchange is not committed.
    """

    def __init__(
        self, bucket: Bucket, rank: int, world_size: int, memory: HostMemory | None = None
    ) -> None:
        super().__init__(bucket, rank, world_size, memory)
        self.groups: dict[tuple[int, int], list[Slot]] = {}
        for slot in bucket.slots:
            self.groups.setdefault(matrix_shape(slot.shape), []).append(slot)
        self._kept: tuple[list[Tensor], list[Tensor]] | None = None
        self._pending: tuple[list[Tensor], list[Tensor]] | None = None

    def _start(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Return residuals of zeros, and bases that are the same on all ranks."""
        residuals, bases = [], []
        for (n, m), slots in self.groups.items():
            generator = torch.Generator().manual_seed(n * 2**20 + m)
            basis = torch.randn(len(slots), m, self.bucket.rank, generator=generator)
            bases.append(basis.mT.contiguous().to(device))
            residuals.append(torch.zeros(len(slots), n, m, device=device))
        return residuals, bases

    def exchange(self, flat: Tensor, used: set[str], scale: Scale) -> Exchange:
        """See Codec.exchange."""
        if self._kept is None:
            self._kept = self._start(flat.device)
        residuals, bases = self._kept
        matrices = []
        for (shape, slots), residual in zip(self.groups.items(), residuals, strict=True):
            batch = self._memory.empty(len(slots), *shape, device=flat.device)
            for slot, old, new in zip(slots, residual, batch, strict=True):
                if slot.name in used:
                    add_scaled(slot.view(flat).reshape(shape), old, scale, new)
                else:
                    new.zero_()
            matrices.append(batch)
        flags = self.used_flags(used, torch.float32, flat.device)
        left = [torch.bmm(q, x.mT) for x, q in zip(matrices, bases, strict=True)]
        total = yield self._all_reduce(torch.cat([*map(torch.flatten, left), flags]))

        votes = total[-len(flags) :]
        left = [orthonormal(p) for p in _split(total, left)]
        right = [torch.bmm(p, x) for x, p in zip(matrices, left, strict=True)]
        summed = torch.cat([q.flatten() for q in right])
        for x, p, q in zip(matrices, left, right, strict=True):
            x.baddbmm_(p.mT, q, alpha=-1)
        total = yield self._all_reduce(summed)

        right = list(_split(total.div_(self.world_size), right))
        for p, q, slots in zip(left, right, self.groups.values(), strict=True):
            for slot, one, other in zip(slots, p.mT, q, strict=True):
                _write_product(one, other, slot.view(flat))
        flat[self.bucket.flags_offset :] = votes
        self.finite = total.isfinite().all()
        self._keep(matrices, right, used, scale)

    def _keep(self, rest: list[Tensor], right: list[Tensor], used: set[str], scale: Scale) -> None:
        """Make residuals and bases of what is left, to be committed."""
        assert self._kept is not None
        residuals, bases = self._kept
        fresh = []
        for new, old in zip(right, bases, strict=True):
            length = new.norm(dim=2, keepdim=True)
            fresh.append(torch.where(length > 0, new / length, old))
        for slots, new, old in zip(self.groups.values(), rest, residuals, strict=True):
            unscaled(new, scale)
            for i, slot in enumerate(slots):
                if slot.name not in used:
                    new[i] = old[i]
        self._pending = (rest, fresh)

    def mean_residual(self) -> Generator[Collective, Tensor, Tensor | None]:
        """See Codec.mean_residual."""
        if self._kept is None:
            return None
        residuals = self._kept[0]
        flat = residuals[0].new_zeros(self.bucket.flags_offset)
        for slots, batch in zip(self.groups.values(), residuals, strict=True):
            for slot, each in zip(slots, batch, strict=True):
                slot.view(flat).copy_(each.view(slot.shape))
        total = yield self._all_reduce(flat)
        return total.div_(self.world_size)

    def load_residual(self, mean: Tensor) -> None:
        """See Codec.load_residual."""
        bases = self._start(mean.device)[1] if self._kept is None else self._kept[1]
        residuals = [
            torch.stack([s.view(mean).reshape(shape) for s in slots])
            for shape, slots in self.groups.items()
        ]
        self._kept = (residuals, bases)

    def bases(self) -> Iterator[tuple[str, Tensor]]:
        """See Codec.bases."""
        if self._kept is not None:
            for slots, batch in zip(self.groups.values(), self._kept[1], strict=True):
                yield from zip((s.name for s in slots), batch.mT, strict=True)

    def load_basis(self, name: str, basis: Tensor) -> None:
        """See Codec.load_basis. A basis of another rank is left out: one is made anew."""
        if self._kept is None:
            self._kept = self._start(basis.device)
        for slots, batch in zip(self.groups.values(), self._kept[1], strict=True):
            for i, slot in enumerate(slots):
                if slot.name == name and basis.shape == batch[i].mT.shape:
                    batch[i] = basis.mT


def _write_product(p: Tensor, q: Tensor, out: Tensor) -> None:
    """Write `p q` to `out` of any shape."""
    if out.is_contiguous():
        torch.mm(p, q, out=out.view(p.shape[0], q.shape[1]))
    else:
        out.copy_(torch.mm(p, q).view(out.shape))


def _split(flat: Tensor, like: list[Tensor]) -> Iterator[Tensor]:
    """Cut the first elements of `flat` into tensors shaped as those of `like`."""
    sizes = [math.prod(t.shape) for t in like]
    for part, t in zip(flat[: sum(sizes)].split(sizes), like, strict=True):
        yield part.view(t.shape)
