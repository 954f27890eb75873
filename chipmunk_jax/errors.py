"""What users did wrong, or numbers did, apart from what we did: the command line prints a sentence, of the last a traceback."""

SHOWN = 6  # names of a kind that a message lists


class InputError(ValueError):
    """An argument, file or setting that does not fit; the message says what was given and what is expected."""


class NotFiniteError(FloatingPointError):
    """A sample of finite noise, conditions and weights is not finite; the message says from which step on."""


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
