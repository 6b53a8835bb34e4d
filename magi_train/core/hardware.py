"""What the GPUs are: by the driver, without touching a CUDA context, and what they can compute."""

import logging

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
