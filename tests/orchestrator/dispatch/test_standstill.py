"""A place stands still that meets one state too often: each meeting counts while leases change, else one a tick."""

from orchestrator.dispatch.standstill import HOPELESS_TICKS, MEETINGS, QUIET_TICKS, TICK_SECONDS, Busy, Standstill
from orchestrator.job import ModelKey
from orchestrator.memory.lease_sizes import Need
from orchestrator.scheduling.snapshot import (
    ChangeLease,
    GpuDemand,
    GpuSpace,
    IdleWorker,
    LeasedWorker,
    Snapshot,
    WaitingTask,
)
from protocol.gpu_memory import GpuId
from tests.orchestrator.dispatch.test_fleet import Clock

GPU, MODEL = GpuId("h", 0), ModelKey("r", "float32")
IDLE = Busy((), (), ())
PLACE = ("vae", MODEL)


def snapshot(available: int) -> Snapshot:
    """A VAE's task that waits, on a GPU of which so many bytes are available, none of them free."""
    need = Need(weights=100, least=100, workspace=50)
    holder = LeasedWorker("w", "vae", MODEL, {GPU: GpuDemand(need)})
    task = WaitingTask("j", "vae", MODEL, 1, workspace=50)
    gpus = {GPU: GpuSpace(available, 0)}
    idle = [IdleWorker("w", "vae", MODEL)]
    return Snapshot({PLACE: [task]}, idle, {(*PLACE, 1): 1}, {"w": holder}, gpus)


def looks(standstill: Standstill, clock: Clock, seconds: float, acts: bool, available: int = 1000) -> int:
    """Return after how many looks the place stands still; 1000 if it doesn't."""
    actions = [ChangeLease("w", ())] if acts else []
    for count in range(1, 1000):
        if standstill.look(snapshot(available), actions, IDLE):
            return count
        clock.now += seconds
    return 1000


def test_each_meeting_counts_while_leases_change_and_else_one_a_tick() -> None:
    clock = Clock()
    assert looks(Standstill(clock), clock, 0.0, acts=True) == MEETINGS
    assert looks(Standstill(clock), clock, 0.0, acts=False) == 1000
    assert looks(Standstill(clock), clock, TICK_SECONDS, acts=False) == QUIET_TICKS


def test_where_no_patience_would_help_it_is_told_soon_and_progress_begins_anew() -> None:
    clock = Clock()
    standstill = Standstill(clock)
    assert looks(standstill, clock, TICK_SECONDS, acts=False, available=10) == HOPELESS_TICKS
    assert standstill.look(snapshot(10), [], IDLE) == [PLACE]
    standstill.moved()
    assert looks(standstill, clock, TICK_SECONDS, acts=False, available=10) == HOPELESS_TICKS
