"""What users did wrong, apart from what we did: the command line prints the first in one sentence, the second as a traceback."""

TEXT = 100  # characters of a text of someone else's that a message repeats
SHOWN = 6  # names of a kind that a message lists


class InputError(ValueError):
    """An argument, file or setting that does not fit; the message says what was given and what is expected."""


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def quoted(text: str, limit: int = TEXT) -> str:
    """A text of someone else's as a part of one line."""
    text = text if len(text) <= limit else f"{text[:limit]}.."
    return text if text.isprintable() else ascii(text)
