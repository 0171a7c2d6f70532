"""What a GPU's first computation waits for, done while the weights are still on their way.

The context, and the libraries for products, attention and convolutions, which are loaded when they are first used.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator

import torch
from torch.nn import functional

log = logging.getLogger(__name__)


@contextlib.contextmanager
def warming_up(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Beside what goes on within; it has ended when that ends."""
    if device.type != "cuda":
        yield
        return
    thread = threading.Thread(target=_warm_up, args=(device, dtype), name="warm-up")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _warm_up(device: torch.device, dtype: torch.dtype) -> None:
    try:
        compute_a_little(device, dtype)
        torch.cuda.synchronize(device)
    except RuntimeError as error:  # a full GPU, say: whoever needs it will tell
        log.info("no warm-up: %s", error)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


@torch.no_grad()
def compute_a_little(device: torch.device, dtype: torch.dtype) -> None:
    """One of each kind of computation that libraries outside torch do."""
    square = torch.zeros(256, 256, dtype=dtype, device=device)
    functional.linear(square, square, square[0])
    square @ square
    heads = square.view(1, 2, 256, 128)
    functional.scaled_dot_product_attention(heads, heads, heads)
    image = square.view(1, 64, 32, 32)
    functional.conv2d(image, square.view(-1)[: 64 * 64 * 9].view(64, 64, 3, 3), padding=1)
