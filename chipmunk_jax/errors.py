"""Errors of what users gave and of what numbers became: the command line prints them in a sentence, and ours with a traceback."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

SHOWN = 5  # names of a kind that a message lists
# Characters that a message repeats of a text in a file, of any value given, and of a word; and that it has itself.
TEXT = 100
LINE = 120
PATH = 200  # files in the cache of Hugging Face have names of 170, and a command is to be copied
SENTENCE = 800  # the longest message of ours, which lists every key of a config, has 500
# A value given: in quotes, or between a name and what is expected of it; or a word longer than any path.
GIVEN = re.compile(rf"(?<!\w)(?P<quote>['\"]).*?(?P=quote)(?!\w)|(?<==)[^'\"].*?(?=: expected)|\S{{{PATH + 1},}}")


class InputError(ValueError):
    """An argument, file or setting that does not fit; the message says what was given and what is expected."""

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


def sentence(message: str) -> str:
    """The message on one line, without the middle of anything endless that it repeats; escaped where it cannot be printed."""
    message = " ".join(shortened(message, 100 * LINE).split())  # first, as the pattern's time goes with the square
    message = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in message)
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


def quoted(text: str, most: int = TEXT) -> str:
    """A text of a file as a part of one line: shortened, and escaped where it cannot be printed."""
    text = shortened(text, most)
    return text if text.isprintable() else ascii(text)


def nearest(word: str, known: Iterable[str]) -> str:
    """A question for what was meant; "" where nothing is near."""
    names = {name.lstrip("-"): name for name in known}  # dashes alike would make any two flags near
    word = word.lstrip("-")
    tails = [name for name in names if name.endswith(f".{word}")]  # top-keys of sparsity.mlp.top-keys
    found = [names[name] for name in tails or difflib.get_close_matches(word, names, n=1)]
    return f"did you mean {' or '.join(found)}?" if found else ""


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Within, an InputError calls arguments what its reader calls them; see renamed()."""
    try:
        yield
    except InputError as error:
        error.args = (renamed(str(error), names),)
        raise


def renamed(message: str, names: Mapping[str, str]) -> str:
    """The message with other names of arguments: before a value, as in "steps=3", and of those with an underscore anywhere.

    Text in quotes and parts of paths stay as they are. A name that is a flag stands before its value without "=".
    """

    def rename(found: re.Match[str]) -> str:
        name, sign = found["name"], found["sign"]
        if name is None or not (sign or "_" in name):
            return found.group()
        return names[name] + (" " if sign and names[name].startswith("--") else sign)

    known = "|".join(map(re.escape, names)) or "(?!)"
    quoted = r"(?<!\w)(?P<quote>['\"]).*?(?P=quote)(?!\w)"
    return re.sub(rf"{quoted}|(?<![\w./-])(?P<name>{known})(?![\w./-])(?P<sign>=?)", rename, message)
