"""Times and steps against diffusers' (golden/make_flux_golden.py, golden/make_solver_golden.py)."""

from pathlib import Path

import numpy as np
import pytest

from chipmunk_jax import Euler, UniPC, flux_timesteps, shifted_timesteps, wan_timesteps
from chipmunk_jax.convert.files import read_weights

GOLDEN = Path(__file__).parent / "golden"


def golden(key, file="schedules"):
    return read_weights(GOLDEN / f"{file}.safetensors").tensors[key].read()


@pytest.mark.parametrize(("steps", "tokens"), [(28, 1024), (50, 3840), (10, 4096)])
def test_times_equal_those_of_diffusers(steps, tokens):
    """Theirs are float32 throughout, ours rounded once: 1e-6 is some ten units in the last place of 1."""
    expected, times = golden(f"dev.{steps}.{tokens}"), flux_timesteps(steps, tokens)
    assert times.shape == expected.shape == (steps + 1,) and times.dtype == np.float32
    np.testing.assert_allclose(times, expected, rtol=0, atol=1e-6)


def test_times_of_schnell_are_evenly_spaced():
    times = flux_timesteps(4, 1024, shift=False)
    np.testing.assert_allclose(times, golden("schnell.4"), rtol=0, atol=1e-6)
    np.testing.assert_allclose(times, [1, 0.75, 0.5, 0.25, 0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("tokens", [1, 256, 1024, 16384])
def test_times_fall_from_1_to_0(steps, tokens):
    times = flux_timesteps(steps, tokens)
    assert times[0] == 1 and times[-1] == 0 and len(times) == steps + 1
    assert np.all(np.diff(times) < 0)


def test_larger_images_stay_longer_at_high_noise():
    small, large = flux_timesteps(10, 256), flux_timesteps(10, 4096)
    assert np.all(large[1:-1] > small[1:-1])


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_is_one_error(steps):
    with pytest.raises(ValueError, match=rf"^steps={steps}: expected at least 1$"):
        flux_timesteps(steps, 256)


def test_euler_walks_the_path_of_diffusers():
    """Ten steps of values of order 1, both in float32: 1e-5 is some ten roundings a step."""
    path, times = golden("euler.dev.10.4096"), flux_timesteps(10, 4096)
    assert path.shape == (11, 2, 12, 4)
    solver, x = Euler(), path[0]
    state = solver.init(x)
    for i, expected in enumerate(path[1:]):
        velocity = np.tanh(x) * (np.float32(0.5) + times[i])  # theirs: 0.5 + t / 1000, where t = 1000 sigma
        x, state = solver.step(x, state, velocity, times[i], times[i + 1])
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5)


def test_euler_is_exact_for_a_constant_velocity():
    x, velocity = np.float32([1, -2, 0.5]), np.float32([0.25, 1, -4])
    moved, _ = Euler().step(x, Euler().init(x), velocity, np.float32(0.75), np.float32(0.25))
    np.testing.assert_array_equal(moved, [0.875, -2.5, 2.5])


@pytest.mark.parametrize(
    ("solver", "times", "name"),
    [
        *((UniPC(), wan_timesteps, name) for name in ("wan.1.5", "wan.2.5", "wan.7.5", "wan.10.3", "wan.50.5")),
        *((Euler(), shifted_timesteps, name) for name in ("hunyuan.10.7", "hunyuan.50.7")),
    ],
)
def test_times_and_paths_of_the_video_models_equal_those_of_diffusers(solver, times, name):
    _, steps, shift = name.split(".")
    sigmas, path = (golden(f"{name}.{part}", "video_schedules") for part in ("sigmas", "path"))
    t = times(int(steps), float(shift))
    np.testing.assert_allclose(t, sigmas, rtol=0, atol=1e-7)
    x, state = path[0], solver.init(path[0])
    for i, expected in enumerate(path[1:]):
        velocity = np.random.default_rng(i).standard_normal(x.shape, np.float32)
        x, state = solver.step(x, state, velocity, t[i], t[i + 1])
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [5, 10, 20, 40])
def test_unipc_comes_closer_than_euler(steps):
    """Along dx/dt = x, from 1 to its sample 1 / e. (Its last step is of order 1, so that more steps help no more than Euler.)"""

    def error(solver):
        x, t = np.ones(1, np.float32), np.linspace(1, 0, steps + 1, dtype=np.float32)
        state = solver.init(x)
        for i in range(steps):
            x, state = solver.step(x, state, x, t[i], t[i + 1])
        return abs(float(x[0]) - np.exp(-1))

    assert error(UniPC()) < error(Euler()) / 10


@pytest.mark.parametrize("times", [shifted_timesteps, wan_timesteps])
@pytest.mark.parametrize(
    ("steps", "shift", "message"), [(0, 5.0, "steps=0"), (5, 0.0, "shift=0.0"), (5, np.inf, "shift=inf")]
)
def test_bad_steps_and_shifts_are_one_error(times, steps, shift, message):
    with pytest.raises(ValueError, match=message):
        times(steps, shift)
