"""The GPUs of this machine as the driver tells them, without torch."""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gpu:
    index: int
    name: str
    total_bytes: int
    free_bytes: int
    driver: str


def list_gpus() -> list[Gpu]:
    """NVIDIA GPUs in the driver's order; empty where there are none or no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    with contextlib.ExitStack() as stack:
        stack.callback(pynvml.nvmlShutdown)
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        gpus: list[Gpu] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(Gpu(index, _text(pynvml.nvmlDeviceGetName(handle)), memory.total, memory.free, driver))
        return gpus


def used_bytes(index: int) -> int | None:
    """Bytes in use on a GPU by its driver's count, contexts included; None where it can't be asked."""
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(_handle(index)).used)
    except pynvml.NVMLError:
        return None


@functools.cache
def _handle(index: int) -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByIndex(index)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
