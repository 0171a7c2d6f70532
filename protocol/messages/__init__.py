"""The messages of protocol version 1: one small class a kind, unknown fields refused. One module for each peer.

`request` is the client's number for its question; the answer carries it back. Tensors travel beside a message, as
frames: see wire.py.
"""

from protocol.messages.client import FROM_CLIENT, TO_CLIENT
from protocol.messages.common import Message
from protocol.messages.describer import FROM_DESCRIBER, TO_DESCRIBER
from protocol.messages.host import FROM_HOST, TO_HOST
from protocol.messages.supervisor import FROM_SUPERVISOR, TO_SUPERVISOR
from protocol.messages.worker import FROM_WORKER, TO_WORKER

EVERY_MESSAGE: tuple[type[Message], ...] = tuple(
    dict.fromkeys(
        FROM_WORKER + FROM_HOST + FROM_SUPERVISOR + FROM_DESCRIBER + FROM_CLIENT
        + TO_WORKER + TO_HOST + TO_SUPERVISOR + TO_DESCRIBER + TO_CLIENT
    )
)  # fmt: skip
