"""Two runs side by side: how much faster has it become?"""

import json
from collections.abc import Sequence

from chipmunk_jax.report.records import Entry
from chipmunk_jax.report.tables import WORDS, ms_text, table


def compare(new: Sequence[Entry], old: Sequence[Entry], name: str) -> str:
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
    both = [entry | {"old": old_by[key]["ms"]} for key, entry in new_by.items() if key in old_by]
    missing = [entry for key, entry in new_by.items() if key not in old_by]
    gone = [entry for key, entry in old_by.items() if key not in new_by and entry["benchmark"] in here]
    lines = [table(both, WORDS | TIMES)] if both else [f"nothing here has a counterpart in {name}"]
    lines += [f"not in {name}: {_title(entry)}" for entry in missing]
    lines += [f"only in {name}: {_title(entry)}" for entry in gone]
    device, devices = new[0]["device"], {entry.get("device") for entry in old}
    if devices != {device}:
        there = ", ".join(sorted(map(str, devices)))
        lines.append(f"the devices differ: {there} in {name}, {device} here; the ratios compare machines")
    return "\n".join(lines)


TIMES = {
    "old ms": lambda entry: ms_text(entry["old"]) or "no time",
    "new ms": lambda entry: ms_text(entry["ms"]) or "no time",
    # Above 1 where it became faster.
    "old / new": lambda entry: f"{entry['old'] / entry['ms']:.3f}" if entry["old"] and entry["ms"] else "-",
}


def _key(entry: Entry) -> str:
    parts = ("benchmark", "model", "variant", "shape", "sparsity", "dtype", "implementation")
    return json.dumps([entry.get(part) for part in parts], sort_keys=True)


def _title(entry: Entry) -> str:
    benchmark, *words = (text(entry) for text in WORDS.values())
    return " ".join(filter(None, (benchmark, entry.get("model"), *words)))
