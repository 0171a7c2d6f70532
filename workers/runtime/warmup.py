"""The start-up costs of a GPU's first computation, paid while the model is still looked up and loaded.

The context, the libraries for products, attention and convolutions, and the kernels that every model has: all are
loaded when they are first used.
"""

import contextlib
import ctypes
import logging
import os
import threading

import torch
from torch.nn import functional

log = logging.getLogger(__name__)


class WarmUp:
    """The warm-up of a GPU, in a thread that starts at once; nothing at all on other devices."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device, self._dtype = torch.device(device), dtype
        self._thread = threading.Thread(target=self._run, name="warm-up", daemon=True)
        if self._device.type == "cuda":
            self._thread.start()

    def join(self) -> None:
        if self._device.type == "cuda":
            self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # another vendor's GPU, or another system
            make_context(self._device.index or 0)
        try:
            with torch.cuda.device(self._device):
                compute_a_little(self._device, self._dtype)
                torch.cuda.synchronize()
        except Exception as error:  # whoever needs the GPU will tell what is wrong with it
            log.info("no warm-up: %s", error)


def make_context(gpu: int) -> None:
    """Make the CUDA context of a GPU, as this process counts them, by the driver alone; torch will find it there.

    Other threads go on loading meanwhile: torch, which makes one while it keeps all others from Python, would let them
    wait for about 0.3 s.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does
    driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), gpu) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


@torch.no_grad()
def compute_a_little(device: torch.device, dtype: torch.dtype) -> None:
    """Do one computation of each kind, on next to nothing."""
    square = torch.zeros(256, 256, dtype=dtype, device=device)
    functional.linear(square, square, square[0])
    heads = square.view(1, 2, 256, 128)
    functional.scaled_dot_product_attention(heads, heads, heads)
    functional.conv2d(square.view(1, 64, 32, 32), square.view(-1)[: 64 * 64 * 9].view(64, 64, 3, 3), padding=1)
    functional.group_norm(square.view(1, 64, 32, 32), 8)
    wide = square.float()
    for values in (square, wide):
        functional.layer_norm(values, (256,))
        functional.gelu(values, approximate="tanh")
        functional.silu(values)
        torch.cat([values + values[:, :1] * values, values * 2 - 1], dim=-1).mean(-1, keepdim=True)
        torch.rsqrt(values.pow(2) + 1)
        torch.stack([-values, values], dim=-1).flatten(-2)
        torch.isfinite(values).all()
    torch.arange(256, device=device).float().mul(-1).exp().cos().sin().to(dtype)
