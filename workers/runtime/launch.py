"""The start of a process of `workers/` from its spec. Torch is imported only by the work."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from platformdirs import user_cache_path

from protocol.curve_keys import load
from protocol.errors import BadRequest
from protocol.process import LIFELINE, REPORT, end_with_parent, log_to_stderr, report_end
from protocol.speedups import parse_speedup
from protocol.worker_spec import PROCESS_SPEC, DescriberSpec, WorkerSpec

QUANTIZERS = ("torchao", "bitsandbytes")
FRESH = "TRIPTYCH_FRESH_PROCESS"  # in the environment of one that has begun anew


class NeedsFreshProcess(Exception):
    """This process was forked from one that has imported its libraries without one that the model needs."""


def run(spec: WorkerSpec | DescriberSpec) -> int:
    """Be the process that a spec describes; the exit code, once it has ended by itself."""
    inherited = {name: os.environ[name] for name in (LIFELINE, REPORT) if name in os.environ}
    end_with_parent()
    try:
        try:
            match spec:
                case WorkerSpec():
                    work(spec)
                case DescriberSpec():
                    describe(spec)
        except NeedsFreshProcess:
            begin_anew(spec, inherited)
    except BaseException as error:
        return report_end(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def keep_compiled_code() -> None:
    """Have torch keep compiled code among the user's caches, where no other place is set: a restart need not compile.

    To be called before torch is imported, which else chooses a temporary folder.
    """
    folder = user_cache_path("triptych") / "compiled"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK | os.X_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def work(spec: WorkerSpec) -> None:
    """Join a stack and work until told to stop."""
    hide_other_gpus(spec.visible_gpus)
    log_to_stderr(spec.name)
    forks = any(name == "parallel" for _, name, _ in map(parse_speedup, spec.speedups))
    with without_quantizers() if forks else contextlib.nullcontext():
        from workers.runtime.worker import serve

    serve(spec, load(Path(spec.key)) if spec.key else None)


def begin_anew(spec: WorkerSpec | DescriberSpec, inherited: Mapping[str, str]) -> NoReturn:
    """Be a new program in this process, with the same spec, that imports its libraries by itself."""
    for descriptor in inherited.values():
        os.set_inheritable(int(descriptor), True)
    os.environ.update({**inherited, FRESH: "1"})
    os.execv(sys.executable, [sys.executable, "-m", "workers.runtime", spec.model_dump_json()])


@contextlib.contextmanager
def without_quantizers() -> Iterator[None]:
    """Import as if these were not installed: transformers and peft import them, which brings up CUDA before any fork.

    A worker whose model needs one begins anew.
    """
    for name in QUANTIZERS:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in QUANTIZERS:
            del sys.modules[name]


def describe(spec: DescriberSpec) -> None:
    """Check the model, and answer the orchestrator until told to stop."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it has no use for a GPU
    log_to_stderr(f"{spec.name}-describer" if spec.name else "describer")
    from workers.runtime.describer import serve

    serve(spec)


def hide_other_gpus(visible: tuple[int, ...] | None) -> None:
    """Hide all GPUs but these, by the driver's numbers, before torch looks; None hides none."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that a look whether there is a GPU leaves it alone
    if visible is not None:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, visible))


def main() -> None:
    """`python -m workers.runtime SPEC`, SPEC being JSON."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    keep_compiled_code()
    if len(sys.argv) != 2:
        sys.exit(report_end(BadRequest("A process is started with its spec as JSON.")))
    sys.exit(run(PROCESS_SPEC.validate_json(sys.argv[1])))
