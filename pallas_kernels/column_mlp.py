"""The MLP over chosen neurons (Chipmunk, section 3): one list of neuron indices for each group of rows.

    a[b, i, j] = gelu_tanh(x[b, i] . fc1[c_j] + b1[c_j]),   y[b, i] = sum_j a[b, i, j] fc2[c_j],   c = the list of (b, i // group)

column_fc1 gives a, or its change since a cached a, packed as [B, N, K]; column_fc2 adds or subtracts y. Both weights are stored
[F, D], so that a neuron is one contiguous row of each. The group runs fastest in the grid: neighbours share weight rows in L2.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch, launch
from pallas_kernels.columns import Columns, covers
from pallas_kernels.exp2 import LOG2E
from pallas_kernels.groups import check_group, group_count, join_groups, split_groups
from pallas_kernels.launch import Launch
from pallas_kernels.tiles import tiles

SQRT_2_PI = math.sqrt(2 / math.pi)


def column_fc1(
    x: jax.Array,
    fc1: jax.Array,
    b1: jax.Array,
    columns: Columns,
    layer: jax.Array | int = 0,
    *,
    group: int,
    activations: jax.Array | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """packed [B, N, K] and activations: the chosen neurons' activations, or their change where a cache is given.

    Args:
        x: [B, N, D], bf16 (any float for the reference).
        fc1, b1: [L, F, D] and [L, F].
        columns: lists [L, B, G, K] of neurons, not packed. Slots of packed from the count on are 0.
        layer: i32 scalar, which entry of the stacked arrays to use.
        group: rows that share a list, a multiple of 64; G = ceil(N / group).
        activations: [L, B, F, N], post-GELU and transposed, so that a neuron's rows are contiguous. Packed is then the change
            against it, and its chosen entries of this layer are overwritten, in place.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: a named implementation cannot take these arguments.
    """
    _check(x, fc1, columns, group)
    if b1.shape != fc1.shape[:-1]:
        raise ValueError(f"b1 {b1.shape}: expected [L, F] to fit fc1 {fc1.shape}")
    if activations is not None and not covers(activations.shape[1:], (x.shape[0], fc1.shape[1], x.shape[1])):
        raise ValueError(f"activations {activations.shape}: expected [L, B, F, N] to fit x {x.shape}, fc1 {fc1.shape}")
    implementation = dispatch.choose(implementation, dtype=x.dtype)
    if implementation == "reference":
        return _fc1_reference(x, fc1[layer], b1[layer], columns, layer, group, activations)
    layer = jnp.asarray(layer, jnp.int32)[None]
    rows, capacity = x.shape[1], columns.capacity
    outputs = [jax.ShapeDtypeStruct((*x.shape[:2], capacity), x.dtype), activations]
    for part in launch.launches(rows, capacity, x.shape[0], *tiles("column_fc1", group)):
        body = functools.partial(_fc1_body, cached=activations is not None, part=part, group=group)
        outputs = launch.run(body, "column_fc1", (x, fc1, b1, columns, layer), outputs, part, implementation)
    return outputs


def column_fc2(
    packed: jax.Array,
    fc2: jax.Array,
    columns: Columns,
    layer: jax.Array | int = 0,
    *,
    group: int,
    residual: jax.Array,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """residual[layer] + packed @ fc2[layer, chosen]: [B, N, D], a new array.

    Args:
        packed: [B, N, K] of column_fc1, 0 from each count on.
        fc2: [L, F, D]: the row of a neuron is what it adds to the output.
        columns, layer, group: as in column_fc1.
        residual: [L, B, N, D].
        implementation: see dispatch.choose.

    Raises:
        ValueError, NotImplementedError: as in column_fc1.
    """
    return _fc2(packed, fc2, columns, layer, group, residual, "add", implementation)


def move_column_fc2(
    packed: jax.Array,
    fc2: jax.Array,
    columns: Columns,
    layer: jax.Array | int,
    *,
    group: int,
    out: jax.Array,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """out [L, B, N, D], in place, with out[layer] += packed @ fc2[layer, chosen]; and that as a copy, [B, N, D].

    Args:
        packed, fc2, columns, layer, group, implementation: as in column_fc2.
        out: [L, B, N, D].

    Raises:
        ValueError, NotImplementedError: as in column_fc1.
    """
    return _fc2(packed, fc2, columns, layer, group, out, "move", implementation)


def store_fc2_residual(
    dense: jax.Array,
    packed: jax.Array,
    fc2: jax.Array,
    columns: Columns,
    layer: jax.Array | int,
    *,
    group: int,
    residual: jax.Array,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """residual [L, B, N, D], in place, with residual[layer] = dense - packed @ fc2[layer, chosen].

    Args:
        dense: [B, N, D], what all neurons give.
        packed, fc2, columns, layer, group, residual, implementation: as in column_fc2.

    Raises:
        ValueError, NotImplementedError: as in column_fc1.
    """
    return _fc2(packed, fc2, columns, layer, group, residual, "store", implementation, dense)


def store_activations(
    activations: jax.Array,
    layer: jax.Array | int,
    *,
    cached: jax.Array,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """cached [L, B, F, N], in place, with cached[layer] = activations [B, N, F], transposed.

    Written with jnp, XLA would rather have the product before it give a transposed result, and then leave out its epilogue.

    Args:
        activations: any float dtype; cast to that of the cache.
        layer: i32 scalar.
        cached: as column_fc1's activations.
        implementation: see dispatch.choose.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: a named implementation cannot take these arguments.
    """
    batch, rows, neurons = activations.shape
    if not covers(cached.shape[1:], (batch, neurons, rows)):
        raise ValueError(f"cached {cached.shape}: expected [L, B, F, N] to fit activations {activations.shape}")
    implementation = dispatch.choose(implementation, dtype=jnp.bfloat16)  # no matrix units here: any dtype goes
    if implementation == "reference":
        return cached.at[layer, :batch].set(activations.swapaxes(1, 2).astype(cached.dtype))
    side = 64
    return pl.pallas_call(
        functools.partial(_store_activations_body, side=side),
        grid=(group_count(rows, side), group_count(neurons, side), batch),
        name="store_activations",
        out_shape=jax.ShapeDtypeStruct(cached.shape, cached.dtype),
        input_output_aliases={2: 0},
        interpret=implementation == "interpret",
        compiler_params=dispatch.compiler_params(num_warps=4, num_stages=2),
    )(activations, jnp.asarray(layer, jnp.int32)[None], cached)


def _store_activations_body(activations_ref, layer_ref, _, cached_ref, *, side):
    i, j, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    rows, neurons = i * side + jnp.arange(side), j * side + jnp.arange(side)
    here = (rows < activations_ref.shape[1])[:, None] & (neurons < activations_ref.shape[2])[None, :]
    tile = plgpu.load(activations_ref.at[b, rows[:, None], neurons[None, :]], mask=here, other=0)
    at = (layer_ref[0], b, neurons[:, None], rows[None, :])
    plgpu.store(cached_ref.at[at], tile.T.astype(cached_ref.dtype), mask=here.T)


def _check(x, weights, columns: Columns, group) -> None:
    check_group(group)
    batch, rows, width = x.shape
    if width != weights.shape[-1]:
        raise ValueError(f"x {x.shape}, weights {weights.shape}: expected the same width D")
    columns.check((batch, group_count(rows, group)), f"[B, N, D] = {x.shape}")


def _fc1_reference(x, fc1, b1, columns: Columns, layer, group, activations):
    batch = len(x)
    ids, listed = columns.listed(layer, batch)  # [B, G, K]
    logits = jnp.einsum("bgrd,bgkd->bgrk", split_groups(x, group), fc1[ids], preferred_element_type=jnp.float32)
    new = jax.nn.gelu(logits + b1[ids][:, :, None].astype(jnp.float32), approximate=True)
    new = jnp.where(listed[:, :, None], new, 0).astype(x.dtype)
    if activations is None:
        return join_groups(new, x.shape[1]), None
    cached = split_groups(activations[layer, :batch].swapaxes(1, 2), group)  # [B, G, group, F]
    old = jnp.take_along_axis(cached, ids[:, :, None], axis=-1)
    change = jnp.where(listed[:, :, None], new.astype(jnp.float32) - old.astype(jnp.float32), 0).astype(x.dtype)
    # Unlisted slots write past the last neuron, where a scatter drops them.
    where = jnp.where(listed, ids, cached.shape[-1])
    write = jax.vmap(jax.vmap(lambda rows, neurons, values: rows.at[:, neurons].set(values, mode="drop")))
    updated = join_groups(write(cached, where, new.astype(cached.dtype)), x.shape[1])
    return join_groups(change, x.shape[1]), activations.at[layer, :batch].set(updated.swapaxes(1, 2))


def _fc1_body(x_ref, fc1_ref, b1_ref, columns, layer_ref, *refs, cached, part: Launch, group):
    packed_ref, new_ref = refs[-2:] if cached else (refs[-1], None)  # before them the same memory as inputs
    indices_ref, counts_ref, _ = columns
    tile, neurons, inner = part.tile.rows, part.tile.columns, part.tile.inner
    i, j, b = part.first + pl.program_id(0), pl.program_id(1), pl.program_id(2)
    layer = layer_ref[0]
    rows_total, width = x_ref.shape[1:]
    capacity = columns.capacity
    g = lax.div(i * tile, group)
    count = counts_ref[layer, b, g]
    rows = i * tile + jnp.arange(tile)
    inside = rows < rows_total
    slots = j * neurons + jnp.arange(neurons)
    listed = slots < count
    chosen = plgpu.load(indices_ref.at[layer, b, g, jnp.minimum(slots, capacity - 1)])
    chosen = jnp.where(listed, chosen, indices_ref[layer, b, g, 0])

    def multiply(t, acc):
        features = t * inner + jnp.arange(inner)
        tokens = _load_2d(x_ref, (b,), rows, features, width, inside if rows_total % tile else None)
        return acc + plgpu.dot(tokens, _load_2d(fc1_ref, (layer,), chosen, features, width).T)

    # A tile without any listed neuron has nothing to multiply: its loop is empty.
    steps = group_count(width, inner) * jnp.clip(count - j * neurons, 0, 1)
    # Added at the end instead, the bias makes Triton compute the GELU in two layouts, and spill.
    bias = plgpu.load(b1_ref.at[layer, chosen], mask=listed, other=0).astype(jnp.float32)
    acc = lax.fori_loop(0, steps, multiply, jnp.broadcast_to(bias[None, :], (tile, neurons)))
    change = _gelu(acc).astype(packed_ref.dtype)
    if cached:
        # All in the cache's own orientation: used in two, the GELU would be computed twice, and spill.
        new = change.T
        # Masked lanes point past the last neuron: the interpreter scatters them too, and must not meet a written one.
        apart = jnp.where(listed, chosen, new_ref.shape[2] + slots)
        at = (layer, b, apart[:, None], rows[None, :])
        live = listed[:, None] & inside[None, :]
        old = plgpu.load(new_ref.at[at], mask=live, other=0)
        plgpu.store(new_ref.at[at], new.astype(new_ref.dtype), mask=live)
        change = (new.astype(jnp.float32) - old.astype(jnp.float32)).astype(packed_ref.dtype).T
    change = jnp.where(listed[None, :], change, 0)
    kept = inside[:, None] & (slots < capacity)[None, :]
    plgpu.store(packed_ref.at[b, rows[:, None], slots[None, :]], change, mask=kept)


def _gelu(x):
    """jax.nn.gelu(x, approximate=True), f32, with one exponential for its tanh: (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))."""
    minus_2u = x * (-2 * SQRT_2_PI - 2 * SQRT_2_PI * 0.044715 * x * x)
    return x / (1 + jnp.exp2(minus_2u * LOG2E))


def _load_2d(ref, prefix, rows, columns, columns_total, inside=None):
    """ref[*prefix, rows, columns] as a tile; rows outside and columns past the last read as 0."""
    shape = (rows.size, columns.size)
    masks = [] if inside is None else [jnp.broadcast_to(inside[:, None], shape)]
    if columns_total is not None and columns_total % columns.size:
        masks.append(jnp.broadcast_to((columns < columns_total)[None, :], shape))
    mask = functools.reduce(jnp.logical_and, masks) if masks else None
    return plgpu.load(ref.at[*prefix, rows[:, None], columns[None, :]], mask=mask, other=0 if masks else None)


def _fc2(packed, fc2, columns, layer, group, base, mode, implementation, dense=None):
    batch = len(packed)
    shape = (*packed.shape[:2], fc2.shape[-1])  # [B, N, D]
    if not covers(base.shape[1:], shape):
        raise ValueError(f"residual or out {base.shape}: expected [L, B, N, D] to fit {packed.shape} and {fc2.shape}")
    if packed.shape[-1] != columns.capacity or (dense is not None and dense.shape != shape):
        shapes = f"packed {packed.shape}" + ("" if dense is None else f", dense {dense.shape}")
        raise ValueError(f"{shapes}: expected [B, N, K] and [B, N, D] to fit K = {columns.capacity} and {base.shape}")
    _check(jax.ShapeDtypeStruct(shape, packed.dtype), fc2, columns, group)
    implementation = dispatch.choose(implementation, dtype=packed.dtype)
    if implementation == "reference":
        product = _fc2_reference(packed, fc2[layer], *columns.listed(layer, batch), group)
        if mode == "store":
            return base.at[layer, :batch].set((dense.astype(jnp.float32) - product).astype(base.dtype))
        total = (base[layer, :batch].astype(jnp.float32) + product).astype(base.dtype)
        return total if mode == "add" else (base.at[layer, :batch].set(total), total)
    inputs = (packed, fc2, columns, jnp.asarray(layer, jnp.int32)[None])
    fresh = None if mode == "store" else jax.ShapeDtypeStruct(shape, base.dtype)
    stack = base
    for part in launch.launches(packed.shape[1], fc2.shape[-1], packed.shape[0], *tiles("column_fc2", group)):
        body = functools.partial(_fc2_body, mode=mode, part=part, group=group)
        sources = {"add": (base,), "move": (), "store": (dense,)}[mode]
        outputs = [None if mode == "add" else stack, fresh]
        stack, fresh = launch.run(body, f"column_fc2_{mode}", (*inputs, *sources), outputs, part, implementation)
    return {"add": fresh, "move": (stack, fresh), "store": stack}[mode]


def _fc2_reference(packed, fc2, ids, listed, group):
    rows = jnp.where(listed[..., None], fc2[ids], 0)  # [B, G, K, D]
    values = jnp.where(listed[:, :, None], split_groups(packed, group), 0)
    product = jnp.einsum("bgrk,bgkd->bgrd", values, rows, preferred_element_type=jnp.float32)
    return join_groups(product, packed.shape[1])


def _fc2_body(packed_ref, fc2_ref, columns, layer_ref, *refs, mode, part: Launch, group):
    indices_ref, counts_ref, _ = columns
    tile, span, inner = part.tile.rows, part.tile.columns, part.tile.inner
    i, j, b = part.first + pl.program_id(0), pl.program_id(1), pl.program_id(2)
    layer = layer_ref[0]
    rows_total, width, capacity = packed_ref.shape[1], fc2_ref.shape[-1], columns.capacity
    g = lax.div(i * tile, group)
    count = counts_ref[layer, b, g]
    first = indices_ref[layer, b, g, 0]
    rows = i * tile + jnp.arange(tile)
    inside = rows < rows_total
    features = j * span + jnp.arange(span)

    def step(offset, acc, ragged):
        slots = offset + jnp.arange(inner)
        neurons = plgpu.load(indices_ref.at[layer, b, g, jnp.minimum(slots, capacity - 1) if ragged else slots])
        if ragged:
            neurons = jnp.where(slots < count, neurons, first)
        # Slots from the count on are 0, those past the last are not there.
        edge = capacity if ragged else None
        changes = _load_2d(packed_ref, (b,), rows, slots, edge, inside if rows_total % tile else None)
        return acc + plgpu.dot(changes, _load_2d(fc2_ref, (layer,), neurons, features, width))

    acc = jnp.zeros((tile, span), jnp.float32)
    whole = lax.div(count, inner)
    acc = lax.fori_loop(0, whole, lambda t, acc: step(t * inner, acc, False), acc)
    acc = lax.fori_loop(whole, lax.div(count + inner - 1, inner), lambda t, acc: step(t * inner, acc, True), acc)

    here = inside[:, None] & (features < width)[None, :]
    at = (b, rows[:, None], features[None, :])
    load = lambda ref, *where: plgpu.load(ref.at[*where, *at], mask=here, other=0).astype(jnp.float32)
    store = lambda ref, total, *where: plgpu.store(ref.at[*where, *at], total.astype(ref.dtype), mask=here)
    if mode == "add":
        store(refs[-1], load(refs[0], layer) + acc)
    elif mode == "store":
        store(refs[-1], load(refs[0]) - acc, layer)
    else:
        *_, stack_ref, fresh_ref = refs
        total = load(stack_ref, layer) + acc
        store(stack_ref, total, layer)
        store(fresh_ref, total)
