"""`magi explain --fits`: a script's function, the GPU, and the answer as text or JSON.

The largest batch is searched with further captures, without a budget and with the smallest one.
"""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from magi_train.core import settings
from magi_train.core.config import Config
from magi_train.core.errors import MagiError
from magi_train.core.hardware import GPUS, OTHER_GPU, Gpu
from magi_train.fits import FORM, Build, Estimate, Setup, estimate
from magi_train.memory.step import GIB, usable_bytes

MOST_CAPTURES = 8
"""Batches that one search looks at."""
SHOWN_TENSORS = 5


@dataclasses.dataclass(frozen=True)
class Answer:
    """Whether a step fits, and what it takes.

    Attributes:
        fits: "without a budget", "with a budget" or "no".
        limit_gib: What a step may take: `memory_budget_gib`, or the GPU's memory less a margin.
        estimate: Of the batch asked for.
        budget_peak_gib: Predicted peak under the limit; None where it does not fit.
        budget_recompute_ms: What it recomputes then, a step, and what copies to the host cost.
        largest_batch: Without a budget, at least; None if not searched.
        largest_batch_with_budget: With the smallest budget, at least; None if not searched.
        lower: What would lower the peak.
    """

    fits: str
    limit_gib: float
    estimate: Estimate
    budget_peak_gib: float | None
    budget_recompute_ms: float | None
    largest_batch: int | None
    largest_batch_with_budget: int | None
    lower: list[str]


def command(
    script: str,
    *,
    gpu: str | None,
    gib: float | None,
    ranks: int,
    autocast: str,
    batch: int | None,
    search: bool,
    words: Sequence[str],
    as_json: bool,
) -> int:
    """Print the answer; return 0 if the step fits, with or without a budget, else 1.

    Args:
        script: `path/to/script.py:function` or `package.module:function`; see `estimate`.
        gpu: A key of GPUS, or None.
        gib: Memory of the GPU, in place of what is known of `gpu`, or of one that is not named.
        ranks: How many train together.
        autocast: "none", or a dtype.
        batch: Dimension 0 of the batch; None as the script makes it.
        search: Whether the largest batch is looked for.
        words: Settings of the training, as key=value.
        as_json: In place of text.

    Raises:
        MagiError: The script or an option is of no use.
    """
    device = _gpu(gpu, gib)
    if ranks < 1 or (batch is not None and batch < 1):
        raise MagiError(f"--ranks and --batch must be 1 or more, got {ranks} and {batch}")
    config, _ = settings.apply(Config(), settings.gather(words))
    dtype = None if autocast == "none" else getattr(torch, autocast)
    build, setup = load_build(script), Setup(device, ranks, config, dtype)
    found = answer(build, setup, batch, search)
    text = json.dumps(dataclasses.asdict(found), indent=2) if as_json else as_text(found, setup)
    sys.stdout.write(text + "\n")
    return 1 if found.fits == "no" else 0


def answer(build: Build, setup: Setup, batch: int | None = None, search: bool = True) -> Answer:
    """Return whether a step fits on `setup.gpu`, which is one, and what it takes."""
    assert setup.gpu is not None, "the host's memory is not asked for"
    known: dict[int, Estimate] = {}

    def at(size: int) -> Estimate:
        if size not in known:
            known[size] = estimate(build, setup, size)
        return known[size]

    budget = setup.config.memory_budget_gib
    limit = budget if isinstance(budget, float | int) else usable_gib(setup.gpu.memory_gib)
    if limit <= 0:
        raise MagiError(f"of {setup.gpu.memory_gib:g} GiB nothing is left beside a GPU's own needs")
    first = estimate(build, setup, batch)
    known[first.batch] = first
    under = first.under(limit)
    largest = most = None
    if search:
        find = functools.partial(largest_batch, start=first.batch, limit_gib=limit)
        largest = find(lambda size: at(size).without_gib)
        most = max(largest, find(lambda size: at(size).least_gib))
    alone = first.without_gib <= limit
    return Answer(
        "without a budget" if alone else "with a budget" if under else "no",
        round(limit, 3),
        first,
        under[0] if under else None,
        under[1] if under else None,
        largest,
        most,
        _lower(first, setup, most),
    )


def _lower(found: Estimate, setup: Setup, most: int | None) -> list[str]:
    """Return what would lower the peak, with what it would give."""
    advice = []
    if found.least_gib < found.without_gib:
        advice.append(
            f"Config(memory_budget_gib=...): down to {found.least_gib:.4g} GiB, for "
            f"{found.least_recompute_ms:.3g} ms more a step"
        )
    state = found.resident_gib.get("optimizer", 0.0)
    if setup.ranks > 1 and not setup.config.shard_optimizer and state:
        advice.append(
            f"Config(shard_optimizer=True): {state * (1 - 1 / setup.ranks):.4g} GiB less, if the "
            "optimizer treats elements one by one"
        )
    if setup.autocast is None:
        advice.append("bfloat16 autocast (--autocast bfloat16): half of what matrix products keep")
    if found.batch > 1:
        cap = f"; {most} is the largest found to fit" if most else ""
        advice.append(f"a batch below {found.batch}{cap}")
    return advice


def as_text(found: Answer, setup: Setup) -> str:
    """Return an answer for people."""
    first, gpu = found.estimate, setup.gpu
    assert gpu is not None, "the host's memory is not asked for"
    held = sum(first.resident_gib.values())
    parts = sorted(first.resident_gib.items(), key=lambda part: -part[1])
    does = "copies and recomputes" if setup.config.offload_activations else "recomputes"
    budget = "does not fit"
    if found.budget_peak_gib is not None and found.budget_recompute_ms is not None:
        budget = f"{found.budget_peak_gib:.4g} GiB, {does} {found.budget_recompute_ms:.3g} ms"
    lines = [
        f"{first.model}, {first.parameters / 1e6:.4g} M parameters, batch {first.batch} a rank, "
        f"{setup.ranks} x {gpu.name} ({gpu.memory_gib:.4g} GiB)",
        f"fits: {found.fits} (limit {found.limit_gib:.4g} GiB)",
        f"  peak without a budget  {first.without_gib:.4g} GiB",
        f"  peak under the limit   {budget}",
        f"  smallest budget        {first.least_gib:.4g} GiB, {does} "
        f"{first.least_recompute_ms:.3g} ms of a forward and backward of {first.step_ms:.3g} ms",
        f"  held all the time      {held:.4g} GiB: "
        + ", ".join(f"{name} {size:.3g}" for name, size in parts),
        f"  at the peak besides    {first.without_gib - held:.4g} GiB of activations and gradients,"
        f" at {first.at}; all gradients are {first.gradients_gib:.3g}",
    ]
    if found.largest_batch is not None:
        lines.append(
            f"  largest batch found    {found.largest_batch} without a budget, "
            f"{found.largest_batch_with_budget} with one"
        )
    lines += ["largest tensors at the peak:", *(f"  {t}" for t in first.largest[:SHOWN_TENSORS])]
    lines += ["what would lower it:", *(f"  {sentence}" for sentence in found.lower)]
    return "\n".join([*lines, *(f"note: {sentence}" for sentence in first.notes)])


def _gpu(name: str | None, gib: float | None) -> Gpu:
    if name is not None and name.lower() not in GPUS:
        raise MagiError(f"no GPU {name!r} is known, only {', '.join(GPUS)}; --gib names any memory")
    if gib is not None and gib <= 0:
        raise MagiError(f"--gib must be positive, got {gib}")
    if name is None and gib is None:
        raise MagiError(f"name a GPU: --gpu with one of {', '.join(GPUS)}, or --gib")
    if name is None:
        assert gib is not None
        return Gpu(f"GPU of {gib:g} GiB", gib, OTHER_GPU)
    gpu = GPUS[name.lower()]
    return gpu if gib is None else dataclasses.replace(gpu, memory_gib=gib)


def load_build(name: str) -> Build:
    """Return the function that `path/to/script.py:function` or `package.module:function` names.

    The function is called "build" where none is named. A script's folder is put on `sys.path`.

    Raises:
        MagiError: There is no such script or function, or importing it fails.
    """
    place, _, wanted = name.partition(":")
    wanted = wanted or "build"
    path = Path(place)
    try:
        if path.suffix == ".py":
            if not path.is_file():
                raise MagiError(f"there is no script {place}")
            sys.path.insert(0, str(path.parent.resolve()))
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except MagiError:
        raise
    except (Exception, SystemExit) as error:
        raise MagiError(f"importing {place} failed: {type(error).__name__}: {error}") from error
    found = getattr(module, wanted, None)
    if not callable(found):
        have = [
            n
            for n, f in vars(module).items()
            if inspect.isfunction(f) and f.__module__ == module.__name__
        ]
        raise MagiError(
            f"{place} has no function {wanted!r}, only {', '.join(have) or 'none'}; name one as "
            f"{place}:function. {FORM}"
        )
    return found  # type: ignore[no-any-return]


def largest_batch(
    peak_gib: Callable[[int], float], start: int, limit_gib: float, most: int = MOST_CAPTURES
) -> int:
    """Return the largest batch found whose peak is within a limit, 0 if not even 1 is.

    A peak is nearly a line in the batch: the next guess lies where the line through the best two
    that are known meets the limit.

    Args:
        peak_gib: Predicts the peak of a batch size.
        start: The first guess.
        limit_gib: In GiB.
        most: How many sizes may be looked at; if that is not enough, a smaller one is returned.
    """
    known: dict[int, float] = {}
    below, above, guess = 0, 0, start
    for _ in range(most):
        known[guess] = peak_gib(guess)
        if known[guess] <= limit_gib:
            below = max(below, guess)
        else:
            above = min(above or guess, guess)
        if above and above - below <= 1:
            break
        guess = _next(known, below, above, limit_gib)
    return below


def _next(known: dict[int, float], below: int, above: int, limit_gib: float) -> int:
    """Return a size that is not known yet, between those that fit and those that do not."""
    near = sorted(known, key=lambda size: abs(known[size] - limit_gib))[:2]
    if len(near) < 2 or known[near[0]] == known[near[1]]:
        guess = 2 * below if below else max(1, above // 2)
    else:
        low, high = sorted(near)
        slope = (known[high] - known[low]) / (high - low)
        guess = int(low + (limit_gib - known[low]) / slope) if slope > 0 else 2 * below
    most = above - 1 if above else max(guess, below + 1)
    return min(max(guess, below + 1), most)


def usable_gib(memory_gib: float) -> float:
    """Return what a step may take of a GPU's memory, as `memory_budget_gib="auto"` does."""
    return usable_bytes(int(memory_gib * GIB)) / GIB
