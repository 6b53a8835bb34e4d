"""What the driver says about the GPUs, through NVML, without touching a CUDA context."""

import logging

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
