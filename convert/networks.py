"""The models by name, and their leaves without weights."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.models.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
from chipmunk_jax.models.wan import Wan, WanConfig


@dataclass(frozen=True)
class Network:
    """A model's class, called as model(config, dtype=.., rngs=..), and its config's."""

    model: type[nnx.Module]
    config: type


NETWORKS = {
    "flux": Network(Flux, FluxConfig),
    "hunyuan_video": Network(HunyuanVideo, HunyuanVideoConfig),
    "wan": Network(Wan, WanConfig),
}
DTYPES = ("bfloat16", "float16", "float32")


def parse_dtype(dtype: Any) -> jnp.dtype:
    """A dtype that weights may have.

    Raises:
        ValueError: any other.
    """
    try:
        parsed = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}") from error
    if parsed.name not in DTYPES:
        raise ValueError(f"dtype={parsed.name}: expected one of {', '.join(DTYPES)}")
    return parsed


def abstract(name: str, config: Any, dtype: Any = jnp.bfloat16) -> nnx.Module:
    """The model with shapes and dtypes in place of arrays."""
    return nnx.eval_shape(lambda: NETWORKS[name].model(config, dtype=parse_dtype(dtype), rngs=nnx.Rngs(0)))


def leaves_of(model: nnx.Module) -> dict[str, Any]:
    """Dotted path -> array, or what stands for one."""
    return flatten(nnx.to_pure_dict(nnx.state(model)))


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": x}} as {"a.b": x}."""
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def with_arrays(model: nnx.Module, tree: dict[str, Any]) -> nnx.Module:
    """The model with the arrays of a nested dict."""
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, tree)
    return nnx.merge(graph, state)


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
