"""What is refused before it is queued, and the defaults of what is not."""

from typing import Any

import pytest

from protocol.errors import BadRequest, DoesNotFit
from protocol.job import JobRequest
from protocol.model import ModelDescription, VideoTask
from protocol.recipe import resolve
from protocol.route import whole_key
from protocol.settings import Setting, as_given

DEV = ModelDescription(
    model="dev", revision="r", pipeline="FluxPipeline", size_multiple=16, width=1024, height=1024, max_pixels=4 << 20,
    steps=28, guidance=3.5, cfg_scale=1.0, negative_prompt=True, max_sequence_length=512, max_sequence_limit=512,
)  # fmt: skip
SCHNELL = DEV.model_copy(update={"guidance": None})


def recipe(model: ModelDescription = DEV, **fields: Any) -> Any:
    return resolve(JobRequest(**({"prompt": "a cat"} | fields)), model, "float32", lambda text: len(text.split()) + 1)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"prompt": ""}, BadRequest, "empty"),
        ({"prompt": " \n\t"}, BadRequest, "empty"),
        ({"prompt": "word " * 600}, DoesNotFit, "601 tokens; 512 fit"),
        ({"prompt": "a b c d", "max_sequence_length": 4}, DoesNotFit, "--max-sequence-length 5"),
        ({"width": 0}, BadRequest, "width is 0"),
        ({"height": -16}, BadRequest, "height is -16"),
        ({"width": 1000, "height": 1000}, BadRequest, "nearest is 992x992"),
        ({"width": 1024, "height": 1000}, BadRequest, "nearest is 1024x992"),
        ({"width": 1000, "height": 1024}, BadRequest, "nearest is 992x1024"),
        ({"width": 100_000, "height": 100_000}, DoesNotFit, "2048x2048"),
        ({"steps": 0}, BadRequest, "from 1 to 1000"),
        ({"num_images": 0}, BadRequest, "from 1 to 16"),
        ({"num_images": 17}, BadRequest, "from 1 to 16"),
        ({"seed": -2}, BadRequest, "seed is -2"),
        ({"guidance": float("nan")}, BadRequest, "guidance is nan"),
        ({"guidance": -1.0}, BadRequest, "guidance is -1"),
        ({"cfg_scale": float("inf")}, BadRequest, "cfg_scale is inf"),
        ({"priority": 5000}, BadRequest, "priority"),
        ({"max_sequence_length": 513}, BadRequest, "max_sequence_length is 513"),
    ],
)
def test_what_cannot_work_is_refused_with_what_fits(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        recipe(**fields)
    assert words in str(caught.value)


def test_guidance_is_refused_where_the_model_takes_none() -> None:
    assert recipe(SCHNELL).guidance is None
    with pytest.raises(BadRequest, match="no distilled guidance"):
        recipe(SCHNELL, guidance=3.5)


def test_no_default_is_left_open() -> None:
    made = recipe()
    assert (made.width, made.height, made.steps, made.guidance, made.cfg_scale) == (1024, 1024, 28, 3.5, 1.0)
    assert made.max_sequence_length == 512
    assert 0 <= made.seed < 2**32
    assert recipe().seed != recipe().seed


def test_no_negative_prompt_is_not_an_empty_one() -> None:
    assert recipe(cfg_scale=2.0).negative_prompt is None
    assert recipe(cfg_scale=2.0, negative_prompt="").negative_prompt == ""
    assert recipe(cfg_scale=1.0, negative_prompt="dog").negative_prompt == "dog"  # what it does is the pipeline's own
    assert whole_key(recipe(cfg_scale=2.0)) != whole_key(recipe(cfg_scale=2.0, negative_prompt=""))


def test_a_seed_of_minus_one_is_drawn() -> None:
    drawn = {recipe(seed=-1).seed for _ in range(3)}
    assert min(drawn) >= 0
    assert len(drawn) > 1
    with pytest.raises(BadRequest, match="seed is -2"):
        recipe(seed=-2)


def test_embeddings_are_shared_by_what_they_depend_on_and_no_further() -> None:
    base = recipe(seed=1)
    assert whole_key(base) == whole_key(recipe(seed=2, steps=4, width=512, height=512, guidance=7.0))
    others = [recipe(prompt="a dog"), recipe(num_images=2), recipe(max_sequence_length=256), recipe(cfg_scale=2.0)]
    assert len({whole_key(base), *map(whole_key, others)}) == 5
    one, two = "1" * 64, "2" * 64
    some = recipe()
    fields: tuple[dict[str, object], ...] = (
        {"images": (one,)}, {"control": one}, {"ip_image": one}, {"videos": (("a", one), ("b", two))},
        {"videos": (("a", two), ("b", one))},
    )  # fmt: skip
    pictured = [some.model_copy(update=update) for update in fields]
    assert len(set(map(whole_key, pictured))) == len(pictured)


VIDEO = DEV.model_copy(update={"video": VideoTask(frames=81, multiple=4, fps=16.0, max_frames=324)})


@pytest.mark.parametrize(
    ("frames", "words"),
    [(80, "nearest are 81"), (84, "nearest are 85"), (2, "nearest are 1"), (0, "positive"), (400, "At most 324")],
)
def test_frames_that_a_pipeline_would_round_are_refused(frames: int, words: str) -> None:
    with pytest.raises((BadRequest, DoesNotFit)) as caught:
        recipe(VIDEO, frames=frames)
    assert words in str(caught.value)


def test_a_video_has_the_models_own_frames_and_rate() -> None:
    assert (recipe(VIDEO).frames, recipe(VIDEO).fps) == (81, 16.0)
    assert (recipe(VIDEO, frames=5, fps=8.0).frames, recipe(VIDEO, frames=5, fps=8.0).fps) == (5, 8.0)
    assert (recipe().frames, recipe().fps) == (None, None)
    for name in ("frames", "fps"):
        with pytest.raises(BadRequest, match="pictures, not videos"):
            recipe(**{name: 8})


SETTINGS = DEV.model_copy(
    update={
        "settings": (
            Setting(name="clip_skip", kind="int"), Setting(name="eta", kind="float"),
            Setting(name="sigmas", kind="floats"),
            Setting(name="flag", kind="bool"), Setting(name="prompt_2", kind="str"),
        )
    }
)  # fmt: skip


def test_settings_are_read_by_their_kinds_and_come_back_as_they_were_given() -> None:
    given = (("prompt_2", "3"), ("clip_skip", " 2"), ("sigmas", "1,0.5"), ("flag", "True"), ("eta", "1"))
    made = recipe(SETTINGS, settings=given)
    assert made.settings == (
        ("clip_skip", 2), ("eta", 1.0), ("flag", True), ("prompt_2", "3"), ("sigmas", (1.0, 0.5))
    )  # fmt: skip
    assert recipe(SETTINGS, settings=as_given(made.settings)).settings == made.settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((("generator", "1"),), "no setting 'generator'. It has clip_skip, eta, sigmas"),
        ((("clip_skip", "1.5"),), "a whole number"),
        ((("eta", "nan"),), "a number"),
        ((("clip_skip", "1" + "0" * 20),), "of 64 bits"),
        ((("flag", "maybe"),), "true or false"),
        ((("sigmas", "1,,2"),), "numbers with commas"),
        ((("eta", "1"), ("eta", "2")), "given twice"),
    ],
)
def test_settings_that_a_pipeline_does_not_take_are_refused(given: tuple[tuple[str, str], ...], words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        recipe(SETTINGS, settings=given)
    assert words in str(caught.value)


def test_what_a_model_needs_must_be_given() -> None:
    needy = DEV.model_copy(update={"needs": ("image",)})
    with pytest.raises(BadRequest, match="begins from a picture"):
        recipe(needy)
    with pytest.raises(BadRequest, match="makes one at a time"):
        recipe(DEV.model_copy(update={"several": False}), num_images=2)
    with pytest.raises(BadRequest, match="takes no control image"):
        recipe(control="0" * 64)
