"""What a worker is told of the tasks that come next, which it may do along with one."""

from pathlib import Path

from protocol.job import JobRequest
from tests.fakes import Orchestrator, orchestrator


def submitted(stack: Orchestrator, *prompts: str, steps: int = 2) -> None:
    client = stack.client()
    client.submit_many([JobRequest(prompt=prompt, seed=n, steps=steps) for n, prompt in enumerate(prompts)])


def test_a_text_worker_is_told_the_next_prompts_each_once(state: Path) -> None:
    with orchestrator(state) as stack:
        vae = stack.worker("vae").ready()
        vae.settle()
        submitted(stack, "a", "b", "b", "a", "c")
        text = stack.worker("text").ready()
        task = text.take()
        assert task.recipe.prompt == "a"
        assert [recipe.prompt for recipe in task.ahead] == ["b", "c"]
        text.finish(task)
        text.ready()
        task = text.take()
        assert (task.recipe.prompt, [recipe.prompt for recipe in task.ahead]) == ("b", ["c"])


def test_a_prompt_as_long_as_a_book_is_told_when_its_turn_comes(state: Path) -> None:
    with orchestrator(state) as stack:
        stack.worker("vae").ready().settle()
        submitted(stack, "a", "b" * 50_000, "c")
        task = stack.worker("text").ready().take()
        assert (task.recipe.prompt, [recipe.prompt for recipe in task.ahead]) == ("a", ["c"])


def test_a_denoiser_that_makes_batches_gets_the_next_jobs_of_a_kind_with_their_embeddings(state: Path) -> None:
    with orchestrator(state) as stack:
        speedups = ("denoise:batch=3",)
        text = stack.worker("text", speedups=speedups).ready()
        text.settle()
        submitted(stack, "a")
        submitted(stack, "b", steps=3)
        submitted(stack, "c", "d", "e")
        for _ in range(5):
            text.finish(text.take())
            text.ready()
        text.settle()
        denoise = stack.worker("denoise", speedups=speedups).ready()
        tasks = []
        for _ in range(5):
            tasks.append(denoise.take())
            beside = [f"ahead:{n}:prompt_embeds" for n, _ in enumerate(tasks[-1].ahead)]
            assert sorted(denoise.inputs()) == sorted(["prompt_embeds", *beside])
            denoise.finish(tasks[-1])
            denoise.ready()
        told = [(task.recipe.prompt, "".join(recipe.prompt for recipe in task.ahead)) for task in tasks]
        assert told == [("a", "cd"), ("b", ""), ("c", "de"), ("d", "e"), ("e", "")]


def test_without_batches_a_denoiser_gets_one_job_at_a_time(state: Path) -> None:
    with orchestrator(state) as stack:
        text = stack.worker("text").ready()
        text.settle()
        submitted(stack, "a", "b")
        for _ in range(2):
            text.finish(text.take())
            text.ready()
        assert stack.worker("denoise").ready().take().ahead == ()


def test_a_job_that_has_failed_has_no_company_and_is_none(state: Path) -> None:
    with orchestrator(state) as stack:
        stack.worker("vae").ready().settle()
        submitted(stack, "a", "b", "c")
        text = stack.worker("text").ready()
        task = text.take()
        assert [recipe.prompt for recipe in task.ahead] == ["b", "c"]
        text.fail(task)
        told = {}
        for _ in range(3):
            task = text.take()
            told[task.recipe.prompt] = [recipe.prompt for recipe in task.ahead]
            text.finish(task)
            text.ready()
        assert told["a"] == []
        assert "a" not in told["b"] + told["c"]


def test_what_one_denoiser_does_along_with_its_task_is_given_to_no_other(state: Path) -> None:
    with orchestrator(state) as stack:
        speedups = ("denoise:batch=3",)
        text = stack.worker("text", speedups=speedups).ready()
        text.settle()
        submitted(stack, "a", "b", "c", "d")
        for _ in range(4):
            text.finish(text.take())
            text.ready()
        text.settle()
        one = stack.worker("denoise", speedups=speedups).ready()
        first = one.take()
        assert [recipe.prompt for recipe in (first.recipe, *first.ahead)] == ["a", "b", "c"]
        other = stack.worker("denoise", speedups=speedups).ready()
        assert other.take().recipe.prompt == "d"
        one.finish(first)
        one.ready()
        assert one.take().recipe.prompt == "b"
