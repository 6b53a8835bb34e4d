"""`magi doctor`: what this machine and environment give, what will be used, and what to do.

Each check returns lines with a status: ok, warn (training runs, but slower or with less) or fail
(training does not run). No kernel is started: the driver is asked through NVML, and torch for what
NVML does not know. What is not installed is said so, never an error.
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from magi_train.core import compat, hardware, settings
from magi_train.core.errors import SettingError
from magi_train.core.versions import installed, own

Status = Literal["ok", "warn", "fail"]
OPTIONAL = {
    "triton": "kernels for CUDA come from it; pip install triton",
    "lightning": 'Trainer(strategy="magi") needs it or pytorch-lightning',
    "pytorch-lightning": 'Trainer(strategy="magi") needs it or lightning',
    "transformers": "only models from it need it",
    "deepspeed": "only its ZeRO engine needs it",
}
LOW_DISK_GIB = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        area: What was looked at.
        status: ok, warn or fail.
        found: What was found.
        do: What to do about it; "" where there is nothing to do.
    """

    area: str
    status: Status
    found: str
    do: str = ""


def examine(as_json: bool = False) -> int:
    """Print the findings; return 1 if one is a failure, else 0."""
    findings = diagnose()
    if as_json:
        sys.stdout.write(json.dumps([asdict(f) for f in findings], indent=2) + "\n")
    else:
        width = max(len(f.area) for f in findings)
        for f in findings:
            sys.stdout.write(f"{f.status:4}  {f.area:{width}}  {f.found}\n")
            if f.do:
                sys.stdout.write(f"{'':{width + 6}}  -> {f.do}\n")
    return 1 if any(f.status == "fail" for f in findings) else 0


def diagnose() -> list[Finding]:
    """Return all findings, in the order in which they are read best."""
    checks: list[Callable[[], Iterable[Finding]]] = [
        _python,
        _torch,
        _packages,
        _compiler,
        _gpus,
        _links,
        _machine,
        _settings,
        _use,
    ]
    return [finding for check in checks for finding in check()]


def _python() -> Iterable[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")
    yield Finding("magi-train", "ok", own())


def _torch() -> Iterable[Finding]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    found = f"{torch.__version__} ({build})"
    missing = compat.problems()
    if compat.torch_version() < compat.OLDEST_TORCH:
        oldest = ".".join(map(str, compat.OLDEST_TORCH))
        yield Finding("torch", "fail", found, f"install torch {oldest} or later")
    elif missing:
        text = f"{found}; it lacks {'; '.join(missing)}, so models run in the EAGER tier"
        yield Finding("torch", "warn", text, "install a torch that magi-train was run on")
    elif compat.torch_version() > compat.NEWEST_TORCH_SEEN:
        yield Finding("torch", "ok", f"{found}, newer than any that magi-train was run on")
    else:
        yield Finding("torch", "ok", found)


def _packages() -> Iterable[Finding]:
    lightnings = [n for n in ("lightning", "pytorch-lightning") if installed(n)]
    for name, use in OPTIONAL.items():
        version = installed(name)
        needed = name == "triton" and torch.version.cuda is not None
        if version is None and name in ("lightning", "pytorch-lightning") and lightnings:
            continue
        status: Status = "warn" if version is None and needed else "ok"
        absent = f"not installed: {use}"
        todo = f"pip install {name}" if status != "ok" else ""
        yield Finding(name, status, version or absent, todo)
    if lightnings and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        yield Finding(
            "strategy names",
            "warn",
            'TORCH_DEVICE_BACKEND_AUTOLOAD=0, so Lightning does not know strategy="magi" by itself',
            "import magi_train.integrations.lightning in the script, or unset the variable",
        )


def compiler() -> str | None:
    """Return the C++ compiler that Inductor would call for CPU code, None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def _compiler() -> Iterable[Finding]:
    path = compiler()
    if path is not None:
        yield Finding("C++ compiler", "ok", path)
    else:
        yield Finding(
            "C++ compiler",
            "warn" if torch.cuda.is_available() else "fail",
            "none: graphs with CPU code cannot be compiled",
            'apt-get install g++, or Config(lowering="aot_eager") (--magi.lowering=aot_eager)',
        )


def _gpus() -> Iterable[Finding]:
    found = hardware.devices_in_use()
    if not found:
        yield _without_nvml()
        return
    text = f"{found['gpus']}; driver {found['driver']}"
    if torch.cuda.is_available():
        yield Finding("GPUs", "ok", text)
    elif torch.version.cuda is None:
        text += "; torch is built without CUDA"
        yield Finding("GPUs", "warn", text, "install a CUDA build of torch")
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "driver too old?" if visible is None else f"CUDA_VISIBLE_DEVICES={visible}"
        todo = f"install a driver for CUDA {torch.version.cuda}, or correct the variable"
        yield Finding("GPUs", "fail", f"{text}; torch cannot use them ({why})", todo)


def _without_nvml() -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("GPUs", "ok", f"{', '.join(names)}; NVML is silent")
    known = installed("nvidia-ml-py") is not None
    why = "NVML finds no NVIDIA driver" if known else "nvidia-ml-py is not installed"
    return Finding("GPUs", "warn", f"none ({why}): training runs on the CPU")


def _links() -> Iterable[Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return
    without = [
        f"{a}-{b}"
        for a in range(count)
        for b in range(a + 1, count)
        if not torch.cuda.can_device_access_peer(a, b)
    ]
    if without:
        text = f"no peer-to-peer between GPUs {', '.join(without)}: gradients go through the host"
        yield Finding("links", "warn", text, "nvidia-smi topo -m shows why")
    else:
        yield Finding("links", "ok", f"peer-to-peer between all {count} GPUs")


def _machine() -> Iterable[Finding]:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    yield Finding("cores", "ok", f"{cores} for this process")
    gib = shutil.disk_usage(os.getcwd()).free / 2**30
    low = gib < LOW_DISK_GIB
    todo = "free some: checkpoints may not fit" if low else ""
    yield Finding("disk", "warn" if low else "ok", f"{gib:.0f} GiB free in {os.getcwd()}", todo)
    if os.path.isdir("/dev/shm"):
        mib = shutil.disk_usage("/dev/shm").total / 2**20
        small = mib < 1024
        todo = "docker run --shm-size=8g, or DataLoader workers may end by SIGBUS" if small else ""
        yield Finding("/dev/shm", "warn" if small else "ok", f"{mib:.0f} MiB", todo)


def _settings() -> Iterable[Finding]:
    try:
        found = settings.from_environment()
    except SettingError as error:
        yield Finding("settings", "fail", str(error), f"correct or unset {settings.VARIABLE}")
        return
    if found:
        yield Finding("settings", "ok", f"{settings.VARIABLE}: {settings.to_words(found)}")


def _use() -> Iterable[Finding]:
    cuda = torch.cuda.is_available()
    triton = installed("triton") is not None
    best = "the highest tier that a model reaches"
    if compat.problems():
        yield Finding("tier", "warn", "EAGER: this torch lacks what capture needs")
    elif triton if cuda else compiler():
        yield Finding("tier", "ok", f"{best}, compiled to {'Triton' if cuda else 'C++'}")
    else:
        lacking = "triton" if cuda else "a C++ compiler"
        todo = f'install {lacking}, or Config(lowering="aot_eager")'
        yield Finding("tier", "fail", f"{best}, but compiling needs {lacking}", todo)
    kernel = "one kernel of ours" if cuda and triton else "torch's: ours needs CUDA and triton"
    yield Finding("optimizer steps", "ok", kernel)
    why = hardware.no_fp8_because("cuda" if cuda else "cpu")
    fp8 = f"not possible: {why}" if why else 'possible: Config(precision="fp8")'
    yield Finding("fp8", "ok", fp8)
    backend = "nccl" if cuda and torch.distributed.is_nccl_available() else "gloo"
    yield Finding("ranks talk through", "ok", backend)
