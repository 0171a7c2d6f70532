"""The beginning of a job's way, found without weights: the key of its first call, or the pipeline's own refusal."""

from collections.abc import Callable
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from protocol.job import JobRequest, Recipe
from protocol.recipe import resolve
from protocol.route import Route, Template, encoded_key
from tests import tiny, tiny_videos
from workers.models.description import describe
from workers.models.source import Source, read
from workers.profile.route import Router

SHAPE = (32, 32, 3)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    known: dict[str, Source] = {}
    makers: dict[str, Callable[[], DiffusionPipeline]] = {
        "flux": tiny.flux, "sdxl": tiny.sdxl, "wan": tiny_videos.wan, "wan of a picture": tiny_videos.wan_of_image
    }  # fmt: skip

    def source(name: str) -> Source:
        if name not in known:
            folder = tiny.save(makers[name](), tmp_path_factory.mktemp("models") / "m")
            known[name] = read(str(folder), folder, None)
        return known[name]

    return source


def recipe_of(source: Source, **fields: Any) -> Recipe:
    request = JobRequest(**{"prompt": "a star", "seed": 1, "width": 32, "height": 32, **fields})
    return resolve(request, describe(source), "float32", None, picture_size=(32, 32))


def look(source: Source, recipe: Recipe) -> Route:
    shapes = tuple(SHAPE for _ in recipe.images) + ((32, 32, 1),) * (recipe.mask is not None)
    return Router(source, "float32").look(Template.of(recipe, shapes))


def key(source: Source, **fields: Any) -> str:
    recipe = recipe_of(source, **fields)
    route = look(source, recipe)
    assert (route.first, route.following) == ("text", "vae" if recipe.images else "denoise")
    assert route.encoded
    return encoded_key(route, recipe)


def test_what_does_not_reach_the_first_call_needs_no_new_embeddings(sources: Callable[[str], Source]) -> None:
    flux = sources("flux")
    base = key(flux)
    same: list[dict[str, Any]] = [
        {"seed": 2}, {"steps": 3}, {"guidance": 7.0}, {"width": 64}, {"images": ("0" * 64,), "strength": 0.5},
        {"settings": (("sigmas", "1.0,0.5"),)},
    ]  # fmt: skip
    assert {key(flux, **fields) for fields in same} == {base}
    others: list[dict[str, Any]] = [
        {"prompt": "a ring"}, {"num_images": 2}, {"max_sequence_length": 64}, {"settings": (("prompt_2", "a ring"),)},
    ]  # fmt: skip
    assert len({base, *(key(flux, **fields) for fields in others)}) == len(others) + 1


def test_a_sweep_of_scales_shares_what_is_encoded_as_far_as_the_pipeline_does(sources: Callable[[str], Source]) -> None:
    sdxl = sources("sdxl")
    assert key(sdxl, cfg_scale=3.0) == key(sdxl, cfg_scale=7.0)
    assert key(sdxl, cfg_scale=3.0) != key(sdxl, cfg_scale=1.0)
    assert key(sdxl, cfg_scale=3.0) != key(sdxl, cfg_scale=3.0, negative_prompt="")
    assert key(sdxl, negative_prompt="blurry") != key(sdxl, negative_prompt="small")


def test_settings_of_several_numbers_are_what_the_pipeline_wants(sources: Callable[[str], Source]) -> None:
    sizes = {"settings": (("original_size", "64,64"), ("sigmas", "1,0.5"))}
    assert key(sources("sdxl"), **sizes) == key(sources("sdxl"))


def test_calls_after_the_first_count_too(sources: Callable[[str], Source]) -> None:
    guided = {"cfg_scale": 3.0, "negative_prompt": "blurry"}  # for which Flux encodes one after the other
    flux = sources("flux")
    assert look(flux, recipe_of(flux, **guided)).calls == 2
    assert key(flux, **guided) == key(flux, **{**guided, "cfg_scale": 5.0})
    assert key(flux, **guided) != key(flux, **{**guided, "negative_prompt": "small"})
    assert key(flux, **guided) != key(flux, **{**guided, "settings": (("negative_prompt_2", "small"),)})


def test_pictures_count_only_where_the_first_call_sees_them(sources: Callable[[str], Source]) -> None:
    one, other = "1" * 64, "2" * 64
    assert key(sources("flux"), images=(one,)) == key(sources("flux"), images=(other,))
    wan = recipe_of(sources("wan of a picture"), images=(one,), frames=5)
    assert not look(sources("wan of a picture"), wan).of_pictures


def test_the_pipelines_own_refusal_is_known_before_anything_is_loaded(sources: Callable[[str], Source]) -> None:
    recipe = recipe_of(sources("wan"), frames=5, settings=(("guidance_scale_2", "3"),))
    assert "boundary_ratio" in look(sources("wan"), recipe).refusal
