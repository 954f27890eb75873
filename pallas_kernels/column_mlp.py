"""The MLP over chosen neurons: one list of neuron indices for each group of rows.

    a[b, i, j] = gelu_tanh(x[b, i] . fc1[c_j] + b1[c_j]),   y[b, i] = sum_j a[b, i, j] fc2[c_j],   c = the list of (b, i // group)

column_fc1 gives a, or its change since a cached a, packed as [B, N, K]; column_fc2 adds or subtracts y. Both weights are stored
[F, D], so that a neuron is one contiguous row of each. The group runs fastest in the grid: neighbours share weight rows in L2.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch
from pallas_kernels.groups import check_group, group_count, join_groups, row_tile, split_groups

NEURONS = 128  # a tile's neurons (fc1) and output features (fc2)
INNER = 64  # a step's width of the contraction


def column_fc1(
    x: jax.Array,
    fc1: jax.Array,
    b1: jax.Array,
    indices: jax.Array,
    counts: jax.Array,
    layer: jax.Array | int = 0,
    *,
    group: int,
    activations: jax.Array | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """packed [B, N, K] and activations: the chosen neurons' activations, or their change where a cache is given.

    Args:
        x: [B, N, D], bf16 or f16 (any float for the reference).
        fc1, b1: [L, F, D] and [L, F].
        indices: [L, B, G, K], i32: the first counts entries are distinct neurons, the others are never used.
        counts: [L, B, G], i32, 0 to K. Slots of packed behind the count are 0.
        layer: i32 scalar, which entry of the stacked arrays to use.
        group: rows that share a list, a multiple of 64; G = ceil(N / group).
        activations: [L, B, F, N], post-GELU and transposed, so that a neuron's rows are contiguous. Packed is then the change
            against it, and its chosen entries of this layer are overwritten, in place.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: a named implementation cannot take these arguments.
    """
    _check(x, fc1, indices, counts, group)
    if b1.shape != fc1.shape[:-1]:
        raise ValueError(f"b1 {b1.shape}: expected [L, F] to fit fc1 {fc1.shape}")
    if activations is not None and activations.shape[1:] != (x.shape[0], fc1.shape[1], x.shape[1]):
        raise ValueError(f"activations {activations.shape}: expected [L, B, F, N] to fit x {x.shape}, fc1 {fc1.shape}")
    implementation = dispatch.choose(implementation, dtype=x.dtype)
    if implementation == "reference":
        return _fc1_reference(x, fc1[layer], b1[layer], indices[layer], counts[layer], layer, group, activations)
    batch, rows, _ = x.shape
    tile, capacity = row_tile(group), indices.shape[-1]
    packed = jax.ShapeDtypeStruct((batch, rows, capacity), x.dtype)
    caches = [] if activations is None else [activations]
    out = pl.pallas_call(
        functools.partial(_fc1_body, tile=tile, group=group),
        grid=(group_count(rows, tile), group_count(capacity, NEURONS), batch),
        name="column_fc1",
        out_shape=[packed, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in caches)],
        input_output_aliases={6: 1} if caches else {},
        interpret=implementation == "interpret",
        compiler_params=dispatch.compiler_params(num_warps=4, num_stages=3),
    )(x, fc1, b1, indices, counts, jnp.asarray(layer, jnp.int32)[None], *caches)
    return out[0], out[1] if caches else None


def column_fc2(
    packed: jax.Array,
    fc2: jax.Array,
    indices: jax.Array,
    counts: jax.Array,
    layer: jax.Array | int = 0,
    *,
    group: int,
    residual: jax.Array,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """residual[layer] + packed @ fc2[layer, chosen]: [B, N, D], a new array.

    Args:
        packed: [B, N, K] of column_fc1, 0 behind each count.
        fc2: [L, F, D]: the row of a neuron is what it adds to the output.
        indices, counts, layer, group: as in column_fc1.
        residual: [L, B, N, D].
        implementation: see dispatch.choose.

    Raises:
        ValueError, NotImplementedError: as in column_fc1.
    """
    return _fc2(packed, fc2, indices, counts, layer, group, residual, None, False, implementation)


def store_column_fc2(
    packed: jax.Array,
    fc2: jax.Array,
    indices: jax.Array,
    counts: jax.Array,
    layer: jax.Array | int,
    *,
    group: int,
    out: jax.Array,
    dense: jax.Array | None = None,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """out [L, B, N, D], in place, with out[layer] += packed @ fc2[layer, chosen], or out[layer] = dense - the same product.

    Args:
        packed, fc2, indices, counts, layer, group, implementation: as in column_fc2.
        out: [L, B, N, D].
        dense: [B, N, D], what all neurons give; None adds to `out` instead.

    Raises:
        ValueError, NotImplementedError: as in column_fc1.
    """
    return _fc2(packed, fc2, indices, counts, layer, group, out, dense, True, implementation)


def _check(x, weights, indices, counts, group) -> None:
    check_group(group)
    batch, rows, width = x.shape
    lists = (batch, group_count(rows, group))
    if width != weights.shape[-1]:
        raise ValueError(f"x {x.shape}, weights {weights.shape}: expected the same width D")
    if indices.shape[1:-1] != lists or counts.shape != indices.shape[:-1]:
        expected = ", ".join(map(str, lists))
        raise ValueError(
            f"indices {indices.shape}, counts {counts.shape}: expected [L, {expected}, K], [L, {expected}]"
        )


def _fc1_reference(x, fc1, b1, indices, counts, layer, group, activations):
    listed = jnp.arange(indices.shape[-1]) < counts[..., None]  # [B, G, K]
    safe = jnp.where(listed, indices, 0)
    logits = jnp.einsum("bgrd,bgkd->bgrk", split_groups(x, group), fc1[safe], preferred_element_type=jnp.float32)
    new = jax.nn.gelu(logits + b1[safe][:, :, None].astype(jnp.float32), approximate=True)
    new = jnp.where(listed[:, :, None], new, 0).astype(x.dtype)
    if activations is None:
        return join_groups(new, x.shape[1]), None
    cached = split_groups(activations[layer].swapaxes(1, 2), group)  # [B, G, group, F]
    old = jnp.take_along_axis(cached, safe[:, :, None], axis=-1)
    change = jnp.where(listed[:, :, None], new.astype(jnp.float32) - old.astype(jnp.float32), 0).astype(x.dtype)
    # Unlisted slots write past the last neuron, where a scatter drops them.
    where = jnp.where(listed, indices, cached.shape[-1])
    write = jax.vmap(jax.vmap(lambda rows, columns, values: rows.at[:, columns].set(values, mode="drop")))
    updated = join_groups(write(cached, where, new.astype(cached.dtype)), x.shape[1])
    return join_groups(change, x.shape[1]), activations.at[layer].set(updated.swapaxes(1, 2))


def _fc1_body(x_ref, fc1_ref, b1_ref, indices_ref, counts_ref, layer_ref, *refs, tile, group):
    old_ref, packed_ref, new_ref = refs if len(refs) == 3 else (None, refs[0], None)
    i, j, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    layer = layer_ref[0]
    rows_total, width = x_ref.shape[1:]
    capacity = indices_ref.shape[-1]
    g = lax.div(i * tile, group)
    count = counts_ref[layer, b, g]
    rows = i * tile + jnp.arange(tile)
    inside = rows < rows_total
    slots = j * NEURONS + jnp.arange(NEURONS)
    listed = slots < count
    neurons = plgpu.load(indices_ref.at[layer, b, g, jnp.minimum(slots, capacity - 1)])
    neurons = jnp.where(listed, neurons, indices_ref[layer, b, g, 0])

    def multiply(t, acc):  # [neurons, rows]: the way the cached activations lie
        features = t * INNER + jnp.arange(INNER)
        weights = _load_2d(fc1_ref, (layer,), neurons, features, width)
        tokens = _load_2d(x_ref, (b,), rows, features, width, inside)
        return acc + plgpu.dot(weights, tokens.T)

    # A tile without any listed neuron has nothing to multiply: its loop is empty.
    steps = group_count(width, INNER) * jnp.clip(count - j * NEURONS, 0, 1)
    acc = lax.fori_loop(0, steps, multiply, jnp.zeros((NEURONS, tile), jnp.float32))
    bias = plgpu.load(b1_ref.at[layer, neurons], mask=listed, other=0).astype(jnp.float32)
    new = jax.nn.gelu(acc + bias[:, None], approximate=True).astype(packed_ref.dtype)
    live = listed[:, None] & inside[None, :]
    change = new
    if old_ref is not None:
        at = (layer, b, neurons[:, None], rows[None, :])
        old = plgpu.load(old_ref.at[at], mask=live, other=0)
        change = (new.astype(jnp.float32) - old.astype(jnp.float32)).astype(packed_ref.dtype)
        # Masked lanes point behind the last neuron: the interpreter scatters them too, and must not meet a written one.
        apart = jnp.where(listed, neurons, old_ref.shape[2] + slots)
        plgpu.store(new_ref.at[layer, b, apart[:, None], rows[None, :]], new.astype(new_ref.dtype), mask=live)
    change = jnp.where(live, change, 0).T.astype(packed_ref.dtype)
    kept = inside[:, None] & (slots < capacity)[None, :]
    plgpu.store(packed_ref.at[b, rows[:, None], slots[None, :]], change, mask=kept)


def _load_2d(ref, prefix, rows, columns, columns_total, inside=None):
    """ref[*prefix, rows, columns] as a tile; rows outside and columns behind the last read as 0."""
    shape = (rows.size, columns.size)
    masks = [] if inside is None else [jnp.broadcast_to(inside[:, None], shape)]
    if columns_total % columns.size:
        masks.append(jnp.broadcast_to((columns < columns_total)[None, :], shape))
    mask = functools.reduce(jnp.logical_and, masks) if masks else None
    return plgpu.load(ref.at[*prefix, rows[:, None], columns[None, :]], mask=mask, other=0 if masks else None)


def _fc2(packed, fc2, indices, counts, layer, group, base, dense, in_place, implementation):
    if base.shape[1:] != (*packed.shape[:2], fc2.shape[-1]):
        raise ValueError(f"residual or out {base.shape}: expected [L, B, N, D] to fit {packed.shape} and {fc2.shape}")
    if packed.shape[-1] != indices.shape[-1] or (dense is not None and dense.shape != base.shape[1:]):
        shapes = f"packed {packed.shape}" + ("" if dense is None else f", dense {dense.shape}")
        raise ValueError(f"{shapes}: expected [B, N, K] and [B, N, D] to fit indices {indices.shape} and {base.shape}")
    _check(jax.ShapeDtypeStruct(base.shape[1:], packed.dtype), fc2, indices, counts, group)
    implementation = dispatch.choose(implementation, dtype=packed.dtype)
    if implementation == "reference":
        product = _fc2_reference(packed, fc2[layer], indices[layer], counts[layer], group)
        if dense is not None:
            return base.at[layer].set((dense.astype(jnp.float32) - product).astype(base.dtype))
        total = (base[layer].astype(jnp.float32) + product).astype(base.dtype)
        return base.at[layer].set(total) if in_place else total
    batch, rows, _ = packed.shape
    width, tile = fc2.shape[-1], row_tile(group)
    sources = [base] if dense is None else [base, dense]
    shape = base.shape if in_place else base.shape[1:]
    return pl.pallas_call(
        functools.partial(_fc2_body, tile=tile, group=group, in_place=in_place),
        grid=(group_count(rows, tile), group_count(width, NEURONS), batch),
        name="column_fc2",
        out_shape=jax.ShapeDtypeStruct(shape, base.dtype),
        input_output_aliases={5: 0} if in_place else {},
        interpret=implementation == "interpret",
        compiler_params=dispatch.compiler_params(num_warps=4, num_stages=3),
    )(packed, fc2, indices, counts, jnp.asarray(layer, jnp.int32)[None], *sources)


def _fc2_reference(packed, fc2, indices, counts, group):
    listed = jnp.arange(indices.shape[-1]) < counts[..., None]
    rows = jnp.where(listed[..., None], fc2[jnp.where(listed, indices, 0)], 0)  # [B, G, K, D]
    values = jnp.where(listed[:, :, None], split_groups(packed, group), 0)
    product = jnp.einsum("bgrk,bgkd->bgrd", values, rows, preferred_element_type=jnp.float32)
    return join_groups(product, packed.shape[1])


def _fc2_body(packed_ref, fc2_ref, indices_ref, counts_ref, layer_ref, base_ref, *refs, tile, group, in_place):
    dense_ref, out_ref = refs if len(refs) == 2 else (None, refs[0])
    i, j, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    layer = layer_ref[0]
    rows_total, width, capacity = packed_ref.shape[1], fc2_ref.shape[-1], indices_ref.shape[-1]
    g = lax.div(i * tile, group)
    count = counts_ref[layer, b, g]
    first = indices_ref[layer, b, g, 0]
    rows = i * tile + jnp.arange(tile)
    inside = rows < rows_total
    features = j * NEURONS + jnp.arange(NEURONS)

    def step(offset, acc, ragged):
        slots = offset + jnp.arange(INNER)
        neurons = plgpu.load(indices_ref.at[layer, b, g, jnp.minimum(slots, capacity - 1) if ragged else slots])
        if ragged:
            neurons = jnp.where(slots < count, neurons, first)
        changes = plgpu.load(
            packed_ref.at[b, rows[:, None], slots[None, :]],
            mask=inside[:, None] & ((slots < count)[None, :] if ragged else jnp.ones((1, INNER), bool)),
            other=0,
        )
        return acc + plgpu.dot(changes, _load_2d(fc2_ref, (layer,), neurons, features, width))

    acc = jnp.zeros((tile, NEURONS), jnp.float32)
    whole = lax.div(count, INNER)
    acc = lax.fori_loop(0, whole, lambda t, acc: step(t * INNER, acc, False), acc)
    acc = lax.fori_loop(whole, lax.div(count + INNER - 1, INNER), lambda t, acc: step(t * INNER, acc, True), acc)

    here = inside[:, None] & (features < width)[None, :]
    at = (b, rows[:, None], features[None, :])
    if dense_ref is not None:
        total = plgpu.load(dense_ref.at[at], mask=here, other=0).astype(jnp.float32) - acc
    else:
        total = plgpu.load(base_ref.at[layer, *at], mask=here, other=0).astype(jnp.float32) + acc
    plgpu.store(out_ref.at[layer, *at] if in_place else out_ref.at[at], total.astype(out_ref.dtype), mask=here)
