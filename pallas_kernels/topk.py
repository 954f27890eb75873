"""Exact top-k columns of rows of scores, as ascending lists.

Non-negative floats order like their bit patterns, so the k-th largest is found by halving an interval of patterns, on chip. A row
that is too long for that is read twice. A sample of it tells between which two patterns the k-th largest lies; the first reading
counts what lies above and sets aside what lies between, a few thousand columns, among which the k-th largest is found; the second
writes the ids of the larger patterns, and of the leftmost equal ones. Where a sample misled, the bounds are halved until they hold.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch
from pallas_kernels.columns import Columns

ON_CHIP = 16384  # columns of the longest row that one program holds in its registers
ASIDE = 8192  # columns of a longer one that it sets aside at most
SAMPLE, CHUNK = 4096, 16  # columns of a sample, and how many are neighbours: what one access to memory brings
BLOCK = 1024  # columns of a step of a reading
RESIDENT = 3  # programs of long rows that fit a multiprocessor


def topk_columns(
    scores: jax.Array,
    k: jax.Array | int,
    *,
    capacity: int,
    implementation: dispatch.Implementation | None = None,
) -> Columns:
    """Lists [.., capacity] of the columns with the k largest scores of every row; of equal scores the leftmost.

    Args:
        scores: [.., N], f32, bf16 or f16, not negative; +inf is taken first.
        k: how many, i32, 0 to capacity, one for all rows or [..]; it may be traced.
        capacity: length of the lists, at most N.
        implementation: see dispatch.choose.

    Raises:
        ValueError: capacity outside 1..N, or scores of an integer dtype.
    """
    width = scores.shape[-1]
    if not 1 <= capacity <= width:
        raise ValueError(f"capacity={capacity}: expected 1 to N = {width}")
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores of dtype {scores.dtype}: expected floats")
    counts = jnp.broadcast_to(jnp.minimum(jnp.asarray(k, jnp.int32), capacity), scores.shape[:-1])
    implementation = dispatch.choose(implementation, dtype=jnp.bfloat16)  # no matrix units here: any dtype goes
    if implementation == "reference":
        order = lax.top_k(scores, capacity)[1]  # stable: equal scores in ascending order of their ids
        chosen = jnp.where(jnp.arange(capacity) < counts[..., None], order, width)
        return Columns(jnp.sort(chosen, axis=-1).astype(jnp.int32), counts)
    bits = lax.bitcast_convert_type(scores, jnp.int16 if scores.dtype.itemsize == 2 else jnp.int32)
    short = width <= ON_CHIP
    programs = counts.size if short else min(counts.size, RESIDENT * dispatch.card().multiprocessors)
    warps = 8 if counts.size <= 512 else 4  # few rows leave processors idle: each gets a larger program
    lists = jax.ShapeDtypeStruct((counts.size, capacity), jnp.int32)
    indices, *_ = pl.pallas_call(
        functools.partial(_short_body if short else _long_body, compiled=implementation == "pallas"),
        grid=(programs,),
        name="topk_columns",
        out_shape=[lists] if short else [lists, jax.ShapeDtypeStruct((programs, ASIDE), bits.dtype)],
        interpret=implementation == "interpret",
        compiler_params=dispatch.compiler_params(num_warps=warps, num_stages=2),
    )(bits.reshape(-1, width), counts.reshape(-1))
    return Columns(indices.reshape(*scores.shape[:-1], capacity), counts)


def _short_body(bits_ref, k_ref, indices_ref, *, compiled):
    row, columns = pl.program_id(0), jnp.arange(pl.next_power_of_2(bits_ref.shape[1]))
    k = k_ref[row]
    patterns = _load(bits_ref, row, columns)
    _, threshold = _bisect(patterns, k, *_range(bits_ref.dtype))
    ties = k - _count(patterns > threshold)
    _write(indices_ref, row, columns, patterns, threshold, ties, (0, 0), compiled)


def _long_body(bits_ref, k_ref, indices_ref, aside_ref, *, compiled):
    program, programs = pl.program_id(0), pl.num_programs(0)

    def one_row(n, carry):
        row = program + n * programs
        k = k_ref[row]
        threshold, larger = _threshold(bits_ref, row, k, aside_ref, program, compiled)

        def write(columns, patterns, carry):
            return _write(indices_ref, row, columns, patterns, threshold, k - larger, carry, compiled)

        _read(bits_ref, row, write, (0, 0))
        return carry

    lax.fori_loop(0, lax.div(bits_ref.shape[0] - program + programs - 1, programs), one_row, 0)


def _threshold(bits_ref, row, k, aside_ref, program, compiled):
    """The k-th largest pattern of a row, and how many are larger."""
    dtype = bits_ref.dtype

    def set_aside(low, high):
        """How many patterns are above high, and how many above low only; these are set aside."""

        def count(columns, patterns, carry):
            above, between = carry
            inside = (patterns > low) & (patterns <= high)
            slots = between + jnp.cumsum(inside.astype(jnp.int32)) - 1
            kept = inside & (slots < ASIDE)
            _scatter(aside_ref, program, slots, patterns.astype(dtype), kept, columns, compiled)
            return above + (patterns > high).astype(jnp.int32), between + _count(inside)

        above, between = _read(bits_ref, row, count, (jnp.zeros(BLOCK, jnp.int32), 0))
        return jnp.sum(above), between

    def look(state):
        low, high, floor, ceiling, larger, *_ = state
        above, between = set_aside(low, high)
        too_low, too_high = above >= k, above + between < k
        larger = jnp.where(too_low, larger, jnp.where(too_high, above + between, above))
        floor = jnp.where(too_low, high, jnp.where(too_high, floor, low))
        ceiling = jnp.where(too_low, ceiling, jnp.where(too_high, low, high))
        found = ~too_low & ~too_high & (between <= ASIDE)
        return _middle(floor, ceiling), ceiling, floor, ceiling, larger, between, found

    # At least k patterns are above floor, fewer than k, namely `larger`, above ceiling.
    state = (*_guess(bits_ref, row, k), *_range(dtype), jnp.int32(0), jnp.int32(0), jnp.bool_(False))
    state = lax.while_loop(lambda s: ~s[-1] & (s[2] < s[3] - 1), look, state)
    _, _, floor, ceiling, larger, between, found = state
    if compiled:
        plgpu.debug_barrier()  # what was set aside is read by other threads
    slots = jnp.arange(ASIDE)
    patterns = plgpu.load(aside_ref.at[program, slots], mask=slots < between, other=-1).astype(jnp.int32)
    # Where nothing was set aside rightly, only the ceiling is left between the two.
    _, threshold = _bisect(patterns, k - larger, floor, ceiling)
    return threshold, larger + jnp.where(found, _count(patterns > threshold), 0)


def _guess(bits_ref, row, k):
    """low and high: the k-th largest pattern is above low and not above high, if the row is like a sample of it."""
    width, half = bits_ref.shape[1], 3 * ASIDE // 8  # three quarters of ASIDE should lie between
    chunks = jnp.arange(SAMPLE // CHUNK)[:, None] * (width // (SAMPLE // CHUNK))
    patterns = _load(bits_ref, row, chunks + jnp.arange(CHUNK)[None, :]).reshape(SAMPLE)
    # Ranks past the last give the lowest pattern, those before the first the highest.
    rank = lambda columns: (columns.astype(jnp.float32) * (SAMPLE / width)).astype(jnp.int32)
    # A guess: a few patterns more or less between the two cost nothing, and slack saves three rounds of halving.
    low, _ = _bisect(patterns, rank(k + half), *_range(bits_ref.dtype), slack=8)
    _, high = _bisect(patterns, rank(k - half), *_range(bits_ref.dtype), slack=8)
    return low, high


def _range(dtype):
    """All patterns are above the first and not above the second."""
    return jnp.int32(-1), jnp.int32(jnp.iinfo(dtype).max)


def _bisect(patterns, k, low, high, slack=1):
    """Bounds on the k-th largest pattern, which is above low and not above high, no more than slack apart."""

    def halve(bounds):
        low, high = bounds
        middle = _middle(low, high)
        enough = _count(patterns > middle) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    return lax.while_loop(lambda bounds: bounds[0] < bounds[1] - slack, halve, (low, high))


def _middle(low, high):
    """Their mean, rounded down, without their sum, which may be too large."""
    return (low & high) + ((low ^ high) >> 1)


def _read(bits_ref, row, body, carry):
    """carry after body(columns, patterns, carry) of every block of a row; each is loaded while the one before it is at work."""

    def step(j, carry):
        patterns, carry = carry
        following = _load(bits_ref, row, (j + 1) * BLOCK + jnp.arange(BLOCK))
        return following, body(j * BLOCK + jnp.arange(BLOCK), patterns, carry)

    first = _load(bits_ref, row, jnp.arange(BLOCK))
    return lax.fori_loop(0, pl.cdiv(bits_ref.shape[1], BLOCK), step, (first, carry))[1]


def _load(bits_ref, row, columns):
    """The patterns of some columns, i32; -1, less than any, where there is none."""
    inside = columns < bits_ref.shape[1]
    # No sign: -0.0 and a negative NaN count too, else a list would have unwritten slots.
    patterns = plgpu.load(bits_ref.at[row, columns], mask=inside, other=0) & jnp.iinfo(bits_ref.dtype).max
    return jnp.where(inside, patterns.astype(jnp.int32), -1)


def _count(mask):
    return jnp.sum(mask.astype(jnp.int32))


def _write(indices_ref, row, columns, patterns, threshold, ties, carry, compiled):
    """The columns above the threshold and the first `ties` equal to it, after those of the blocks before.

    Args:
        carry: how many columns before these are larger, how many equal. Returned for the next block.
    """
    larger, equal = patterns > threshold, patterns == threshold
    both = larger.astype(jnp.int32) + (equal.astype(jnp.int32) << 16)  # two counts in one sum
    before = jnp.cumsum(both) - both
    larger_before, equal_before = carry[0] + (before & 0xFFFF), carry[1] + (before >> 16)
    take = larger | (equal & (equal_before < ties))
    slots = larger_before + jnp.minimum(equal_before, ties)
    _scatter(indices_ref, row, slots, columns, take, columns, compiled)
    total = jnp.sum(both)
    return carry[0] + (total & 0xFFFF), carry[1] + (total >> 16)


def _scatter(ref, row, slots, values, mask, distinct, compiled):
    """ref[row, slots] = values, where the mask says so."""
    if not compiled:
        # The interpreter scatters masked lanes too: they point past the end of the row, so that they meet no other.
        slots = jnp.where(mask, slots, ref.shape[1] + distinct)
    plgpu.store(ref.at[row, slots], values, mask=mask)
