"""Every private torch name the project uses, with the versions it was seen on, and a self-test.

Seen on torch 2.11.0, 2.13.0, 2.15.0. `problems()` tries each name once at import; what is missing
is listed there, and capture then falls to the EAGER tier with a warning instead of a crash.

| name | used for |
|---|---|
| torch._inductor.compile_fx.compile_fx | lowering with our passes in Inductor's slots |
| torch._inductor.custom_graph_pass.CustomGraphPass, CustomPartitionerFn | bases of those passes |
| torch._inductor.choices.InductorChoices, virtualized.V.set_choices_handler | what is fused |
| codegen.cpp.CppScheduling._can_fuse_nodes_with_compatible_ranges | what is not, on the CPU |
| torch._inductor.runtime.cache_dir_utils.cache_dir | where PyTorch keeps compiled code |
| torch._inductor.runtime.cache_dir_utils.triton_cache_dir | where Inductor lets Triton do so |
| torch._functorch._aot_autograd.descriptors | what graph inputs and outputs are gradients of |
| torch._functorch.partitioners.min_cut_rematerialization_partition | the partition to bound |
| torch._functorch.config | eager backward lowering, no cache of joint graphs |
| torch._dynamo.exc.TorchDynamoException, FailOnRecompileLimitHit | capture failed |
| torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode | the same |
| torch._dynamo.convert_frame._compile, its local recompile_reason | what changes in each step |
| torch._dynamo.config.ignore_logging_functions (2.11: ignore_logger_methods) | logging in models |
| torch._dynamo.config.skip_nnmodule_hook_guards | hooks that come and go between steps |
| torch._dynamo.config.allow_unspec_int_on_nn_module | counters that modules keep |
| torch._dynamo.config.trace_autograd_ops (2.13) | torch.autograd.grad in a captured function |
| torch._dynamo.variables.tensor.TensorVariable.call_method (2.13) | not so Tensor.backward |
| torch._dynamo.callback.callback_handler | settings that hold while Dynamo compiles |
| torch._dynamo.convert_frame.ConvertFrame | run uncompiled what Dynamo fails at |
| torch._dynamo.types.ConvertFrameReturn, FrameExecStrategy, FrameAction | likewise |
| torch._dynamo.backends.common.aot_autograd | the aot_eager lowering |
| torch._inductor.fx_passes.control_dependencies | pinning the order of collectives |
| torch.utils._python_dispatch.TorchDispatchMode | watching the ops of a mask |
| torch.utils._python_dispatch.is_traceable_wrapper_subclass | kinds of tensors to compile for |
| torch._subclasses.fake_tensor.unset_fake_temporarily | real tensors inside a backend |
| torch.autograd.Variable._execution_engine.queue_callback | the end of a backward |
| torch.distributed.distributed_c10d._get_default_store | messages between ranks |
| torch.distributed.fsdp._fully_shard._fsdp_api.AllGather, ReduceScatter | bounded waits in FSDP2 |
| FSDPModule._get_fsdp_state()._state_ctx | whether a backward of FSDP2 raised |
| torch._C._current_graph_task_id | whether a backward is running |
| "_orig_mod.", "_checkpoint_wrapped_module." in names | what torch's checkpoints leave out |
| placeholder._dynamo_source | a graph input that is no variable of the user's |
| torch.amp.autocast_mode._enter_autocast | autocast inside of a captured graph |
| output.meta["original_output_strides"] | what Inductor restores the layout of outputs to |
| torch._inductor.aoti_compile_and_package, package.load_package | export to machine code |
| placeholder.meta["grapharg"] | the live tensor of a graph input, and how Dynamo reads it |
| Optimizer.step.hooked, ._init_group, ._opt_called | give an optimizer another class |
| _torchdynamo_orig_callable | a method of an optimizer that Dynamo replaced |
| optimizer.step._wrapped_by_lr_sched | know a learning-rate scheduler's wrapper |
| torch.aten._fused_sdp_choice | which attention kernel a call would take |
| torch.aten._flash_attention_forward, _backward | attention with offsets and windows |
| torch._functorch.partitioners.choose_saved_values_set | saving a set that was planned |
| torch._inductor.decomposition.select_decomp_table | an op that lowering is to see whole |
| torch._inductor.graph.GraphLowering.decide_layout_opt | whether code has channels innermost |
| UntypedStorage._cdata, torch._C._has_storage | which fake tensors share memory |
| torch.fx.proxy.GraphAppendingTracer | inserting what a function computes into a graph |
| torch._C._storage_Use_Count | whether anybody else holds a tensor's memory |
| torch._C._autograd._get_current_graph_task_keep_graph | backward(retain_graph=True) |
| torch._C._autograd._top_saved_tensors_default_hooks | the user packs saved tensors |
| torch.autograd.forward_ad._current_level | the user computes forward-mode derivatives |
| CompiledFunctionBackward, ._tensors_no_vc_check | the node of a compiled graph |
| CompiledFunctionBackward._forward_cls.metadata.bw_donated_idxs | a backward that runs twice |
| Module._forward_hooks, _forward_pre_hooks, _backward_hooks, _backward_pre_hooks | all hooks |
| Tensor._backward_hooks | the user hooks a parameter's gradient |
| torch._C._cuda_endAllocateToPool, _cuda_releasePool | take back a capture that failed |
| torch.ops.aten._scaled_mm | fp8 matrix products |
| torch._ops.HigherOrderOperator | operators that take graphs |
| torch._C._distributed_c10d._dump_fr_trace_json, _dump_nccl_trace_json | the last collective |
| GradScaler._get_scale_async | the loss scale, without waiting for the device |
| torch._subclasses.fake_tensor.FakeTensorMode | building a model without its memory |
| torch._dispatch.python.enable_python_dispatcher | fake values of sizes that vary |
| torch._C._ExcludeDispatchKeyGuard, Library._destroy | autocast on the CPU as on CUDA |
| torch.nn.init._no_grad_trunc_normal_ | which asks for values, so never ends without any |
| Tensor._make_wrapper_subclass | gradients to wait for |
| Node.meta["eager_input_vals"] | strides of what custom ops are given |
| Node.meta["inductor_realize_to_strides"] | what custom ops are given is in memory once |
| torch.distributed._symmetric_memory.empty, rendezvous | memory that other ranks can write |
| SymInt.node.expr, .hint | symbols of a dynamic size, and its size while compiling |
| SymInt.node.shape_env.bound_sympy, .guards | the range of a dynamic size, and its divisor |
| SymInt.node.shape_env.replace; torch.utils._sympy.printers.PythonPrinter | what sizes fulfil |
| torch.utils._sympy.functions.Mod, FloorDiv | what a dynamic size was divided by |
| FakeTensorMode.shape_env.ignore_fresh_unbacked_symbols | sizes of fake values to forget |
| torch.nn.utils.clip_grad._clip_grads_with_norm_ | gradients that an engine clips by itself |
"""

import contextlib
import copy
import functools
import json
import logging
import math
import os
import re
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from magi_train.core.errors import EagerOnlyError, MagiError

logger = logging.getLogger(__name__)

STRIDES_OF_ARGUMENTS = "eager_input_vals"
"""Key of a node's "meta": its fake (args, kwargs), whose strides Inductor keeps for a custom op.
Where it is missing, any strides will do (torch._inductor.graph.GraphLowering.call_function)."""

IN_MEMORY = "inductor_realize_to_strides"
"""Key of a node's "meta": whether generated code writes it to memory, in the graph's strides."""

OLDEST_TORCH = (2, 11)
NEWEST_TORCH_SEEN = (2, 15)

_missing: list[str] = []


def _lookup(module: str, name: str, *, required: bool = True) -> Any:
    """Return `name` of `module`, or None after noting that it is missing, if capture needs it."""
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError) as error:
        if required:
            _missing.append(f"{module}.{name} ({error})")
        return None


compile_fx: Callable[..., Any] = _lookup("torch._inductor.compile_fx", "compile_fx")
CustomGraphPass: Any = _lookup("torch._inductor.custom_graph_pass", "CustomGraphPass") or object
CustomPartitionerFn: Any = (
    _lookup("torch._inductor.custom_graph_pass", "CustomPartitionerFn") or object
)
min_cut_partition: Callable[..., Any] = _lookup(
    "torch._functorch.partitioners", "min_cut_rematerialization_partition"
)
partitioners: Any = _lookup("torch._functorch", "partitioners")
_lookup("torch._functorch.partitioners", "choose_saved_values_set")
functorch_config: Any = _lookup("torch._functorch", "config")
dynamo_config: Any = _lookup("torch._dynamo", "config")
compile_callbacks: Any = _lookup("torch._dynamo.callback", "callback_handler")
_TensorVariable: Any = _lookup("torch._dynamo.variables.tensor", "TensorVariable", required=False)
_TRACES_GRADIENTS = (
    tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 13)  # not tried before
    and hasattr(dynamo_config, "trace_autograd_ops")
    and hasattr(_TensorVariable, "call_method")
)
# torch < 2.12 knows the older name only
_IGNORED_LOGGING = (
    "ignore_logging_functions"
    if hasattr(dynamo_config, "ignore_logging_functions")
    else "ignore_logger_methods"
)
GradAOTOutput: Any = _lookup("torch._functorch._aot_autograd.descriptors", "GradAOTOutput")
PlainAOTInput: Any = _lookup("torch._functorch._aot_autograd.descriptors", "PlainAOTInput")
PlainAOTOutput: Any = _lookup("torch._functorch._aot_autograd.descriptors", "PlainAOTOutput")
TangentAOTInput: Any = _lookup("torch._functorch._aot_autograd.descriptors", "TangentAOTInput")
_ConvertFrame: Any = _lookup("torch._dynamo.convert_frame", "ConvertFrame")
_ConvertFrameReturn: Any = _lookup("torch._dynamo.types", "ConvertFrameReturn")
_FrameExecStrategy: Any = _lookup("torch._dynamo.types", "FrameExecStrategy")
_FrameAction: Any = _lookup("torch._dynamo.types", "FrameAction")
DynamoError: Any = _lookup("torch._dynamo.exc", "TorchDynamoException") or ()
RecompileLimitHit: Any = _lookup("torch._dynamo.exc", "FailOnRecompileLimitHit") or ()
_DATA_DEPENDENT: Any = _lookup(
    "torch.fx.experimental.symbolic_shapes", "GuardOnDataDependentSymNode", required=False
)
CAPTURE_ERRORS: Any = tuple(filter(None, (DynamoError, RecompileLimitHit, _DATA_DEPENDENT)))
"""What a captured function raises only while it is compiled: nothing of it has run."""
is_made_of_tensors: Callable[[Any], bool] = _lookup(
    "torch.utils._python_dispatch", "is_traceable_wrapper_subclass"
)
aot_autograd: Callable[..., Any] = _lookup("torch._dynamo.backends.common", "aot_autograd")
preserve_node_ordering: Callable[..., Any] = _lookup(
    "torch._inductor.fx_passes.control_dependencies", "preserve_node_ordering"
)
OrderedSet: Any = _lookup("torch.utils._ordered_set", "OrderedSet")
unset_fake_temporarily: Callable[..., Any] = _lookup(
    "torch._subclasses.fake_tensor", "unset_fake_temporarily"
)
FakeTensor: Any = _lookup("torch._subclasses.fake_tensor", "FakeTensor")
FakeTensorMode: Any = _lookup("torch._subclasses.fake_tensor", "FakeTensorMode")
extract_tensor_metadata: Callable[..., Any] = _lookup(
    "torch.fx.passes.shape_prop", "_extract_tensor_metadata"
)
cache_dir: Callable[[], str] = _lookup("torch._inductor.runtime.cache_dir_utils", "cache_dir")
TorchDispatchMode: Any = (
    _lookup("torch.utils._python_dispatch", "TorchDispatchMode") or contextlib.nullcontext
)
_FloorDiv: Any = _lookup("torch.utils._sympy.functions", "FloorDiv")
_QUOTIENTS: tuple[Any, ...] = tuple(
    filter(None, (_lookup("torch.utils._sympy.functions", "Mod"), _FloorDiv))
)
_PythonPrinter: Any = _lookup("torch.utils._sympy.printers", "PythonPrinter")
python_dispatcher: Callable[[], contextlib.AbstractContextManager[None]] = _lookup(
    "torch._dispatch.python", "enable_python_dispatcher"
)
GraphAppendingTracer: Any = _lookup("torch.fx.proxy", "GraphAppendingTracer")
aoti_compile: Callable[..., Any] = _lookup(
    "torch._inductor", "aoti_compile_and_package", required=False
)
aoti_load: Callable[..., Any] = _lookup("torch._inductor.package", "load_package", required=False)
AOTI_LOADER_MAY_CRASH = tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 13)
"""Torch 2.11.0+cu130 was seen to end with a segmentation fault in the loader, for CPU and CUDA, and
for a plain linear layer as well."""
_FSDP = "torch.distributed.fsdp._fully_shard._fsdp_api"
FSDPAllGather: Any = _lookup(_FSDP, "AllGather", required=False) or object
FSDPReduceScatter: Any = _lookup(_FSDP, "ReduceScatter", required=False) or object
get_default_store: Callable[..., Any] = _lookup(
    "torch.distributed.distributed_c10d", "_get_default_store"
)

if not hasattr(torch.autograd.Variable, "_execution_engine"):
    _missing.append("torch.autograd.Variable._execution_engine")


def name_in_checkpoints(name: str) -> str:
    """Return a parameter's name as torch.distributed.checkpoint.state_dict writes it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def backward_is_open(module: Any) -> bool:
    """Return whether a backward of a `fully_shard`ed module was left before its end.

    Not while one runs: a checkpointed module computes its forward again in there.
    """
    if torch._C._current_graph_task_id() != -1:
        return False
    context = getattr(module._get_fsdp_state(), "_state_ctx", None)
    return bool(getattr(context, "post_backward_final_callback_queued", False))


def make_boxed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward` taking its arguments as one list, which AOTAutograd may empty early."""
    from functorch.compile import make_boxed_func

    return make_boxed_func(forward)  # type: ignore[no-any-return]


def set_output_stride(output: torch.fx.Node, position: int, stride: tuple[int, ...]) -> None:
    """Tell Inductor which strides an output has now; it would copy to the recorded ones else."""
    recorded = output.meta.get("original_output_strides")
    if recorded is not None:
        output.meta["original_output_strides"] = [
            stride if i == position else old for i, old in enumerate(recorded)
        ]


_F = TypeVar("_F", bound=Callable[..., Any])


def untraced(function: _F) -> _F:
    """Return `function` so that Dynamo never looks into it: a backward may run where it looks."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


def uncompiled_call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run `module(...)`, its hooks included, without what `set_compiled_call` set."""
    return module._call_impl(*args, **kwargs)


def set_compiled_call(module: torch.nn.Module, call: Callable[..., Any] | None) -> None:
    """Make `module(...)` run `call`, as nn.Module.compile() does; None undoes it.

    Neither pickling nor deepcopy carries it along.
    """
    module._compiled_call_impl = call  # type: ignore[assignment]


def queue_backward_callback(callback: Callable[[], None]) -> None:
    """Run `callback` once when the backward that is now running ends. Only legal inside one."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def torch_version() -> tuple[int, int]:
    """Return the major and minor version of the installed torch."""
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def problems() -> tuple[str, ...]:
    """Return the private names that this torch lacks; empty means that capture can be tried."""
    return tuple(_missing)


def share_triton_cache(device: torch.device) -> None:
    """Let Triton keep what it compiles where Inductor lets it, from its first kernel on."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))


def forced_backward_lowering() -> Any:
    """Context in which AOTAutograd compiles the backward together with the forward."""
    return functorch_config.patch(force_non_lazy_backward_lowering=True)


def without_joint_cache() -> Any:
    """Context in which AOTAutograd looks for no joint graph that it has compiled before.

    Its key leaves out the values of Python floats, and so do the guards it keeps: where a float is
    taken as a constant after all, a later value would get the code of an earlier one.
    """
    return functorch_config.patch(enable_autograd_cache=False)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context in which `owner` has another attribute `name`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def fusions_in_place() -> Iterator[None]:
    """Context in which Inductor fuses no two kernels if more is made early than the fusion saves.

    Kernels that read the same, and do not need each other, become one where they lie up to 64
    kernels apart, of two layers, say: then whatever the second one needs is computed before the
    first one's results are used. Seen to add 2 GiB to a backward that recomputes.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class InPlace(InductorChoices):
        scheduler: Any = None
        by_order: Mapping[int, Any] = {}

        def can_fuse_horizontal(  # type: ignore[override]
            self, scheduler: Any, node1: Any, node2: Any, shared_data_score: int
        ) -> bool:
            if not InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score):
                return False
            if self.scheduler is not scheduler:
                self.scheduler = scheduler
                nodes = scheduler.name_to_node.values()  # also of dead ones, without a place
                self.by_order = {getattr(n, "min_order", -1): n for n in nodes}
            first, second = sorted((node1, node2), key=lambda node: node.min_order)
            between = map(self.by_order.get, range(first.max_order + 1, second.min_order))
            early = [
                write
                for node in between
                if node is not None
                and node.get_name() in second.ancestors
                and node.get_name() not in first.ancestors
                for write in node.read_writes.writes
            ]
            return sum(map(scheduler.dep_size_hint, early)) <= shared_data_score

    with V.set_choices_handler(InPlace()):
        yield


def writes_are_kept() -> contextlib.AbstractContextManager[None]:
    """Context in which Inductor's code for the CPU keeps what is scattered into a buffer.

    To fuse loops over one range and over several (512 and 8 x 64), torch 2.13 works out again what
    a node reads, and forgets that a buffer has been written to since: the node reads it as it was,
    and the writes, which nobody reads then, are dropped. The backward of an upsampling gave zeros.
    Nodes that read what has been written to are not fused this way.
    """
    from torch._inductor.codegen import cpp

    name = "_can_fuse_nodes_with_compatible_ranges"
    can_fuse: Any = getattr(cpp.CppScheduling, name, None)
    if can_fuse is None:
        return contextlib.nullcontext()

    @functools.wraps(can_fuse)
    def can(self: Any, *nodes: Any) -> Any:
        written = getattr(self.scheduler, "mutation_real_name", {})
        read = {each.name for node in nodes for each in node.read_writes.reads}
        return not read & written.keys() and can_fuse(self, *nodes)

    return _replaced(cpp.CppScheduling, name, can)


PARTIAL_SUMS = re.compile(r"^(\w+ = )(\w+\[.*\]\.view\(.*?\))\.sum\(dim=0\)(.*)$")
"""The line of generated code that adds up, with torch's `sum`, what the programs of a kernel summed
over their rows: gradients of a norm's weight and bias. It has (result, partial sums, the rest)."""


def partial_sums_by(operator: str) -> contextlib.AbstractContextManager[None]:
    """Context in which Inductor's code calls `operator(matrix)` for the sums of PARTIAL_SUMS.

    Code that is generated in another way, in another version, stays as it is.

    Args:
        operator: Full name of an op, as generated code calls it.
    """
    from torch._inductor.codegen import simd
    from torch._inductor.virtualized import V

    name = "_codegen_mix_order_reduction"
    generate: Any = getattr(simd.SIMDScheduling, name, None)
    if generate is None:
        return contextlib.nullcontext()

    @functools.wraps(generate)
    def generating(self: Any, *nodes: Any) -> Any:
        wrapper: Any = V.graph.wrapper_code
        write = wrapper.writeline

        def writing(line: Any) -> Any:
            if isinstance(line, str):
                line = PARTIAL_SUMS.sub(rf"\g<1>{operator}(\g<2>)\g<3>", line)
            return write(line)

        wrapper.writeline = writing
        try:
            return generate(self, *nodes)
        finally:
            del wrapper.writeline

    return _replaced(simd.SIMDScheduling, name, generating)


def call_captured(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Any,
    *,
    guards_hooks: bool = True,
    failures: list[Exception] | None = None,
) -> Any:
    """Call what torch.compile made; if a logging call breaks its graph, capture without that call.

    Nothing of the function has run when Dynamo raises, so calling again is safe: it is captured
    whole, or `failures` is given. The settings are not in force from the start because switching
    them costs time on every call.

    In what is compiled meanwhile an integer attribute of a module that has changed once is a
    variable, and torch.autograd.grad is captured.

    Args:
        function: What torch.compile made.
        args: For it.
        kwargs: For it.
        guards_hooks: Compile again once hooks on modules were added or removed. Without it Dynamo
            takes no notice; its guards take some 2 us a module in every call.
        failures: Of a function that is captured in pieces: takes why a piece could not be compiled.
            From there on the call compiles nothing more, and goes on without: what has run already
            must not run again.
    """
    if failures is not None:
        _go_on_where_dynamo_fails()
    _while_compiling.guards_hooks = guards_hooks
    outer, _while_compiling.failures = _while_compiling.failures, failures
    with _while_compiling:
        try:
            return function(*args, **kwargs)
        except DynamoError as error:
            if "logging.Logger" not in str(error):
                raise
        except AssertionError as error:
            if not _raised_while_compiling(error):
                raise
            raise DynamoError(str(error)) from error
        finally:
            _while_compiling.failures = outer
        with capture_settings():
            return function(*args, **kwargs)


def failures_taken() -> list[Exception] | None:
    """Return what takes the failures of the call that runs now, see `call_captured`."""
    return _while_compiling.failures


def _raised_while_compiling(error: BaseException) -> bool:
    """Return whether Dynamo raised an error of Python's own: an assertion (seen on 2.13)."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "torch._dynamo.convert_frame":
            return True
        trace = trace.tb_next
    return False


WHILE_COMPILING = {
    name: value
    for name, value in {
        "allow_unspec_int_on_nn_module": True,
        **({"trace_autograd_ops": True} if _TRACES_GRADIENTS else {}),
    }.items()
    if hasattr(dynamo_config, name)
}
"""Settings of Dynamo for what is compiled during `call_captured`."""


class _WhileCompiling:
    """Context in which Dynamo compiles under settings of ours; free where it compiles nothing."""

    def __init__(self) -> None:
        self._depth = 0
        self._patch: Any = None
        self.guards_hooks = False
        self.failures: list[Exception] | None = None  # what takes them, see call_captured

    def __enter__(self) -> None:
        self._depth += 1
        if compile_callbacks is not None and _compiles not in compile_callbacks.start_callbacks:
            compile_callbacks.register_start_callback(_compiles)  # torch._dynamo.reset() drops them
            compile_callbacks.register_end_callback(_compiled)

    def __exit__(self, *_: object) -> None:
        self._depth -= 1

    @property
    def in_force(self) -> bool:
        """Whether something is compiled under the settings now."""
        return self._patch is not None

    def begin(self) -> None:
        """Put the settings in force, where the compilation is for a call of ours."""
        if self._depth and self._patch is None:
            _trace_no_backward()
            guards = {"skip_nnmodule_hook_guards": False} if self.guards_hooks else {}
            self._patch = dynamo_config.patch(WHILE_COMPILING | guards)
            self._patch.__enter__()

    def end(self) -> None:
        """Put back what was there."""
        if self._patch is not None:
            self._patch.__exit__(None, None, None)
            self._patch = None


_while_compiling = _WhileCompiling()


@functools.cache
def _trace_no_backward() -> None:
    """Let Dynamo capture torch.autograd.grad, and break the graph at Tensor.backward.

    A backward in the graph would write `.grad` without the hooks that reduce gradients.
    """
    if not _TRACES_GRADIENTS:
        return
    traced = _TensorVariable.call_method  # 2.15 keeps the handlers of methods in a table behind it

    @functools.wraps(traced)
    def call_method(self: Any, tx: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        leave = name == "backward" and _while_compiling.in_force
        off = dynamo_config.patch(trace_autograd_ops=False) if leave else contextlib.nullcontext()
        with off:
            return traced(self, tx, name, *args, **kwargs)

    _TensorVariable.call_method = call_method


@functools.cache
def _go_on_where_dynamo_fails() -> None:
    """Let a frame run uncompiled whose compilation raises, where a call of ours takes the reason.

    Dynamo does so for what it knows that it does not support, and raises other errors, by when
    earlier frames of the call have run. `suppress_errors` would hide ours, too.
    """
    converted = _ConvertFrame.__call__

    @functools.wraps(converted)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        failures = _while_compiling.failures
        if failures is None:
            return converted(self, *args, **kwargs)
        if not failures:
            try:
                return converted(self, *args, **kwargs)
            except Exception as error:
                inner = inner_backend_error(error)
                if isinstance(inner, MagiError) and not isinstance(inner, EagerOnlyError):
                    raise
                failures.append(error)
        skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)  # and what it calls
        return _ConvertFrameReturn(frame_exec_strategy=skip, apply_to_code=False)

    _ConvertFrame.__call__ = call


def _compiles(_: object) -> None:
    _while_compiling.begin()


def _compiled(_: object) -> None:
    _while_compiling.end()


def capture_settings() -> Any:
    """Context in which a logging call in the captured code is left out instead of breaking it."""
    methods = {
        getattr(logging.Logger, name)
        for name in ("debug", "info", "warning", "warning_once", "warning_advice", "error")
        if hasattr(logging.Logger, name)  # libraries add some
    }
    return dynamo_config.patch({_IGNORED_LOGGING: methods})


def saving(names: Collection[str]) -> contextlib.AbstractContextManager[None]:
    """Context in which the partitioner saves the nodes `names`, and inputs, for the backward."""

    def chosen(graph: torch.fx.Graph, info: Any, **_: Any) -> list[torch.fx.Node]:
        return [*info.inputs, *(node for node in graph.nodes if node.name in names)]

    return _replaced(partitioners, "choose_saved_values_set", chosen)


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Context in which tensors that are made have shape, dtype and strides, but no values."""

    def left_alone(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor

    with (
        _replaced(torch.nn.init, "_no_grad_trunc_normal_", left_alone),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


_FLOAT32_ON_CUDA = (
    "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan "
    "pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm "
    "group_norm norm.Scalar norm.ScalarOpt_dim cosine_similarity cumprod cumsum prod prod.dim_int "
    "sum sum.dim_IntList softmax.int log_softmax.int logsumexp dist cdist kl_div nll_loss "
    "nll_loss2d nll_loss_nd cross_entropy_loss l1_loss smooth_l1_loss mse_loss huber_loss "
    "binary_cross_entropy_with_logits"
)
"""What autocast computes in float32 on CUDA; its list for the CPU is another."""


@contextlib.contextmanager
def autocast_as_on_cuda() -> Iterator[None]:
    """Context in which autocast treats tensors on the CPU as it would treat them on a GPU."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def in_float32(op: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wide = [_widened(a) for a in args]
            with torch._C._ExcludeDispatchKeyGuard(key):
                return op(*wide, **{name: _widened(a) for name, a in kwargs.items()})

        return call

    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():  # it tells that a kernel is replaced
            warnings.simplefilter("ignore")
            for name in _FLOAT32_ON_CUDA.split():
                packet, _, overload = name.partition(".")
                op = getattr(getattr(torch.ops.aten, packet), overload or "default")
                library.impl(op, in_float32(op), "AutocastCPU")
        yield
    finally:
        library._destroy()


def _widened(value: Any) -> Any:
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


_has_storage: Callable[[torch.Tensor], bool] = _lookup("torch._C", "_has_storage")


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that tensors have in common which share memory, fake ones included."""
    return int(tensor.untyped_storage()._cdata) if _has_storage(tensor) else id(tensor)


def storage_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of the memory that a tensor lies in, as they are while compiling.

    A sparse tensor has none of its own, but lies in others that nobody here is told of.
    """
    if not _has_storage(tensor):
        return 0
    size = tensor.untyped_storage().nbytes()
    return (size_hint(size) or 0) if isinstance(size, torch.SymInt) else int(size)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the memory that `tensors` lie in, shared memory once."""
    return sum({storage_key(t): storage_bytes(t) for t in tensors}.values())


def fused_attention_choice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> int:
    """Return the attention kernel chosen for real tensors: 0 is the unfused one."""
    return int(torch.ops.aten._fused_sdp_choice(q, k, v, **kwargs))


def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    back: int,
    ahead: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and logsumexp of FlashAttention over packed rows; -1 is no limit."""
    causal = (back, ahead) == (-1, 0)
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, 0.0, causal, False,
        scale=scale, window_size_left=back, window_size_right=ahead,
    )  # fmt: skip
    return found[0], found[1]


def flash_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    back: int,
    ahead: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `flash_forward` by q, k and v."""
    causal = (back, ahead) == (-1, 0)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
    found = torch.ops.aten._flash_attention_backward(
        gradient, q, k, v, output, logsumexp, offsets, offsets, longest, longest, 0.0, causal,
        state, torch.empty(0, device=q.device), scale=scale,
        window_size_left=back, window_size_right=ahead,
    )  # fmt: skip
    return found[0], found[1], found[2]


def wrapper_like(kind: type[torch.Tensor], like: torch.Tensor) -> Any:
    """Return a `kind` without memory that looks like `like`; it handles operators by itself."""
    return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        kind, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
    )


class _DecompositionsWithout(dict[Any, Any]):
    """Inductor's decompositions but for those of `packets`; keys of caches hold their names.

    PyTorch pickles the table for its key, and takes nothing from its cache if it cannot: some
    decompositions are functions of C++.
    """

    def __init__(self, table: dict[Any, Any], packets: tuple[Any, ...]) -> None:
        kept = {op: f for op, f in table.items() if getattr(op, "overloadpacket", 0) not in packets}
        super().__init__(kept)
        self.packets = packets

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (f"without {', '.join(map(str, self.packets))}",)


def decompositions_without(*packets: Any) -> dict[Any, Any] | None:
    """Return Inductor's decompositions but for those of `packets`; None for its own table."""
    select = _lookup("torch._inductor.decomposition", "select_decomp_table", required=False)
    return None if select is None else _DecompositionsWithout(select(), packets)


def wants_channels_last(gm: torch.fx.GraphModule) -> bool:
    """Return whether Inductor would lay out AOTAutograd's graph with the channels innermost."""
    lowering = _lookup("torch._inductor.graph", "GraphLowering", required=False)
    decide = getattr(lowering, "decide_layout_opt", None)
    return decide is not None and bool(decide(gm, is_inference=False))


def size_hint(size: int | torch.SymInt) -> int | None:
    """Return a size as it is while compiling, without fixing it to that; None if unknown."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return hint if isinstance(hint, int) else None


def known_size(size: int | torch.SymInt) -> int | torch.SymInt:
    """Return a size as a number if it has turned out to be one."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size


def size_divisor(size: torch.SymInt) -> int:
    """Return what must divide a dynamic size without rest, by what was found while tracing.

    Tracing asks in many forms: `Mod(s, 2) == 0`, `4*s == 8*(s//2)`. So the numbers that sizes are
    divided by are tried: what must divide lets its multiples pass, and nothing between them.
    """
    symbol, asked = size.node.expr, []
    for guard in size.node.shape_env.guards:
        quotients = [e for e in guard.expr.atoms(*_QUOTIENTS) if e.args[0].has(symbol)]
        divisors = {int(e.args[1]) for e in quotients if e.args[1].is_Integer}
        if divisors:
            others = dict.fromkeys(guard.expr.free_symbols - {symbol}, 120)
            asked.append((guard.expr.subs(others), divisors))

    def passes(value: int) -> bool:
        return all(bool(expr.subs(symbol, value) == True) for expr, _ in asked)  # noqa: E712

    found = 1
    for d in set().union(*(divisors for _, divisors in asked)):
        rests = {r for r in range(1, d) if d % r == 0} | {d - 1} if d > 1 else set()
        if rests and passes(4 * d) and not any(passes(4 * d + r) for r in rests):
            found = math.lcm(found, d)
    return found


def size_symbols(size: torch.SymInt) -> list[Any]:
    """Return the symbols that a dynamic size is computed from."""
    return sorted(size.node.expr.free_symbols, key=str)


def evaluate_size(size: torch.SymInt, values: Mapping[Any, int]) -> int:
    """Return a dynamic size where its symbols have `values`."""
    return int(size.node.expr.subs(dict(values)))


def symbol_bounds(size: torch.SymInt) -> tuple[int, int | None]:
    """Return the range that a dynamic size may take, its upper end None where there is none."""
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    known = bounds.upper.is_Integer  # infinity is none
    return int(bounds.lower), int(bounds.upper) if known else None


@contextlib.contextmanager
def forgetting_sizes(mode: Any) -> Iterator[None]:
    """Context under a fake mode, whose values nobody keeps: their data-dependent sizes are none."""
    shapes = mode.shape_env
    ignoring = shapes.ignore_fresh_unbacked_symbols() if shapes else contextlib.nullcontext()
    with mode, ignoring:
        yield


def size_conditions(sizes: Sequence[tuple[str, torch.SymInt]]) -> list[str]:
    """Return what tracing found out about dynamic sizes, beyond the range of each.

    Args:
        sizes: Name and size of every dynamic dimension of the inputs of one trace.

    Returns:
        Python expressions over the names: "sequence % 2 == 1", "y_0 == 2*sequence".
    """
    if not sizes:
        return []
    env = sizes[0][1].node.shape_env
    given = [(name, size.node.expr) for name, size in sizes]
    names = {expr: _named(expr, name) for name, expr in reversed(given) if expr.is_symbol}
    printer = _PythonPrinter()

    def text(expr: Any) -> str:
        written: str = printer.doprint(expr.xreplace(names))
        return written.replace("torch.sym_float", "float").replace("torch._sym_sqrt", "math.sqrt")

    found = []
    for name, expr in given:
        symbols = expr.free_symbols
        if len(symbols) == 1 and not symbols <= names.keys():  # as of 2*Dim("pairs") + 1
            (symbol,) = symbols
            factor, rest = expr.coeff(symbol), expr.subs(symbol, 0)
            if expr == factor * symbol + rest and factor.is_Integer and rest.is_Integer:
                names[symbol] = _FloorDiv(_named(symbol, name) - rest, factor)
                found.append(f"{name} % {factor} == {rest % factor}")
        elif symbols <= names.keys() and not expr.is_symbol:
            found.append(f"{name} == {text(expr)}")
    for guard in env.guards:
        expr = env.replace(guard.expr)
        open_ended = expr.free_symbols and expr.free_symbols <= names.keys()
        if open_ended and env.bound_sympy(expr).lower != True:  # noqa: E712  (sympy's True)
            found.append(text(expr))
    return [*dict.fromkeys(found)]


def _named(symbol: Any, name: str) -> Any:
    return type(symbol)(name, **symbol.assumptions0)


_UNTRACED = "_torchdynamo_orig_callable"
"""Where Dynamo keeps a method that it replaced; it does so to optimizers when it first compiles."""


def own_step(kind: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """Return an optimizer class's step without the wrapper that runs step hooks."""
    step: Any = kind.step
    while getattr(step, "hooked", False) or hasattr(step, _UNTRACED):
        step = getattr(step, _UNTRACED, None) or step.__wrapped__
    return step


def steps_like(kind: type[torch.optim.Optimizer], base: type[torch.optim.Optimizer]) -> bool:
    """Return whether an optimizer class takes its step, and the state it makes, from `base`."""
    first, second = (getattr(k, "_init_group", None) for k in (kind, base))
    same_state = getattr(first, _UNTRACED, first) is getattr(second, _UNTRACED, second)
    return issubclass(kind, base) and own_step(kind) is own_step(base) and same_state


def step_is_replaced(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an instance has a step that is not its class's; LRScheduler's does not count.

    LRScheduler puts a function on the instance that notes the call and runs the class's step.
    """
    step: Any = optimizer.__dict__.get("step")
    if step is None:
        return False
    scheduled = getattr(step, "_wrapped_by_lr_sched", False)
    return not (scheduled and step.__wrapped__ is type(optimizer).step)


def subclass_before(
    own: type[torch.optim.Optimizer], before: type, **members: Any
) -> type[torch.optim.Optimizer]:
    """Return a subclass of `own` that bears its name, with `before` before it.

    The step is that of `before`, and runs step hooks as torch's classes do.
    """
    step: Any = torch.optim.Optimizer.profile_hook_step(before.step)  # type: ignore[attr-defined]
    step.hooked = True
    members |= {"step": step, "__doc__": own.__doc__}
    members |= {"__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (before, own), members)


def change_class(optimizer: torch.optim.Optimizer, kind: type[torch.optim.Optimizer]) -> None:
    """Give an optimizer another class, and its schedulers' wrapper that class's step."""
    optimizer.__class__ = kind
    if "step" not in optimizer.__dict__:
        return
    reference, call = weakref.ref(optimizer), kind.step

    @functools.wraps(call)
    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer: Any = reference()
        optimizer._opt_called = True
        return call(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.__dict__["step"] = step


def capture_failure_text(error: BaseException) -> str:
    """Return why Dynamo gave up, with the user's line, in a sentence or two."""
    if isinstance(error, RecompileLimitHit or ()):
        changed = _last_recompilation(error)
        more = f": {changed}" if changed else ""
        return (
            f"compiled {dynamo_config.recompile_limit} times, and something has changed again{more}"
        )
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    named = lines and lines[0] != "from user code:"  # a bare assertion of Dynamo's says nothing
    text = lines[0] if named else type(error).__name__
    explanation = next((line for line in lines if line.startswith("Explanation:")), "")
    where = ""
    if "from user code:" in lines:
        frames = [
            i for i, line in enumerate(lines) if line.startswith("File ") and ", line " in line
        ]
        if frames:
            code = lines[frames[-1] + 1] if frames[-1] + 1 < len(lines) else ""
            where = f" at {lines[frames[-1]]}: {code}"
    return f"{text}{'. ' + explanation if explanation else ''}{where}"


def _last_recompilation(error: BaseException) -> str:
    """Return which guard sent Dynamo to compile once more, with the user's line; "" if unknown."""
    for each in (error, error.__cause__):
        trace = each.__traceback__ if each is not None else None
        while trace is not None:
            reason = trace.tb_frame.f_locals.get("recompile_reason")
            if isinstance(reason, str):
                said = reason.partition(": ")[2].partition("(HINT")[0]
                return " ".join(said.partition("User stack trace:")[0].split())
            trace = trace.tb_next
    return ""


def enters_a_lock(failure: str) -> bool:
    """Return whether a capture failed, in the words of `capture_failure_text`, at `with lock:`."""
    return "a `lock` context manager" in failure


def breaks_at_a_gradient(failure: str) -> bool:
    """Return whether a capture failed at torch.autograd.grad, of what two graphs would compute.

    Both ends of it may be outputs of the first one, so that autograd knows no way between them.
    """
    return not WHILE_COMPILING.get("trace_autograd_ops", False) and "autograd.grad" in failure


def inner_backend_error(error: BaseException) -> BaseException:
    """Return what a backend raised, without the wrapper that Dynamo puts around it."""
    inner = getattr(error, "inner_exception", None)
    return inner if isinstance(inner, BaseException) else error


def live_example(placeholder: torch.fx.Node) -> Any:
    """Return the live tensor that Dynamo saw for a graph input, or None."""
    argument = placeholder.meta.get("grapharg")
    if argument is None:
        return None
    try:
        return argument.example
    except (AssertionError, ReferenceError, RuntimeError):  # the weak reference is dead
        return None


def with_inputs(
    gm: torch.fx.GraphModule, values: Mapping[str, torch.Tensor]
) -> torch.fx.GraphModule:
    """Return a copy of Dynamo's graph with more inputs, last, and the metadata AOTAutograd reads.

    A copy, because Dynamo goes on to read the placeholders of its own.
    """
    copied = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta = dict(gm.meta)
    placeholders = copied.graph.find_nodes(op="placeholder")
    for old, new in zip(gm.graph.find_nodes(op="placeholder"), placeholders, strict=True):
        new._dynamo_source = getattr(old, "_dynamo_source", None)
    for name, value in values.items():
        with copied.graph.inserting_after(placeholders[-1]):
            placeholders.append(copied.graph.placeholder(name))
        placeholders[-1].meta["example_value"] = value
        placeholders[-1]._dynamo_source = None  # no variable of the user's
    copied.recompile()
    return copied


def empty_like_inputs(
    inputs: Sequence[Any], numel: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return a new vector, fake if `inputs` are."""
    fakes = [x for x in inputs if isinstance(x, FakeTensor)]
    with fakes[0].fake_mode if fakes else contextlib.nullcontext():
        return torch.empty(numel, dtype=dtype, device=device)


def give_up_memory(examples: Iterable[torch.Tensor]) -> None:
    """Free what example inputs of a compilation take; torch 2.11 keeps real ones for good."""
    for example in examples:
        if not isinstance(example, FakeTensor):
            example.untyped_storage().resize_(0)


def is_higher_order(target: object) -> bool:
    """Return whether a node calls an operator that takes graphs, such as a checkpointed region."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def autocast_dtype(gm: torch.fx.GraphModule, device_type: str) -> torch.dtype | None:
    """Return what autocast casts to around or inside a captured graph, None where it is off."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    for node in gm.graph.nodes:
        if node.target is torch.amp.autocast_mode._enter_autocast and node.args[2]:
            return node.args[1] or torch.get_autocast_dtype(device_type)  # type: ignore[no-any-return]
    return None


def is_non_overlapping_and_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor fills its storage without gaps, in whatever order."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def source_name(placeholder: torch.fx.Node) -> str:
    """Return the expression by which Dynamo reads a graph input, "" if unknown."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")  # a method in older versions
    return str(name() if callable(name) else name)


_storage_uses: Callable[[int], int] = _lookup("torch._C", "_storage_Use_Count")
graph_is_retained: Callable[[], bool] = _lookup(
    "torch._C._autograd", "_get_current_graph_task_keep_graph"
)
_saved_tensors_hooks: Callable[[bool], Any] = _lookup(
    "torch._C._autograd", "_top_saved_tensors_default_hooks"
)


def loss_scale(scaler: torch.amp.GradScaler) -> float | torch.Tensor:
    """Return what `scaler` multiplies losses with: a tensor `[]` on its device once it has one."""
    scale = scaler._get_scale_async() if scaler.is_enabled() else None
    return scaler.get_scale() if scale is None else scale


def storage_uses(storage: torch.UntypedStorage) -> int:
    """Return how many tensors and handles share this memory."""
    return _storage_uses(storage._cdata)


def hooks_of_modules(module: torch.nn.Module) -> list[Mapping[int, Any]]:
    """Return where `module` and those in it keep their hooks: the dicts themselves."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return [
        vars(m)[kind] for m in module.modules() for kind in kinds if vars(m).get(kind) is not None
    ]


def is_compiled_node(node: Any) -> bool:
    """Return whether an autograd node is that of a graph that AOTAutograd has compiled."""
    return type(node).__name__ == "CompiledFunctionBackward"


def run_again_afterwards(node: Any, fresh: bool) -> Callable[[], None] | None:
    """Let a compiled backward that is about to run be run once more; return what it owes then.

    Generated code writes over some of what was saved ("donated buffers", which are neither inputs
    nor outputs), and AOTAutograd refuses to run it twice, by a list that is emptied here for good.

    Args:
        node: Of the backward.
        fresh: Whether what was saved is another tensor for each backward: nothing is owed.
    """
    metadata = node._forward_cls.metadata
    if not hasattr(metadata, "_magi_donated"):
        metadata._magi_donated, metadata.bw_donated_idxs = metadata.bw_donated_idxs or [], []
    if fresh or not metadata._magi_donated:
        return None
    saved = [*node.saved_tensors, *getattr(node, "_tensors_no_vc_check", ())]
    first = metadata.num_symints_saved_for_bw
    donated = [saved[i - first] for i in metadata._magi_donated]
    with torch.no_grad():  # a host's copy of an activation is read only, and may still be written
        all_on_host = all(t is None or t.is_cpu for t in saved)
        donated = [t for t in donated if t is not None and (all_on_host or not t.is_cpu)]
        kept = [(t, t.clone()) for t in donated]

    def put_back() -> None:
        for tensor, before in kept:
            tensor.data.copy_(before)

    return put_back


def is_hooked(tensor: torch.Tensor) -> bool:
    """Return whether somebody's hook is to see, and may change, the gradient of `tensor`."""
    return bool(tensor._backward_hooks)


def forward_mode_is_on() -> bool:
    """Return whether the user computes forward-mode derivatives, which no compiled graph has."""
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def saved_tensors_are_hooked() -> bool:
    """Return whether the user's hooks see what is saved for a backward (offloading, for one)."""
    return _saved_tensors_hooks(True) is not None


def before_clipping(ask: Callable[[Sequence[torch.Tensor], float], bool]) -> None:
    """Let `ask(parameters, max_norm)` say before each `clip_grad_norm_` whether torch may scale.

    It looks this function up at each call, so it does not matter how a script has imported it.
    """
    module: Any = torch.nn.utils.clip_grad
    scale = getattr(module, "_clip_grads_with_norm_", None)
    if scale is None:
        return

    def ask_first(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> None:
        parameters = [parameters] if torch.is_tensor(parameters) else list(parameters)
        if ask(parameters, float(max_norm)):
            scale(parameters, max_norm, *args, **kwargs)

    module._clip_grads_with_norm_ = ask_first


def end_failed_capture(device: int, pool: tuple[int, int]) -> None:
    """Stop the allocator from serving a capture whose end raised; nothing if it has stopped."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    release = getattr(torch._C, "_cuda_releasePool", None)
    if end is None or release is None:
        return
    with contextlib.suppress(RuntimeError):  # it has stopped, and the graph releases its pool
        end(device, pool)
        release(device, pool)


def last_collective() -> str:
    """Return what torch's flight recorder knows about this process's last collective."""
    bindings = __import__("torch._C", fromlist=["_distributed_c10d"])._distributed_c10d
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # NCCL's, then everybody's
        dump = getattr(bindings, name, None)
        entries = json.loads(dump()).get("entries", []) if dump is not None else []
        if entries:
            last = entries[-1]
            sizes = ", ".join(map(str, last.get("input_sizes", []))) or "nothing"
            begun = last.get("time_created_ns", 0) / 1e9
            return (
                f"{last.get('profiling_name')} of {sizes}, number {last.get('collective_seq_id')} "
                f"in {' '.join(last.get('process_group', []))}, begun {time.time() - begun:.0f} s "
                f"ago, {'ended' if last.get('retired') else 'not ended'}"
            )
    return "none recorded"


def peer_memory(
    num_bytes: int, device: torch.device, timeout_seconds: float
) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Map memory on the GPUs of all ranks of the default group; a collective.

    Returns:
        By rank, its memory `[num_bytes]` of uint8; and what makes the current stream wait until
        that of every rank has come to the same call, or fail after `timeout_seconds`.

    Raises:
        RuntimeError: This torch, or these GPUs, cannot.
    """
    try:
        symmetric: Any = __import__("torch.distributed._symmetric_memory", fromlist=["empty"])
        mine = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(mine, torch.distributed.group.WORLD)
        # newer ones take memory from a pool, where it is free again once nobody holds `mine`
        buffers = [
            mine if r == handle.rank else handle.get_buffer(r, (num_bytes,), torch.uint8)
            for r in range(handle.world_size)
        ]
    except (ImportError, AttributeError, TypeError) as error:
        raise RuntimeError(f"no symmetric memory: {error}") from error
    milliseconds = int(1e3 * timeout_seconds)
    return buffers, lambda: handle.barrier(channel=0, timeout_ms=milliseconds)


def clone_store(store: Any) -> Any:
    """Return a second connection to `store`, so that two threads never wait for one lock."""
    try:
        return store.clone()
    except (AttributeError, NotImplementedError, RuntimeError):
        return store


def ordered(graph: torch.fx.Graph, after: Mapping[torch.fx.Node, Sequence[torch.fx.Node]]) -> None:
    """Pin that each node of `after` runs after the nodes it maps to."""
    preserve_node_ordering(graph, {node: OrderedSet(deps) for node, deps in after.items()})


def warn_about_version() -> None:
    """Log what is known about this torch: missing names, or a version nobody has tried."""
    if _missing:
        logger.warning(
            "magi-train runs in the EAGER tier: this torch lacks %s", "; ".join(_missing)
        )
    elif torch_version() > NEWEST_TORCH_SEEN:
        newest = ".".join(map(str, NEWEST_TORCH_SEEN))
        logger.info(
            "torch %s is newer than %s, the newest magi-train was run on", torch.__version__, newest
        )
