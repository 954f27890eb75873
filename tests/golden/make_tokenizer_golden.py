"""Golden data of the tokenizers, by transformers: three small vocabularies and the ids of 1,000 strings.

usage: HF_HUB_OFFLINE=1 python make_tokenizer_golden.py [--train]
    (Python 3.11, transformers 5.23.0, tokenizers 0.23.3, sentencepiece 0.2.3, ftfy 6.3.1)

--train makes the vocabularies anew, beside this script in tokenizers/, of this repository's own prose and of TEXTS:
    clip/    vocab.json and merges.txt as CLIP's folders have them: bytes, bytes that end a word, merges, two special tokens
    t5/      spiece.model, and tokenizer.json as transformers 5 saves it
    umt5/    spiece.model with byte pieces, and tokenizer.json as transformers 4 saved those that are published
"""

import argparse
import contextlib
import itertools
import json
import shutil
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import regex
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES, PIECES, EXTRA_IDS = 160, {"t5": 380, "umt5": 700}, 10
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # of CLIP
PROMPTS = [
    "a photo of a chipmunk in a red scarf, sitting on a mossy log in the rain, golden hour, 35 mm film",
    "an astronaut riding a horse on the moon, highly detailed, 4k, cinematic light",
    "two cats boxing on a stage with bright lights; the camera moves slowly from left to right",
    "a watercolour of a small café by the sea, naïve style, soft pastel colours",
    "it's a robot that doesn't know where they've put its keys, and we'll never find out",
]
TEXTS = [
    "一只花栗鼠坐在雨中的木头上，围着红色的围巾。", "一辆红色的汽车在雪地里行驶，镜头缓慢移动。",
    "静态，细节模糊不清，最差质量，低质量",
    "赤いマフラーを巻いたシマリスが雨の中に座っている。", "猫がステージでボクシングをしている。",
    "빨간 목도리를 두른 다람쥐가 비 속에 앉아 있다.", "Бурундук в красном шарфе сидит под дождём на бревне.",
    "Ein Streifenhörnchen mit rotem Schal sitzt im Regen auf einem moosigen Baumstamm.",
    "Un tamia avec une écharpe rouge est assis sous la pluie sur une bûche.",
    "Una ardilla listada con una bufanda roja está sentada bajo la lluvia.",
    "Ένας σκίουρος με κόκκινο κασκόλ κάθεται στη βροχή.", "سنجاب يرتدي وشاحا أحمر يجلس تحت المطر.",
    "लाल दुपट्टा पहने एक गिलहरी बारिश में बैठी है।", "กระรอกสวมผ้าพันคอสีแดงนั่งกลางสายฝน",
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", action="store_true")
    if parser.parse_args().train:
        prose = [
            line
            for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
            for line in (ROOT / name).read_text().split("\n")
        ]
        train_clip(HERE / "tokenizers/clip", PROMPTS * 20 + prose)
        train_t5(HERE / "tokenizers/t5", PROMPTS * 5 + prose, byte_fallback=False)
        train_t5(HERE / "tokenizers/umt5", PROMPTS * 5 + TEXTS * 20 + prose[:200], byte_fallback=True)
        as_version_4(HERE / "tokenizers/umt5/tokenizer.json")


def train_clip(folder: Path, texts: list[str]):
    """Merges of the most frequent pairs, ties by their spelling, in CLIP's order of ids."""
    fresh(folder)
    words = Counter()
    for text in texts:
        for word in regex.findall(WORDS, unicodedata.normalize("NFC", text).lower()):
            ((spelt, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)
            words[(*spelt[:-1], spelt[-1] + "</w>")] += 1
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
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    special = dict(bos_token=START, eos_token=END, pad_token=END, unk_token=END)
    write_json(folder / "special_tokens_map.json", special)
    config = dict(add_prefix_space=False, do_lower_case=True, errors="replace", model_max_length=77)
    write_json(folder / "tokenizer_config.json", config | special | dict(tokenizer_class="CLIPTokenizer"))


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
    from transformers import T5Tokenizer

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
