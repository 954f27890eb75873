"""What users did wrong, or numbers did, apart from what we did: the command line prints a sentence, of the last a traceback."""

import re

TEXT = 100  # characters of a text of someone else's that a message repeats
SHOWN = 6  # names of a kind that a message lists
LINE = 120  # characters of anything given that a message repeats
PATH = 200  # of a word: files in the cache of Hugging Face have names of 170, and a command is to be copied
SENTENCE = 800  # of a message; the longest of ours, which lists every key of a config, has 500
# Anything given: in quotes, between a name and what is expected of it, or a word.
GIVEN = re.compile(rf"(?<!\w)(?P<quote>['\"]).*?(?P=quote)(?!\w)|(?<==)[^'\"].*?(?=: expected)|\S{{{PATH + 1},}}")


class InputError(ValueError):
    """An argument, file or setting that does not fit; the message says what was given and what is expected."""

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


def sentence(message: str) -> str:
    """The message on one line, without the middle of anything endless that it repeats."""
    message = " ".join(shortened(message, 100 * LINE).split())  # the pattern tries every start to every end
    line = GIVEN.sub(lambda found: shortened(found.group(), LINE), message)
    return shortened(line, SENTENCE)


def shortened(text: str, most: int) -> str:
    """The text, or its start and its end where it is longer."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}..{text[1 - most + most // 2 :]}"


class NotFiniteError(FloatingPointError):
    """A sample of finite noise, conditions and weights is not finite; the message says from which step on."""


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def quoted(text: str, limit: int = TEXT) -> str:
    """A text of someone else's as a part of one line."""
    text = text if len(text) <= limit else f"{text[:limit]}.."
    return text if text.isprintable() else ascii(text)
