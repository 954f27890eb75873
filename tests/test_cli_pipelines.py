"""The commands on whole pipelines: what a newcomer types, from a folder of published layout to files that say what they are."""

import io
import json
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
from golden_pipelines import assemble
from PIL import Image

from chipmunk_jax import progress
from chipmunk_jax.cli import verify
from chipmunk_jax.cli.main import main
from chipmunk_jax.cli.prompts import calls_of, read_prompts
from chipmunk_jax.convert.source import Source
from chipmunk_jax.errors import InputError
from chipmunk_jax.pipelines.residents import Residents
from chipmunk_jax.progress import Reporter, phase

SMALL = ["--height", "32", "--width", "48", "--steps", "2", "--dense"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A FLUX.1-dev as diffusers saves it."""
    return assemble("flux_dev_pipeline", tmp_path_factory.mktemp("golden") / "flux-dev")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A Wan2.1 as diffusers saves it."""
    return assemble("wan21_pipeline", tmp_path_factory.mktemp("golden") / "wan")


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights is long work, too late for an error."""

    def never(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Residents, "place", never)


def run(*words):
    """Exit status of a command."""
    return main(list(map(str, words)))


def assert_one_sentence(capsys, *words):
    """What was printed is one line on stderr that holds all words."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("chipmunk: ") and captured.err.count("\n") == 1, captured.err
    assert all(word in captured.err for word in words), captured.err


def test_prompts_of_a_file_are_numbered_pictures_that_each_say_how_they_were_made(flux, folder, capsys):
    (folder / "prompts.txt").write_text("a fox\n\n  the sea at night \n")
    flags = ["--prompts", "prompts.txt", "--negative-prompt", "rain", "--negative-prompt", "fog", "--true-cfg", 3]
    flags += ["--prompt-2", "in oil", "--solver", "unipc", "--max-sequence-length", 16, "--seed", 5, "--json"]
    assert run("sample", flux, *SMALL, *flags, "-o", "a.png") == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert "1 of 2: a fox\n" in captured.err and "2 of 2: the sea at night\n" in captured.err
    assert told["paths"] == ["a-1.png", "a-2.png"] and told["prompts"] == ["a fox", "the sea at night"]
    assert (told["prompts_2"], told["negative_prompts"], told["seeds"]) == (["in oil"] * 2, ["rain", "fog"], [5, 6])
    assert list(told["stages"]) == ["text", "transformer", "decoder"]
    assert all(stage.keys() == {"seconds", "peak_bytes"} for stage in told["stages"].values())
    assert told["seconds"] >= sum(stage["seconds"] for stage in told["stages"].values()) > 0
    assert told["density"] == {"attention": 1, "mlp": 1} and (told["full_steps"], told["skipped_steps"]) == ([0, 1], [])
    settings = {
        "num_inference_steps": 2,
        "true_cfg_scale": 3,
        "guidance_scale": 3.5,
        "solver": "UniPC",
        "max_sequence_length": 16,
        "seed": 5,
    }
    assert settings.items() <= told["settings"].items()
    for i, path in enumerate(told["paths"]):
        with Image.open(path) as image:
            assert image.size == (48, 32)
            text = dict(image.text)
        assert json.loads(text.pop("settings")) == told["settings"] | {"seed": 5 + i}
        lists = {"prompt": "prompts", "prompt_2": "prompts_2", "negative_prompt": "negative_prompts", "seed": "seeds"}
        assert text == {key: str(told[name][i]) for key, name in lists.items()}


def test_a_video_says_what_it_was_guided_away_from(wan, folder, capsys):
    small = [*SMALL, "--frames", 5, "--max-sequence-length", 8]
    assert run("sample", wan, "--prompt", "a fox runs over fresh snow", *small, "-o", "fox.webp") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("fox.webp\n1 video in ") and "\ntext " in captured.out
    said = captured.err.splitlines()  # and nothing of it on stdout
    assert "text_encoder: a text encoder takes 8 tokens of a prompt: cut 'uns over fresh snow'" in said
    with Image.open("fox.webp") as video:
        made = json.loads(video.getexif()[0x010E])
    assert (made["prompt"], made["seed"]) == ("a fox runs over fresh snow", 0)
    assert made["negative_prompt"].startswith("色调艳丽") and "prompt_2" not in made  # the model's usual one


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("flux", ["--width", 40], ["--width 40: expected a positive multiple of 16 pixels, such as 32 or 48"]),
        ("flux", ["--negative-prompt", "rain"], ["--negative-prompt with --true-cfg None: expected a scale above 1"]),
        ("flux", ["--true-cfg", 4], ["--true-cfg 4.0: expected a --negative-prompt"]),
        ("flux", ["--guidance-2", 4], ["--guidance-2: expected none, as a FluxPipeline takes none"]),
        ("flux", ["--prompt-2", "a", "--prompt-2", "b"], ["--prompt-2: given 2 times for 1 prompts"]),
        ("flux", ["--frames", 5], ["--frames 5: expected none, as this model makes images"]),
        ("flux", ["-o", "a.mp4"], ["a.mp4", ".png"]),
        ("flux", ["--max-sequence-length", 513], ["--max-sequence-length 513", "from 1 to 512"]),
        ("flux", ["--prompts", "none.txt"], ["--prompts none.txt: no such file"]),
        ("flux", ["--seed", 2**32 - 1, "--batch", 2], ["--seed 4294967295"]),
        ("wan", ["--guidance-2", 4], ["--guidance-2 4.0: expected none, as this Wan has one network"]),
        ("wan", ["--true-cfg", 4], ["--true-cfg: expected none, as a WanPipeline takes none"]),
        ("wan", ["--prompt-2", "a"], ["--prompt-2: expected none, as a WanPipeline takes none"]),
        ("wan", ["--frames", 6], ["--frames 6", "such as 5 or 9"]),
        ("wan", ["-o", "a.gif"], ["a.gif", ".mp4 or .webp or .png"]),
    ],
)
def test_bad_input_is_one_sentence_before_weights_are_read(kind, flags, words, request, folder, no_weights, capsys):
    assert run("sample", request.getfixturevalue(kind), "--prompt", "a fox", *flags) == 2
    assert_one_sentence(capsys, *words)
    assert not list(folder.iterdir())


def test_lines_of_a_file_are_prompts_whatever_editor_wrote_it(tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa fox\r\n\r\n \t\r\n狐\u2028狸\rüber\x0b\n".encode())
    assert read_prompts(str(file)) == ["a fox", "狐\u2028狸", "über"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb")))
    assert read_prompts("-") == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\n \n", "holds no prompts, expected one a line"),
        (b"a\nb\n\xff\n", "line 3 is not text in UTF-8"),
        (b"a\n" * 5_000_001, "expected at most 10 MB of text"),
    ],
)
def test_a_bad_file_of_prompts_is_one_sentence(content, expected, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"prompts.txt: {expected}"):
        read_prompts(str(file))
    with pytest.raises(InputError, match="Is a directory"):
        read_prompts(str(tmp_path))


def test_prompts_of_flags_are_a_batch_and_those_of_a_file_come_in_turn(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("c\n")
    given = dict(prompt=["a", "b"], prompts=None, prompt_2=None, negative_prompt=["n"], batch=2, seed=7)
    rest = {"prompt_2": None, "negative_prompt": ["n"]}
    assert calls_of(SimpleNamespace(**given)) == [rest | dict(prompt=["a", "b"], negative_prompt=["n", "n"], seed=7)]
    given["prompts"] = str(file)
    expected = [rest | dict(prompt=[prompt], seed=seed) for prompt, seed in (("a", 7), ("b", 9), ("c", 11))]
    assert calls_of(SimpleNamespace(**given)) == expected


def test_a_folder_is_converted_once_however_often_it_is_asked_for(flux, folder, capsys, monkeypatch):
    """And a conversion matches a component with its model once."""
    assert run("convert", flux, "flux-dev", "--component", "vae") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("flux-dev/vae: flux_vae, ") and captured.out.count("\n") == 1
    assert run("inspect", "flux-dev") == 1
    out = capsys.readouterr().out
    assert "  missing: tokenizer_2 " in out and "  missing: transformer     no samples\n" in out
    matched, match = [], Source.match
    monkeypatch.setattr(Source, "match", lambda self: matched.append(self.layout.model) or match(self))
    assert run("convert", flux, "flux-dev") == 0
    assert matched == ["clip_text", "t5", "flux", "flux_vae"]
    captured = capsys.readouterr()
    assert "kept, as converted before from the same files: vae\n" in captured.err and "converted: 100%" in captured.err
    assert run("convert", flux, "flux-dev") == 0
    captured = capsys.readouterr()
    assert (
        captured.err
        == "kept, as converted before from the same files: text_encoder, text_encoder_2, transformer, vae\n"
    )
    assert run("inspect", "flux-dev") == 0
    out = capsys.readouterr().out
    assert (
        "  tokenizer       tokenizer/vocab.json\n  tokenizer_2     tokenizer_2/tokenizer.json\n" in out
        and "missing" not in out
    )


def test_inspect_says_what_a_folder_cannot_do_without_its_vae(flux, tmp_path, capsys):
    copy = shutil.copytree(flux, tmp_path / "copy")
    shutil.rmtree(copy / "vae")
    assert run("inspect", copy) == 1
    assert '  missing: vae    no pixels; latents are made with output_type="latent"\n' in capsys.readouterr().out


def test_verify_compares_sentences_of_everyday_life_where_a_model_reads_any(flux, folder, monkeypatch):
    def check(pipeline, prompts, **settings):
        assert len(prompts) == 3 and pipeline.check(prompts, **settings).prompts == verify.EVERYDAY
        raise InputError("seen")

    monkeypatch.setattr(verify, "check_verify", check)
    small = ["--height", 32, "--width", 48, "--sparsity.attention.full-step-every", 2]
    small += ["--sparsity.attention.full-step-schedule", "null", "--sparsity.patches", "[]"]
    assert run("verify", flux, *small) == 2


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self):
        return True


def test_the_bar_of_steps_counts_their_time_alone(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Reporter(4, "dense", True, None) as reporter:
        reporter.bar._time, reporter.bar.start_t = time.time, clock[0]
        for what, seconds in (("loading", 60), ("compiling", 30)):
            reporter.pause(what)
            clock[0] += seconds
        reporter.resume()
        for step in range(4):
            if step == 2:  # another network
                reporter.pause("loading")
                clock[0] += 500
                reporter.resume()
            clock[0] += 3
            reporter.report(step, 0.0)
    said = sys.stderr.getvalue()
    assert all(f"dense: {what}: " in said for what in ("loading", "compiling", "sampling"))
    last = said.rstrip().rpartition("\r")[2]
    assert (
        last.startswith("dense: sampling: 100%")
        and last.endswith("4/4 [00:12<00:00,  3.00s/step]")
        and said[-1] == "\n"
    )


def test_the_time_of_a_phase_goes_on_in_a_terminal_alone(monkeypatch):
    monkeypatch.setattr(progress, "REDRAWN", 0.02)
    for stream, redrawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with phase("text", True):
            deadline = time.monotonic() + 10
            while redrawn and stream.getvalue().count("text") < 4:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert (stream.getvalue().count("text") > 2) == redrawn and stream.getvalue().endswith("\n")


def test_no_bar_is_drawn_and_no_thread_started_where_none_is_wanted(monkeypatch):
    monkeypatch.setattr(progress.threading, "Thread", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with phase("text", False), Reporter(2, "dense", False, None) as reporter:
        reporter.pause("compiling")
        reporter.resume()
        reporter.report(0, 0.5)
    assert sys.stderr.getvalue() == ""
