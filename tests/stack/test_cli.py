"""The command line: data on stdout, one clear line and the right exit code for each mistake."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from protocol.client.picture_files import metadata_of, read_recipe, save_picture
from tests.stacks import TRIPTYCH, RunningStack, triptych
from tests.tiny import environment

SMALL = ("--size", "32x32", "--steps", "2")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("",), 2, "prompt is empty"),
        ((), 2, "no prompt"),
        (("x " * 1000,), 5, "tokens; 512 fit"),
        (("x", "--width", "0"), 2, "width is 0"),
        (("x", "--height", "-8"), 2, "height is -8"),
        (("x", "--size", "33x33"), 2, "nearest is 32x32"),
        (("x", "--size", "100000x100000"), 5, "too large"),
        (("x", "--size", "big"), 2, "1024x768"),
        (("x", "--size", "32x32", "--width", "32"), 2, "--size and --width"),
        (("x", "--steps", "many"), 2, "not a valid integer"),
        (("x", "-o", "nowhere/x.png"), 2, "no folder"),
        (("x", "-o", "x.tiff"), 2, "FILE.png"),
        (("x", "-o", "x.mp4"), 2, "this model makes pictures"),
        (("x", "--frames", "9"), 2, "makes pictures, not videos"),
        (("x", "--set", "clip_skip=1"), 2, "has no setting 'clip_skip'"),
        (("x", "--seeds", "4..1"), 2, "no range"),
        (("x", "--output-pattern", "{size}.png"), 2, "has no 'size'"),
        (("x", "-n", "0"), 2, "num_images is 0"),
        (("--prompts", "missing.txt"), 2, "can't be read"),
        (("--prompts", "bad.jsonl"), 2, "lines that don't fit: 2, 3"),
        (("--prompts", "field.jsonl"), 2, "line 1: sed"),
        (("--prompts", "binary.txt"), 2, "not UTF-8"),
        (("--prompts", "empty.txt"), 2, "no prompt"),
        (("--prompts", "size.txt", "--size", "30x30"), 2, "multiples of 4"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_queued(
    arguments: tuple[str, ...], code: int, words: str, stack: RunningStack, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine"}\n{"prompt": 1}\nnot json\n')
    (tmp_path / "field.jsonl").write_text('{"prompt": "fine", "sed": 1}\n')
    (tmp_path / "binary.txt").write_bytes(b"\xff\x00\x01")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "size.txt").write_text("one\ntwo\n")
    before = stack.client.jobs(limit=1000)
    done = triptych("submit", *arguments, folder=stack.folder, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert stack.client.jobs(limit=1000) == before


def test_submit_writes_pictures_and_prints_their_paths(stack: RunningStack, tmp_path: Path) -> None:
    done = triptych(
        "submit", "a red star", *SMALL, "-n", "2", "--seed", "4", "-o", "x.png", folder=stack.folder, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["x-1.png", "x-2.png"]
    assert "denoising" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    with Image.open(tmp_path / "x-1.png") as image:
        assert image.size == (32, 32)
        assert "Seed: 4" in image.info["parameters"]


def test_retry_of_a_png_makes_it_again_bit_for_bit(stack: RunningStack, tmp_path: Path) -> None:
    first = triptych("submit", "a blue star", *SMALL, "-q", "-o", "x.png", folder=stack.folder, cwd=tmp_path)
    assert (first.stdout, first.stderr) == ("x.png\n", "")
    again = triptych("retry", "x.png", "-o", "y.png", folder=stack.folder, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    with Image.open(tmp_path / "x.png") as a, Image.open(tmp_path / "y.png") as b:
        assert a.tobytes() == b.tobytes()
        recipe = read_recipe(tmp_path / "x.png").recipe
        save_picture(
            a, tmp_path / "z.png", metadata_of(recipe.model_copy(update={"speedups": ("denoise:compile",)}), "job", 0)
        )
        save_picture(a, tmp_path / "w.png", metadata_of(recipe.model_copy(update={"dtype": "bfloat16"}), "job", 0))
    other = triptych("retry", "z.png", folder=stack.folder, cwd=tmp_path)
    assert other.returncode == 2
    assert "made with denoise:compile" in other.stderr
    other = triptych("retry", "w.png", folder=stack.folder, cwd=tmp_path)
    assert other.returncode == 2
    assert "--dtype bfloat16" in other.stderr
    assert "--anyway" in other.stderr
    anyway = triptych("retry", "w.png", "--anyway", "-o", "v.png", folder=stack.folder, cwd=tmp_path)
    assert anyway.stdout == "v.png\n"


def test_retry_of_one_of_several_pictures_writes_that_one(stack: RunningStack, tmp_path: Path) -> None:
    first = triptych("submit", "stars", *SMALL, "-n", "2", "-q", "-o", "n.png", folder=stack.folder, cwd=tmp_path)
    assert first.stdout.split() == ["n-1.png", "n-2.png"]
    again = triptych("retry", "n-2.png", "-o", "again.png", folder=stack.folder, cwd=tmp_path)
    assert again.stdout == "again.png\n"
    with Image.open(tmp_path / "n-2.png") as a, Image.open(tmp_path / "again.png") as b:
        assert a.tobytes() == b.tobytes()


def test_one_bad_line_of_many_is_named_and_none_is_queued(stack: RunningStack, tmp_path: Path) -> None:
    lines = [f'{{"prompt": "a {number}"}}' for number in range(1500)]
    lines[1300] = '{"prompt": "a", "width": 33}'
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    before = stack.client.stack().counts
    refused = triptych("submit", "--prompts", "many.jsonl", *SMALL, folder=stack.folder, cwd=tmp_path)
    assert refused.returncode == 2
    assert "many.jsonl, line 1301" in refused.stderr
    assert refused.stdout == ""
    assert stack.client.stack().counts == before


def test_no_wait_then_wait_show_jobs_and_json(stack: RunningStack, tmp_path: Path) -> None:
    sent = triptych("submit", "a circle", *SMALL, "--no-wait", folder=stack.folder)
    (job,) = sent.stdout.split()
    waited = triptych("wait", job, "-o", ".", "--json", folder=stack.folder, cwd=tmp_path)
    answer = json.loads(waited.stdout)
    assert answer["paths"] == [f"triptych-{job}.png"]
    assert answer["jobs"][0]["state"] == "done"
    assert job in triptych("jobs", "-q", folder=stack.folder).stdout.split()
    assert "denoise-1" in triptych("show", job, folder=stack.folder).stdout
    assert json.loads(triptych("show", job, "--json", folder=stack.folder).stdout)[0]["id"] == job
    assert f"job={job} " in triptych("logs", "--job", job, folder=stack.folder).stdout


def test_prompts_files_give_each_line_its_own_settings(stack: RunningStack, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "seed": 1}\n\n{"prompt": "b", "seed": 2, "steps": 3}\n')
    arguments = ("--prompts", "p.jsonl", "--size", "32x32", "--steps", "2", "--json")
    done = triptych("submit", *arguments, folder=stack.folder, cwd=tmp_path)
    recipes = [job["recipe"] for job in json.loads(done.stdout)["jobs"]]
    assert [(r["prompt"], r["seed"], r["steps"]) for r in recipes] == [("a", 1, 2), ("b", 2, 3)]


def test_workers_restart_and_scale(stack: RunningStack) -> None:
    found = json.loads(triptych("workers", "--json", folder=stack.folder).stdout)
    assert {worker["name"] for worker in found["workers"]} == {"text-1", "denoise-1", "vae-1"}
    places = triptych("workers", "--map", folder=stack.folder).stdout.splitlines()
    assert "denoise-1\ttransformer\tcpu" in places
    assert triptych("scale", "denoise", folder=stack.folder).returncode == 2
    assert triptych("scale", "sampler=2", folder=stack.folder).returncode == 2
    assert triptych("restart", "sampler", folder=stack.folder).returncode == 2


def test_cancel_ends_a_job_and_waiting_for_it_says_so(stack: RunningStack, tmp_path: Path) -> None:
    (job,) = triptych("submit", "a star", *SMALL[:2], "--steps", "900", "--no-wait", folder=stack.folder).stdout.split()
    assert triptych("cancel", job, folder=stack.folder).stdout == f"{job} cancelled\n"
    waited = triptych("wait", job, folder=stack.folder, cwd=tmp_path)
    assert waited.returncode == 6
    assert f"triptych retry {job}" in waited.stderr


def test_a_wait_that_takes_too_long_is_over_while_the_job_goes_on(stack: RunningStack, tmp_path: Path) -> None:
    done = triptych(
        "submit", "a star", "--size", "32x32", "--steps", "1000", "--timeout", "0.2", folder=stack.folder, cwd=tmp_path
    )
    assert done.returncode == 124
    newest = stack.client.jobs(limit=1)[0]
    assert newest.state not in ("failed", "cancelled")
    stack.client.cancel(newest.id)


def test_no_stack_is_told_with_what_to_do(state: Path) -> None:
    for command in (("submit", "x"), ("jobs",), ("workers",), ("cancel", "x")):
        done = triptych(*command, folder=state)
        assert done.returncode == 3
        assert "triptych up" in done.stderr
    (state / "stack.json").write_text(json.dumps({"clients": f"ipc://{state}/gone", "workers": "x"}))
    assert triptych("jobs", folder=state).returncode == 3


def test_doctor_ends_in_the_next_command(stack: RunningStack, state: Path) -> None:
    done = triptych("doctor", folder=state)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("Next: triptych run ")
    for line in (
        "ok  family: FluxPipeline: makes pictures of a prompt, pictures (--image), a picture and a mask (--mask)",
        "ok  weights: text 5.9 MB, denoise 25.1 MB, vae 7.5 MB, in float32",
        "ok  licence: apache-2.0",
    ):
        assert line in done.stdout.splitlines()
    assert json.loads(triptych("doctor", "--json", folder=stack.folder).stdout)["next"].startswith("triptych submit ")
    missing = triptych("doctor", "--model", "nobody/nothing-here", folder=state)
    assert missing.returncode == 1
    assert "Traceback" not in missing.stderr


def test_doctor_names_what_a_model_lacks(flux_schnell: Path, state: Path, tmp_path: Path) -> None:
    model = shutil.copytree(flux_schnell, tmp_path / "model")
    assert triptych("doctor", "--model", str(model), folder=state).returncode == 0
    for path in (model / "vae").glob("*.safetensors"):
        path.unlink()
    (model / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "diffusion_pytorch_model-00002-of-00002.safetensors"}})
    )
    lacking = triptych("doctor", "--model", str(model), folder=state)
    assert lacking.returncode == 1
    (index, vae) = [line for line in lacking.stdout.splitlines() if line.startswith("!!  model: ")]
    assert "transformer/diffusion_pytorch_model-00002-of-00002.safetensors is missing" in index
    assert "vae/ has no weights as safetensors" in vae
    assert not lacking.stdout.splitlines()[-1].startswith("Next: triptych run")


def test_run_needs_no_stack_and_leaves_none(flux_schnell: Path, tmp_path: Path) -> None:
    done = triptych(
        "run", "a red star", *SMALL, "--model", str(flux_schnell), "--device", "cpu", "-o", "x.png", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "x.png\n"
    assert (tmp_path / "x.png").exists()
    refused = triptych("run", "x", "--model", str(tmp_path), cwd=tmp_path)
    assert refused.returncode == 4
    assert "model_index.json" in refused.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_ended_by_a_signal_says_so_and_leaves_nothing(
    number: signal.Signals, flux_schnell: Path, tmp_path: Path
) -> None:
    arguments = ["run", "a red star", "--steps", "999", "--model", str(flux_schnell), "--device", "cpu"]
    process = subprocess.Popen(
        [*TRIPTYCH, *arguments], stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment()
    )
    assert process.stderr
    while "Starting" not in process.stderr.readline():
        pass
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "Interrupted." in said
    assert not os.listdir(tmp_path)


def test_settings_come_from_flags_environment_and_file_in_this_order(tmp_path: Path) -> None:
    from orchestrator.config import load_config
    from protocol.errors import BadRequest

    file = tmp_path / "stack.toml"
    file.write_text('model = "m"\n[stages.denoise]\nworkers = 2\ngpus = [0, 1]\nmax_memory = "16GB"\n')
    config = load_config(file, {"model": "n"}, {"denoise": {"workers": "3"}, "vae": {"keep_alive": "forever"}})
    assert config.stage("vae").keep_alive is None
    assert load_config(None, {}, {"text": {"keep_alive": "2.5"}}).stage("text").keep_alive == 2.5
    with pytest.raises(BadRequest, match="keep_alive"):
        load_config(None, {}, {"text": {"keep_alive": "soon"}})
    assert (config.model, config.stage("denoise").workers, config.stage("denoise").gpus) == ("n", 3, (0, 1))
    assert config.stage("denoise").max_memory == (16_000_000_000,)
    for text, words in (("modle = 1", "modle"), ("x", "not valid TOML"), ("[stages.sampler]\nworkers=1", "sampler")):
        file.write_text(text)
        with pytest.raises(BadRequest, match=words):
            load_config(file, {}, {})
    with pytest.raises(BadRequest, match="can't be read"):
        load_config(tmp_path / "none.toml", {}, {})


def test_unknown_commands_get_a_suggestion_and_debug_a_traceback(state: Path) -> None:
    assert "Did you mean 'submit'" in triptych("sumbit").stderr
    assert "Traceback" in triptych("--debug", "jobs", folder=state).stderr


def test_environment_variables_stand_in_for_options(stack: RunningStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_STATE", str(stack.folder))
    monkeypatch.setenv("TRIPTYCH_SUBMIT_STEPS", "2")
    (job,) = triptych("submit", "a star", "--size", "32x32", "--no-wait").stdout.split()
    assert stack.client.job(job).recipe.steps == 2
    assert os.environ["TRIPTYCH_STATE"] == str(stack.folder)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    assert "_TRIPTYCH_COMPLETE" in triptych("completion", shell).stdout
