"""A process that has imported everything and computed nothing, from which workers are forked in milliseconds.

    python -m workers.runtime.fork_server FD [--spare]

The supervisor asks through the socket FD, one datagram a worker: msgpack of its spec as JSON and its environment, and
the descriptors of its log, its lifeline and the pipe for its exit report. The answer is the worker's process number. A
worker is forked twice, so that it becomes the supervisor's own child (which is its subreaper). It never touches CUDA
here, so each worker may choose its GPUs; and it makes no threads, so a fork leaves none behind. Asked for a twin (no
spec, the descriptor of another socket), it forks one that can do all that it can itself, and shares its memory: it
takes over when this one is gone. A spare process doesn't fork: it becomes the first worker that it is asked for.
"""

import ctypes
import functools
import gc
import importlib
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

# A mere `is_available()` during an import would else bring up CUDA, which no fork survives.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import msgpack

from protocol.process import LIFELINE, PID, PR_SET_PDEATHSIG, REPORT
from protocol.worker_spec import PROCESS_SPEC
from workers.runtime.launch import keep_compiled_code, run, without_quantizers

EVERYTHING = (  # that workers of any stage need; whatever else a model needs, its worker imports
    "diffusers.pipelines.flux.pipeline_flux",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "workers.models.description",
    "workers.runtime.describer",
    "workers.models.model_check",
    "workers.runtime.worker",
)
STAYS_DOWN = 2  # an exit code after which the supervisor does not try again
MAX_REQUEST = 1 << 20


def main(link: socket.socket, spare: bool) -> None:
    end_with_supervisor()
    keep_compiled_code()
    import_everything()
    serve(link, spare)


def end_with_supervisor() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def serve(link: socket.socket, spare: bool = False) -> None:
    """Serve the supervisor's requests until it is gone."""
    link.send(PID.pack(os.getpid()))
    while True:
        request, descriptors, _, _ = socket.recv_fds(link, MAX_REQUEST, 3)
        if not request:
            return
        spec, environment = msgpack.unpackb(request)
        if spare:
            link.close()
            become_worker(spec, environment, *descriptors)
        if spec:
            pid = fork_twice(link, functools.partial(become_worker, spec, environment, *descriptors))
        else:
            pid = fork_twice(link, functools.partial(become_twin, *descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        link.send(PID.pack(pid))


def import_everything() -> None:
    """Import all, in four fifths of the time that it takes where garbage is looked for meanwhile (3.8 s of 4.9).

    What is there then is never looked through again, so that workers go on sharing its memory.
    """
    gc.disable()
    with without_quantizers():
        for name in EVERYTHING:
            importlib.import_module(name)
    gc.freeze()
    gc.enable()
    import torch

    if torch.cuda.is_initialized():
        print("an import brought up CUDA, so workers can't be forked; they start by themselves", file=sys.stderr)
        sys.exit(STAYS_DOWN)


def fork_twice(link: socket.socket, live: Callable[[], NoReturn]) -> int:
    """A grandchild with a life of its own; its process number."""
    told, tell = os.pipe()
    go, hold = os.pipe()  # at its end once the process between is gone for good, whose death would be the worker's own
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        between = os.fork()
    if between == 0:
        os.setsid()
        worker = os.fork()
        if worker:
            os.write(tell, PID.pack(worker))
            os._exit(0)
        link.close()
        os.close(hold)
        os.read(go, 1)
        for descriptor in (told, tell, go):
            os.close(descriptor)
        live()
    os.waitpid(between, 0)
    pid: int = PID.unpack(os.read(told, PID.size))[0]
    for descriptor in (told, tell, go, hold):
        os.close(descriptor)
    return pid


def become_twin(link: int) -> NoReturn:
    """Wait until the supervisor wants this one in the place of the one that it was forked from."""
    try:
        end_with_supervisor()
        serve(socket.socket(fileno=link))
    finally:
        os._exit(0)


def become_worker(spec: bytes, environment: dict[str, str], log: int, lifeline: int, report: int) -> NoReturn:
    """Be the process that a spec (JSON) describes, as if it had been started by itself."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    os.environ[LIFELINE], os.environ[REPORT] = str(lifeline), str(report)
    code = 1
    try:
        code = run(PROCESS_SPEC.validate_json(spec))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), "--spare" in sys.argv)
