"""Golden data of the tokenizers, by transformers: small vocabularies, the ids of 1,000 strings, and strings that Wan cleans.

usage: HF_HUB_OFFLINE=1 python make_tokenizer_golden.py [--train] [--clip FILE]
    (Python 3.11, transformers 5.23.0, tokenizers 0.23.3, sentencepiece 0.2.3, diffusers 0.42.1, ftfy 6.3.1)

Writes beside itself:
    tokenizers.npz      of every folder of tokenizers/: "<name>.ids" of the strings of golden_texts.py, one after the other, and
                        "<name>.lengths"; "<name>.padded" and "<name>.mask" [100, 12] of the first, cut and padded
    cleaned.json        pairs of a string and what diffusers' Wan pipeline makes of it

--clip makes tokenizers/clip_real of CLIP's published vocabulary, bpe_simple_vocab_16e6.txt.gz (clip-anytorch 2.6.0 has it): its
merges and tokens, under its ids, that golden_texts.of_clip() needs.

--train makes the vocabularies anew, beside this script in tokenizers/, of this repository's own prose and of TEXTS:
    clip/    vocab.json and merges.txt as CLIP's folders have them: bytes, bytes that end a word, merges, two special tokens
    t5/      spiece.model, and tokenizer.json as transformers 5 saves it
    umt5/    spiece.model with byte pieces, and tokenizer.json as transformers 4 saved those that are published
"""

import argparse
import contextlib
import gzip
import itertools
import json
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import regex
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from transformers.models.clip import CLIPTokenizer
from transformers.models.t5 import T5Tokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from golden_texts import PROMPTS, TEXTS, of_clip, random_texts  # noqa: E402

ROOT = HERE.parents[1]
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES, PIECES, EXTRA_IDS = 160, {"t5": 380, "umt5": 700}, 10
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # of CLIP
COUNT, PADDED, LENGTH = 1000, 100, 12
GARBLED = [
    "cafÃ©", "l&#39;Ã©tÃ©", "&amp;lt;b&amp;gt; &amp;amp;", "&lt;&quot;a&quot;&gt;", "ï¼¡ï¼¢", "âœ” No problems", "ﬁlm ﬂow",
    "a\u2003\tb \n c\r\n", "\ufeffbom", "“curly” ‘quotes’ – …", "ＦＵＬＬ　ｗｉｄｔｈ", "\x1b[36mcolour\x1b[0m",
    "&copy; 2024 &nbsp; x", "", "   ", "ÐŸÑ€Ð¸Ð²ÐµÑ‚", "一只花栗鼠 &amp; cafÃ©", "静态，细节模糊不清", "a\x00b\x07",
    "e\u0301 n\u0303", "&ampamp; &notit; &#x1F43F;", "&amp;amp;amp;amp;",
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--clip", type=Path)
    options, texts = parser.parse_args(), random_texts(COUNT, seed=0)
    if options.train:
        names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
        prose = [line for name in names for line in (ROOT / name).read_text().split("\n")]
        train_clip(HERE / "tokenizers/clip", PROMPTS * 20 + prose)
        train_t5(HERE / "tokenizers/t5", PROMPTS * 5 + prose, byte_fallback=False)
        train_t5(HERE / "tokenizers/umt5", PROMPTS * 5 + TEXTS * 20 + prose[:200], byte_fallback=True)
        as_version_4(HERE / "tokenizers/umt5/tokenizer.json")
    if options.clip:
        some_of_clip(HERE / "tokenizers/clip_real", options.clip, of_clip())
    load = {name: CLIPTokenizer.from_pretrained for name in ("clip", "clip_real")} | {"t5": T5Tokenizer.from_pretrained}
    load["umt5"] = as_written
    arrays = {}
    for name, kind in load.items():
        arrays |= {f"{name}.{key}": a for key, a in ids(kind(HERE / "tokenizers" / name), texts, name).items()}
    np.savez_compressed(HERE / "tokenizers.npz", **arrays)
    pairs = [(text, prompt_clean(text)) for text in [*GARBLED, *texts[:40]]]
    (HERE / "cleaned.json").write_text(json.dumps(pairs, ensure_ascii=False, indent=0) + "\n")


def ids(tokenizer, texts: list[str], name: str) -> dict[str, np.ndarray]:
    """What the tokenizer makes of the strings; of those of clip_real only, if it is that one."""
    texts = of_clip() if name == "clip_real" else texts
    whole = tokenizer(texts).input_ids
    fixed = tokenizer(texts[:PADDED], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np")
    return {
        "ids": np.concatenate(whole).astype(np.uint16),
        "lengths": np.array([len(row) for row in whole], np.uint16),
        "padded": fixed.input_ids.astype(np.uint16),
        "mask": fixed.attention_mask.astype(bool),
    }


def as_written(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer.json of a folder without the class that rebuilds it in part: T5Tokenizer takes U+0085 for a blank."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    texts, rebuilt = random_texts(COUNT, seed=0), T5Tokenizer.from_pretrained(folder)
    assert all(tokenizer(text).input_ids == rebuilt(text).input_ids for text in texts if "\x85" not in text)
    return tokenizer


def train_clip(folder: Path, texts: list[str]):
    """Merges of the most frequent pairs, ties by their spelling, in CLIP's order of ids."""
    fresh(folder)
    words = Counter()
    for text in texts:
        words.update(clip_words(text))
    merges = []
    while len(merges) < MERGES:
        pairs = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({merged(word, best): count for word, count in words.items()})
    units = bytes_as_letters()
    tokens = [*units, *(f"{unit}</w>" for unit in units), *("".join(pair) for pair in merges), START, END]
    assert len(set(tokens)) == len(tokens)
    write_clip(folder, {token: i for i, token in enumerate(tokens)}, merges)


def write_clip(folder: Path, tokens: dict[str, int], merges: list[tuple[str, str]]):
    """The files of a folder of CLIP, with the flags of special tokens as they are published."""
    write_json(folder / "vocab.json", tokens)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    special = dict(bos_token=START, eos_token=END, pad_token=END, unk_token=END)
    write_json(folder / "special_tokens_map.json", special)
    flags = dict(lstrip=False, rstrip=False, single_word=False, special=True)
    added = {str(tokens[token]): flags | dict(content=token, normalized=token == START) for token in (START, END)}
    config = dict(add_prefix_space=False, added_tokens_decoder=added, do_lower_case=True, model_max_length=77)
    write_json(folder / "tokenizer_config.json", config | special | dict(tokenizer_class="CLIPTokenizer"))


def some_of_clip(folder: Path, published: Path, texts: list[str]):
    """The part of CLIP's vocabulary that the texts need, and whatever a merge of it makes on the way there."""
    with gzip.open(
        published, "rt", encoding="utf-8"
    ) as file:  # the first line is a version, the last ones CLIP leaves out
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49_152 - 256 - 2 + 1]]
    units = bytes_as_letters()
    tokens = [*units, *(f"{unit}</w>" for unit in units), *("".join(pair) for pair in merges), START, END]
    tokens = {token: i for i, token in enumerate(tokens)}
    rank = {pair: i for i, pair in enumerate(merges)}
    used = {pair for text in texts for word in clip_words(text) for pair in applied(word, rank)}
    kept = [pair for pair in merges if pair in used]
    needed = {*units, *(f"{unit}</w>" for unit in units), *("".join(pair) for pair in kept), START, END}
    fresh(folder)
    write_clip(folder, tokens, merges)
    expected = [CLIPTokenizer.from_pretrained(folder)(text).input_ids for text in texts]
    write_clip(folder, {token: i for token, i in tokens.items() if token in needed}, kept)
    assert expected == [CLIPTokenizer.from_pretrained(folder)(text).input_ids for text in texts]
    assert expected[0][:5] == [49406, 320, 1125, 539, 320], "a photo of a"


def clip_words(text: str) -> Iterator[tuple[str, ...]]:
    """The words of a text as CLIP merges them, a letter for each byte."""
    for word in regex.findall(WORDS, unicodedata.normalize("NFC", text).lower()):
        ((spelt, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)
        yield *spelt[:-1], spelt[-1] + "</w>"


def applied(word: tuple[str, ...], rank: dict[tuple[str, str], int]) -> Iterator[tuple[str, str]]:
    """The merges that a word goes through, the first of the vocabulary first."""
    while pairs := [pair for pair in itertools.pairwise(word) if pair in rank]:
        yield (best := min(pairs, key=rank.get))
        word = merged(word, best)


def bytes_as_letters() -> list[str]:
    """The letters that stand for bytes, those of printable ones first, as CLIP numbers them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word with every occurrence of the pair as one."""
    parts, i = [], 0
    while i < len(word):
        found = word[i : i + 2] == pair
        parts.append("".join(pair) if found else word[i])
        i += 2 if found else 1
    return tuple(parts)


def train_t5(folder: Path, texts: list[str], *, byte_fallback: bool):
    """A Unigram model with T5's special tokens and `<extra_id_i>`, saved by transformers."""
    from sentencepiece import SentencePieceTrainer

    fresh(folder)
    # In the folder, as the file keeps the paths that the trainer is given.
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        rules = "".join(f"{spelt(a)}\t{spelt(b)}\n" for a, b in sorted(normalisation().items()))
        Path("rules.tsv").write_text(rules)
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix="spiece", model_type="unigram", vocab_size=PIECES[folder.name],
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=byte_fallback, normalization_rule_tsv="rules.tsv",
            character_coverage=0.9995, hard_vocab_limit=False, num_threads=1, minloglevel=2,
        )  # fmt: skip
        shutil.copy("spiece.model", folder)
    config = dict(model_max_length=512, extra_ids=EXTRA_IDS, tokenizer_class="T5Tokenizer")
    write_json(folder / "tokenizer_config.json", config)
    T5Tokenizer.from_pretrained(folder, extra_ids=EXTRA_IDS).save_pretrained(folder)
    write_json(folder / "tokenizer.json", json.loads((folder / "tokenizer.json").read_text()))
    write_json(folder / "tokenizer_config.json", config | dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>"))


def normalisation() -> dict[str, str]:
    """Of the rules of T5's files (nmt_nfkc) some of every kind: with all of them a file has 240 KB."""
    ranges = [(0xA0, 0x17F), (0x2000, 0x200A), (0x2010, 0x2030), (0x2100, 0x2138), (0x3000, 0x3001), (0xFB00, 0xFB07),
              (0xFF01, 0xFFA0)]  # fmt: skip
    letters = [chr(c) for low, high in ranges for c in range(low, high)]
    rules = {c: unicodedata.normalize("NFKC", c) for c in letters}
    rules |= {unicodedata.normalize("NFD", c): c for c in letters if 0xC0 <= ord(c) < 0x180}  # composed
    controls = [*range(1, 9), 0xB, *range(0xE, 0x20), 0x7F, 0x8F, 0x9F]
    blanks = [0x9, 0xA, 0xC, 0xD, 0x1680, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0x2581, 0xFEFF, 0xFFFD]
    rules |= dict.fromkeys(map(chr, controls), "") | dict.fromkeys(map(chr, blanks), " ")
    return {a: b for a, b in rules.items() if a != b}


def spelt(text: str) -> str:
    return " ".join(f"{ord(c):X}" for c in text)


def as_version_4(file: Path):
    """The file as transformers 4 wrote it: blanks by the normaliser, and no word of its own for each."""
    tree = json.loads(file.read_text())
    blanks = [{"type": "Strip", "strip_left": False, "strip_right": True},
              {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]  # fmt: skip
    tree["normalizer"] = {"type": "Sequence", "normalizers": [tree["normalizer"], *blanks]}
    tree["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    write_json(file, tree)
    Tokenizer.from_file(str(file))


def fresh(folder: Path):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def write_json(file: Path, tree: object):
    file.write_text(json.dumps(tree, ensure_ascii=False, separators=(",", ":")))


if __name__ == "__main__":
    main()
