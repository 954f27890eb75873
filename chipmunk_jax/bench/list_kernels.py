"""Lists of columns in less memory, and back, against a copy of them: all should run at the speed of the memory."""

from dataclasses import dataclass

import jax
import numpy as np

from chipmunk_jax.bench import draw
from chipmunk_jax.bench.measure import EXACT, Candidate
from chipmunk_jax.bench.references import some_rows
from chipmunk_jax.bench.timing import input_sets
from chipmunk_jax.memory import nbytes
from pallas_kernels import Implementation, lists_to_mask, mask_to_lists, pack_lists

CHECKED_ROWS = 4


@dataclass(frozen=True)
class ListCase:
    """Lists of one length, a head and group each."""

    heads: int  # H
    groups: int  # G
    columns: int  # N
    kept: int  # K

    @property
    def shape(self) -> dict[str, int]:
        return {"H": self.heads, "G": self.groups, "N": self.columns, "K": self.kept}


def list_candidates(case: ListCase, most_sets: int, implementation: Implementation | None) -> list[Candidate]:
    """A copy of the lists, two ids a word, and bit masks from lists and back."""
    make = lambda key: draw.lists(key, (case.heads, case.groups), case.kept, case.columns)
    sets = input_sets(make, jax.random.key(0), most=most_sets)
    masks = [_to_mask(*lists, case.columns) for lists in sets]
    lists, mask = nbytes(sets[0][0]), nbytes(masks[0])
    common = dict(shape=case.shape, sparsity=1 - case.kept / case.columns, tolerance=EXACT)
    return [
        Candidate(
            variant="copy of the lists", sets=sets, call=lambda inputs, state: (~inputs[0], state), bytes=2 * lists,
            expected=lambda inputs, state: [~_rows(inputs[0])], observed=lambda out, state: [_rows(out)], **common,
        ),
        Candidate(
            variant="pack lists", sets=sets, call=lambda inputs, state: (pack_lists(*inputs)[0], state),
            expected=lambda inputs, state: [_rows(inputs[0]) % 2**16], bytes=1.5 * lists,
            observed=lambda words, state: [_parts(words, np.uint16)[:, : case.kept]], **common,
        ),
        Candidate(
            variant="lists to masks", sets=sets, bytes=lists + mask,
            call=lambda inputs, state: (_to_mask(*inputs, case.columns), state),
            expected=lambda inputs, state: [_bits(_rows(inputs[0]), case.columns)],
            observed=lambda words, state: [_parts(words, np.uint8)], **common,
        ),
        Candidate(
            variant="masks to lists", sets=masks, bytes=lists + mask,
            call=lambda words, state: (
                mask_to_lists(words, capacity=case.kept, implementation=implementation)[0],
                state,
            ),
            expected=lambda words, state: [_listed(_parts(words, np.uint8))],
            observed=lambda out, state: [_rows(out)], **common,
        ),
    ]  # fmt: skip


_to_mask = jax.jit(lists_to_mask, static_argnums=2)


def _rows(x: jax.Array) -> np.ndarray:
    """Some rows of an array [H, G, n]."""
    return some_rows(x, CHECKED_ROWS)


def _parts(words: jax.Array, dtype: type) -> np.ndarray:
    """The same rows of words of 32 bits, in parts of fewer."""
    return np.ascontiguousarray(_rows(words)).view(dtype).astype(np.int32)


def _bits(ids: np.ndarray, columns: int) -> np.ndarray:
    """Masks of whole words, a byte an entry, of lists [r, K]."""
    there = np.zeros((len(ids), -(-columns // 32) * 32), bool)
    np.put_along_axis(there, ids, True, axis=1)
    return np.packbits(there, axis=1, bitorder="little").astype(np.int32)


def _listed(masks: np.ndarray) -> np.ndarray:
    """Lists [r, K] of masks that all have as many bits."""
    bits = np.unpackbits(masks.astype(np.uint8), axis=1, bitorder="little")
    return np.nonzero(bits)[1].reshape(len(masks), -1)
