"""How models are sampled where nobody says otherwise: one table that the checkpoint's config finds its row of."""

import dataclasses
import math

import numpy as np
import pytest

from chipmunk_jax import Euler, UniPC, flux_timesteps, shifted_timesteps, wan_timesteps
from chipmunk_jax.bench.models import MODELS
from chipmunk_jax.families import FAMILIES, NEGATIVE_PROMPT, PUBLISHED, Family, defaults
from chipmunk_jax.models.flux import FluxConfig
from chipmunk_jax.models.hunyuan_video import HunyuanVideoConfig
from chipmunk_jax.models.wan import WanConfig
from chipmunk_jax.sparsity import PRESETS

WAN_14B = dict(dim=5120, ffn_dim=13_824, num_heads=40, num_layers=40)
CONFIGS = {
    "flux-dev": FluxConfig(),
    "flux-schnell": FluxConfig(guidance_embed=False),
    "hunyuan-video": HunyuanVideoConfig(),
    "wan-1.3b": WanConfig(),
    "wan-14b": WanConfig(**WAN_14B),
    "wan-i2v-14b": WanConfig(**WAN_14B, in_dim=36, image_dim=1280),
}
SMALL = {
    "flux": FluxConfig(in_channels=12, guidance_embed=False),
    "wan": WanConfig(in_dim=3, out_dim=3, text_dim=64, patch_size=(1, 4, 4)),
}


def test_every_published_model_is_found_by_its_config():
    assert {name: defaults(config) for name, config in CONFIGS.items()} == PUBLISHED
    assert all(MODELS[name].defaults == PUBLISHED[name] for name in PUBLISHED.keys() & MODELS.keys())


@pytest.mark.parametrize("name", SMALL)
def test_a_model_that_makes_pixels_is_of_a_family(name):
    assert defaults(SMALL[name]) == FAMILIES[name]
    assert not any(isinstance(defaults(config), Family) for config in CONFIGS.values())
    wider = dataclasses.replace(SMALL[name], **({"in_channels": 48} if name == "flux" else {"patch_size": (2, 8, 8)}))
    assert defaults(wider).patch == ((4, 4) if name == "flux" else (2, 8, 8))


@pytest.mark.parametrize("found", [*PUBLISHED.values(), *FAMILIES.values()], ids=[*PUBLISHED, *FAMILIES])
def test_the_defaults_of_a_model_fit_each_other(found):
    assert found.preset in PRESETS and found.video == (found.fps is not None)
    assert math.prod(found.grid()) > 0 and len(found.timesteps()) == found.steps + 1
    sparsity = PRESETS[found.preset]
    schedules = [part.full_step_schedule for part in (sparsity.attention, sparsity.mlp) if part]
    assert all(max(schedule or (0,)) < found.steps for schedule in schedules)
    assert found.guidance is not None or not found.negative_prompt


@pytest.mark.parametrize(
    ("name", "grid", "times"),
    [
        ("flux-dev", (48, 80), flux_timesteps(50, 3840)),
        ("flux-schnell", (48, 80), np.linspace(1, 0, 5, dtype=np.float32)),
        ("hunyuan-video", (33, 45, 80), shifted_timesteps(50, 7.0)),
        ("wan-1.3b", (21, 30, 52), wan_timesteps(50, 8.0)),
        ("wan-14b", (21, 45, 80), wan_timesteps(50, 5.0)),
        ("wan-i2v-14b", (21, 45, 80), wan_timesteps(40, 5.0)),
    ],
)
def test_published_models_have_the_grids_and_times_of_their_authors(name, grid, times):
    found = PUBLISHED[name]
    assert found.grid() == grid
    np.testing.assert_array_equal(found.timesteps(), times)
    assert isinstance(found.solver, UniPC if name.startswith("wan") else Euler)


def test_sizes_that_are_given_stand_and_the_shift_of_image_to_video_follows_them():
    config = CONFIGS["wan-i2v-14b"]
    assert [defaults(config, height=h, width=w).shift for h, w in ((480, 832), (832, 480), (720, 1280))] == [3, 3, 5]
    assert defaults(config, height=480, width=832).grid() == (21, 30, 52)
    assert defaults(CONFIGS["wan-14b"], height=480, width=832).shift == 5
    assert defaults(CONFIGS["flux-dev"], width=1024) == dataclasses.replace(PUBLISHED["flux-dev"], width=1024)


def test_true_guidance_and_the_condition_are_not_taken_for_each_other():
    distilled = {name: (found.guidance, found.distilled) for name, found in PUBLISHED.items()}
    assert distilled == {
        "flux-dev": (None, 3.5),
        "flux-schnell": (None, None),
        "hunyuan-video": (None, 6.0),
        "wan-1.3b": (6.0, None),
        "wan-14b": (5.0, None),
        "wan-i2v-14b": (5.0, None),
    }
    for name, config in CONFIGS.items():
        assert (PUBLISHED[name].distilled is not None) == getattr(config, "guidance_embed", False)
        assert PUBLISHED[name].text == config.text_rows[1]


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
    with pytest.raises(ValueError, match=message):
        PUBLISHED[name].grid(PUBLISHED[name].complete(**change))


def test_a_config_of_no_model_is_refused():
    with pytest.raises(ValueError, match="config dict: expected a FluxConfig, HunyuanVideoConfig or WanConfig"):
        defaults({})
