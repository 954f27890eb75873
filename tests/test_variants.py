"""How models are sampled where nobody says otherwise: one table that the checkpoint's config finds its row of."""

import dataclasses
import math

import numpy as np
import pytest

from chipmunk_jax import Euler, UniPC, flux_timesteps, shifted_timesteps, wan_timesteps
from chipmunk_jax.errors import InputError
from chipmunk_jax.models import MODELS
from chipmunk_jax.models.flux import FluxConfig
from chipmunk_jax.models.hunyuan_video import HunyuanVideoConfig
from chipmunk_jax.models.wan import WanConfig
from chipmunk_jax.pipelines import VARIANTS, Pipeline, Variant, register, variant_of
from chipmunk_jax.pipelines.depths import other_depths
from chipmunk_jax.pipelines.pixels import PixelPipeline
from chipmunk_jax.pipelines.wan import NEGATIVE_PROMPT
from chipmunk_jax.sparsity import PRESETS, load_sparsity

WAN_14B = dict(dim=5120, ffn_dim=13_824, num_heads=40, num_layers=40)
CONFIGS = {
    "flux-dev": FluxConfig(),
    "flux-schnell": FluxConfig(guidance_embed=False),
    "hunyuan-video": HunyuanVideoConfig(),
    "wan-1.3b": WanConfig(),
    "wan-14b": WanConfig(**WAN_14B),
    "wan-i2v-14b": WanConfig(**WAN_14B, in_dim=36, image_dim=1280),
    "wan2.2-ti2v-5b": WanConfig(dim=3072, ffn_dim=14_336, in_dim=48, out_dim=48, num_heads=24),
}
TWO = {
    "wan2.2-i2v-a14b": WanConfig(**WAN_14B, in_dim=36),
    "wan2.2-t2v-a14b": WanConfig(**WAN_14B),
}  # networks of one sample
SMALL = {
    "mini-flux": FluxConfig(in_channels=12, guidance_embed=False),
    "mini-wan": WanConfig(in_dim=3, out_dim=3, text_dim=64, patch_size=(1, 4, 4)),
}
PUBLISHED = {name: VARIANTS[name] for name in CONFIGS | TWO}
USUAL = dataclasses.fields(Variant)


def usual(variant):
    """The row but for the sizes of its network."""
    return {field.name: getattr(variant, field.name) for field in USUAL if field.name != "config"}


def test_every_published_model_is_found_by_its_config():
    found = {name: variant_of(config) for name, config in CONFIGS.items()}
    found |= {name: variant_of(config, VARIANTS[name].boundary) for name, config in TWO.items()}
    assert found == PUBLISHED and all(name == variant.name for name, variant in found.items())
    assert {name: variant.config for name, variant in PUBLISHED.items()} == CONFIGS | TWO


@pytest.mark.parametrize("name", TWO)
def test_one_of_two_networks_is_sampled_alone_and_two_at_the_boundary_of_their_release(name):
    alone, moved = variant_of(TWO[name]), variant_of(TWO[name], 0.8)
    assert alone.boundary is None and "guidance_2" not in alone.complete()
    assert moved == dataclasses.replace(VARIANTS[name], boundary=0.8)
    assert moved.complete()["guidance_2"] == VARIANTS[name].guidance_2


@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_is_found_by_its_own_config_and_names_its_network(name):
    found = VARIANTS[name]
    assert variant_of(found.config, found.boundary) is found and isinstance(
        found.config, MODELS[found.network].config_class
    )


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (FluxConfig(depth=3), "flux-dev"),
        (FluxConfig(depth=3, guidance_embed=False), "flux-schnell"),
        (HunyuanVideoConfig(depth=3), "hunyuan-video"),
        (WanConfig(dim=256, num_heads=2), "wan-1.3b"),
        (WanConfig(**WAN_14B | dict(num_layers=3)), "wan-14b"),
        (WanConfig(in_dim=36, image_dim=1280), "wan-i2v-14b"),
        (WanConfig(in_dim=48, out_dim=48), "wan2.2-ti2v-5b"),
    ],
)
def test_a_config_of_none_is_sampled_as_the_nearest(config, name):
    found = variant_of(config)
    assert found.config is config and usual(found) == usual(VARIANTS[name])


@pytest.mark.parametrize("name", SMALL)
def test_a_model_that_makes_pixels_has_a_pipeline_of_pixels(name):
    assert usual(variant_of(SMALL[name])) == usual(VARIANTS[name])
    assert issubclass(VARIANTS[name].pipeline, PixelPipeline)
    assert not any(issubclass(variant.pipeline or Pipeline, PixelPipeline) for variant in PUBLISHED.values())
    wider = dataclasses.replace(
        SMALL[name], **({"in_channels": 48} if name == "mini-flux" else {"patch_size": (2, 8, 8)})
    )
    assert variant_of(wider).patch == ((4, 4) if name == "mini-flux" else (2, 8, 8))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_usual_sample_of_a_model_fits_it(name):
    found = VARIANTS[name]
    assert found.video == (found.fps is not None)
    assert math.prod(found.grid()) > 0 and len(found.timesteps()) == found.steps + 1
    assert found.guidance is not None or not found.negative_prompt
    if name not in ("wan-tiny",):  # too small for its preset's neighbourhood
        found.check(found.complete(), load_sparsity(found.preset))


@pytest.mark.parametrize(
    ("name", "grid", "times"),
    [
        ("flux-dev", (48, 80), flux_timesteps(50, 3840)),
        ("flux-schnell", (48, 80), np.linspace(1, 0, 5, dtype=np.float32)),
        ("hunyuan-video", (33, 45, 80), shifted_timesteps(50, 7.0)),
        ("wan-1.3b", (21, 30, 52), wan_timesteps(50, 8.0)),
        ("wan-14b", (21, 45, 80), wan_timesteps(50, 5.0)),
        ("wan-i2v-14b", (21, 45, 80), wan_timesteps(40, 5.0)),
        ("wan2.2-i2v-a14b", (21, 45, 80), wan_timesteps(40, 5.0)),
        ("wan2.2-t2v-a14b", (21, 45, 80), wan_timesteps(40, 12.0)),
        ("wan2.2-ti2v-5b", (31, 22, 40), wan_timesteps(50, 5.0)),
    ],
)
def test_published_models_have_the_grids_and_times_of_their_authors(name, grid, times):
    found = PUBLISHED[name]
    assert found.grid() == grid
    np.testing.assert_array_equal(found.timesteps(), times)
    assert isinstance(found.solver, UniPC if name.startswith("wan") else Euler)


@pytest.mark.parametrize(
    ("name", "size", "shift"),
    [
        ("wan-i2v-14b", (480, 832), 3),
        ("wan-i2v-14b", (832, 480), 3),
        ("wan-i2v-14b", (720, 1280), 5),
        ("wan-14b", (480, 832), 5),
    ],
)
def test_the_shift_of_image_to_video_follows_the_size(name, size, shift):
    found = VARIANTS[name]
    settings = found.complete(height=size[0], width=size[1])
    np.testing.assert_array_equal(found.timesteps(settings), wan_timesteps(found.steps, shift))
    assert found.grid(settings) == (21, size[0] // 16, size[1] // 16)


def test_true_guidance_and_the_condition_are_not_taken_for_each_other():
    distilled = {name: (found.guidance, found.distilled) for name, found in PUBLISHED.items()}
    assert distilled == {
        "flux-dev": (None, 3.5),
        "flux-schnell": (None, None),
        "hunyuan-video": (None, 6.0),
        "wan-1.3b": (6.0, None),
        "wan-14b": (5.0, None),
        "wan-i2v-14b": (5.0, None),
        "wan2.2-i2v-a14b": (3.5, None),
        "wan2.2-t2v-a14b": (4.0, None),
        "wan2.2-ti2v-5b": (5.0, None),
    }
    for name, config in (CONFIGS | TWO).items():
        assert (PUBLISHED[name].distilled is not None) == getattr(config, "guidance_embed", False)
        rows = {"hunyuan-video": 256, "flux-schnell": 256}.get(name, 512)
        assert PUBLISHED[name].text_rows == config.text_rows[1] == rows


def test_wans_negative_prompt_is_the_released_one():
    phrases = NEGATIVE_PROMPT.split("，")
    assert len(NEGATIVE_PROMPT) == 137 and len(phrases) == 28 and (phrases[0], phrases[-1]) == ("色调艳丽", "倒着走")
    assert PUBLISHED["wan-i2v-14b"].negative_prompt == "镜头晃动，" + PUBLISHED["wan-14b"].negative_prompt


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("wan-14b", dict(frames=80), "frames=80: expected a multiple of 4, and one"),
        ("wan-14b", dict(frames=0), "frames=0: expected a multiple of 4, and one"),
        ("wan-14b", dict(frames=-3), "frames=-3: expected a multiple of 4, and one"),
        ("wan-14b", dict(frames=5.0), "frames=5.0: expected a whole number"),
        ("hunyuan-video", dict(height=728), "height=728: expected a positive multiple of 16 pixels"),
        ("hunyuan-video", dict(width=0), "width=0: expected a positive multiple of 16 pixels"),
        ("flux-dev", dict(height=-16), "height=-16: expected a positive multiple of 16 pixels"),
        ("flux-dev", dict(frames=1), "frames=1: expected none, as this model makes images"),
        ("flux-dev", dict(depth=1), "unknown setting depth; known are height, width, steps, guidance"),
    ],
)
def test_sizes_that_tokens_do_not_fill_are_refused(name, change, message):
    with pytest.raises(InputError, match=message):
        PUBLISHED[name].grid(PUBLISHED[name].complete(**change))


def test_a_config_of_no_model_is_refused():
    with pytest.raises(InputError, match=r"config dict: expected one of a model among mini-flux, .*wan-tiny"):
        variant_of({})


@pytest.mark.parametrize(
    ("name", "sparsity", "change", "advice"),
    [
        ("flux-dev", "wan-14b", {}, "the model's own preset, flux, fits"),
    ],
)
def test_a_sparsity_that_does_not_fit_is_told_with_what_does(name, sparsity, change, advice):
    found = VARIANTS[name]
    with pytest.raises(InputError, match=advice):
        found.check(found.complete(**change), PRESETS[sparsity])


def test_a_name_that_is_taken_is_not_registered_again():
    before = dict(VARIANTS), dict(MODELS)
    for name, variants in (
        ("flux", {}),
        ("mine", {"flux-dev": dataclasses.replace(VARIANTS["flux-dev"], network="mine")}),
    ):
        with pytest.raises(InputError, match="already registered"):
            register(name, MODELS["flux"], variants=variants)
    assert before == (VARIANTS, MODELS)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (FluxConfig(depth_single_blocks=37), "37 single blocks where flux-dev has 38: pruned, or cut short"),
        (FluxConfig(depth=1, depth_single_blocks=1), "1 double blocks where flux-dev has 19, 1 single blocks where"),
        (FluxConfig(depth=8, guidance_embed=False), "8 double blocks where flux-schnell has 19"),
        (HunyuanVideoConfig(refiner_depth=1), "1 refiner blocks where hunyuan-video has 2"),
        (WanConfig(num_layers=29), "29 blocks where wan-1.3b has 30"),
    ],
)
def test_a_published_network_with_other_depths_says_so(config, told):
    assert other_depths(config).startswith(told)


def test_networks_of_published_or_of_own_sizes_say_nothing_of_depths():
    assert not any(other_depths(row.config) for row in VARIANTS.values())
    assert not other_depths(FluxConfig(depth=8, context_in_dim=64))
