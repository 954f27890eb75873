"""Whole pipelines give the pixels of diffusers, from prompts to pictures, with the same noise, in float32."""

import json
import shutil

import numpy as np
import pytest
from golden_pipelines import PIPELINES, assemble, cases

from chipmunk_jax import AttentionSparsity, MlpSparsity, Sparsity
from chipmunk_jax.convert import convert, inspect, load
from chipmunk_jax.errors import InputError
from chipmunk_jax.memory import nbytes
from chipmunk_jax.pipelines import Pipeline

CALLS = [(name, call) for name in PIPELINES for call in cases(name)]
USUAL = {name: next(iter(cases(name))) for name in PIPELINES}
CLOSE = dict(rtol=0, atol=1e-3)
EVERYTHING = Sparsity(
    attention=AttentionSparsity(top_keys=1.0, first_n_dense_layers=0, group=64),
    mlp=MlpSparsity(top_keys=1.0, random_keys=0.0, first_n_dense_layers=0, group=64),
)
KINDS = ["flux_schnell_pipeline", "wan22_pipeline"]  # the least and the most that a pipeline can consist of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> the folder of a pipeline as diffusers saves it."""
    return {name: assemble(name, tmp_path_factory.mktemp("golden") / name) for name in PIPELINES}


@pytest.fixture(scope="module")
def pipelines(folders):
    """Name -> the pipeline of the folder, read as it is."""
    return {name: Pipeline.from_pretrained(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def converted(folders, tmp_path_factory):
    """Name -> the folder of a pipeline that `convert` wrote."""
    targets = {name: tmp_path_factory.mktemp("converted") / name for name in KINDS}
    for name, target in targets.items():
        convert(folders[name], target, progress=False)
    return targets


def draw(pipeline, name, **changed):
    """What the pipeline gives for its first stored call, as arrays."""
    case = cases(name)[changed.pop("call", USUAL[name])]
    settings = case.settings | dict(latents=case.arrays["noise"], sparsity=None, output_type="np", progress=False)
    out = pipeline(**settings | changed)
    return out.images if out.frames is None else out.frames


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_pixels_are_those_of_diffusers(pipelines, name, call):
    np.testing.assert_allclose(draw(pipelines[name], name, call=call), cases(name)[call].arrays["pixels"], **CLOSE)


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_texts_and_latents_are_those_of_diffusers(pipelines, name, call):
    pipeline, arrays, settings = pipelines[name], cases(name)[call].arrays, cases(name)[call].settings
    request = pipeline.check(**settings, sparsity=None)
    for side, said in ((request.wanted, ""), (request.unwanted, "negative_")):
        if f"{said}text" in arrays:
            for name_, text in pipeline.encode(side, request).items():
                np.testing.assert_allclose(text, arrays[f"{said}{name_}"], rtol=0, atol=1e-4)
    latents = draw(pipeline, name, call=call, output_type="latent")
    np.testing.assert_allclose(latents, arrays["latents"], **CLOSE)


@pytest.mark.parametrize("name", ["flux_dev_pipeline", "wan22_pipeline"])
def test_all_columns_of_a_pipeline_are_the_dense_one(pipelines, name):
    np.testing.assert_allclose(draw(pipelines[name], name, sparsity=EVERYTHING), draw(pipelines[name], name), **CLOSE)


@pytest.mark.parametrize("name", KINDS)
def test_a_converted_folder_gives_the_same_pixels(pipelines, converted, name):
    pipeline = Pipeline.from_pretrained(converted[name], dtype="float32")
    np.testing.assert_array_equal(draw(pipeline, name), draw(pipelines[name], name))


@pytest.mark.parametrize("offload", ["model", "none"])
def test_what_leaves_the_device_changes_no_pixel(folders, pipelines, offload):
    name = "wan22_pipeline"
    pipeline = Pipeline.from_pretrained(folders[name], offload=offload)
    np.testing.assert_array_equal(draw(pipeline, name), draw(pipelines[name], name))
    roles = ("text_encoder", "transformer", "transformer_2", "vae")
    assert [role in pipeline.residents for role in roles] == [offload == "none"] * 3 + [True]


def test_a_component_gives_way_to_one_that_needs_its_room(folders, pipelines, monkeypatch):
    """Room for the largest two: each is released, the one unused for longest first, where the next one has none."""
    name = "wan22_pipeline"
    pipeline = Pipeline.from_pretrained(folders[name])
    sizes = {role: nbytes(shapes) for role, shapes in pipeline.residents.shapes.items()}
    held = lambda: sum(size for role, size in sizes.items() if role in pipeline.residents)
    everything = sum(sizes.values())
    monkeypatch.setattr("chipmunk_jax.memory.free_bytes", lambda: everything - held())
    here = lambda: {role for role in sizes if role in pipeline.residents}
    for role in sizes:
        pipeline.residents.place(role, beside=0)
    assert here() == sizes.keys()
    # More than is free, as the encoder itself is counted as free now: the transformer was used before all others.
    pipeline.residents.place("text_encoder", beside=sizes["text_encoder"] + 1)
    assert here() == sizes.keys() - {"transformer"}
    pipeline.residents.place("transformer", beside=0)
    assert here() == sizes.keys()
    monkeypatch.setattr("chipmunk_jax.memory.free_bytes", lambda: 1_000)
    pipeline = Pipeline.from_pretrained(folders[name])
    with pytest.raises(
        InputError, match=r"no room on .* for the text_encoder: its weights are .* JAX has 0\.0 GB free"
    ):
        pipeline.residents.place("text_encoder", beside=0)


def test_a_prompt_that_was_read_is_not_read_again(folders, monkeypatch):
    name = "flux_schnell_pipeline"
    pipeline = Pipeline.from_pretrained(folders[name])
    first, runs = draw(pipeline, name), []
    run = pipeline.residents.run
    monkeypatch.setattr(pipeline.residents, "run", lambda role, *args: runs.append(role) or run(role, *args))
    np.testing.assert_array_equal(draw(pipeline, name), first)
    assert runs == ["vae", "vae"]
    draw(pipeline, name, prompt=["another", "and another"])
    assert runs[2:] == ["text_encoder"] * 2 + ["text_encoder_2"] * 2 + ["vae"] * 2


@pytest.mark.parametrize(("name", "call"), [("flux_dev_pipeline", "true_guidance"), ("wan21_pipeline", "usual")])
def test_embeddings_in_place_of_prompts_give_the_same(pipelines, name, call):
    case = cases(name)[call]
    names = dict(text="prompt_embeds", pooled="pooled_prompt_embeds")
    names |= {f"negative_{short}": f"negative_{long}" for short, long in names.items()}
    given = {long: case.arrays[short] for short, long in names.items() if short in case.arrays}
    assert len(given) == (4 if name == "flux_dev_pipeline" else 2)
    out = draw(pipelines[name], name, call=call, prompt=None, negative_prompt=None, **given)
    np.testing.assert_allclose(out, case.arrays["pixels"], **CLOSE)


def test_a_result_says_how_long_each_stage_took_and_what_was_made(pipelines):
    pipeline = pipelines["wan22_pipeline"]
    case = cases("wan22_pipeline")["usual"]
    seen = []
    out = pipeline(
        **case.settings, sparsity=None, progress=False, seed=3, callback_on_step_end=lambda *a: seen.append(a)
    )
    assert list(out.stages) == ["text", "transformer", "decoder"]
    assert sum(stage.seconds for stage in out.stages.values()) <= out.seconds
    assert [[frame.size for frame in video] for video in out.frames] == [[(48, 32)] * 5] * 2
    assert [step for step, *_ in seen] == list(range(6)) == list(out.full_steps)  # of both networks
    assert out.settings == dict(
        num_frames=5, height=32, width=48, num_inference_steps=6, guidance_scale=4.0, guidance_scale_2=3.0, seed=3
    )


def test_two_networks_make_samples_of_which_a_gate_decides_for_each_one_after_another(pipelines):
    name = "wan22_pipeline"
    sparsity = {"attention": None, "mlp": None, "step_cache": {"gate": "easy", "threshold": 1e3, "warm_up": 0.1}}
    case = cases(name)["usual"]
    words = zip(case.settings["prompt"], case.settings["negative_prompt"], case.arrays["noise"], strict=True)
    names = ("prompt", "negative_prompt", "latents")
    alone = [
        draw(pipelines[name], name, sparsity=sparsity, **dict(zip(names, (*texts, noise[None]), strict=True)))
        for *texts, noise in words
    ]
    both = draw(pipelines[name], name, sparsity=sparsity)
    np.testing.assert_array_equal(both, np.concatenate(alone))
    assert np.abs(both - case.arrays["pixels"]).max() > 1e-2  # steps were skipped


def test_times_can_be_given_in_place_of_their_number(pipelines):
    pipeline, name = pipelines["flux_dev_pipeline"], "flux_dev_pipeline"
    steps = cases(name)[USUAL[name]].settings["num_inference_steps"]
    usual = draw(pipeline, name)
    spaced = np.linspace(1, 1 / steps, steps)
    request = pipeline.check("a", sigmas=spaced, height=32, width=48)
    np.testing.assert_array_equal(draw(pipeline, name, sigmas=spaced, num_inference_steps=None), usual)
    for times in (request.timesteps[:-1], request.timesteps, 1000 * request.timesteps[:-1]):
        np.testing.assert_allclose(draw(pipeline, name, timesteps=times, num_inference_steps=None), usual, **CLOSE)
    assert np.abs(draw(pipeline, name, solver="unipc") - usual).max() > 1e-3


def test_a_shift_that_follows_the_size_is_that_of_the_scheduler_whatever_the_model(folders, tmp_path):
    folder, target = shutil.copytree(folders["flux_schnell_pipeline"], tmp_path / "schnell"), tmp_path / "out"
    assert Pipeline.from_pretrained(folder).variant.shift == 1.0
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": True}))
    assert Pipeline.from_pretrained(folder).variant.shift is None
    convert(folder, target, component="vae", progress=False)
    assert inspect(target).shift == "with size"


def test_a_conversion_that_was_cut_off_goes_on_where_it_was(folders, tmp_path, capsys):
    target = tmp_path / "out"
    convert(folders["wan22_pipeline"], target, component="vae", progress=False)
    made = (target / "vae/config.json").stat().st_mtime_ns
    found = inspect(target)
    assert list(found.components) == ["vae"] and not found.whole
    assert found.missing == ["text_encoder", "transformer", "transformer_2", "tokenizer"]
    convert(folders["wan22_pipeline"], target, progress=False)
    found = inspect(target)
    assert list(found.components) == ["text_encoder", "transformer", "transformer_2", "vae"] and found.whole
    assert (target / "vae/config.json").stat().st_mtime_ns == made
    assert (found.boundary, json.loads((target / "config.json").read_text())["shift"]) == (0.875, 3.0)
    with pytest.raises(
        InputError, match="text_encoder: already converted from other files or to another dtype; add --overwrite"
    ):
        convert(folders["wan22_pipeline"], target, dtype="float32", progress=False)
    with pytest.raises(InputError, match="holds a wan, expected one of flux"):
        convert(folders["flux_dev_pipeline"], target, progress=False)
    convert(folders["wan22_pipeline"], target, dtype="float32", progress=False, overwrite=True)
    assert load(target / "vae").dtype == "float32"


def without(*names):
    def damage(folder):
        for name in names:
            shutil.rmtree(folder / name)

    return damage


@pytest.mark.parametrize(
    ("damage", "change", "expected"),
    [
        (without("vae"), {}, 'no vae, so only latents can be made: output_type="latent"'),
        (without("text_encoder_2"), {}, "no text_encoder_2, so prompts cannot be read; give prompt_embeds"),
        (without("tokenizer"), {}, "no tokenizer, so prompts cannot be read; give prompt_embeds"),
        (None, dict(prompt=3), "prompt 3: expected a sentence"),
        (None, dict(prompt=[]), "no prompts: expected at least one"),
        (None, dict(prompt=None), "no prompts: expected at least one"),
        (None, dict(height=40), "height=40: expected a positive multiple of 16 pixels, such as 32 or 48"),
        (None, dict(image="a.png"), "image: expected none, as a FluxPipeline takes none"),
        (None, dict(guidance_scale_2=3.0), "guidance_scale_2: expected none, as a FluxPipeline takes none"),
        (None, dict(num_frames=5), "num_frames=5: expected none, as this model makes images"),
        (None, dict(latents=np.zeros((2, 6, 15))), r"latents \(2, 6, 15\): expected \(2, 6, 16\)"),
        (None, dict(latents=np.full((2, 6, 16), np.nan)), "latents: holds NaN or infinity"),
        (None, dict(latents="noise"), "latents: expected an array of numbers"),
        (None, dict(true_cfg_scale=2.0), "true_cfg_scale=2.0: expected a negative_prompt with it"),
        (None, dict(true_cfg_scale="much", negative_prompt="a"), "true_cfg_scale='much': expected a number"),
        (None, dict(negative_prompt="a"), "negative_prompt with true_cfg_scale=None: expected a scale above 1"),
        (None, dict(guidance_scale="much"), "guidance_scale='much': expected a number"),
        (None, dict(max_sequence_length=0), "max_sequence_length=0: expected a whole number from 1 to 512"),
        (None, dict(max_sequence_length=513), "max_sequence_length=513: expected a whole number from 1 to 512"),
        (None, dict(sigmas=[0.5, 0.7], num_inference_steps=None), "expected at least two numbers that fall"),
        (None, dict(sigmas=[1.0]), "num_inference_steps, sigmas and timesteps: expected one of them"),
        (None, dict(solver="dpm"), "solver='dpm': expected euler, unipc"),
        (
            None,
            dict(prompt_embeds=np.zeros((2, 4, 24))),
            "prompts and embeddings of the same side: expected one of them",
        ),
        (
            None,
            dict(prompt=None, prompt_embeds=np.zeros((2, 4, 24))),
            "prompt_embeds alone: expected pooled_prompt_embeds and prompt_embeds",
        ),
        (
            None,
            dict(prompt=None, prompt_embeds=np.zeros((2, 4, 24)), pooled_prompt_embeds=np.zeros((2, 15))),
            r"pooled_prompt_embeds \(2, 15\): expected",
        ),
        (None, dict(prompt_2=["a"] * 3), "3 second prompts for 2 prompts: expected one, or as many"),
    ],
)
def test_a_bad_request_is_one_sentence_before_any_weights_are_read(
    folders, tmp_path, monkeypatch, damage, change, expected
):
    folder = folders["flux_dev_pipeline"]
    if damage:
        folder = shutil.copytree(folder, tmp_path / "copy")
        damage(folder)
    pipeline = Pipeline.from_pretrained(folder)
    monkeypatch.setattr(pipeline.residents, "_load", None)
    with pytest.raises(InputError, match=expected) as error:
        draw(pipeline, "flux_dev_pipeline", **change)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["flux_dev_pipeline"], tmp_path / "copy")
    shutil.rmtree(folder / "tokenizer_2")
    shutil.copytree(folders["wan21_pipeline"] / "tokenizer", folder / "tokenizer_2")
    with pytest.raises(InputError, match=r"tokenizer_2: a tokenizer with 710 tokens beside a text encoder with 416"):
        draw(Pipeline.from_pretrained(folder), "flux_dev_pipeline")


def test_what_an_encoder_gives_is_judged_before_the_transformer_runs(folders, monkeypatch):
    pipeline = Pipeline.from_pretrained(folders["flux_schnell_pipeline"])
    run = pipeline.residents.run
    broken = lambda role, *args: np.nan * np.asarray(run(role, *args))
    monkeypatch.setattr(pipeline.residents, "run", broken)
    with pytest.raises(InputError, match="text_encoder: gives NaN or infinity for"):
        draw(pipeline, "flux_schnell_pipeline")
    assert "transformer" not in pipeline.residents


def test_a_file_alone_says_what_it_lacks(folders):
    pipeline = Pipeline.from_pretrained(folders["flux_schnell_pipeline"] / "transformer")
    with pytest.raises(InputError, match="no text_encoder, so prompts cannot be read"):
        pipeline.check("a", height=32, width=48)
    with pytest.raises(InputError, match="a flux_vae alone, expected a pipeline or its transformer"):
        Pipeline.from_pretrained(folders["flux_schnell_pipeline"] / "vae")
