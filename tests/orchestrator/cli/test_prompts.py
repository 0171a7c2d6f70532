"""What people type and bring: prompt files, names of outputs, control characters, forged log lines."""

import json
import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from orchestrator.cli.options import make_request, requests_from
from orchestrator.cli.output import Name, Wanted, fit_to, names_for, names_of_pattern
from orchestrator.cli.prompts import read_prompts
from orchestrator.config import load_config
from protocol.client.picture_files import metadata_of, parameters_text, put_in_place, read_recipe, save_picture
from protocol.errors import BadRequest
from protocol.job import Recipe
from protocol.process import OnceASecond
from protocol.visible import visible


def prompts(path: Path) -> list[str]:
    return [fields["prompt"] for _, fields in read_prompts(path)]


def test_byte_order_marks_and_line_ends_are_no_part_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.TXT"
    path.write_bytes("\ufeffa red circle\r\na\u2028blue\u0085star\r\r\n\n".encode())
    assert prompts(path) == ["a red circle", "a\u2028blue\u0085star"]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL"])
def test_objects_a_line(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"p{suffix}"
    path.write_text('{"prompt": "a", "seed": 1}\n\n{"prompt": "b\u2028c"}\n')
    assert [fields for _, fields in read_prompts(path)] == [{"prompt": "a", "seed": 1}, {"prompt": "b\u2028c"}]


def test_a_list_and_a_table(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(["a", {"prompt": "b", "steps": 4}]))
    assert [fields for _, fields in read_prompts(path)] == [{"prompt": "a"}, {"prompt": "b", "steps": 4}]
    path = tmp_path / "p.csv"
    path.write_text('\ufeffprompt,seed,guidance\n"a, b",7,3.5\n12,,\n', encoding="utf-8")
    asked = requests_from((), {"prompts_file": path})
    assert [(a.request.prompt, a.request.seed, a.request.guidance) for a in asked] == [
        ("a, b", 7, 3.5), ("12", None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("p.yaml", b"a", "no known kind"),
        ("p", b"a", "no known kind"),
        ("p.txt", "a red circle".encode("utf-16"), "UTF-16"),
        ("p.txt", "a red circle".encode("utf-16-le"), "UTF-16"),
        ("p.txt", b"\xff\x00\x01", "not UTF-8"),
        ("p.txt", b"\n \n", "no prompt"),
        ("p.jsonl", b'{"prompt": 3}\n[]\n{"prompt": "a"}\n"', "don't fit: 1, 2, 4"),
        ("p.jsonl", b'{"prompt": ' + b"[" * 100_000, "don't fit: 1"),
        ("p.json", b"[" * 100_000, "not valid JSON"),
        ("p.json", b"{}", "no list"),
        ("p.csv", b"text\na\n", "no column 'prompt'"),
        ("p.csv", b"prompt,sed\na,1\n", "sed"),
    ],
)
def test_files_that_can_not_be_read_are_told_as_what_they_are(
    name: str, data: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadRequest) as refusal:
        requests_from((), {"prompts_file": tmp_path / name})
    assert told in str(refusal.value)


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (path := tmp_path / "stack.toml").write_text('\ufeffmodel = "demo"\n', encoding="utf-8")
    assert load_config(path, {}, {}).model == "demo"


def test_an_id_that_is_none_is_drawn() -> None:
    assert make_request({"prompt": "x", "id": None}, "").id


def test_every_final_name_is_checked(tmp_path: Path) -> None:
    (tmp_path / "q-1.png").mkdir()
    with pytest.raises(BadRequest, match=r"q-1.png' is a folder"):
        names_for(tmp_path / "q.png", [Wanted("a", 1), Wanted("b", 2)])
    with pytest.raises(BadRequest, match="File name too long"):
        names_for(tmp_path / ("x" * 300 + ".png"), [Wanted("a", 1)])
    (tmp_path / "triptych-a-2.png").mkdir()
    with pytest.raises(BadRequest, match=r"triptych-a-2.png' is a folder"):
        names_for(tmp_path, [Wanted("a", 2)])
    names = names_for(tmp_path / "r.png", [Wanted("a", 3, only=1)])
    assert names == {"a": [Name(1, tmp_path / "r.png")]}


def test_a_pattern_names_each_picture_and_equal_names_get_numbers(tmp_path: Path) -> None:
    def names(pattern: str, *prompts: str) -> list[str]:
        jobs = [(Wanted(f"j{i}", 1), {"prompt": prompt, "seed": 7}) for i, prompt in enumerate(prompts)]
        found = names_of_pattern(str(tmp_path / pattern), jobs)
        return [name.path.name for rows in found.values() for name in rows]

    assert names("{seed}-{prompt:.5}.png", "a long one", "../b") == ["7-a lon.png", "7-.._b.png"]
    assert names("{seed}.webp", "x", "y") == ["7.webp", "7-2.webp"]
    assert names("{job}-{index:03d}.jpg", "x") == ["j0-001.jpg"]
    for bad, words in (("{size}.png", "has no 'size'"), ("{seed", "can't be read"), ("{seed:q}.png", "can't be filled"),
                       ("{seed.real}.png", "has no 'seed.real'"), ("{seed}.txt", "is not a picture")):  # fmt: skip
        with pytest.raises(BadRequest, match=words):
            names(bad, "x")


def test_a_name_fits_what_is_made() -> None:
    def fitted(name: str, video: bool, chosen: bool = True) -> str:
        return fit_to({"j": [Name(0, Path(name), chosen)]}, video)["j"][0].path.name

    assert fitted("x.png", True, chosen=False) == "x.mp4"
    assert fitted("x.webp", False) == "x.webp"
    assert fitted("x.gif", True) == "x.gif"
    assert fitted("x-%04d.png", True) == "x-%04d.png"
    with pytest.raises(BadRequest, match="this model makes pictures"):
        fitted("x.webm", False)
    with pytest.raises(BadRequest, match="for a video, which this model makes"):
        fitted("x.png", True)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_of_any_format_carries_its_recipe(suffix: str, tmp_path: Path) -> None:
    image, path = Image.new("RGB", (8, 8), "red"), tmp_path / f"x{suffix}"
    save_picture(image, path, metadata_of(recipe(prompt="ein grüner Kreis"), "j", 0))
    assert read_recipe(path).recipe == recipe(prompt="ein grüner Kreis")
    save_picture(image, path, None)
    with pytest.raises(BadRequest, match="carries no recipe"):
        read_recipe(path)


def recipe(**fields: object) -> Recipe:
    base = {
        "prompt": "a", "negative_prompt": None, "width": 64, "height": 64, "steps": 4, "guidance": None,
        "cfg_scale": None, "seed": 1, "num_images": 1, "max_sequence_length": None,
        "model": "/home/me/models/FLUX, the: first", "revision": "r", "dtype": "float32",
    }  # fmt: skip
    return Recipe.model_validate(base | fields)


def half_written(path: Path, data: bytes) -> None:
    with put_in_place(path) as draft:
        draft.write_bytes(data)
        raise OSError(28, "No space left on device")


def test_a_picture_that_can_not_be_written_leaves_the_old_one_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "keep.png"
    save_picture(Image.new("RGB", (8, 8)), path, metadata_of(recipe(), "j", 0))
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space"):
        half_written(path, before[:20])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["keep.png"]
    (tmp_path / "link.png").symlink_to(path)
    save_picture(Image.new("RGB", (9, 9)), tmp_path / "link.png", metadata_of(recipe(), "j", 0))
    assert (tmp_path / "link.png").is_symlink()
    assert read_recipe(path).recipe == recipe()


def test_parameters_name_the_models_folder_alone_and_quote_as_others_read_it() -> None:
    text = parameters_text(recipe(), 0)
    assert "/home/me" not in text
    assert 'Model: "FLUX, the: first"' in text
    assert "Negative prompt" not in text
    assert "Negative prompt: \n" in parameters_text(recipe(negative_prompt=""), 0)


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert visible("a\x1b[2Jb\x07\u202ec\x85d\n") == "a\\x1b[2Jb\\x07\\u202ec\\x85d\\x0a"
    assert visible("naïve 星 🙂") == "naïve 星 🙂"


def test_a_line_of_a_kind_comes_once_a_second_and_those_of_jobs_always() -> None:
    limit = OnceASecond()

    def passes(**extra: object) -> bool:
        record = logging.makeLogRecord({"msg": "%s was not let in", "args": ("x",), **extra})
        return bool(limit.filter(record))

    assert [passes() for _ in range(3)] == [True, False, False]
    assert passes(job="a")
    assert passes(msg="another kind", args=())
