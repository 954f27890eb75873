"""Two runs side by side: how much faster has it become?"""

import json
from collections.abc import Sequence
from typing import Any

from chipmunk_jax.bench.records import align, ms_text, shape_text, sparsity_text


def compare(new: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]], name: str) -> str:
    """A table of old ms / new ms, and in words what has no counterpart and whether the devices differ.

    Records agree that have the same benchmark, model, variant, shape, sparsity, dtype and implementation; of several in one file
    the last one counts.

    Args:
        new: records of this run.
        old: records of another.
        name: of the other, for the words.
    """
    here, there = (sorted({entry["benchmark"] for entry in records}) for records in (new, old))
    if not set(here) & set(there):
        return f"nothing here has a counterpart in {name}: {', '.join(there)} there, {', '.join(here)} here"
    new_by, old_by = ({_key(entry): entry for entry in records} for records in (new, old))
    both = [(old_by[key], entry) for key, entry in new_by.items() if key in old_by]
    lines = [_table(both)] if both else [f"nothing here has a counterpart in {name}"]
    missing = [entry for key, entry in new_by.items() if key not in old_by]
    gone = [entry for key, entry in old_by.items() if key not in new_by and entry["benchmark"] in here]
    lines += [f"not in {name}: {_title(entry)}" for entry in missing]
    lines += [f"only in {name}: {_title(entry)}" for entry in gone]
    for entry, kinds in ((e, {o.get("device") for o in old}) for e in new[:1]):
        if kinds != {entry["device"]}:
            there = ", ".join(sorted(map(str, kinds)))
            lines.append(f"the devices differ: {there} in {name}, {entry['device']} here; the ratios compare machines")
    return "\n".join(lines)


def _key(entry: dict[str, Any]) -> str:
    parts = ("benchmark", "model", "variant", "shape", "sparsity", "dtype", "implementation")
    return json.dumps([entry.get(part) for part in parts], sort_keys=True)


def _table(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    news = [new for _, new in pairs]
    columns = {
        "benchmark": [new["benchmark"] for new in news],
        "variant": [new["variant"] for new in news],
        "shape": [shape_text(new) for new in news],
        "sparsity": [sparsity_text(new) for new in news],
        "old ms": [ms_text(old["ms"]) or "no time" for old, _ in pairs],
        "new ms": [ms_text(new["ms"]) or "no time" for new in news],
        "old / new": [ratio(old["ms"], new["ms"]) for old, new in pairs],
    }
    return align(columns, [None] * len(pairs))


def ratio(old: float | None, new: float | None) -> str:
    """old / new, above 1 where it became faster; nothing where one has no time."""
    return f"{old / new:.3f}" if old and new else "-"


def _title(entry: dict[str, Any]) -> str:
    words = (entry["benchmark"], entry.get("model") or "", entry["variant"], shape_text(entry), sparsity_text(entry))
    return " ".join(filter(None, words))
