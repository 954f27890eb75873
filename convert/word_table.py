"""The table of words of the small models in pixels, beside their weights: prompts without a text encoder."""

from pathlib import Path

import numpy as np

from chipmunk_jax.config_file import read_config
from chipmunk_jax.convert.files import read_weights
from chipmunk_jax.errors import InputError

FILES = ("words.json", "word_embeddings.safetensors")
TEXT_ROWS = 16  # of a prompt: one for each attribute, then zeros
LARGEST = 1e6  # more than any embedding has: sums of a few must be finite in any dtype of weights but float16


def read_word_table(folder: str | Path) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], np.ndarray]:
    """(attributes, words of each, their embeddings f32 [words, C] in the order of the concatenated lists).

    Raises:
        FileNotFoundError, InputError: the folder has no word table, or a bad one.
    """
    folder = Path(folder)
    if not (folder / "words.json").is_file():
        raise InputError(f"{folder}: no words.json; the prompts of a model in pixels need its table of words")
    try:
        content = read_config(folder / "words.json")
        attributes, words = tuple(content["attributes"]), tuple(map(tuple, content["words"]))
        embeddings = read_weights(folder / "word_embeddings.safetensors").tensors["embeddings"].read()
        embeddings = np.array(embeddings, np.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: bad word table: {error}") from error
    if not all(isinstance(word, str) for word in (*attributes, *sum(words, ()))):
        raise InputError(f"{folder}: bad word table: attributes or words that are no texts")
    if not np.all(np.abs(embeddings) < LARGEST):
        raise InputError(f"{folder}: bad word table: embeddings that are NaN or infinite, or beyond {LARGEST:g}")
    total = sum(map(len, words))
    if not len(attributes) == len(words) <= TEXT_ROWS or embeddings.shape[:-1] != (total,):
        raise InputError(
            f"{folder}: bad word table: {len(attributes)} attributes, {len(words)} lists of {total} words, embeddings "
            f"{embeddings.shape}; expected a list an attribute, {TEXT_ROWS} at most, and an embedding a word"
        )
    return attributes, words, embeddings


def word_table_beside(path: Path) -> list[Path]:
    """The files of the word table beside weights, once it is read; none where there is none.

    Raises:
        InputError: it is a bad one.
    """
    folder = path if path.is_dir() else path.parent
    files = [folder / name for name in FILES]
    if not all(file.is_file() for file in files):
        return []
    read_word_table(folder)
    return files
