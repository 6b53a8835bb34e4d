"""One step of a torch optimizer through the kernels: who can be taken, what each row holds.

For every parameter group the parameters that a kernel can take go into one launch (one for each
dtype of gradients); the rest is left to torch. Nothing here waits for the device: step counts live
there, as under torch's `fused=True`, and a parameter without a gradient is a row that takes no
part, so that the map from blocks to tensors stays as it is.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from magi_train.fusion.ahead import compile_ahead, wait
from magi_train.fusion.kernels.adamw import AdamSettings, adamw
from magi_train.fusion.kernels.multi_tensor import AddressTable, Row, StepScalars, interpreted
from magi_train.fusion.kernels.sgd import SgdSettings, sgd

Group = dict[str, Any]
State = dict[str, Any]

DEVICES = ("cuda",)
"""Device types whose parameters are taken. Tests add "cpu", where the interpreter runs kernels."""
GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
SHADOWS = (torch.bfloat16, torch.float16)


@lru_cache(maxsize=4096)
def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the strides that matter, or None where memory has gaps or is shared."""
    kept = [(s, n) for s, n in zip(stride, shape, strict=True) if n != 1]
    if 0 in shape:
        return ()
    expected = 1
    for s, n in sorted(kept):
        if s != expected:
            return None
        expected *= n
    return tuple(s for s, _ in kept)


def layout(tensor: Tensor) -> tuple[int, ...] | None:
    """Return what two tensors of one shape must share for their memory to be walked as one."""
    return _dense(tuple(tensor.shape), tensor.stride())


class Algorithm(Protocol):
    """What differs between optimizers."""

    def reason(self, group: Group) -> str | None:
        """Return why a group is left to torch, or None."""
        ...

    def states(self, group: Group) -> tuple[str, ...]:
        """Return the names of the float32 states of a parameter's shape."""
        ...

    def row(self, p: Tensor, group: Group, state: State) -> tuple[list[Tensor | None], bool]:
        """Return the tensors of the columns after the third, and whether there was no state."""
        ...

    def launch(self, table: AddressTable, group: Group, scalars: StepScalars,
               grad_dtype: torch.dtype, shadow_dtype: torch.dtype | None) -> None:  # fmt: skip
        """Run the kernel."""
        ...


def _rate(lr: float | Tensor, device: torch.device) -> float | Tensor:
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return lr.to(device, non_blocking=True)
    return float(lr)


class Adam:
    """Adam, AdamW and AMSGrad."""

    def reason(self, group: Group) -> str | None:
        """Return why a group is left to torch, or None."""
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "betas are tensors"
        return None

    def states(self, group: Group) -> tuple[str, ...]:
        """Return the names of the moments."""
        more = ("max_exp_avg_sq",) if group["amsgrad"] else ()
        return ("exp_avg", "exp_avg_sq", *more)

    def row(self, p: Tensor, group: Group, state: State) -> tuple[list[Tensor | None], bool]:
        """Return moments and step; made as torch makes them, the step on the device."""
        names = self.states(group)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in names:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        step = state["step"]
        if step.device != p.device or step.dtype is not torch.float32:
            step = state["step"] = step.to(p.device, torch.float32, non_blocking=True)
        return [state["exp_avg"], state["exp_avg_sq"],
                state["max_exp_avg_sq"] if group["amsgrad"] else None, step], False  # fmt: skip

    def launch(self, table: AddressTable, group: Group, scalars: StepScalars,
               grad_dtype: torch.dtype, shadow_dtype: torch.dtype | None) -> None:  # fmt: skip
        """Run the kernel."""
        settings = AdamSettings(
            lr=_rate(group["lr"], table.device),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )
        adamw(table, settings, scalars, grad_dtype, shadow_dtype)


class Sgd:
    """SGD, with momentum or without."""

    def reason(self, group: Group) -> str | None:
        """Return None: every group can be taken."""
        return None

    def states(self, group: Group) -> tuple[str, ...]:
        """Return the name of the buffer, if there is one."""
        return ("momentum_buffer",) if group["momentum"] else ()

    def row(self, p: Tensor, group: Group, state: State) -> tuple[list[Tensor | None], bool]:
        """Return the momentum buffer."""
        if not group["momentum"]:
            return [], False
        first = state.get("momentum_buffer") is None
        if first:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [state["momentum_buffer"]], first

    def launch(self, table: AddressTable, group: Group, scalars: StepScalars,
               grad_dtype: torch.dtype, shadow_dtype: torch.dtype | None) -> None:  # fmt: skip
        """Run the kernel."""
        settings = SgdSettings(
            lr=_rate(group["lr"], table.device),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        sgd(table, settings, scalars, grad_dtype, shadow_dtype)


def _kernel(
    algorithm: Algorithm, grad: torch.dtype, shadow: torch.dtype | None
) -> tuple[type[Algorithm], torch.dtype, torch.dtype | None]:
    """Return what the kernel of such a launch is called where it compiles ahead."""
    return type(algorithm), grad, shadow


def _on_nothing(
    algorithm: Algorithm, group: Group, looks: bool, grad_dtype: torch.dtype,
    shadow_dtype: torch.dtype | None, device: torch.device,
) -> None:  # fmt: skip
    """Launch an algorithm's kernel on a row that takes no part."""
    table = AddressTable([1], device)
    table.update([None])
    drift = torch.zeros(1, dtype=torch.int32, device=device) if looks else None
    algorithm.launch(table, group, StepScalars(drift=drift), grad_dtype, shadow_dtype)


@dataclass
class Launch:
    """The rows of one launch.

    Attributes:
        rows: One for every parameter of the group that could be taken; None takes no part.
        written: What the kernel writes.
        shadowed: Parameters whose shadow it writes.
        shadow_dtype: Of these shadows.
    """

    rows: list[Row | None]
    written: list[Tensor] = field(default_factory=list)
    shadowed: list[Tensor] = field(default_factory=list)
    shadow_dtype: torch.dtype | None = None


@dataclass
class FusedStep:
    """The kernels' side of an optimizer that was taken over.

    Attributes:
        algorithm: Which kernel.
        shadow_of: Returns a parameter's shadow, or None.
        on_written: Told, after a step, which parameters had their shadow written.
        drift: int32 on the device, set to 1 where a shadow was not its rounded parameter.
        note: Takes a sentence for the report.
        steps: Taken so far.
    """

    algorithm: Algorithm
    shadow_of: Callable[[Tensor], Tensor | None]
    on_written: Callable[[Sequence[Tensor]], None] | None
    drift: Tensor | None
    note: Callable[[str], None]
    steps: int = -1
    tables: dict[tuple[int, torch.device, torch.dtype], AddressTable] = field(default_factory=dict)

    def why_never(self, p: Tensor, group: Group) -> str | None:
        """Return why a parameter is left to torch whatever its gradient is, or None."""
        for setting in ("capturable", "differentiable"):
            if group.get(setting):
                return f"{setting}=True"
        if type(p) not in (Tensor, torch.nn.Parameter):
            return "it is a tensor subclass"
        if p.dtype is not torch.float32:
            return f"it is {str(p.dtype).removeprefix('torch.')}, not float32"
        if p.device.type not in DEVICES or (p.device.type == "cpu") != interpreted():
            return f"it lies on {p.device.type}; the kernel runs on cuda"
        if layout(p) is None:
            return "its memory has gaps or overlaps"
        return self.algorithm.reason(group)

    def why_not_now(self, p: Tensor, group: Group, state: State) -> str | None:
        """Return why this step of a parameter is left to torch, or None."""
        g = p.grad
        assert g is not None, "the parameter has no gradient"
        if g.layout is not torch.strided or type(g) is not Tensor:
            return "its gradient is sparse or a tensor subclass"
        if g.dtype not in GRADIENTS or g.device != p.device:
            return f"its gradient is {g.dtype} on {g.device}"
        stride = p.stride()
        if g.stride() != stride and layout(g) != layout(p):
            return "its gradient has other strides"
        for name in self.algorithm.states(group) if state else ():
            held = state.get(name)
            if held is not None and (
                held.dtype is not torch.float32
                or held.device != p.device
                or (held.stride() != stride and layout(held) != layout(p))
            ):
                return f"its {name} has another dtype, device or strides"
        return None

    def divide(self, optimizer: Optimizer) -> tuple[list[tuple[int, list[Tensor]]], list[Group]]:
        """Return what the kernels take, by number of group, and groups of the rest for torch."""
        taken: list[tuple[int, list[Tensor]]] = []
        rest: list[Group] = []
        for index, group in enumerate(optimizer.param_groups):
            ours: list[Tensor] = []
            theirs: list[Tensor] = []
            for p in group["params"]:
                reason = self.why_never(p, group)
                if reason is None and p.grad is None:
                    ours.append(p)
                    continue
                if reason is None:
                    reason = self.why_not_now(p, group, optimizer.state.get(p, {}))
                    if reason is not None:
                        self.note(f"fused_optimizer left a parameter to torch: {reason}")
                    if p.grad is not None and p.grad.dtype is not p.dtype and p.grad_dtype is None:
                        p.grad = p.grad.to(p.dtype)  # torch's kernels want one dtype
                (ours if reason is None else theirs).append(p)
            if ours:
                taken.append((index, ours))
            if any(p.grad is not None for p in theirs):
                rest.append({**group, "params": theirs})
        return taken, rest

    def run(self, optimizer: Optimizer, taken: list[tuple[int, list[Tensor]]]) -> None:
        """Step every parameter of `taken` that has a gradient."""
        shadowed: list[Tensor] = []
        self.steps += 1
        for index, parameters in taken:
            group = optimizer.param_groups[index]
            for (device, dtype), launch in self._launches(optimizer, group, parameters).items():
                wait(_kernel(self.algorithm, dtype, launch.shadow_dtype))
                key, numels = (index, device, dtype), tuple(p.numel() for p in parameters)
                table = self.tables.get(key)
                if table is None or table.numels != numels:
                    table = self.tables[key] = AddressTable(numels, device)
                with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                    table.update(launch.rows)
                    scalars = self._scalars(optimizer, device)
                    self.algorithm.launch(table, group, scalars, dtype, launch.shadow_dtype)
                # the kernel wrote through addresses: tell autograd, as torch's step does
                torch.autograd.graph.increment_version(launch.written)
                shadowed += launch.shadowed
        if shadowed and self.on_written is not None:
            self.on_written(shadowed)

    def compile_ahead(
        self, optimizer: Optimizer, dtypes: Sequence[tuple[torch.dtype, torch.dtype | None]]
    ) -> None:
        """Let kernels compile, for each group that they take, before there are gradients.

        Args:
            optimizer: The one that was taken over.
            dtypes: Of gradients and of shadows, of each kernel that steps will launch.
        """
        for group in optimizer.param_groups:
            p = next((p for p in group["params"] if self.why_never(p, group) is None), None)
            settings = {k: v for k, v in group.items() if k != "params"}
            held = any(isinstance(v, Tensor) for v in settings.values())
            if p is None or held:  # no other process may have these
                continue
            for grad, shadow in dtypes:
                known = (self.algorithm, settings, self.drift is not None, grad, shadow)
                kernel = _kernel(self.algorithm, grad, shadow)
                compile_ahead(kernel, p.device, partial(_on_nothing, *known), id(self))

    def _scalars(self, optimizer: Optimizer, device: torch.device) -> StepScalars:
        # GradScaler sets the first two on an optimizer that scales by itself
        names = {"grad_scale": "grad_scale", "found_inf": "found_inf", "clip": "clip_factor"}
        given = {ours: getattr(optimizer, theirs, None) for ours, theirs in names.items()}
        tensors = {
            name: value if value is None else torch.as_tensor(value, dtype=torch.float32).to(
                device, non_blocking=True)
            for name, value in given.items()
        }  # fmt: skip
        return StepScalars(drift=self.drift, number=self.steps, **tensors)

    def _launches(
        self, optimizer: Optimizer, group: Group, parameters: list[Tensor]
    ) -> dict[tuple[torch.device, torch.dtype], Launch]:
        launches: dict[tuple[torch.device, torch.dtype], Launch] = {}
        scaled = getattr(optimizer, "grad_scale", None) is not None
        for i, p in enumerate(parameters):
            g = p.grad
            if g is None:
                continue
            key = (p.device, g.dtype)
            if key not in launches:
                launches[key] = Launch([None] * len(parameters))
            launch = launches[key]
            shadow = self._shadow(p, launch)
            held = bool(self.algorithm.states(group))  # else torch makes no entry either
            state = optimizer.state[p] if held else {}
            states, first = self.algorithm.row(p, group, state)
            tensors = [p, g, shadow, *states]
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            launch.rows[i] = (*addresses, *[0] * (7 - len(addresses)), int(first))
            launch.written += [
                t for t in tensors if t is not None and (t is not g or scaled)
            ]  # fmt: skip
        return launches

    def _shadow(self, p: Tensor, launch: Launch) -> Tensor | None:
        shadow = self.shadow_of(p)
        if shadow is None:
            return None
        if shadow.dtype not in SHADOWS or shadow.shape != p.shape or layout(shadow) != layout(p):
            raise ValueError(
                f"the shadow of a parameter of shape {tuple(p.shape)} must be bfloat16 or float16 "
                f"with the parameter's shape and strides {p.stride()}, got {shadow.dtype}, "
                f"{tuple(shadow.shape)}, {shadow.stride()}; make it with empty_like(parameter)"
            )
        if launch.shadow_dtype not in (None, shadow.dtype):
            raise ValueError(
                f"the shadows of one parameter group must have one dtype, got {shadow.dtype} "
                f"beside {launch.shadow_dtype}; use one precision for all"
            )
        launch.shadow_dtype = shadow.dtype
        launch.shadowed.append(p)
        return shadow
