"""Faults planted in modules that decide something, one at a time: do the tests notice?

    python -m scripts.faults.mutants [--only N]

Each is planted in a copy of the tree, and the tests that are meant to notice run there. Prints a line for each, and
fails if fewer than 32 of the 35 are noticed, or one can't be planted any more.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
WANTED = 32
DISPATCH, SCHEDULING, MEMORY = "orchestrator/dispatch", "orchestrator/scheduling", "orchestrator/memory"
LEASES = ("tests/orchestrator/memory", "tests/orchestrator/scheduling")
QUEUES = ("tests/orchestrator/dispatch/test_transitions.py", "tests/orchestrator/dispatch/test_job_queue.py")


@dataclass(frozen=True, slots=True)
class Mutant:
    """A fault: `old` becomes `new` in `file`; the tests at these paths should fail then."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        f"{DISPATCH}/transitions.py", "job.saved > job.saved_at_failure", "job.saved >= job.saved_at_failure", QUEUES
    ),
    Mutant(f"{DISPATCH}/transitions.py", "failures < MAX_ATTEMPTS", "failures <= MAX_ATTEMPTS", QUEUES),
    Mutant(f"{DISPATCH}/transitions.py", 'if state != "failed":', 'if state == "failed":', QUEUES),
    Mutant(f"{DISPATCH}/transitions.py", "attempt = job.attempts + 1", "attempt = job.attempts", QUEUES),
    Mutant(f"{DISPATCH}/transitions.py", "if saved > job.saved:", "if saved >= job.saved:", QUEUES),
    Mutant(f"{DISPATCH}/transitions.py", "records=tuple(earlier)", "records=job.records", QUEUES),
    Mutant("orchestrator/job.py", "return -self.priority,", "return self.priority,", QUEUES),
    Mutant(f"{DISPATCH}/job_queue.py", "            self._delays.drop(before.id)\n", "", QUEUES),
    Mutant(
        f"{DISPATCH}/stage_queues.py", "            self.depth[job.stage, job.model, job.distance] -= 1\n", "", QUEUES
    ),
    Mutant(
        f"{DISPATCH}/fleet.py",
        'first.state in ("idle", "busy")',
        "True",
        ("tests/orchestrator/dispatch/test_fleet.py",),
    ),
    Mutant(
        f"{DISPATCH}/fleet.py",
        "limits.get(worker.state, SILENCE_SECONDS)",
        "LOADING_SECONDS",
        ("tests/orchestrator/dispatch/test_fleet.py",),
    ),
    Mutant(
        f"{DISPATCH}/quotas.py",
        "self.jobs + count > limits.queue_limit",
        "self.jobs > limits.queue_limit",
        ("tests/orchestrator/dispatch/test_admission.py",),
    ),
    Mutant(
        "orchestrator/token_bucket.py",
        "min(self._burst, self._left + (now - self._since) * self._rate)",
        "self._left + (now - self._since) * self._rate",
        ("tests/orchestrator/dispatch/test_admission.py",),
    ),
    Mutant(
        f"{DISPATCH}/catalogue.py",
        "self._entries.get(self._default) != entry",
        "self._default not in self._entries",
        ("tests/orchestrator/dispatch/test_admission.py",),
    ),
    Mutant(f"{SCHEDULING}/snapshot.py", "if distance < task.distance)", "if distance <= task.distance)", LEASES),
    Mutant(f"{SCHEDULING}/scheduler.py", "holder is None or holder.covers(task)", "True", LEASES),
    Mutant(f"{SCHEDULING}/swaps.py", "want.task.waited > self.patience", "want.task.waited < self.patience", LEASES),
    Mutant(f"{SCHEDULING}/swaps.py", "holder.id in self.busiest and", "holder.id not in self.busiest and", LEASES),
    Mutant(f"{MEMORY}/lease_sizes.py", "int(main.weights * LEAST_IN_PLACE)", "0", LEASES),
    Mutant(f"{MEMORY}/ledger.py", "lease.bytes > holding.booked + max(0,", "lease.bytes > 10**15 + max(0,", LEASES),
    Mutant(f"{MEMORY}/ledger.py", "(HEADROOM if self.worked else FIRST_HEADROOM)", "0", ("tests/orchestrator/memory",)),
    Mutant(
        f"{MEMORY}/ledger.py",
        "(room * MORE - ROUNDING)",
        "(room - ROUNDING)",
        (
            "tests/orchestrator/memory",
            "tests/orchestrator/dispatch/test_progress.py",
            "tests/orchestrator/dispatch/test_leasing.py",
        ),
    ),
    Mutant(
        f"{DISPATCH}/standstill.py",
        "if acts or meetings.tick != tick:",
        "if meetings.tick != tick:",
        ("tests/orchestrator/dispatch/test_standstill.py",),
    ),
    Mutant(
        "orchestrator/supervisor/child.py",
        "return not self.ever_proven or (not self.essential",
        "return True or (not self.essential",
        ("tests/orchestrator/supervisor",),
    ),
    Mutant(
        "orchestrator/server/supervisor_link.py",
        "and w.hello.pid != old ",
        "",
        ("tests/orchestrator/server/test_supervisor_link.py",),
    ),
    Mutant("orchestrator/config.py", "data |= flags", "data = flags | data", ("tests/orchestrator/test_config.py",)),
    Mutant(
        "protocol/recipe.py", "if width % multiple or height % multiple:", "if width % multiple:", ("tests/protocol",)
    ),
    Mutant("protocol/tensors.py", "if expected != tensor.nbytes:", "if expected > tensor.nbytes:", ("tests/protocol",)),
    Mutant(
        "workers/models/component_plan.py",
        "if gpu != first:",
        "if gpu == first:",
        ("tests/workers/models/test_component_plan.py",),
    ),
    Mutant(
        "orchestrator/planning/pipeline_cut.py",
        "(max(before, part.seconds), start)",
        "(min(before, part.seconds), start)",
        ("tests/orchestrator/planning",),
    ),
    Mutant(
        f"{SCHEDULING}/swaps.py",
        "(self.lent_free[gpu] if self._size(holder, gpu).borrows else 0)",
        "self.lent_free[gpu]",
        LEASES,
    ),
    Mutant(
        f"{SCHEDULING}/swaps.py",
        "if not missing or not (changing or borrowers or self.passing[gpu]):",
        "if not missing:",
        ("tests/orchestrator/dispatch/test_progress.py", "tests/orchestrator/dispatch/test_leasing.py"),
    ),
    Mutant(
        f"{MEMORY}/ledger.py",
        "lent = self.loan.bytes if self.loan and self.loan.given else 0",
        "lent = self.loan.bytes if self.loan else 0",
        ("tests/orchestrator/dispatch/test_leasing.py",),
    ),
    Mutant(
        f"{DISPATCH}/step_deadlines.py",
        'if worker.loan == "given" and used',
        "if used",
        ("tests/orchestrator/dispatch/test_fleet.py",),
    ),
    Mutant(
        "workers/weights/resident_pieces.py",
        "                self._await(piece.rows, mark)",
        "                pass",
        ("tests/workers/weights/test_residency.py",),
    ),
)


def noticed(mutant: Mutant) -> bool:
    """Plant a fault in a copy of the tree, and run the tests that should fail there."""
    with tempfile.TemporaryDirectory(prefix="tm-") as name:
        tree = Path(name)
        for part in ("protocol", "orchestrator", "workers", "scripts", "tests", "docs"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "triptych.py"):
            shutil.copy(ROOT / part, tree)
        path = tree / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise click.ClickException(
                f"{mutant.file} has {text.count(mutant.old)} of {mutant.old!r}; it should have 1."
            )
        path.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *mutant.tests]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise click.ClickException(
                f"The tests of {mutant.file} did not run: {done.stdout[-500:]}{done.stderr[-500:]}"
            )
        return done.returncode == 1


@click.command(help=__doc__.split("\n")[0])
@click.option("--only", type=click.IntRange(1, len(MUTANTS)), help="The Nth alone.")
def main(only: int | None) -> None:
    chosen = MUTANTS if only is None else MUTANTS[only - 1 : only]
    found = 0
    for number, mutant in enumerate(chosen, only or 1):
        caught = noticed(mutant)
        found += caught
        print(f"{number:2} {'noticed' if caught else 'MISSED '} {mutant.file}: {mutant.old.strip()}", flush=True)
    print(f"{found} of {len(chosen)} noticed")
    sys.exit(only is None and found < WANTED)


if __name__ == "__main__":
    main()
