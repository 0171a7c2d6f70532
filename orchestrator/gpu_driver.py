"""The GPUs of this machine as the driver tells them, without torch."""

import contextlib
import functools
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Bytes a second over 16 lanes of each generation of PCIe, from page-locked memory (docs/benchmarks/memory.md).
PCIE_BYTES = {3: 13.2e9, 4: 26.5e9, 5: 55.5e9}


@dataclass(frozen=True, slots=True)
class GpuInfo:
    index: int
    name: str
    total_bytes: int
    free_bytes: int
    driver: str
    link: float = 0.0  # bytes a second from page-locked memory, at most; 0 where the driver doesn't tell


def list_gpus() -> list[GpuInfo]:
    """Return NVIDIA GPUs in the driver's order, as far as CUDA_VISIBLE_DEVICES lets them be seen.

    Empty where there are none or no driver.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    with contextlib.ExitStack() as stack:
        stack.callback(pynvml.nvmlShutdown)
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        gpus: list[GpuInfo] = []
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        uuids = [_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        for index in visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids):
            handle = handles[index]
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = _text(pynvml.nvmlDeviceGetName(handle))
            gpus.append(GpuInfo(index, name, memory.total, memory.free, driver, _link(handle)))
        return gpus


def visible_gpus(value: str | None, uuids: Sequence[str]) -> list[int]:
    """Return the numbers of the GPUs with these UUIDs that a value of CUDA_VISIBLE_DEVICES names, in ascending order.

    Numbers are nvidia-smi's; a UUID may be cut short. As for CUDA, what follows a name that fits no GPU is not seen.
    """
    if value is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for name in (part.strip() for part in value.split(",")):
        numbers = [
            number
            for number, uuid in enumerate(uuids)
            if name == str(number) or (name.startswith("GPU-") and uuid.startswith(name))
        ]
        if len(numbers) != 1:
            break
        found += numbers
    return sorted(set(found))


def _link(handle: Any) -> float:
    import pynvml

    try:
        generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
        lanes = pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
    except pynvml.NVMLError:
        return 0.0
    return PCIE_BYTES.get(generation, 0.0) * int(lanes) / 16


def label_of(host: str, index: int) -> str:
    """Return how a GPU is called: by its number, with its host where that is another one than this."""
    return str(index) if host == socket.gethostname() else f"{host}:{index}"


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
