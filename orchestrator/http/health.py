"""Whether the stack lives, and whether it can make pictures now."""

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from orchestrator.http.asking import Http
from protocol.errors import TriptychError
from protocol.stages import STAGES

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: str
    reasons: list[str] = []


@router.get("/healthz")
async def healthz() -> Health:
    """Tell that this process answers."""
    return Health(status="ok")


@router.get("/readyz", responses={503: {"model": Health}})
async def readyz(request: Request, response: Response) -> Health:
    """Tell whether a job would be made now, and what is missing where it wouldn't."""
    http: Http = request.app.state.http
    try:
        async with http.stack.acting_for("") as client:
            models, found = await client.models(), await client.workers()
    except TriptychError:
        reasons = ["No stack gives an answer."]
    else:
        reasons = [] if models else ["The stack is yet looking at its model."]
        for model in (model for model in models if not model.resting):  # what rests starts with its first job
            there = {
                worker.stage for worker in found.workers
                if worker.state != "loading" and (worker.revision, worker.speedups) == (model.revision, model.speedups)
            }  # fmt: skip
            reasons += [f"No worker of {stage} is ready for {model.name}." for stage in STAGES if stage not in there]
        reasons += [f"{stage} is drained." for stage in found.drained]
    if reasons:
        response.status_code = 503
        response.headers["Retry-After"] = "2"
    return Health(status="not ready" if reasons else "ready", reasons=reasons)
