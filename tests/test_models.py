"""What every network of MODELS says of itself (chipmunk_jax.model.Model), without weights."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from chipmunk_jax.errors import InputError
from chipmunk_jax.models import MODELS, Network, WanConfig

TOKENS = 6
NETWORKS = [name for name, component in MODELS.items() if issubclass(component, Network)]
CONFIGS = {name: MODELS[name].config_class() for name in NETWORKS}
CASES = [*CONFIGS.items(), ("wan", WanConfig(in_dim=36, image_dim=1280))]


def abstract(name, config):
    return nnx.eval_shape(lambda: MODELS[name](config, rngs=nnx.Rngs(0)))


def zeros(model, batch, text):
    """Noise and conditions of the shapes that the model asks for."""
    shapes = model.conditions(TOKENS, text)
    kinds = {"mask": bool}
    cond = {name: jnp.zeros((batch, *shape), kinds.get(name)) for name, shape in shapes.items()}
    return jnp.zeros((batch, TOKENS, model.channels)), cond


@pytest.mark.parametrize(("name", "config"), CASES)
def test_inputs_of_the_shapes_that_a_network_asks_for_fit(name, config):
    model = abstract(name, config)
    most = config.text_rows[1]
    noise, cond = zeros(model, 2, most)
    model.check(noise, cond)
    assert set(model.prompted) <= cond.keys()
    assert {name for name in model.on_grid if name in cond} == {
        name for name, array in cond.items() if array.shape[1:2] == (TOKENS,)
    }
    for wrong in (noise[:, :, 1:], noise[:1]):
        with pytest.raises(InputError, match="expected"):
            model.check(wrong, cond)
    for missing in cond:
        with pytest.raises(InputError, match=r"conditions .*: expected"):
            model.check(noise, {name: array for name, array in cond.items() if name != missing})
    with pytest.raises(InputError, match=f"condition text of {most + 1} rows: expected"):
        model.check(*zeros(model, 2, most + 1))


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_are_those_of_the_velocity(name):
    model = abstract(name, CONFIGS[name])
    noise, cond = zeros(model, 2, CONFIGS[name].text_rows[1])
    arguments = model, noise, jnp.zeros(2), cond, jnp.zeros((TOKENS, 3))
    assert jax.eval_shape(lambda model, *given: model(*given)[0], *arguments).shape == noise.shape


@pytest.mark.parametrize("name", NETWORKS)
def test_depths_count_the_layers_of_every_stack_in_order(name):
    config = CONFIGS[name]
    depths = MODELS[name].depths
    model = abstract(name, dataclasses.replace(config, **{depth: 1 + i for i, depth in enumerate(depths)}))
    stacks = model.stacks(TOKENS, zeros(model, 1, 16)[1])
    assert [stack.layers for stack in stacks.values()] == [1 + i for i in range(len(depths))]
