"""Progress for a person, on stderr: a line a job on a terminal, plain lines elsewhere, nothing when quiet."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, Self

from protocol.job import Job
from protocol.messages.client import JobEvent
from protocol.visible import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN = 8  # jobs with a line of their own; more are counted together


class Display(Protocol):
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def show(self, event: JobEvent) -> None: ...
    def picture(self, drawn: "RenderableType") -> None: ...
    def note(self, text: str) -> None: ...


def make_display(jobs: Sequence[Job], quiet: bool) -> Display:
    """Rich on a terminal, plain lines elsewhere (or where TERM is dumb), silence with --quiet."""
    if quiet:
        return Silent()
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return Bars(jobs, console)
    return Lines(jobs)


def prompt_line(job: Job) -> str:
    """Return a job's prompt as one line that a terminal may show."""
    return visible(" ".join(job.recipe.prompt.split()))


def title(job: Job) -> str:
    prompt = prompt_line(job)
    return f"{job.id}  {prompt if len(prompt) <= 44 else prompt[:43] + '…'}"


def phase(event: JobEvent) -> str:
    """Return a person's word for what a job does now."""
    match event.state, event.running:
        case ("text", True):
            return "encoding"
        case ("denoise", True):
            return f"denoising {event.step}/{event.steps}"
        case ("vae", True):
            return "decoding"
        case ("queued" | "text" | "denoise" | "vae", False):
            ahead = f", {event.queue_position} ahead" if event.queue_position else ""
            waiting = {"denoise": "encoded, waiting", "vae": "denoised, waiting"}.get(event.state, "queued")
            return f"{'cached, ' if event.cached and event.state == 'queued' else ''}{waiting}{ahead}"
    return f"failed: {visible(event.reason)}" if event.state == "failed" else event.state


class Silent:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, event: JobEvent) -> None:
        pass

    def picture(self, drawn: "RenderableType") -> None:
        """Show how a picture will look, where there is a terminal."""

    def note(self, text: str) -> None:
        pass


class Lines(Silent):
    """A line whenever a job comes to another stage; steps are not worth a line each."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._titles = {job.id: title(job) for job in jobs}
        self._last: dict[str, str] = {}

    def show(self, event: JobEvent) -> None:
        now = phase(event).split(" ")[0].rstrip(",") if event.state == "denoise" and event.running else phase(event)
        if self._last.get(event.job) != now:
            self._last[event.job] = now
            print(f"{self._titles.get(event.job, event.job)}: {now}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bars:
    """A bar a job with the stage, the steps, their rate and the time left; many jobs share one more bar."""

    def __init__(self, jobs: Sequence[Job], console: "object") -> None:
        from rich.console import Console, RenderableType
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

        class Pictured(Progress):
            """Bars above a picture."""

            drawn: RenderableType | None = None

            def get_renderables(self) -> Iterator[RenderableType]:
                yield self.make_tasks_table(self.tasks)
                if self.drawn is not None:
                    yield self.drawn

        assert isinstance(console, Console)
        self._jobs = {job.id: job for job in jobs}
        self._clocks: dict[str, tuple[int, float]] = {}  # first step that was seen, and when
        self._ended: set[str] = set()
        self._progress = Pictured(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[phase]}", markup=False),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._total = self._progress.add_task("all", total=len(jobs), phase="") if len(jobs) > 1 else None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.drawn = None
        self._progress.stop()

    def picture(self, drawn: "RenderableType") -> None:
        self._progress.drawn = drawn

    def show(self, event: JobEvent) -> None:
        ended = event.state in ("done", "failed", "cancelled")
        if ended and event.job not in self._ended:
            self._ended.add(event.job)
            if self._total is not None:
                done = len(self._ended)
                self._progress.update(self._total, completed=done, phase=f"{done}/{len(self._jobs)}")
        if event.job not in self._tasks:
            if (ended and event.state == "done" and len(self._jobs) > SHOWN) or event.job not in self._jobs:
                return
            if len(self._jobs) > SHOWN and not event.running and not ended:
                return
            description = title(self._jobs[event.job])
            self._tasks[event.job] = self._progress.add_task(description, total=max(1, event.steps) + 2, phase="")
        task = self._tasks[event.job]
        self._progress.update(task, completed=self._completed(event), phase=phase(event) + self._rate(event))
        if event.state == "done" and len(self._jobs) > SHOWN:
            self._progress.remove_task(self._tasks.pop(event.job))

    def _completed(self, event: JobEvent) -> int:
        """Count what is done: one for encoding, the steps, one for decoding."""
        match event.state:
            case "queued" | "text":
                return 0
            case "denoise":
                return 1 + event.step
            case "vae":
                return 1 + event.steps
        return 2 + event.steps if event.state == "done" else 0

    def _rate(self, event: JobEvent) -> str:
        if event.state != "denoise" or not event.running or event.step == 0:
            return ""
        first, since = self._clocks.setdefault(event.job, (event.step, time.monotonic()))
        seconds = time.monotonic() - since
        if event.step == first or seconds <= 0:
            return ""
        rate = (event.step - first) / seconds
        left = (event.steps - event.step) / rate
        speed = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
        return f"  {speed}  {left:.0f} s left" if left >= 1 else f"  {speed}"

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)
