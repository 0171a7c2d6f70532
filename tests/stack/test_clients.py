"""The Python clients, as programs use them."""

import asyncio
from pathlib import Path

import pytest

import triptych
from tests.stacks import RunningStack

SMALL = {"width": 32, "height": 32, "steps": 2}


def test_the_public_face() -> None:
    assert isinstance(triptych.Client, type)
    assert issubclass(triptych.JobFailed, triptych.TriptychError)
    assert triptych.__version__.count(".") == 2


def test_the_synchronous_client_submits_streams_and_fetches(stack: RunningStack) -> None:
    with triptych.Client(stack.folder) as client:
        # Steps are told of at most every 0.1 s, so it takes many.
        job = client.submit("a red star", seed=1, num_images=2, **{**SMALL, "steps": 100})
        events = list(client.events([job.id], timeout=150))
        assert events[-1].state == "done"
        assert {event.state for event in events} >= {"denoise", "vae", "done"}
        assert 0 < max(event.step for event in events if event.state == "denoise") < 100
        pictures = client.pictures(job.id)
        assert [picture.size for picture in pictures] == [(32, 32), (32, 32)]


def test_the_asyncio_client_follows_many_jobs_at_once(stack: RunningStack) -> None:
    async def main() -> None:
        async with triptych.AsyncClient(stack.folder) as client:
            jobs = await asyncio.gather(*(client.submit("a star", seed=i, **SMALL) for i in range(4)))
            done = await asyncio.gather(*(client.wait(job.id, timeout=60) for job in jobs))
            assert {job.state for job in done} == {"done"}
            assert (await client.pictures(jobs[0].id))[0].size == (32, 32)
            long = await client.submit("a star", width=32, height=32, steps=900)
            await client.cancel(long.id)
            with pytest.raises(triptych.JobCancelled):
                await client.wait(long.id)
            with pytest.raises(triptych.BadRequest):
                await client.submit("")
            assert (await client.stack()).model is not None
            assert len((await client.workers()).workers) == 3
            (watched,) = await client.submit_many([triptych.JobRequest(prompt="a star", seed=9, **SMALL)], watch=True)
            assert [event.state async for event in client.events([watched.id], timeout=60)][-1] == "done"
            job, raw = await client.raw_pictures(watched.id)
            assert (job.state, raw.shape) == ("done", (1, 32, 32, 3))

    asyncio.run(main())


def test_the_environment_names_the_stack(stack: RunningStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_STATE", str(stack.folder))
    with triptych.Client() as client:
        assert client.stack().model is not None


def test_clients_without_a_stack_say_so(state: Path) -> None:
    with pytest.raises(triptych.NoStack):
        triptych.Client(state)

    async def main() -> None:
        async with triptych.AsyncClient(endpoint=f"ipc://{state}/nothing") as client:
            with pytest.raises(triptych.NoStack):
                await client.stack()

    asyncio.run(main())


def test_both_clients_can_do_the_same() -> None:
    def public(cls: type) -> set[str]:
        return {name for name in dir(cls) if not name.startswith("_")}

    # What reads an asyncio client's socket is a task, which may have ended.
    assert public(triptych.Client) == public(triptych.AsyncClient) - {"broken"}
