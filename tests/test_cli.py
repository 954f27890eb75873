"""The `chipmunk` command: bad input is one sentence, at once and without traces; good input is files that say what they are."""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from PIL import Image

from chipmunk_jax import load_sparsity, sampling
from chipmunk_jax.cli import commands, sample, verify
from chipmunk_jax.cli.main import main
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, read_sparsity
from chipmunk_jax.errors import InputError
from chipmunk_jax.pipelines import VARIANTS, Pipeline
from chipmunk_jax.sparsity import PARTS, PRESETS, GuidanceCache, to_dict

PROMPT = "red striped heart on meadow"
BENCHES = ("kernels", "step", "sample", "schedule", "quality", "plot")
COMMANDS = ("convert", "inspect", "sample", "verify", "tune", "bench", *(f"bench {name}" for name in BENCHES))
SMALL = ["--height", "20", "--width", "12", "--steps", "3"]


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is long work, too late for an error."""

    def never(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("chipmunk_jax.pipelines.base.load", never)


def run(command, checkpoint, *flags):
    """Exit status of a small sample or verification."""
    given = list(map(str, flags))
    prompt = [] if "--prompt" in given else ["--prompt", PROMPT]
    return main([command, str(checkpoint), *prompt, *SMALL, *given])


def assert_one_sentence(capsys, *words):
    """What was printed is one line on stderr that holds all words."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("chipmunk: ") and captured.err.endswith("\n")
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err and len(captured.err) < 1000
    assert all(word in captured.err for word in words), captured.err


BAD = [
    (["--height", 21], ["--height 21", "multiple of 2"]),
    (["--width", 7], ["--width 7", "multiple of 2"]),
    (["--prompt", "a\x1b[31m"], ["'a\\x1b[31m'"]),
    (["--height", 0], ["--height 0", "positive multiple of 2"]),
    (["--height", -2], ["--height -2", "positive multiple of 2"]),
    (["--frames", 4], ["--frames 4", "expected none, as this model makes images"]),
    (["--fps", 4], ["--fps 4", "expected none, as this model makes images"]),
    (["--steps", 0], ["--steps 0", "at least 1"]),
    (["--steps", 10**6], ["--steps 1000000", "at most 100000"]),
    (["--height", 2**31], [f"--height {2**31}", "at most 1048576"]),
    (["--width", "9" * 4000], ["--width 9999", "9999: expected a positive multiple of 2 pixels"]),
    (["--sparsity.attention.full-step-every", "9" * 4000], ["full_step_every=9999", "9999: expected at least 1"]),
    (["--sparsity.attention.top-keys", "9" * 5000], ["top_keys='9999", "9999': expected a number"]),
    (["--sparsity.patches", "[" * 5000], ["patches='[[[[", "[[[[': expected a list of whole numbers"]),
    (["--prompt", "red ring " * 5000], ["prompt 'red ring ", "expected one texture"]),
    (["--steps", -3], ["--steps -3", "at least 1"]),
    (["--seed", -1], ["--seed -1", "expected a whole number from 0 to"]),
    (["--seed", 10**30], ["--seed 1000", "expected a whole number from 0 to"]),
    (["--guidance", "nan"], ["--guidance nan", "plain scale"]),
    (["--prompt", "red striped dog on meadow"], ["'red striped dog on meadow'", "one shape of disc, ring, heart"]),
    (["--prompt", ""], ["''", "one shape"]),
    (["--prompt", "red ring and blue ring plain on sky"], ["one colour of", "both red and blue"]),
    (["-o", "none/out.png"], ["none/out.png", "no folder none"]),
    (["-o", "out.jpg"], ["out.jpg", ".png"]),
    (["-o", "."], [".png"]),
    (["--sparsity.attention.top-keys", 0], ["attention.top_keys=0", "above 0 and up to 1"]),
    (["--sparsity.attention.top-keys", 1.2], ["attention.top_keys=1.2", "above 0 and up to 1"]),
    (["--sparsity.attention.top-keys", "nan"], ["attention.top_keys=nan", "above 0 and up to 1"]),
    (["--sparsity.mlp.top-keys", "many"], ["mlp.top_keys='many'", "a number"]),
    (["--sparsity.mlp.group", 100], ["mlp.group=100", "multiple of 64"]),
    (["--sparsity.patches", "8,3"], ["patches=(8, 3)", "divide"]),
    (["--sparsity", "fluks"], ["'fluks'", "one of flux"]),
    (["--sparsity", "none.yaml"], ["none.yaml", "no such file"]),
    (
        ["--sparsity", "wan-14b"],
        ["patch (4, 4, 8)", "2 sides for the grid", "; the model's own preset, mini-flux, fits"],
    ),
    (
        ["--sparsity.attention.local-voxels", 3, "--sparsity.patches", "[8]"],
        ["local_voxels=3", "at most 1", "; --sparsity.attention.local-voxels 1 fits"],
    ),
    (["--sparsity.attention.local-1d-window", 1.5], ["attention.local_1d_window=1.5", "from 0 to 1"]),
    (
        ["--sparsity", "flux", "--sparsity.schedule-steps", "null", "--sparsity.mlp.full-step-schedule", "0,3"],
        ["mlp.full_step_schedule", "step 3", "3 steps (0 to 2)"],
    ),
    (
        ["--sparsity.attention.full-step-schedule", "0,1,40"],
        ["attention.full_step_schedule", "step 40", "mini-flux, fits"],
    ),
    (
        ["--sparsity", "flux", "--sparsity.schedule-steps", 40, "--sparsity.step-cache.skip-steps", "[43]"],
        ["step 43, but schedule_steps says 40 steps (0 to 39)", "; the model's own preset, mini-flux, fits"],
    ),
]


@pytest.mark.parametrize("command", ["sample", "verify"])
@pytest.mark.parametrize(("flags", "words"), BAD, ids=[" ".join(map(str, flags))[:60] for flags, _ in BAD])
def test_bad_input_is_one_sentence_before_a_model_is_loaded(
    command, flags, words, checkpoint, folder, no_model, capsys
):
    assert run(command, checkpoint, *flags) == 2
    assert_one_sentence(capsys, *words)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("sample", ["--batch", 0], ["--batch 0", "at least 1"]),
        ("sample", ["--batch", 2**31], [f"--batch {2**31}", "at most 1048576"]),
        ("sample", ["--batch", 2, "-o", f"{'a' * 240}.png"], ["File name too long"]),
        ("verify", ["-o", "a.png", "--json", "./a.png"], ["./a.png: written twice"]),
        ("verify", ["-o", "a.png", "-o", "a.png"], ["a.png: written twice"]),
        ("verify", ["--json", "none/a.json"], ["none/a.json", "no folder none"]),
        ("verify", ["--json", "."], ["cannot be written"]),
        ("verify", ["--steps", 1], ["--steps 1", "at least 2"]),
        ("verify", ["--min-psnr", "nan"], ["--min-psnr nan", "number of dB"]),
        ("verify", ["--seeds", 0], ["--seeds 0", "at least 1"]),
        ("verify", ["--seeds", 2**31], [f"--seeds {2**31}", "at most 1048576"]),
        ("verify", ["--prompts", "none.txt"], ["none.txt", "no such file"]),
        ("verify", ["--report", "none/out"], ["none/out", "no folder none"]),
        ("verify", ["--report", "/dev/null"], ["/dev/null", "expected a folder"]),
        ("verify", ["--report", "/proc/out"], ["/proc/out", "cannot write into /proc"]),
    ],
)
def test_bad_input_of_one_command_is_one_sentence_too(command, flags, words, checkpoint, folder, no_model, capsys):
    assert run(command, checkpoint, *flags) == 2
    assert_one_sentence(capsys, *words)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("command", ["sample", "verify"])
@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"attention": {"topkeys": 0.2}}, ["sparsity.attention: unknown key topkeys", "known are top_keys"]),
        (
            {"atention": None},
            [
                "sparsity: unknown key atention",
                "known are attention, mlp, step_cache, guidance_cache, max_drift, schedule_steps, patches",
            ],
        ),
        ({"mlp": {"top_keys": "0.2"}}, ["sparsity.mlp.top_keys='0.2'", "a number"]),
        ([1, 2], ["bad.yaml", "expected keys"]),
    ],
)
def test_a_bad_sparsity_file_is_one_sentence(command, tree, words, checkpoint, tmp_path, folder, no_model, capsys):
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert run(command, checkpoint, "--sparsity", file) == 2
    assert_one_sentence(capsys, *words)
    assert not list(folder.iterdir())


def remove_config(checkpoint):
    (checkpoint / "config.json").unlink()


def remove_words(checkpoint):
    (checkpoint / "words.json").unlink()


def break_words(checkpoint):
    (checkpoint / "words.json").write_text("{}")


def make_source(checkpoint):
    """As a diffusers folder: a config.json, and no weights of ours."""
    shutil.rmtree(checkpoint / "weights")
    (checkpoint / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))


def make_file(checkpoint):
    """As flux1-dev.safetensors in place of the folder that convert writes."""
    shutil.rmtree(checkpoint)
    checkpoint.write_text("")


def make_latent(checkpoint):
    """As the config of FLUX.1 itself."""
    content = json.loads((checkpoint / "config.json").read_text())
    content["config"]["in_channels"] = 64
    (checkpoint / "config.json").write_text(json.dumps(content))


def cut_weights(checkpoint):
    """As a copy that was interrupted."""
    files = [file for file in (checkpoint / "weights").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])


DAMAGES = [
    (shutil.rmtree, "no such file or folder"),
    (remove_config, "half-written"),
    (make_source, "unknown layout"),
    (make_file, "an empty file: fetch it again"),
    (make_latent, "the weights do not fit config.json"),
    (remove_words, "no words.json"),
    (break_words, "bad word table"),
    (cut_weights, "damaged weights"),
]


@pytest.mark.parametrize("command", ["sample", "verify"])
@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_bad_checkpoint_is_one_sentence(command, damage, words, checkpoint, tmp_path, folder, capsys):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    damage(copy)
    assert run(command, copy) == 2
    assert_one_sentence(capsys, str(copy), words)
    assert not list(folder.iterdir())


def refused(capsys, *words):
    """The one sentence about a bad command line; its command's usage follows."""
    with pytest.raises(SystemExit) as error:
        main(list(map(str, words)))
    captured = capsys.readouterr()
    sentence, usage, *_ = captured.err.splitlines()
    command, _, message = sentence.partition(": ")
    assert (error.value.code, captured.out) == (2, "") and usage.startswith(f"usage: {command} "), captured.err
    return command, message


@pytest.mark.parametrize("command", COMMANDS)
def test_a_usage_error_is_a_sentence_and_the_usage_of_its_command(command, capsys):
    told = {"--nope": f"`chipmunk {command} --help` lists all", "--halp": "did you mean --help?"}
    for flag, hint in told.items():  # whatever else is wrong or missing
        words = [*command.split(), flag, "--steps", "few"]
        assert refused(capsys, *words) == (f"chipmunk {command}", f"unknown flag {flag}; {hint}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample", "mini", "--promt", PROMPT], "unknown flag --promt; did you mean --prompt?"),
        (["sample", "mini", f"--promt={PROMPT}"], "unknown flag --promt; did you mean --prompt?"),
        (["sample", "mini", "--prompt", PROMPT, "--step", 3], "unknown flag --step; did you mean --steps?"),
        (["convert", "a", "b", "--overwite"], "unknown flag --overwite; did you mean --overwrite?"),
        (["inspect", "a", "--modle", "wan-14b"], "unknown flag --modle; did you mean --model?"),
        (["verify", "mini", "-x"], "unknown flag -x; `chipmunk verify --help` lists all"),
        (["bench", "step", "--modell", "wan-14b"], "unknown flag --modell; did you mean --model?"),
        (["bench", "quality", "mini", "a.yaml", "--prompt", 3], "unknown flag --prompt; did you mean --prompts?"),
        (["bench", "--model", "flux-dev", "step"], "unknown flag --model; `chipmunk bench --help` lists all"),
        (
            ["verify", "mini", "--sparsity.attention.top_keys", 0.1],
            "unknown flag --sparsity.attention.top_keys; did you mean --sparsity.attention.top-keys?",
        ),
        (
            ["verify", "mini", "--top-keys", 0.1],
            "unknown flag --top-keys; did you mean --sparsity.attention.top-keys or --sparsity.mlp.top-keys?",
        ),
    ],
)
def test_an_unknown_flag_is_told_with_the_nearest_one(words, told, capsys):
    assert refused(capsys, *words)[1] == told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no command: expected one of convert, inspect, sample, verify, tune, bench"),
        (["smaple"], "unknown command 'smaple'; did you mean sample?"),
        (["draw"], "unknown command 'draw'; expected one of convert, inspect, sample, verify, tune, bench"),
        (["bench"], "no command: expected one of kernels, step, sample, pipeline, schedule, quality, plot"),
        (["bench", "kernel"], "unknown command 'kernel'; did you mean kernels?"),
    ],
)
def test_an_unknown_command_is_told_with_the_nearest_one(words, told, capsys):
    assert refused(capsys, *words) == ("chipmunk bench" if words[:1] == ["bench"] else "chipmunk", told)


def test_values_may_look_like_flags(folder, capsys):
    prompts = ["--prompt", "--a blue-ish ring", "--prompt=-5", "--seed", "-1", "-oring.png", "--", "mini"]
    assert main(["sample", *prompts]) == 2
    assert_one_sentence(capsys, "mini", "no such file or folder")


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_a_bad_source_is_one_sentence(command, checkpoint, tmp_path, folder, capsys):
    target = ["target"] if command == "convert" else []
    (tmp_path / "empty").mkdir()
    for source, words in (("none", "no such file or folder"), (tmp_path / "empty", "holds no .safetensors file")):
        assert main([command, str(source), *target]) == 2
        assert_one_sentence(capsys, str(source), words)
    if command == "convert":
        assert main([command, str(checkpoint), "target"]) == 2
        assert_one_sentence(capsys, "already converted")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["sample"], ["CKPT"]),
        (["sample", "mini"], ["--prompt or --prompts"]),
        (["sample", "mini", "--prompt", PROMPT, "--steps", "few"], ["--steps", "few"]),
        (["sample", "mini", "--prompt", PROMPT, "--sparsity.attention.keys", "1"], ["--sparsity.attention.keys"]),
        (["verify", "mini", "--dtype", "int8"], ["--dtype", "bfloat16"]),
    ],
)
def test_a_bad_command_line_exits_2_and_names_the_fault(flags, words, folder, capsys):
    command, message = refused(capsys, *flags)
    assert command == f"chipmunk {flags[0]}" and all(word in message for word in words), message


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_description_and_examples_of_the_command(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([*command.split(), "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert text.split("\n\n")[1][0].isupper() and f"examples:\n  chipmunk {command} " in text
    assert max(map(len, text.splitlines())) <= 125


def test_help_lists_all_commands(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in ("convert", "inspect", "sample", "verify", "tune", "bench"))


def test_sample_writes_a_picture_that_says_how_it_was_made(checkpoint, folder, capsys):
    other = "blue plain ring on night"
    assert run("sample", checkpoint, "-o", "a.png", "--seed", 7, "--sparsity", "flux", "--negative-prompt", other) == 0
    assert [file.name for file in folder.iterdir()] == ["a.png"]
    assert "a.png\n" in capsys.readouterr().out
    with Image.open(folder / "a.png") as image:
        assert image.size == (12, 20) and image.mode == "RGB"
        text, pixels = image.text, np.asarray(image)
    assert (text["prompt"], text["negative_prompt"], text["seed"]) == (PROMPT, other, "7")
    settings = json.loads(text["settings"])
    expected = {"height": 20, "width": 12, "num_inference_steps": 3, "guidance_scale": 2.0, "seed": 7}
    expected |= {"sparsity": to_dict(PRESETS["flux"])}
    made = {
        "model": "flux",
        "checkpoint": "tiny",
        "solver": "Euler",
        "dtype": "float32",
    }  # of other sizes than mini-flux
    assert settings == expected | made | {"version": version("chipmunk-jax")}
    same = dict(negative_prompt=other, height=20, width=12, num_inference_steps=3, seed=7, sparsity="flux")
    (image,) = Pipeline.from_pretrained(checkpoint)(PROMPT, **same).images
    np.testing.assert_array_equal(pixels, np.asarray(image))


@pytest.mark.parametrize("command", ["sample", "verify"])
def test_a_sample_that_is_not_finite_is_one_sentence_exit_1_and_no_file(
    checkpoint, folder, capsys, monkeypatch, command
):
    state = sampling.SampleState(x=None, solver=None, cache=None, kept=None, broken=np.array([2]))
    monkeypatch.setattr(sampling, "finished", lambda *_, **__: state)
    assert run(command, checkpoint, "-o", "out.png") == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("chipmunk: the sample: not finite from step 2 of 0 to 2 on, t = 0."), err
    assert not list(folder.iterdir())


def test_a_sample_is_sparse_by_the_models_own_preset_and_says_what_it_computed(checkpoint, folder, capsys):
    flags = ["--steps", 28, "--guidance", 1, "--sparsity.max-drift", "null"]  # random weights drift
    assert run("sample", checkpoint, "-o", "a.png", *flags) == 0
    captured = capsys.readouterr()
    # See test_pipeline.py for the shares.
    shares, full = "sparse: 67.2 % of the keys, 71.4 % of the neurons", "full 0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26"
    steps = f"of 28 steps (0 to 27) {full}, skipped 4, 7, 10, 13, 16, 19, 22, 25\n"
    assert f"s on cpu, compilation included, {shares}\n{steps}" in captured.out
    assert "sparse: compiling" in captured.err and "sparse: sampling" in captured.err
    with Image.open("a.png") as image:
        assert json.loads(image.text["settings"])["sparsity"] == to_dict(
            dataclasses.replace(PRESETS["mini-flux"], max_drift=None)
        )
    assert run("sample", checkpoint, "-o", "b.png", *flags, "--sparsity.step-cache.skip-steps", "[6,9]") == 0
    assert f"{full}, skipped 6, 9\n" in capsys.readouterr().out
    assert run("sample", checkpoint, "-o", "c.png", *flags, "--dense") == 0
    captured = capsys.readouterr()
    assert "s on cpu, compilation included, dense\n" in captured.out and "dense: sampling" in captured.err
    assert run("sample", checkpoint, "-o", "d.png", "--guidance", 1) == 0
    captured = capsys.readouterr()
    assert "s on cpu, compilation included, dense\n" in captured.out
    assert "this sparsity saves nothing in 3 steps, sampled densely\n" in captured.err


def test_a_batch_is_numbered_files_with_seeds_of_their_own(checkpoint, folder):
    assert run("sample", checkpoint, "--batch", 2, "--seed", 3) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["out-1.png", "out-2.png"]
    images = [Image.open(folder / f"out-{i}.png") for i in (1, 2)]
    assert [image.text["seed"] for image in images] == ["3", "4"]
    assert [json.loads(image.text["settings"])["seed"] for image in images] == [3, 4]
    assert np.any(np.asarray(images[0]) != np.asarray(images[1]))
    for image in images:
        image.close()


def test_inspect_says_how_a_checkpoint_is_usually_sampled(checkpoint, video_checkpoint, capsys):
    assert main(["inspect", str(checkpoint)]) == main(["inspect", str(video_checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "  height 64, width 64, 28 steps of Euler, guidance 2, shift by size, preset mini-flux\n" in out
    shift = "shift 3 as usual (no scheduler says one)"
    assert f"  frames 16, height 64, width 64, 30 steps of UniPC, guidance 3, {shift}, preset mini-wan\n" in out


def test_inspect_and_convert_say_that_blocks_of_a_published_model_are_not_there(folder, monkeypatch, capsys):
    source, row = str(Path(__file__).parents[1] / "examples/mini-flux"), VARIANTS["mini-flux"]
    deeper = dataclasses.replace(row.config, depth=row.config.depth + 1)
    monkeypatch.setitem(VARIANTS, "mini-flux", dataclasses.replace(row, config=deeper))
    assert main(["inspect", source]) == main(["convert", source, "out"]) == 0
    told = f"{row.config.depth} double blocks where mini-flux has {deeper.depth}: pruned, or cut short"
    out, err = capsys.readouterr()
    assert f" {told}\n" in out and f"out: {told}\n" in err


def test_a_batch_without_room_is_refused_before_its_prompts_are_encoded(checkpoint, folder, capsys):
    assert run("sample", checkpoint, "--batch", 10**6) == 2
    assert_one_sentence(capsys, "no room on", "a smaller batch")


def test_a_file_that_is_there_is_replaced_whole(checkpoint, folder):
    (folder / "a.png").write_text("old")
    assert run("sample", checkpoint, "-o", "a.png") == 0
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG") and len(list(folder.iterdir())) == 1


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_sample_that_runs_and_leaves_nothing(checkpoint, folder):
    size = ["--height", "64", "--width", "64", "--steps", "20000"]  # minutes
    command = [sys.executable, "-m", "chipmunk_jax.cli.main", "sample", str(checkpoint), "--prompt", PROMPT, *size]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        said = b""
        while b"sampling" not in said:
            said += process.stderr.read(1) or pytest.fail(said.decode())
        process.send_signal(signal.SIGINT)
        try:
            out, error = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, b"") and b"Traceback" not in error
    assert error.decode().splitlines()[-1] == "chipmunk: interrupted"
    assert not list(folder.iterdir())


EARLY = """
import sys
from chipmunk_jax.cli.main import main

class Interrupt:
    def find_spec(self, name, *_):
        if name == "jax":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
main(["sample", "--help"])
"""


def test_ctrl_c_while_jax_is_imported_is_one_sentence():
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "chipmunk: interrupted\n")


HEAVY = """
import sys
from chipmunk_jax.cli.main import main

try:
    main({words})
except SystemExit as end:
    assert end.code == {status}
print(sorted({{"jax", "jaxlib", "flax", "orbax", "numpy", "PIL", "yaml"}} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("words", "status"), [(["--help"], 0), (["--version"], 0), ([], 2), (["smaple"], 2), (["--hlp"], 2)]
)
def test_without_a_command_nothing_heavy_is_imported(words, status):
    program = HEAVY.format(words=words, status=status)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["convert", "inspect", "sample", "verify", "tune", "bench"])
def test_only_the_module_of_the_named_command_is_imported(name, monkeypatch):
    imported = []
    module = SimpleNamespace(parse=lambda words: words, run=lambda words: len(words))
    monkeypatch.setattr(commands, "import_module", lambda name: imported.append(name) or module)
    assert main([name, "a", "--b"]) == 2
    assert imported == [f"chipmunk_jax.cli.{name}"]


def raising(monkeypatch, error):
    """Makes every command raise the error."""

    def run(_):
        raise error

    monkeypatch.setattr(commands, "import_module", lambda _: SimpleNamespace(parse=list, run=run))


@pytest.mark.parametrize("ours", [ValueError("expected 3"), RuntimeError("INTERNAL"), KeyError("a"), AssertionError()])
def test_a_bug_is_no_bad_input(ours, monkeypatch, capsys):
    raising(monkeypatch, ours)
    with pytest.raises(type(ours)) as error:
        main(["sample"])
    assert error.value is ours and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "told", [InputError("a=1:\nexpected 2"), NotImplementedError("a=1: expected 2"), OSError("a=1: expected 2")]
)
def test_what_the_user_did_is_one_sentence(told, monkeypatch, capsys):
    raising(monkeypatch, told)
    assert main(["sample"]) == 2
    assert capsys.readouterr().err == "chipmunk: a=1: expected 2\n"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("JAX_PLATFORMS", "cuda", "JAX_PLATFORMS=cuda: expected a device of this machine"),
        ("JAX_ENABLE_X64", "banana", "'banana' for environment 'JAX_ENABLE_X64'"),
    ],
)
def test_a_setting_that_jax_does_not_take_is_one_sentence(variable, value, words, checkpoint):
    if value == "cuda" and jax.default_backend() == "gpu":
        pytest.skip("needs a machine without a GPU")
    command = [sys.executable, "-m", "chipmunk_jax.cli.main", "sample", str(checkpoint), "--prompt", PROMPT, "--dense"]
    env = os.environ | {variable: value}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and done.stderr.startswith("chipmunk: ") and done.stderr.count("\n") == 1
    assert words in done.stderr


def test_what_cannot_be_printed_is_escaped(monkeypatch, capsys):
    raising(monkeypatch, InputError("key a\x1b[31m\udcff\u202e of sch\xf6n: \n\t expected none"))
    assert main(["sample"]) == 2
    assert capsys.readouterr().err == "chipmunk: key a\\x1b[31m\\udcff\\u202e of sch\xf6n: expected none\n"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_no_memory_is_one_sentence(error, monkeypatch, capsys):
    raising(monkeypatch, error)
    assert main(["sample"]) == 2
    assert_one_sentence(capsys, "out of memory", "a smaller size or batch")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    assert error.value.code == 0 and capsys.readouterr().out == f"chipmunk-jax {version('chipmunk-jax')}\n"


def test_dense_ignores_sparsity(checkpoint, folder):
    flags = ["--dense", "--sparsity", "flux", "--sparsity.mlp.top-keys", 0.1]
    assert run("sample", checkpoint, "-o", "a.png", *flags) == 0
    assert run("sample", checkpoint, "-o", "b.png", "--dense") == 0
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert json.loads(a.text["settings"])["sparsity"] is None
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def parse(*flags, preset="flux"):
    """The Sparsity of a command line."""
    parser = argparse.ArgumentParser()
    add_sparsity_flags(parser)
    return read_sparsity(parser.parse_args(list(flags)), preset)


def test_sparsity_flags_reach_the_config(tmp_path):
    assert parse() == parse("--sparsity", "flux") == PRESETS["flux"]
    assert parse("--sparsity.attention.top-keys", "0.2") == load_sparsity("flux", {"attention.top_keys": 0.2})
    found = parse(
        *("--sparsity.attention.recompute-mask", "true"),
        *("--sparsity.attention.full-step-schedule", "0,1,10,40"),
        *("--sparsity.mlp.cache", "residual"),
        *("--sparsity.mlp.first-n-dense-layers", "0"),
        *("--sparsity.patches", "[]"),
    )
    assert found.attention.recompute_mask and found.attention.full_step_schedule == (0, 1, 10, 40)
    assert (found.mlp.cache, found.mlp.first_n_dense_layers, found.patches) == ("residual", 0, ())
    file = tmp_path / "a.yaml"
    file.write_text("attention: {top_keys: 0.1, max_keys: 0.5}\nmlp: null\n")
    found = parse("--sparsity", str(file), "--sparsity.attention.top-keys", "0.4")
    assert (found.attention.top_keys, found.attention.max_keys, found.mlp) == (0.4, 0.5, None)
    assert parse("--sparsity", str(file), "--sparsity.attention.max-keys", "null").attention.max_keys is None


def test_single_flags_start_from_the_models_own_preset():
    assert parse(preset="mini-wan") == load_sparsity("mini-wan")
    found = parse("--sparsity.attention.top-keys", "0.4", preset="mini-wan")
    assert found == load_sparsity("mini-wan", {"attention.top_keys": 0.4})
    assert parse("--sparsity", "flux", preset="mini-wan") == PRESETS["flux"]


def test_every_field_has_a_flag():
    tree = to_dict(dataclasses.replace(PRESETS["flux-step-cache"], guidance_cache=GuidanceCache()))
    whole = {"patches": [4], "schedule_steps": 60, "max_drift": 0.1}
    assert set(tree) == {*PARTS, *whole}
    for name in [f"{part}.{name}" for part in PARTS for name in tree[part]] + list(whole):
        part, _, field = name.partition(".")
        value = tree[part][field] if field else whole[name]
        found = parse(f"--sparsity.{name.replace('_', '-')}", json.dumps(value))
        assert found == load_sparsity("flux", {name: value}) and (name != "patches" or found.patches == (4,))


def test_the_prompts_of_verify_are_sentences_of_the_words_that_the_help_of_sample_lists():
    lines = [line.split() for line in sample.DESCRIPTION.splitlines() if line.startswith("  ")]
    listed = {attribute: set(words) for attribute, *words in lines}
    assert set(listed) == {"shape", "colour", "texture", "background"}
    for prompt in verify.PROMPTS:
        assert all(len(words & set(prompt.split())) == 1 for words in listed.values()), prompt


def test_a_plan_of_too_few_steps_to_save_anything_is_the_dense_one(capsys):
    size = ["--model", "flux-dev", "--height", 64, "--width", 64, "--steps", 4]
    assert plan(*size) == plan(*size, "--dense") == 0
    sparse, dense = capsys.readouterr().out.split("flux-dev: ")[1:]
    assert sparse == dense and "4, bfloat16, dense" in dense


def plan(*flags):
    """Exit status of a memory plan."""
    return main(["inspect", "--plan", *map(str, flags)])


def test_the_lines_of_a_plan_add_up(capsys):
    assert plan("--model", "hunyuan-video", "--height", 128, "--width", 256, "--frames", 65) == 0
    first, *lines, device, verdict = capsys.readouterr().out.splitlines()
    assert first == "hunyuan-video: height 128, width 256, frames 65, batch 1, steps 50, bfloat16, sparse"
    sizes = {line.strip().partition("  ")[0]: float(line.split()[-2].replace(",", "")) for line in lines}
    assert all(line.endswith(" GB") for line in lines) and list(sizes)[-1] == "peak"
    assert sum(sizes.values()) == pytest.approx(2 * sizes["peak"], abs=5e-4 * len(sizes))
    parts = ("weights", "modulations of all steps", "attention residuals", "lists of keys", "log-sum-exps")
    assert all(sizes[part] > 0 for part in parts)
    assert device.split()[:2] == ["h100:", "63.7"] and "it fits" in verdict


def test_a_converted_checkpoint_is_planned_by_its_own_sizes(checkpoint, capsys):
    sizes = ["--height", 20, "--width", 12]
    assert plan(checkpoint, *sizes) == 0
    sparse = capsys.readouterr().out
    assert sparse.startswith(f"{checkpoint}: height 20, width 12, batch 1, steps 28, float32, sparse\n")
    assert plan(checkpoint, *sizes, "--dense") == 0
    dense = capsys.readouterr().out
    assert "residuals" in sparse and "residuals" not in dense


@pytest.mark.parametrize(
    ("flags", "largest"),
    [
        (["--model", "flux-tiny", "--height", 512, "--width", 512, "--batch", 2], "MLP activations"),
        (["--model", "hunyuan-tiny", "--height", 128, "--width", 128, "--frames", 33], "working set"),
    ],
)
def test_whatever_a_plan_says_would_fit_does(flags, largest, capsys, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert plan(*flags, "--device", 80) == 0
    peak = float(capsys.readouterr().out.split("peak")[1].split()[0])
    small = ["--device", 0.9 * peak / 0.75 * 1e9 / 2**30]
    assert plan(*flags, *small) == 1
    error = capsys.readouterr().out.splitlines()[-1]
    assert error.startswith("no room on ") and f"the largest part is {largest}" in error
    found = [remedy.split() for remedy in error.partition("it fits with ")[2].split(", or with ")]
    assert {"--dense", "--height"} < {remedy[0] for remedy in found} and len(found) >= 5
    for remedy in found:
        with monkeypatch.context() as patch:
            for setting in (word for word in remedy if "=" in word):
                patch.setenv(*setting.split("="))
            changes = [word for word in remedy if word != "and" and "=" not in word]
            assert plan(*flags, *small, *changes) == 0, remedy


def test_the_largest_of_a_million_batches_that_fits_is_found(capsys):
    assert plan("--model", "flux-tiny", "--batch", 10**6) == 1
    error = capsys.readouterr().out.splitlines()[-1]
    batch = int(error.partition("--batch ")[2].partition(",")[0])
    assert (
        plan("--model", "flux-tiny", "--batch", batch) == 0 and plan("--model", "flux-tiny", "--batch", batch + 1) == 1
    )


def test_a_preset_on_a_grid_too_small_names_a_flag_that_fits(capsys):
    flags = ["--model", "wan-tiny", "--height", 32, "--sparsity", "wan-1.3b"]
    assert plan(*flags) == 2
    flag = capsys.readouterr().err.partition("; --")[2].split()[:2]
    assert flag == ["sparsity.attention.local-voxels", "1"] and plan(*flags, f"--{flag[0]}", flag[1]) == 0
    assert plan(*flags[:-2]) == 0  # the model's own preset by itself


def test_all_pictures_are_written_before_a_path_is_printed(checkpoint, folder, monkeypatch):
    class Reader:
        def write(self, text):
            assert len(list(folder.iterdir())) == 2
            return len(text)

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Reader())
    assert run("sample", checkpoint, "--batch", 2) == 0


def test_pictures_without_room_on_the_disk_are_refused_before_a_model_is_loaded(
    checkpoint, folder, no_model, monkeypatch, capsys
):
    usage = shutil.disk_usage(folder)._replace(free=2 * 3 * 20 * 12 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run("sample", checkpoint, "--batch", 2) == 2
    assert_one_sentence(capsys, "out.png: 0.0 MB needed and 0.0 MB free")
    assert not list(folder.iterdir())


def test_a_folder_in_the_place_of_one_of_several_pictures_is_found_first(checkpoint, folder, no_model, capsys):
    (folder / "out-1.png").mkdir()
    assert run("sample", checkpoint, "--batch", 2) == 2
    assert_one_sentence(capsys, "out-1.png: a folder")
    assert [file.name for file in folder.iterdir()] == ["out-1.png"]


def test_a_plan_without_any_way_out_says_so(capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.01")
    assert plan("--model", "wan-i2v-14b", "--device", 1) == 1  # too large for an H200 as well
    assert "the largest part is attention residuals" in (out := capsys.readouterr().out) and "fits either" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["inspect"], ["expected PATH"]),
        (["inspect", "somewhere", "--model", "flux-dev"], ["--model only with --plan"]),
        (["inspect", "somewhere", "--height", "64", "--dense"], ["--height, --dense only with --plan"]),
        (
            ["inspect", "somewhere", "--sparsity.attention.max-keys", "null"],
            ["--sparsity.attention.max-keys only with"],
        ),
        (["inspect", "--plan"], ["a checkpoint or --model"]),
        (["inspect", "--plan", "somewhere", "--model", "flux-dev"], ["one of them"]),
        (["inspect", "--plan", "somewhere"], ["somewhere", "no such file or folder"]),
        (["inspect", "--plan", "--model", "flux-dev", "--device", "a100"], ["--device a100", "h100, h200 or a number"]),
        (["inspect", "--plan", "--model", "flux-dev", "--batch", "0"], ["--batch 0", "at least 1"]),
        (
            ["inspect", "--plan", "--model", "flux-dev", "--batch", "100000000"],
            ["--batch 100000000", "at most 1048576"],
        ),
        (
            ["inspect", "--plan", "--model", "flux-dev", "--height", "2147483648"],
            ["--height 2147483648", "at most 1048576"],
        ),
        (["inspect", "--plan", "--model", "flux-dev", "--steps", "0"], ["--steps 0", "at least 1"]),
        (["inspect", "--plan", "--model", "flux-dev", "--frames", "5"], ["--frames 5", "images"]),
        (["inspect", "--plan", "--model", "wan-1.3b", "--frames", "6"], ["--frames 6", "multiple of 4"]),
        (
            ["inspect", "--plan", "--model", "hunyuan-video", "--frames", "-3"],
            ["--frames -3", "multiple of 4, and one"],
        ),
        (
            ["inspect", "--plan", "--model", "hunyuan-video", "--steps", "20", "--sparsity.schedule-steps", "null"],
            ["names step 40", "there are 20 steps", "the model's own preset, hunyuan-video, fits\n"],
        ),
        (
            ["inspect", "--plan", "--model", "wan-tiny", "--height", "32", "--sparsity", "wan-1.3b"],
            ["local_voxels=3: expected at most 1"],
        ),
        (["inspect", "--plan", "--model", "flux-dev", "--sparsity", "wan-14b"], ["patch (4, 4, 8)", "2 sides"]),
        (["inspect", "--plan", "--model", "flux-dev", "--device", "nan"], ["--device nan", "h100, h200 or a number"]),
        (["inspect", "--plan", "--model", "wan-1.3b", "--height", "7"], ["--height 7", "multiple of 16"]),
        (["inspect", "--plan", "--model", "flux-dev", "--sparsity", "fluks"], ["'fluks'"]),
    ],
)
def test_a_bad_plan_is_one_sentence(flags, words, folder, capsys):
    assert main(flags) == 2
    assert_one_sentence(capsys, *words)
