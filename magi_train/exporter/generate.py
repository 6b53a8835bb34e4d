"""`load_decoder`: a file that `export_decoder` wrote, and the loop that generates with it.

The loop does what transformers' `generate` does for greedy search and sampling (temperature, then
top_k, then top_p), token for token with the same random numbers. Prompts of one batch are padded on
the left. On CUDA one decode step can be replayed as a CUDA graph: the cache then stays in one place
and is reused by the next generation, one at a time.
"""

import io
import os
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from magi_train.core import compat
from magi_train.core.device_graphs import DeviceGraphs, device_graphs
from magi_train.core.errors import ExportError
from magi_train.exporter import artifact
from magi_train.exporter.loaded import check_compile, compiled

Graph = Callable[..., Tensor]
ONE_ROW = {"coordinate_descent_tuning": True}
"""Options of Inductor for decode steps on GPUs: products of one row are then generated sums, which
come closer to the memory's bandwidth than a library's kernels for matrices. A token of Llama 1.24 B
took 1.48 ms without and 1.15 with them; where a library computed its attention, 1.50 and 1.58."""

PARTS = 128
"""Of a row of logits, in which the largest is looked for at the same time."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; greedy without `sample`.

    Attributes:
        sample: Draw at random.
        temperature: Logits are divided by it.
        top_k: Only the so many most likely tokens, 0 for all.
        top_p: Only the most likely tokens that together reach this probability.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature must be positive, top_p in (0, 1] and top_k at least 0; got {self}"
            )

    def next(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return one token for each row of `logits`, `[batch, vocabulary]`."""
        if not self.sample:
            return likeliest(logits)
        logits = logits / self.temperature
        lowest = float("-inf")
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, lowest)
        if self.top_p < 1:
            values, order = logits.sort(descending=False)
            out = values.softmax(-1).cumsum(-1) <= 1 - self.top_p
            out[:, -1] = False  # the likeliest stays
            logits = logits.masked_fill(out.scatter(1, order, out), lowest)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def likeliest(logits: Tensor) -> Tensor:
    """Return the first of the largest in each row of `[batch, vocabulary]`.

    In two steps: in one, a GPU has a single block read a row.
    """
    batch, vocabulary = logits.shape
    if vocabulary < PARTS**2:
        return logits.argmax(-1)
    padded = F.pad(logits, (0, -vocabulary % PARTS), value=float("-inf"))
    width = padded.shape[1] // PARTS
    values, inside = padded.view(batch, PARTS, width).max(-1)
    part = values.argmax(-1, keepdim=True)
    return (part * width + inside.gather(1, part))[:, 0]


class Decoder:
    """A loaded decoder; see `load_decoder`.

    Attributes:
        manifest: What is known about the file.
        length: Tokens of prompt and answer together that the cache holds.
    """

    def __init__(
        self,
        graphs: dict[str, Graph],
        manifest: dict[str, Any],
        replayer: DeviceGraphs | None = None,
    ) -> None:
        self._graphs, self.manifest = graphs, manifest
        self._about = manifest["decoder"]
        self.length = int(self._about["length"])
        self._device = manifest["contract"]["device"]
        self._replayer = replayer
        self._lock: Any = threading.Lock() if replayer else nullcontext()
        self._held: dict[int, _Recorded] = {}
        self._renewals, self._stream = replayer.renewals() if replayer else 0, None

    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
        eos: list[int] | None = None,
        pad: int | None = None,
    ) -> Tensor:
        """Return the prompts with what follows them.

        Args:
            input_ids: Prompts, `[batch, prompt]`, padded on the left.
            attention_mask: 0 for padding, `[batch, prompt]`; None for prompts without.
            max_new_tokens: At most so many are added.
            sampling: Greedy by default.
            generator: Of the random numbers.
            eos: Tokens that end a sequence; the model's own by default, [] for none.
            pad: What follows an end in a batch; the model's own, else the first of `eos`.

        Returns:
            `[batch, prompt + new]`.

        Raises:
            ExportError: The prompts do not fit the file; says how.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check(input_ids, mask, max_new_tokens)
        ends = self._about["eos"] if eos is None else eos
        filler = pad if pad is not None else self._about["pad"]
        filler = (ends[0] if ends else 0) if filler is None else filler
        stop = torch.tensor(ends, dtype=torch.long, device=input_ids.device)
        if max_new_tokens == 0:
            return input_ids.clone()
        with self._lock, torch.no_grad():
            return self._loop(input_ids, mask, max_new_tokens, sampling or Sampling(), generator,
                              stop, filler)  # fmt: skip

    def _loop(
        self,
        ids: Tensor,
        given: Tensor,
        count: int,
        sampling: Sampling,
        generator: torch.Generator | None,
        stop: Tensor,
        pad: int,
    ) -> Tensor:
        batch, prompt = ids.shape
        mask = ids.new_ones(batch, self.length)
        mask[:, :prompt] = given
        positions = (given.long().cumsum(-1) - 1).clamp(min=0)
        cache = self._cache(batch)
        start = torch.zeros((), dtype=torch.long, device=ids.device)
        name = "prefill" if prompt > 1 else "decode"
        logits = self._graphs[name](ids, mask, positions, start, *cache)
        rows = [ids]
        running = ids.new_ones(batch, dtype=torch.bool)
        at = positions[:, -1:]
        for number in range(count):
            token = sampling.next(logits, generator)
            if len(stop):
                token = torch.where(running, token, pad)
                running = running & ~torch.isin(token, stop)
            rows.append(token[:, None])
            if number + 1 == count or (len(stop) and not bool(running.any())):
                break
            at = at + 1
            held = torch.full_like(start, prompt + number)
            logits = self._decode(token[:, None], mask, at, held, cache)
        return torch.cat(rows, dim=1)

    def _decode(
        self, token: Tensor, mask: Tensor, at: Tensor, start: Tensor, cache: list[Tensor]
    ) -> Tensor:
        if self._replayer is None:
            return self._graphs["decode"](token, mask, at, start, *cache)
        batch = token.shape[0]
        if batch not in self._held:
            self._held[batch] = _Recorded(self._graphs["decode"], self._replayer, cache,
                                          (token, mask, at, start))  # fmt: skip
        return self._held[batch](token, mask, at, start)

    def _cache(self, batch: int) -> list[Tensor]:
        """Return an empty cache: that of a recorded decode step if there is one."""
        if self._replayer is not None:
            if self._renewals != self._replayer.renewals():  # a failed capture has made them void
                self._held.clear()
                self._replayer.new_pool()
            self._renewals = self._replayer.renewals()
            self._stream = self._replayer.behind(self._stream)  # of the last generation
        if batch in self._held:
            cache = self._held[batch].cache
            for each in cache:
                each.zero_()  # what is masked counts 0 times, and 0 * NaN is NaN
            return cache
        return [
            torch.zeros(batch, *shape, dtype=getattr(torch, dtype), device=self._device)
            for shape, dtype in self._about["cache"]
        ]

    def _check(self, ids: Tensor, mask: Tensor, count: int) -> None:
        low, high = self._about["batch"]
        problem = ""
        if ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape[1] == 0:
            problem = f"input_ids must be int64 [batch, prompt], got {ids.dtype} {list(ids.shape)}"
        elif ids.device.type != self._device:
            problem = f"input_ids are on {ids.device}, and the file is for {self._device!r}"
        elif ids.shape[0] < low or (high is not None and ids.shape[0] > high):
            problem = f"the file takes {low} to {high or 'any number of'} prompts, not {len(ids)}"
        elif mask.shape != ids.shape:
            problem = f"attention_mask must be {list(ids.shape)}, got {list(mask.shape)}"
        elif not bool(mask[:, -1].all()):
            problem = "prompts must be padded on the left: attention_mask ends with a 0"
        elif count < 0 or ids.shape[1] + count > self.length:
            problem = (
                f"{ids.shape[1]} tokens of prompt and {count} new ones do not fit the cache of "
                f"{self.length}; export the decoder with a larger length"
            )
        if problem:
            raise ExportError(problem)


class _Recorded:
    """One decode step at one batch size, as a CUDA graph over a cache that stays where it is."""

    def __init__(
        self, run: Graph, graphs: DeviceGraphs, cache: list[Tensor], inputs: tuple[Tensor, ...]
    ) -> None:
        self.cache, self._inputs = cache, [t.clone() for t in inputs]
        for _ in range(
            2
        ):  # sets up libraries, which may not be recorded; writes what follows again
            run(*self._inputs, *cache)
        (self._logits,), self._replay = graphs.capture(lambda: [run(*self._inputs, *cache)])
        self._given: tuple[Tensor | None, ...] = (None,) * len(inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for inside, outside, before in zip(self._inputs, inputs, self._given, strict=True):
            if outside is not before:  # the mask is the same all along
                inside.copy_(outside, non_blocking=True)
        self._given = inputs
        self._replay()
        assert self._logits is not None
        return self._logits


def load_decoder(
    path: str | os.PathLike[str],
    *,
    cuda_graphs: bool = False,
    compile: bool | Mapping[str, Any] = False,
) -> Decoder:
    """Load what `export_decoder` wrote.

    Args:
        path: The file.
        cuda_graphs: Replay decode steps, each batch size by itself; generations then take turns.
        compile: Compile the decode step of a "program", each batch size at its first call, as
            `magi_train.load` does; options of Inductor in place of True for others than ONE_ROW.
            Prompts, which differ in length, run op by op.

    Raises:
        ExportError: The file is missing, cut short, no decoder, or for another torch or machine.
    """
    path = Path(path)
    manifest = artifact.read_manifest(path)
    if "decoder" not in manifest:
        raise ExportError(f"{path} is not a decoder; magi_train.load() runs it")
    artifact.check_host(path, manifest)
    check_compile(path, manifest["target"], compile)
    device = torch.device(manifest["contract"]["device"])
    replayer = device_graphs(device) if cuda_graphs else None
    if cuda_graphs and replayer is None:
        raise ExportError(f"{path} is for {device.type!r}, which has no CUDA graphs")
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            with io.BytesIO(archive.read("decoder/weights.pt")) as file:
                weights = torch.load(file, map_location=device, weights_only=True)
            used = manifest["decoder"]["weights"]
            graphs = {
                name: _graph(Path(archive.extract(f"decoder/{name}.pt2", folder)),
                             manifest["target"], [weights[key] for key in used[name]],
                             recorded=cuda_graphs, compile=name == "decode" and compile)
                for name in used
            }  # fmt: skip
    except Exception as error:
        raise ExportError(f"{path} cannot be loaded ({type(error).__name__}: {error})") from error
    return Decoder(graphs, manifest, replayer)


def _graph(
    file: Path,
    target: str,
    weights: list[Tensor],
    *,
    recorded: bool,
    compile: bool | Mapping[str, Any],
) -> Graph:
    run: Callable[..., Any]
    if compile is not False:
        run = compiled(torch.export.load(file), compile, (weights,), ONE_ROW)
    elif target == "pt2":
        run = partial(compat.aoti_load(str(file), run_single_threaded=recorded), weights)
    else:
        run = partial(torch.export.load(file).module(), weights)
    # compiled code reads its inputs as dense rows and does not look at their strides; the cache is
    # dense already, so what is written in place is the caller's
    return lambda *inputs: run(*(t.contiguous() for t in inputs))[0]
