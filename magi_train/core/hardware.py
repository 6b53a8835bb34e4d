"""What the GPUs are and how fast: by the driver, without a CUDA context where that is enough."""

import contextlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def devices_in_use() -> dict[str, str]:
    """Return the driver's version, and name and memory of each kind of GPU; {} without a driver."""
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.debug("no NVIDIA driver: %s", error)
        return {}
    try:
        kinds: dict[str, int] = {}
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            gib = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
            kind = f"{pynvml.nvmlDeviceGetName(handle)}, {gib:.0f} GiB"
            kinds[kind] = kinds.get(kind, 0) + 1
        gpus = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
        return {"driver": str(pynvml.nvmlSystemGetDriverVersion()), "gpus": gpus}
    except pynvml.NVMLError as error:
        logger.warning("NVML answers only partly: %s", error)
        return {}
    finally:
        pynvml.nvmlShutdown()


def energy_counter() -> Callable[[], float] | None:
    """Return a function that reads the joules that the current CUDA device has used; None without.

    The driver counts since it was loaded, in millijoules (Volta and later).
    """
    if not torch.cuda.is_initialized():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (ImportError, AttributeError) as error:
        logger.debug("no energy counter: %s", error)
        return None
    except pynvml.NVMLError as error:  # a slice of a GPU has none of its own
        logger.debug("no energy counter: %s", error)
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


FP8_SINCE = (8, 9)
"""Compute capability of the first NVIDIA GPUs with fp8 matrix products (Ada)."""


def no_fp8_because(device_type: str) -> str:
    """Return why `torch._scaled_mm` would not run on this process's device, "" if it does."""
    if device_type != "cuda" or torch.version.hip is not None:
        kind = "ROCm" if device_type == "cuda" else device_type
        return f"fp8 is implemented for NVIDIA GPUs, and the model lies on {kind}"
    if not hasattr(torch.ops.aten, "_scaled_mm"):
        return f"torch {torch.__version__} has no _scaled_mm"
    have = torch.cuda.get_device_capability()
    if have < FP8_SINCE:
        name, needed = torch.cuda.get_device_name(), ".".join(map(str, FP8_SINCE))
        return f"{name} has compute capability {have[0]}.{have[1]}, fp8 products need {needed}"
    return ""


@dataclass(frozen=True)
class Speed:
    """What a roofline needs to know about a device.

    Attributes:
        flops: Operations a second of a large bfloat16 matrix product.
        bytes: Bytes a second from and to its memory.
        host: Bytes a second that a copy engine moves between it and pinned memory of its host, each
            way; 0: there is none.
    """

    flops: float
    bytes: float
    host: float = 0.0


PCIE_5, PCIE_4 = 45e9, 22e9
"""16 lanes: seven tenths of their rate, which is 63 and 31.5 GB/s [estimated]."""
SPEEDS = {
    "H200": Speed(790e12, 4.3e12, PCIE_5),  # measured; the others are 80 % of the data sheet
    "B200": Speed(1800e12, 6.4e12, PCIE_5),
    "H100": Speed(790e12, 2.7e12, PCIE_5),
    "A100": Speed(250e12, 1.6e12, PCIE_4),
    "L40": Speed(145e12, 0.69e12, PCIE_4),
}
OTHER_GPU, HOST = Speed(100e12, 0.8e12, PCIE_4 / 2), Speed(1e12, 50e9)


def speed_of(device_type: str) -> Speed:
    """Return the speed of the current device of a type; a typical one where it is unknown."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return HOST
    name = torch.cuda.get_device_name()
    return next((speed for known, speed in SPEEDS.items() if known in name), OTHER_GPU)


LINK_STEPS, LINK_PROBE_BYTES = 10, 2**29
"""More than the caches of a host hold, from which a copy would be faster."""


def measured_link(expected: float) -> float:
    """Return the bytes a second between the current CUDA device and its host, the slower way.

    At most what is expected, and in tenths of that, as compiled code depends on it. Takes some
    hundred milliseconds, most of it to pin memory.
    """
    there = torch.empty(LINK_PROBE_BYTES, dtype=torch.uint8, device="cuda")
    here = torch.empty(LINK_PROBE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    slowest = math.inf
    for target, source in ((here, there), (there, here)):
        target.copy_(source, non_blocking=True)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(3):
            target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        slowest = min(slowest, 3 * LINK_PROBE_BYTES / (begin.elapsed_time(end) / 1e3))
    return expected * max(1, min(LINK_STEPS, int(slowest / expected * LINK_STEPS))) / LINK_STEPS


HOST_SHARE = 0.25
"""Part of a host's memory that one step may pin, all ranks together: the host may be a step ahead
of the device, and pins for the next one then."""


def host_room_bytes(ranks: int) -> int:
    """Return how much memory of its host one rank may pin.

    Args:
        ranks: On all hosts; those of this one count where the launcher tells how many there are.
    """
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with contextlib.suppress(OSError, ValueError):
            size = min(size, int(Path("/sys/fs/cgroup", limit).read_text()))
    return int(size * HOST_SHARE) // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def pinned_bytes(size: int) -> int:
    """Return what PyTorch takes from the host for `size` bytes of pinned memory."""
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class Machine:
    """Speeds that decide where fp8 pays: of whole casts and products, where `Speed` is peaks.

    Attributes:
        bf16_tflops: Of a large bf16 product.
        fp8_tflops: Of a large fp8 product, forward and backward mixed.
        gb_per_second: What casts and maxima move.
        launch_us: Time that one more small kernel takes on the device.
    """

    bf16_tflops: float
    fp8_tflops: float
    gb_per_second: float
    launch_us: float


FP8_H200 = Machine(bf16_tflops=760.0, fp8_tflops=1300.0, gb_per_second=3400.0, launch_us=2.0)
"""Measured by benchmarks/fp8_cast.py. bf16: 741 to 772 for the products of a 1.24 B Llama. fp8:
1261 to 1463 with fast accumulation, 1185 to 1317 without. Bandwidth: the cast moves 3770 GB/s, a
maximum that nothing is fused with 2290."""


PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""{part of a GPU's name: dense bfloat16 operations a second by its data sheet}; first match."""


def peak_flops(name: str) -> float | None:
    """Return what utilisation is measured against on a GPU of a name; None if it is not known."""
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


CUBLAS_BYTES, CUBLAS_BYTES_HOPPER = 8 * 2**20 + 128 * 1024, 32 * 2**20
"""cuBLAS's default workspace, before and from compute capability 9.0 on."""
CUBLAS_HANDLES = 2


def cublas_bytes(capability: tuple[int, int]) -> int:
    """Return the workspaces that cuBLAS takes on a GPU of a compute capability: one a handle.

    A step was seen to hold two on an H200 with torch 2.11.
    """
    return CUBLAS_HANDLES * (CUBLAS_BYTES_HOPPER if capability >= (9, 0) else CUBLAS_BYTES)


@dataclass(frozen=True)
class Gpu:
    """A GPU that a step can be planned for without having one.

    Attributes:
        name: As the user calls it.
        memory_gib: What PyTorch calls its total capacity, rounded down.
        speed: For the roofline.
        capability: Compute capability.
    """

    name: str
    memory_gib: float
    speed: Speed
    capability: tuple[int, int] = (8, 0)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 178.3, SPEEDS["B200"], (10, 0)),
        Gpu("h200", 139.7, SPEEDS["H200"], (9, 0)),
        Gpu("h100", 79.1, SPEEDS["H100"], (9, 0)),
        Gpu("a100-80", 79.1, SPEEDS["A100"]),
        Gpu("a100-40", 39.3, SPEEDS["A100"]),
        Gpu("l40s", 44.3, SPEEDS["L40"], (8, 9)),
        Gpu("l4", 22.0, OTHER_GPU, (8, 9)),
        Gpu("rtx4090", 23.5, OTHER_GPU, (8, 9)),
    )
}


def device_memory_bytes() -> int:
    """Return the memory of the current CUDA device, as its driver says."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        import pynvml
    except ImportError:
        return int(properties.total_memory)
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        pynvml.nvmlShutdown()
    except (AttributeError, pynvml.NVMLError) as error:  # a slice of a GPU has another name
        logger.debug("NVML does not know this device: %s", error)
        return int(properties.total_memory)
    return min(total, int(properties.total_memory))
