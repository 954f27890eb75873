"""From prompts to the ids that text encoders take: Tokenizer, by a checkpoint's own files, and clean()."""

import bisect
import html
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chipmunk_jax.config_file import read_json
from chipmunk_jax.convert.file_kind import HEAD, mistaken
from chipmunk_jax.errors import TEXT, InputError, listed, shortened

START, END = "<|startoftext|>", "<|endoftext|>"  # of CLIP
PAD = "<pad>"  # of T5
# Where CLIP's words end (openai/CLIP, simple_tokenizer.py): special tokens, English contractions, letters, a digit, other signs.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MOST_TOKENS = 2**31  # of a vocabulary: ids are i32
# Encoders have more rows than tokens, for even shards: T5 32,128 for 32,000 and 100 more, UMT5 256,384 for 256,000 and 300 more.
SPARE_ROWS = 512
PACKAGES = {"tokenizers": "tokenizers>=0.21", "sentencepiece": "sentencepiece>=0.2", "ftfy": "ftfy>=6.3"}
Split = tuple[
    list[int], Callable[[int], int]
]  # ids of a text; n -> the place in it where what the first n ids stand for ends
EXPECTED = "expected tokenizer.json, vocab.json with merges.txt, or spiece.model"


class Tokens(NamedTuple):
    """What a text encoder takes, of B prompts."""

    ids: np.ndarray  # i32 [B, T]
    mask: np.ndarray  # bool [B, T], False where padded
    cut: list[str]  # the end of each prompt that had no room, "" where all of it had

    @property
    def warning(self) -> str:
        """One line that says what was cut from prompts, "" if nothing was."""
        lost = [repr(shortened(text, TEXT)) for text in dict.fromkeys(self.cut) if text]
        return f"a text encoder takes {self.ids.shape[1]} tokens of a prompt: cut {listed(lost)}" if lost else ""


@dataclass(frozen=True)
class Tokenizer:
    """Prompts to ids, as the diffusers pipelines make them: between special tokens, cut and padded on the right to one length."""

    split: Callable[[str], Split]  # without padding, cutting and the ids below
    before: tuple[int, ...]  # ids that stand before and after those of every prompt, also of one that is cut
    after: tuple[int, ...]
    pad: int
    vocabulary: int  # ids there are: the largest and one

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a folder: tokenizer.json as it is written, CLIP's vocab.json and merges.txt, or spiece.model.

        Raises:
            FileNotFoundError: no such folder.
            InputError: none of these files in it, or a damaged one; a package that reads it is missing.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        if (file := folder / "tokenizer.json").is_file():
            return _written(file)
        vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
        if vocabulary.is_file() and merges.is_file():
            return _clip(vocabulary, merges)
        if vocabulary.is_file() or merges.is_file():
            here, absent = sorted((vocabulary, merges), key=Path.exists, reverse=True)
            raise InputError(f"{folder}: {here.name} without {absent.name}; a tokenizer of CLIP has both")
        if (file := folder / "spiece.model").is_file():
            return _sentencepiece(file)
        raise InputError(f"{folder}: no tokenizer; {EXPECTED}")

    def __call__(self, prompts: Sequence[str], length: int) -> Tokens:
        """Ids and mask of prompts, and what was cut from each.

        Args:
            prompts: B sentences.
            length: T, ids of each: 77 for CLIP, max_sequence_length for T5 and UMT5.

        Raises:
            InputError: a length without room for a prompt, or a prompt that is no text.
        """
        room = length - len(self.before) - len(self.after)
        if room < 1:
            raise InputError(f"{length} tokens: expected at least {length + 1 - room}, special ones among them")
        ids = np.full((len(prompts), length), self.pad, np.int32)
        mask, cut = np.zeros(ids.shape, bool), []
        for row, prompt in enumerate(prompts):
            found, place = self.split(_checked(prompt))
            kept = [*self.before, *found[:room], *self.after]
            ids[row, : len(kept)], mask[row, : len(kept)] = kept, True
            cut.append(prompt[place(room) :] if len(found) > room else "")
        return Tokens(ids, mask, cut)

    def check_rows(self, rows: int) -> None:
        """Raises InputError unless a text encoder with embeddings [rows, D] can be the one that this tokenizer is for."""
        if not self.vocabulary <= rows < self.vocabulary + SPARE_ROWS:
            raise InputError(
                f"a tokenizer with {self.vocabulary:,} tokens beside a text encoder with {rows:,} embeddings: expected as many, or "
                f"up to {SPARE_ROWS} embeddings more; one of the two is another model's"
            )


class MissingPackageError(InputError):
    """A package that reads a file, or a kind of prompt, is not installed."""


def load_tokenizers(folders: Mapping[str, Path], rows: Mapping[str, int]) -> dict[str, Tokenizer]:
    """Tokenizers by role of their text encoder.

    Args:
        folders: role -> folder of its tokenizer.
        rows: role -> embeddings of the encoder, where it is known.

    Raises:
        InputError: damaged files, a package that is not installed, or a tokenizer of another model.
    """
    found = {}
    for role, folder in folders.items():
        found[role] = Tokenizer.load(folder)
        if role in rows:
            try:
                found[role].check_rows(rows[role])
            except InputError as error:
                raise InputError(f"{folder}: {error}") from error
    return found


def clean(text: str) -> str:
    """A prompt as Wan's text encoder is to see it: garbled characters mended, HTML unescaped, blanks joined.

    Raises:
        InputError: ftfy is not installed.
    """
    _check_package("ftfy", "a prompt of Wan")
    import ftfy

    # Twice, as text that was copied from the web may have been escaped twice (Wan-Video/Wan2.1, wan/modules/tokenizers.py).
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _written(file: Path) -> Tokenizer:
    """That of tokenizer.json, whatever class would read it."""
    _check_package("tokenizers", file)
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library has no class of its own
        raise _damaged(file, "JSON of a tokenizer", error) from error
    backend.no_truncation()
    padding = backend.padding or {}
    backend.no_padding()
    settings = _settings(file.parent)
    usual = (name for name in (PAD, END) if backend.token_to_id(name) is not None)
    pad = _content(settings.get("pad_token")) or padding.get("pad_token") or next(usual, None)
    return _tokenizer(file, backend, pad)


def _clip(vocabulary: Path, merges: Path) -> Tokenizer:
    """CLIP's, which has no tokenizer.json: of bytes, with a mark at the end of a word, in lower case."""
    _check_package("tokenizers", vocabulary)
    from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    folder, tokens = vocabulary.parent, _vocabulary(vocabulary)
    settings = _settings(folder)
    defaults = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    start, end, unknown, pad = (_content(settings.get(key)) or usual for key, usual in defaults.items())
    if absent := [token for token in dict.fromkeys((start, end, unknown, pad)) if token not in tokens]:
        raise InputError(f"{vocabulary}: no {listed(absent)}; expected the vocabulary of CLIP")
    try:
        model = models.BPE.from_file(
            str(vocabulary), str(merges), unk_token=unknown, end_of_word_suffix="</w>", continuing_subword_prefix=""
        )
    except Exception as error:
        raise _damaged(merges, "merges of tokens in vocab.json, two a line", error) from error
    backend = Backend(model)
    # CLIP joins blanks, too, but no blank is part of a word.
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, tokens[start]), (end, tokens[end])]
    )
    special = {token: {"special": True} for token in (start, end, unknown, pad)}
    special |= {token["content"]: token for token in _added(settings)}
    options = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for content, flags in special.items():
        known = {key: value for key, value in flags.items() if key in options}
        backend.add_tokens([AddedToken(content, **known)])
    return _tokenizer(vocabulary, backend, pad)


def _tokenizer(file: Path, backend: Any, pad: str | None) -> Tokenizer:
    """Of a tokenizers.Tokenizer and the token that pads."""
    if pad is None or backend.token_to_id(pad) is None:
        raise InputError(
            f"{file}: pad_token {pad!r}: expected a token of the vocabulary, named in tokenizer_config.json"
        )

    def split(text: str) -> Split:
        try:
            found = backend.encode(text, add_special_tokens=False)
        except Exception as error:
            raise InputError(
                f"prompt {shortened(text, TEXT)!r}: the tokenizer {file} cannot encode it ({error})"
            ) from error
        return found.ids, lambda n: found.offsets[n][0]

    try:
        letter = backend.encode("a")
        added = letter.special_tokens_mask  # 1 for those that stand around every text
        before, after = added.index(0), added[::-1].index(0)
    except Exception as error:
        raise _damaged(file, "a tokenizer with letters", error) from error
    return Tokenizer(
        split=split,
        before=tuple(letter.ids[:before]),
        after=tuple(letter.ids[len(added) - after :]),
        pad=backend.token_to_id(pad),
        vocabulary=max(backend.get_vocab().values()) + 1,
    )


def _sentencepiece(file: Path) -> Tokenizer:
    """T5's or UMT5's, by the library that the file was made by."""
    _check_package("sentencepiece", file)
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.Load(str(file))
    except (RuntimeError, OSError) as error:
        raise _damaged(file, "a model of SentencePiece", error) from error
    end, pad = model.eos_id(), model.pad_id()
    if end < 0 or pad < 0:
        raise InputError(f"{file}: no </s> or no <pad>; expected the SentencePiece model of T5 or UMT5")

    def split(text: str) -> Split:
        # The library says only what the ids are, in the same way in all its versions: the longest start with n of them.
        count = lambda length: len(model.EncodeAsIds(text[:length]))
        return model.EncodeAsIds(text), lambda n: bisect.bisect_right(range(len(text)), n, key=count) - 1

    return Tokenizer(split=split, before=(), after=(end,), pad=pad, vocabulary=model.GetPieceSize())


def _settings(folder: Path) -> dict[str, Any]:
    """What the files beside a tokenizer say of it, tokenizer_config.json before special_tokens_map.json."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                read = read_json(folder / name)
            except InputError as error:
                raise InputError(f"{folder}: {error}") from error
            found |= {key: value for key, value in read.items() if value is not None}
    return found


def _content(token: Any) -> str | None:
    """The text of a special token, which files give as it is or with its flags."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) and found else None


def _added(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens with flags: those that stand in added_tokens_decoder by id, or else those of special tokens."""
    by_id = settings.get("added_tokens_decoder")
    found = by_id.values() if isinstance(by_id, Mapping) and by_id else settings.values()
    return [dict(token) for token in found if isinstance(token, Mapping) and _content(token)]


def _vocabulary(file: Path) -> dict[str, int]:
    try:
        tokens = read_json(file)
    except InputError as error:
        raise InputError(f"{file.parent}: {error}") from error
    whole = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < MOST_TOKENS for i in tokens.values())
    if not whole or len(set(tokens.values())) < len(tokens):
        raise InputError(f"{file}: expected tokens, each with an id of its own from 0 on")
    return tokens


def _checked(prompt: str) -> str:
    """The prompt, if it is text that can be written down."""
    try:
        prompt.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise InputError(f"prompt {shortened(str(prompt), TEXT)!r}: expected a sentence of whole characters") from error
    return prompt


def _damaged(file: Path, expected: str, error: Exception) -> InputError:
    with file.open("rb") as stream:
        what, remedy = mistaken(stream.read(HEAD)) or ("damaged or of another kind", f"expected {expected} ({error})")
    return InputError(f"{file}: {what}: {remedy}")


def _check_package(name: str, what: object) -> None:
    if importlib.util.find_spec(name) is None:
        raise MissingPackageError(f"{what}: needs {name}, which is not installed (pip install '{PACKAGES[name]}')")
