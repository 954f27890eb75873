"""What a user of diffusers writes here is taken, or told in one sentence in its own words, before any weights are read."""

import ast
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_pipelines import assemble

from chipmunk_jax.cli.main import main
from chipmunk_jax.errors import InputError, renamed
from chipmunk_jax.pipelines import VARIANTS, Pipeline
from chipmunk_jax.pipelines.elsewhere import COMPONENTS, ELSEWHERE
from chipmunk_jax.pipelines.residents import Residents
from chipmunk_jax.pipelines.room import PlannedSample, published
from chipmunk_jax.sparsity import PRESETS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/coming-from-diffusers.md").read_text()
KINDS = {"flux": "flux_dev_pipeline", "schnell": "flux_schnell_pipeline", "wan": "wan21_pipeline"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> a pipeline as diffusers saves it."""
    return {kind: assemble(name, tmp_path_factory.mktemp("golden") / kind) for kind, name in KINDS.items()}


@pytest.fixture(scope="module")
def pipelines(folders):
    return {kind: Pipeline.from_pretrained(folder) for kind, folder in folders.items()}


def told(act) -> str:
    """The one sentence that act() is refused with."""
    with pytest.raises(InputError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_what_is_not_here_is_one_sentence_wherever_it_is_used(name, pipelines):
    pipe, sentence = pipelines["flux"], f"{name}: {ELSEWHERE[name]}"
    assert told(lambda: pipe("a fox", **{name: None})) == sentence
    assert told(lambda: Pipeline.from_pretrained("none", **{name: None})) == sentence
    if not hasattr(pipe, name):  # some are attributes of ours
        assert told(lambda: getattr(pipe, name)) == sentence
    if name in COMPONENTS:
        assert told(lambda: setattr(pipe, name, None)) == sentence


def test_every_component_has_a_sentence_and_what_nobody_has_is_no_attribute(pipelines):
    assert ELSEWHERE.keys() >= COMPONENTS.keys() and not hasattr(pipelines["flux"], "to")
    with pytest.raises(AttributeError, match="'FluxPipeline' object has no attribute 'tto'"):
        _ = pipelines["flux"].tto


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("flux", dict(num_inference_step=3), "did you mean num_inference_steps?"),
        ("flux", dict(qqq=3), "qqq: no such argument; help(Pipeline.__call__) lists all"),
        ("flux", dict(num_frames=5), "num_frames=5: expected none"),
        ("flux", dict(num_inference_steps=0), "num_inference_steps=0: expected at least 1"),
        ("flux", dict(guidance_scale="x"), "guidance_scale='x'"),
        ("flux", dict(true_cfg_scale="x", negative_prompt="a"), "true_cfg_scale='x'"),
        ("flux", dict(negative_prompt="a"), "negative_prompt with true_cfg_scale=None: expected a scale above 1"),
        ("wan", dict(negative_prompt="a", guidance_scale=1), "negative_prompt with guidance_scale=1: expected a scale"),
        ("wan", dict(guidance_scale="x"), "guidance_scale='x'"),
        ("wan", dict(num_frames=6), "num_frames=6"),
        ("wan", dict(num_videos_per_prompt=0), "num_videos_per_prompt=0: expected at least 1"),
        ("wan", dict(num_videos_per_prompt=2, num_images_per_prompt=2), "expected one of them"),
        ("schnell", dict(guidance_scale=3.5), "guidance_scale=3.5: expected 0 or none"),
        ("wan", dict(prompt=None, prompt_embeds=np.zeros((16, 24))), "prompt_embeds (16, 24): expected [B, T, 24]"),
        ("wan", dict(prompt=None, prompt_embeds=np.zeros((1, 600, 24))), "prompt_embeds of 600 tokens: expected 1 to 512"),
        ("wan", dict(prompt=None, prompt_embeds=np.full((1, 4, 24), np.nan)), "prompt_embeds: holds NaN"),
        ("wan", dict(negative_prompt_embeds=np.zeros(())), "negative_prompt_embeds: expected an array"),
        ("wan", dict(prompt=["a", "b"], negative_prompt=["a"] * 3), "3 negative prompts for 2 prompts: expected one, or as"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_told_by_the_name_that_it_was_given_by(kind, given, expected, pipelines, monkeypatch):
    monkeypatch.setattr(Residents, "place", None)
    call = {"prompt": "a fox"} | given
    assert expected in told(lambda: pipelines[kind](**call))


def test_a_tensor_of_pytorch_that_numpy_cannot_read_says_how_it_can(pipelines):
    def refuse(self, *_, **__):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    tensor = type("Tensor", (), {"__module__": "torch", "__array__": refuse})()
    for name in ("latents", "prompt_embeds"):
        prompt = None if name == "prompt_embeds" else "a"
        said = told(lambda name=name, prompt=prompt: pipelines["wan"](prompt, **{name: tensor}))
        assert said == f"{name}: expected an array of numbers, such as {name}.detach().float().cpu().numpy()"


def test_one_prompt_in_a_list_is_for_all_as_one_alone_is(pipelines):
    check = lambda negative: pipelines["wan"].check(["a", "b"], negative_prompt=negative, height=32, width=48)
    assert check(["c"]).unwanted == check("c").unwanted and check(["c"]).unwanted.prompts == ("c", "c")
    assert pipelines["wan"].check("a", num_videos_per_prompt=2, height=32, width=48).batch == 2


def test_names_are_changed_before_values_and_never_in_quotes_or_paths():
    names = {"steps": "--steps", "true_cfg_scale": "--true-cfg"}
    message = "steps=3 of steps: 'true_cfg_scale' a/steps=3.py, true_cfg_scale=None or true_cfg_scale"
    expected = "--steps 3 of steps: 'true_cfg_scale' a/steps=3.py, --true-cfg None or --true-cfg"
    assert renamed(message, names) == expected
    assert (
        renamed("steps=3", {"steps": "num_inference_steps"}) == "num_inference_steps=3" and renamed("a=1", {}) == "a=1"
    )


def test_a_callback_returns_nothing_and_what_changes_pixels_is_in_the_settings(checkpoint, monkeypatch):
    pipe = Pipeline.from_pretrained(checkpoint)
    call = dict(height=20, width=12, num_inference_steps=3, sparsity=None, progress=False)
    monkeypatch.setattr(type(pipe), "inexact", lambda self, settings: {"vae_tile": [2, 3]})
    prompt = "red striped heart on meadow"
    assert pipe(prompt, **call, callback_on_step_end=lambda *_: None).settings["vae_tile"] == [2, 3]
    said = told(lambda: pipe(prompt, **call, callback_on_step_end=lambda *_: {}))
    assert said == "callback_on_step_end returned a dict: latents cannot be changed between steps, expected None"


def test_weights_are_read_with_a_bar_only_where_the_call_shows_one(folders, capsys):
    pipe = Pipeline.from_pretrained(folders["schnell"])
    assert pipe.load("vae") and capsys.readouterr().err == ""
    pipe.residents.progress = True
    assert pipe.load("vae") and "reading vae: " in capsys.readouterr().err


def test_tiles_of_the_vae_are_told_once_and_whole_frames_are_not(folders, monkeypatch, capsys):
    pipe = Pipeline.from_pretrained(folders["wan"])
    settings = pipe.variant.complete(frames=5, height=480, width=832)
    assert pipe.inexact(settings) == {} and capsys.readouterr().err == ""
    sides = np.multiply(pipe.variant.grid(settings), pipe.variant.config.patch_size)
    whole = pipe.residents.shapes["vae"].decoding_bytes((1, *sides, pipe.variant.config.out_dim))
    monkeypatch.setattr(pipe.residents, "room", lambda role: 0.9 * whole)
    found = [pipe.inexact(settings) for _ in range(2)]
    rows, columns = found[0]["vae_tile"]
    note = f"vae: no room for whole frames: decoded in tiles of {rows}x{columns} latents, pixels differ a little\n"
    assert found[0] == found[1] and capsys.readouterr().err == note


def test_the_models_own_preset_fits_a_small_sample_and_says_so(pipelines, capsys):
    small = dict(height=32, width=48, num_frames=5)
    request = pipelines["wan"].check("a fox", **small)
    assert request.sparsity.attention.local_voxels == 1
    assert "preset wan-1.3b: neighbourhoods of 1 voxels in place of 3" in capsys.readouterr().err
    assert "local_voxels=3: expected at most 1" in told(
        lambda: pipelines["wan"].check("a", **small, sparsity="wan-1.3b")
    )


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("flux", {"use_karras_sigmas": True}, "use_karras_sigmas=True: expected False"),
        ("flux", {"_class_name": "DDIMScheduler"}, "_class_name='DDIMScheduler': expected 'FlowMatchEuler"),
        ("flux", {"base_shift": 0.3}, "base_shift=0.3: expected 0.5"),
        ("wan", {"shift_terminal": 0.1}, "shift_terminal=0.1: expected None"),
        ("wan", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "expected 'UniPCMultistepScheduler'"),
    ],
)
def test_a_scheduler_that_would_make_other_samples_is_refused(kind, change, expected, folders, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / "copy")
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    said = told(lambda: Pipeline.from_pretrained(folder))
    assert expected in said and "solver= and sigmas=" in said
    file.unlink()
    Pipeline.from_pretrained(folder)


def test_a_missing_component_is_told_by_inspect_convert_and_sample(folders, tmp_path, capsys):
    folder = shutil.copytree(folders["wan"], tmp_path / "part")
    for file in (folder / "vae").glob("*.safetensors"):
        file.unlink()
    assert main(["inspect", str(folder)]) == 1
    assert "missing: vae  vae/ holds no weights: no pixels" in capsys.readouterr().out
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.startswith("missing: vae  vae/ holds no weights: no pixels")
    for path, remedy in ((folder, "download it into this folder"), (tmp_path / "out", "--component vae` adds it")):
        assert main(["sample", str(path), "--prompt", "a"]) == 2
        assert remedy in capsys.readouterr().err
    assert "missing: vae" in repr(Pipeline.from_pretrained(tmp_path / "out"))


def test_another_models_tokenizer_is_found_before_anything_is_converted(folders, tmp_path, capsys):
    folder = shutil.copytree(folders["flux"], tmp_path / "mixed")
    shutil.rmtree(folder / "tokenizer_2")
    shutil.copytree(folders["wan"] / "tokenizer", folder / "tokenizer_2")
    assert main(["inspect", str(folder)]) == 1 and "another model's" in capsys.readouterr().out
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()


def test_a_name_of_hugging_face_without_its_prefix_says_the_prefix():
    said = told(lambda: Pipeline.from_pretrained("black-forest-labs/FLUX.1-dev"))
    assert said.endswith("; on Hugging Face it is hf:black-forest-labs/FLUX.1-dev")


@pytest.mark.parametrize(
    ("flag", "hint"),
    [("--num-inference-steps", "did you mean --steps?"), ("--guidance_scale", "did you mean --guidance?"),
     ("--num-frames", "did you mean --frames?"), ("--true-cfg-scale", "did you mean --true-cfg?"),
     ("--image", "image to image and image to video are not here yet")],
)  # fmt: skip
def test_flags_named_as_diffusers_arguments_say_ours(flag, hint, capsys):
    with pytest.raises(SystemExit):
        main(["sample", "a", "--prompt", "b", flag, "3"])
    assert f"unknown flag {flag}; {hint}\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["text_to_image", "text_to_video", "dense_and_sparse"])
def test_an_example_without_arguments_prints_its_usage(name, monkeypatch):
    file = str(ROOT / f"examples/{name}.py")
    monkeypatch.setattr(sys, "argv", [file])
    with pytest.raises(SystemExit, match=f"^usage: python examples/{name}.py FOLDER PROMPT"):
        runpy.run_path(file, run_name="__main__")


def test_the_page_states_our_defaults():
    rows = dict(
        re.findall(r"^\| ([\w./, -]+?) \| ([^|]+?) \|", PAGE[PAGE.index("## Defaults that differ") :], re.MULTILINE)
    )
    size = lambda row: f"{row.width}x{row.height}" + (f", {row.frames} frames" if row.video else "")
    for name, label in (("flux-dev", "FLUX.1-dev"), ("flux-schnell", "FLUX.1-schnell"), ("wan-1.3b", "Wan2.1 1.3B"),
                        ("wan-14b", "Wan2.1 14B"), ("wan2.2-t2v-a14b", "Wan2.2 A14B")):  # fmt: skip
        row = VARIANTS[name]
        scales = [row.distilled, row.guidance, row.guidance_2]
        guidance = " and ".join(f"{scale:g}" for scale in scales if scale is not None)
        expected = f"{size(row)}; {row.steps} steps" + (f"; guidance {guidance}" if guidance else "")
        assert rows[label] == expected


def test_the_page_states_the_memory_that_is_planned():
    row = published(VARIANTS["flux-dev"])
    sizes = {}
    for kind, sparsity in (("dense", None), ("sparse", PRESETS["flux"])):
        sample = PlannedSample(
            variant=row.variant, settings=row.variant.complete(), batch=1, dtype=row.dtype, sparsity=sparsity, beside=row.beside
        )  # fmt: skip
        parts = sample.parts()
        sizes[kind] = sample.size() / 1e9, (sum(parts.values()) - parts["weights"]) / 1e9
    (dense, beside), (sparse, more) = sizes["dense"], sizes["sparse"]
    said = (
        f"{dense:.1f} GB dense and {sparse:.1f} GB sparse at its usual size, all but {beside:.1f} GB and {more:.1f} GB"
    )
    assert said in " ".join(PAGE.split()) and dense > 24


def test_python_on_the_page_parses():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 3 and all(ast.parse(block) for block in blocks)
