"""`load`: an artifact as a callable that checks what it is given.

Calls may come from many threads: programs and compiled code keep nothing between calls. What does
keep something (replay as CUDA graphs writes to fixed memory) takes a lock.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from magi_train.core import compat
from magi_train.core.device_graphs import device_graphs
from magi_train.core.errors import ExportError
from magi_train.exporter import artifact
from magi_train.exporter.contract import Contract, Size, rebuild
from magi_train.exporter.replayed import Replayed

Runner = Callable[..., Sequence[Tensor]]


KINDS = {"pt2": "machine code already", "onnx": "run by ONNX Runtime",
         "executorch": "run by ExecuTorch"}  # fmt: skip


class Loaded:
    """An exported model. Call it with the arguments of the module, by position or name.

    Attributes:
        manifest: What is known about the file: versions, passes, measured errors.
        contract: What goes in and comes out.
        buckets: Batches are padded to these sizes; empty for none.
    """

    def __init__(
        self, run: Runner, manifest: dict[str, Any], contract: Contract, buckets: Sequence[int]
    ) -> None:
        self._run, self.manifest, self.contract = run, manifest, contract
        self.buckets = tuple(sorted(set(buckets)))
        changed = manifest.get("writes", {}).get("inputs", ())
        self._written = [i for i, s in enumerate(contract.inputs) if s.name in changed]
        if self.buckets:
            _check_buckets(contract, self.buckets)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Returns:
            What the module returned: a tensor, a tuple, or results by name (also as attributes).

        Raises:
            ExportError: An argument does not fit; says which, and what it must be.
        """
        given = self.contract.bind(args, kwargs)
        # compiled code reads its inputs as dense rows and does not look at their strides
        tensors = [t.contiguous() for t in given]
        rows = self._rows(tensors)
        padded = self._padded(tensors, rows)
        with torch.no_grad():
            results = self._run(*padded)
            for i in self._written:  # in a copy, if the caller's was no dense rows of a bucket
                if padded[i] is not given[i]:
                    given[i].copy_(padded[i][: len(given[i])])
        if padded is not tensors:
            results = [r[:rows] for r in results]
        return rebuild(self.contract.skeleton, results)

    def warmup(self, calls: int = 2, **sizes: int) -> None:
        """Run made-up inputs, so that no user's call pays for start-up.

        Args:
            calls: How often, for each bucket or the given sizes.
            sizes: Sizes by name, as `contract.sizes()` lists them; the lowest by default.
        """
        batches = self.buckets if "batch" not in sizes else ()
        for given in [{**sizes, "batch": b} for b in batches] or [sizes]:
            for _ in range(calls):
                self(**dict(zip((s.name for s in self.contract.inputs),
                                self.contract.example(**given), strict=True)))  # fmt: skip

    def _rows(self, tensors: Sequence[Tensor]) -> int:
        return next((int(t.shape[0]) for t, s in zip(tensors, self.contract.inputs, strict=True)
                     if s.shape and _is_batch(s.shape[0])), 0)  # fmt: skip

    def _padded(self, tensors: list[Tensor], rows: int) -> list[Tensor]:
        """Return `tensors` with their last row repeated up to the next bucket."""
        if not self.buckets:
            return tensors
        size = next((b for b in self.buckets if b >= rows), None)
        if size is None:
            raise ExportError(f"the batch is {rows}, and the largest bucket {self.buckets[-1]}")
        if size == rows:
            return tensors
        return [
            torch.cat([t, t[-1:].expand(size - rows, *t.shape[1:])])
            if s.shape and _is_batch(s.shape[0])
            else t
            for t, s in zip(tensors, self.contract.inputs, strict=True)
        ]


def load(
    path: str | os.PathLike[str],
    *,
    buckets: Sequence[int] = (),
    cuda_graphs: bool | Literal["auto"] = False,
    runners: int = 1,
    compile: bool | Mapping[str, Any] = False,
) -> Loaded:
    """Load what `export` wrote.

    Args:
        path: The file.
        buckets: Batch sizes to pad to, so that few shapes are run; results are cut again. For files
            with a dynamic batch whose results all have the batch first.
        cuda_graphs: Replay each shape as a CUDA graph after its first call. Pays for small batches,
            which are bound by launches; holds memory for each shape. "auto" times both ways in a
            shape's second call, and keeps a graph where it gains 5 %; what cannot be recorded runs
            without, with a warning. Not for models that write to their inputs; "auto" not for those
            that write to their buffers, as the timed calls would.
        runners: Calls that compiled code may run at the same time; each has memory of its own.
        compile: Compile a "program" with Inductor, each shape at its first call (or in `warmup`),
            in place of running it op by op; or Inductor's options, {"max_autotune": True}. Takes
            seconds to minutes a shape, once a machine: PyTorch keeps the code on disk.

    Raises:
        ExportError: The file is missing, cut short, no artifact, or for another torch or machine;
            or it is compiled already; or its model writes to what a replay must leave alone.
        ValueError: `cuda_graphs` is something else.
    """
    if cuda_graphs not in (True, False, "auto"):
        raise ValueError(f"cuda_graphs must be True, False or 'auto', got {cuda_graphs!r}")
    path = Path(path)
    manifest = artifact.read_manifest(path)
    artifact.check_host(path, manifest)
    check_compile(path, manifest["target"], compile)
    if compile is not False and manifest.get("writes", {}).get("buffers"):
        raise ExportError(
            f"{path} is of a model that writes to its buffers, and the code for each shape would "
            "have its own; load it without `compile`"
        )
    contract = Contract.from_dict(manifest["contract"])
    try:
        if compile is not False:
            run: Runner = compiled(torch.export.load(path), compile)
        else:
            run = _runner(path, manifest["target"], contract, runners, recorded=bool(cuda_graphs))
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch {torch.__version__} cannot load {path}, written by torch "
            f"{manifest['versions']['torch']} ({type(error).__name__}: {str(error)[:500]}); export "
            "again"
        ) from error
    if cuda_graphs:
        graphs = device_graphs(torch.device(contract.device))
        if graphs is None or manifest["target"] not in ("program", "pt2"):
            raise ExportError(
                f"{path} is for {contract.device!r} as {manifest['target']!r}, which cannot be "
                "replayed as CUDA graphs; load it without cuda_graphs"
            )
        _check_replay(path, manifest.get("writes", {}), cuda_graphs)
        run = Replayed(run, graphs, threading.Lock(), if_faster=cuda_graphs == "auto")
    return Loaded(run, manifest, contract, buckets)


def _check_replay(path: Path, writes: Mapping[str, Any], cuda_graphs: bool | str) -> None:
    """Make sure that calls may be replayed, and timed, as if nothing had happened between them."""
    if writes.get("inputs"):
        raise ExportError(
            f"{path} is of a model that writes to its input {', '.join(writes['inputs'])}; a "
            "replay works on copies, so the caller's would stay as it is. Load it without "
            "cuda_graphs"
        )
    if writes.get("buffers") and cuda_graphs == "auto":
        raise ExportError(
            f"{path} is of a model that writes to its buffers, which the calls that 'auto' times "
            "would do, too; load it with cuda_graphs=True or without"
        )


def check_compile(path: Path, target: str, compile: bool | Mapping[str, Any]) -> None:
    """Make sure that a file can be compiled where it is loaded, if it is to be.

    Raises:
        ExportError: It cannot.
    """
    if compile is not False and target != "program":
        raise ExportError(
            f"{path} is {KINDS[target]}; load it without `compile`, or export it with "
            "target='program'"
        )


def compiled(
    program: torch.export.ExportedProgram,
    compile: bool | Mapping[str, Any],
    first: Sequence[Any] = (),
    with_kernel: Mapping[str, Any] | None = None,
) -> Runner:
    """Return what compiles a program for each shape; see `load` and exporter/compiled.py."""
    from magi_train.exporter.compiled import Compiled

    if compile is True:
        return Compiled(program, {}, first, with_kernel)
    return Compiled(program, dict(compile or {}), first)


def _runner(path: Path, target: str, contract: Contract, runners: int, *, recorded: bool) -> Runner:
    if target == "onnx":
        from magi_train.exporter.onnx_file import onnx_runner

        return onnx_runner(path, contract)
    if target == "executorch":
        from magi_train.exporter.executorch_file import executorch_runner

        return executorch_runner(path)
    if target == "pt2":
        # compiled code asks events of its own between calls, which a recording forbids
        count = 1 if recorded else runners
        return compat.aoti_load(str(path), run_single_threaded=recorded, num_runners=count)
    # the contract asks what a program's guards ask, but for sizes of 1, which were tried
    return torch.export.load(path).module(check_guards=False)


def _is_batch(size: int | Size) -> bool:
    return isinstance(size, Size) and size.name == "batch"


def _check_buckets(contract: Contract, buckets: Sequence[int]) -> None:
    batch = contract.sizes().get("batch")
    if batch is None:
        raise ExportError("buckets need a file with a dynamic batch; export with dynamic='batch'")
    for each in contract.outputs:
        if not (each.shape and _is_batch(each.shape[0])):
            raise ExportError(
                f"buckets pad the batch and cut the results, but {each.name} is {each.text()}, "
                "whose first dimension is not the batch; load the file without buckets"
            )
    if not all(map(batch.takes, buckets)):
        raise ExportError(f"buckets must lie in {batch}, got {list(buckets)}")
