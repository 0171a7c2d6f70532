"""Jobs that were accepted for a stack unlike the one that runs now: they wait, since their bits would be others."""

from collections.abc import Sequence

from protocol.client.client import Client
from protocol.job import ENDED, JOB_STATES, Job
from protocol.views import ModelView, WorkerView

MOST = 1000  # jobs that are looked at


def wanting(job: Job, workers: Sequence[WorkerView], models: Sequence[ModelView]) -> str:
    """Return the model that a job waits for and the stack does not have; empty where it has, or the job has ended."""
    recipe = job.recipe
    fits = {(worker.revision, worker.dtype, worker.speedups) for worker in workers}
    fits |= {(model.revision, model.dtype, model.speedups) for model in models}
    if job.state in ENDED or not fits or (recipe.revision, recipe.dtype, recipe.speedups) in fits:
        return ""
    return f"{recipe.model}, {recipe.dtype}, {', '.join(recipe.speedups) or 'without speedups'}"


def strays(client: Client) -> str:
    """A line about all of them; empty where there are none."""
    workers, models = client.workers().workers, client.models()
    unfinished = client.jobs([state for state in JOB_STATES if state not in ENDED], MOST)
    found = [wanted for job in unfinished if (wanted := wanting(job, workers, models))]
    if not found:
        return ""
    kinds = "; ".join(sorted(set(found)))
    return (
        f"{len(found)} unfinished job(s) wait for a stack as they were accepted by ({kinds}): start one, or "
        "triptych cancel"
    )
