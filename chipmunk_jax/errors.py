"""What users did wrong, apart from what we did: the command line prints the first in one sentence, the second as a traceback."""


class InputError(ValueError):
    """An argument, file or setting that does not fit; the message says what was given and what is expected."""
