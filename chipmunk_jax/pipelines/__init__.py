"""From a checkpoint and prompts to pixels: pipelines, and the table of models with their usual samples."""

from collections.abc import Mapping, Sequence

from chipmunk_jax.convert.rules import Layout
from chipmunk_jax.convert.source import TABLES
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.models import MODELS
from chipmunk_jax.models.blocks import Network
from chipmunk_jax.pipelines import flux, hunyuan_video, pixels, wan
from chipmunk_jax.pipelines.base import Pipeline, PipelineOutput
from chipmunk_jax.pipelines.variant import VARIANTS, Variant, variant_of
from chipmunk_jax.sparsity import PRESETS

for module in (pixels, flux, hunyuan_video, wan):  # in the order in which their rows are asked whether they match
    VARIANTS.update(module.VARIANTS)


def register(
    name: str, network: type[Network], *, layouts: Sequence[Layout] = (), variants: Mapping[str, Variant] = {}
) -> None:
    """Adds a network of your own, its conversion tables and its variants, to all that knows networks by name.

    Args:
        name: of the network, as `Variant.network` and `Layout.model` have it.
        network: called as network(config, dtype=.., rngs=..), with `config_class`.
        layouts: how its PyTorch checkpoints are written.
        variants: by name; the first that matches a config is how it is sampled.

    Raises:
        InputError: a name that is taken, or arguments that do not belong together; nothing is registered then.
    """
    if not (name and isinstance(name, str) and isinstance(network, type) and issubclass(network, Network)):
        raise InputError(f"register({name!r}, {network!r}): expected a name and a subclass of Network")
    for layout in layouts:
        if not isinstance(layout, Layout) or layout.model != name:
            raise InputError(
                f"{name}: layouts={listed([str(one) for one in layouts])}: expected Layouts whose model is {name!r}"
            )
    for key, variant in dict(variants).items():
        if not isinstance(variant, Variant) or variant.network != name or variant.preset not in PRESETS:
            raise InputError(f"{name}: variant {key!r}: expected a Variant of network {name!r} with one of the presets")
    if taken := [key for key in (name, *variants) if key in MODELS or key in VARIANTS]:
        raise InputError(f"{taken[0]}: already registered")
    MODELS[name], TABLES[name] = network, tuple(layouts)
    VARIANTS.update(variants)


__all__ = ["VARIANTS", "Pipeline", "PipelineOutput", "Variant", "register", "variant_of"]
