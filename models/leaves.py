"""A component as leaves: a dotted path for each array, or for what stands in its place."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chipmunk_jax.config_file import nest
from chipmunk_jax.errors import InputError
from chipmunk_jax.models import MODELS, Component

DTYPES = ("bfloat16", "float16", "float32")


def parse_dtype(dtype: Any) -> jnp.dtype:
    """A dtype that weights may have.

    Raises:
        InputError: any other.
    """
    try:
        parsed = jnp.dtype(dtype)
    except TypeError as error:
        raise InputError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}") from error
    if parsed.name not in DTYPES:
        raise InputError(f"dtype={parsed.name}: expected one of {', '.join(DTYPES)}")
    return parsed


def abstract(name: str, config: Any, dtype: Any = jnp.bfloat16) -> Component:
    """The model with shapes and dtypes in place of arrays. All callers get the same one, so it must not be changed."""
    return _abstract(MODELS[name], config, parse_dtype(dtype))


@lru_cache(maxsize=64)  # tracing takes a tenth of a second, and a conversion asks several times
def _abstract(component: type[Component], config: Any, dtype: jnp.dtype) -> Component:
    return nnx.eval_shape(lambda: component(config, dtype=dtype, rngs=nnx.Rngs(0)))


def leaves_of(model: Component) -> dict[str, Any]:
    """Dotted path -> array, or what stands in its place."""
    return flatten(nnx.to_pure_dict(nnx.state(model)))


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": x}} as {"a.b": x}, the inverse of nest(); an entry of a list has a number for a name."""
    return {
        ".".join(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def with_arrays(model: Component, leaves: dict[str, Any]) -> Component:
    """The model with these arrays in place of its own."""
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, nest(leaves))
    return nnx.merge(graph, state)
