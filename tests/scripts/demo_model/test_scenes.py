"""The demo model's world: held-out means held out, and the scorer knows a right picture from a wrong one."""

import random

import numpy as np
import torch

from scripts.demo_model import evaluate as evaluation
from scripts.demo_model import scenes
from scripts.demo_model import train as training


def drawn(scene: scenes.Scene) -> np.ndarray:
    batch = scenes.SceneBatch.of([scene])
    generator = torch.Generator().manual_seed(0)
    atlas = scenes.shape_atlas()
    picture = scenes.draw(batch.attributes, batch.background, batch.second, atlas, 128, 128, generator)[0]
    return ((picture.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()


def test_training_prompts_never_ask_for_a_held_out_combination_and_every_test_prompt_does() -> None:
    seen = training._prompts((1, 300))[-1]
    given = [t for s in seen for t in s.things if min(t.color, t.shape, t.size, t.place) >= 0]
    assert given
    assert not any(scenes.held_out(t.color, t.shape, t.size, t.place) for t in given)
    for _, scene in evaluation.held_out_prompts(50, seed=1):
        assert any(scenes.held_out(t.color, t.shape, t.size, t.place) for t in scene.things)
        assert not scenes.overlaps(scene)


def test_each_token_belongs_to_the_object_whose_words_it_is_among() -> None:
    _, ids, owner, seen = training._prompts((1, 100))
    t5 = training.t5_tokenizer()
    for row, of, scene in zip(ids, owner, seen, strict=True):
        words = [t5.decode(row[of == k]).lower().split() for k in (0, 1)]
        assert bool(words[1]) == (len(scene.things) == 2)
        for thing, found in zip(scene.things, words, strict=False):
            named = scenes.SHAPE_WORDS[scenes.SHAPES[thing.shape]] if thing.shape >= 0 else scenes.ANY_SHAPE
            assert any(name.split()[0] in found for name in named)
            for color, forms in scenes.COLOR_WORDS.items():  # of its own color's words, and of no other's
                assert any(form in found for form in forms) == (list(scenes.COLORS).index(color) == thing.color)


def test_what_prompts_leave_open_is_filled_in_without_held_out_combinations() -> None:
    rng = random.Random(2)
    batch = scenes.SceneBatch.of([scenes.random_scene(rng) for _ in range(400)])
    attributes, background, bad = scenes.fill_in(batch, torch.Generator().manual_seed(0))
    c, s, z, p = attributes[~bad][:, 0].unbind(-1)
    assert not scenes.HELD_OUT[c, s, z, p].any()
    assert not (c == background[~bad]).any()
    given = batch.attributes >= 0
    assert torch.equal(attributes[given], batch.attributes[given])


def test_the_scorer_takes_a_right_drawing_and_refuses_wrong_ones() -> None:
    wanted = scenes.Scene((scenes.Thing(color=0, shape=1, size=2, place=0), scenes.Thing(4, 4, 0, 8)), background=2)
    atlas = scenes.shape_atlas()
    right = evaluation.judge(drawn(wanted), wanted, atlas)
    assert all(v.color and v.shape and v.place and v.size for v in right)
    second = wanted.things[1]
    for wrong, what in (
        (scenes.Thing(3, 1, 2, 0), "color"),
        (scenes.Thing(0, 4, 2, 0), "shape"),
        (scenes.Thing(0, 1, 0, 0), "size"),
        (scenes.Thing(0, 1, 2, 3), "place"),
    ):
        verdict = evaluation.judge(drawn(scenes.Scene((wrong, second), 2)), wanted, atlas)[0]
        assert not getattr(verdict, what)


def test_a_wording_names_what_is_given() -> None:
    scene = scenes.Scene((scenes.Thing(0, 0, 2, 0),), background=1)
    text = scenes.wording(scene, random.Random(0), plain=True)
    assert text == "a large red circle at the top left on an orange background"
