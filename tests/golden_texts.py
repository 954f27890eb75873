"""Strings for tokenizers, always the same: sentences, scripts, signs, controls, and what looks like special tokens."""

import random

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
WORDS = [
    "a", "photo", "of", "a", "chipmunk", "in", "a", "red", "scarf,", "sitting", "on", "a", "mossy", "log", "in", "the", "rain;",
    "golden", "hour,", "35", "mm", "film.", "Two", "cats", "are", "boxing!", "it's", "they've", "we'll", "don't", "I'd", "I'm",
    "you're", "'S", "'LL", "’s", "O'Neill", "1,234", "$5", "50%", "4k", "3.5", "x2", "(best)", "[quality]", "{1:2}", "<b>",
    "&amp;", "&lt;", "&#39;", "a/b", "naïve", "café", "CafÃ©", "Straße", "İstanbul", "ﬁlm", "ＷＩＤＥ", "½", "™", "…", "–—", "«»",
    "“quotes”", "x²", "ſpeed", "\u212aelvin",
]  # fmt: skip
SPECIAL = [
    "<|startoftext|>", "<|endoftext|>", "<|STARTOFTEXT|>", "<|ENDOFTEXT|>", "</s>", "<s>", "<pad>", "<unk>", "<extra_id_0>",
    "<0x41>", "</w>", "▁",
]  # fmt: skip
BLANKS = [
    " ", " ", " ", " ", "  ", "\n", "\t", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000", "",
]  # fmt: skip
# First and last letter of a script or kind of sign.
RANGES = [
    ("a", "z"), ("A", "Z"), ("!", "/"), ("0", "9"), ("À", "ſ"), ("Α", "ω"), ("А", "я"), ("ا", "ي"), ("अ", "ह"), ("ก", "ฮ"),
    ("一", "丿"), ("雀", "雿"), ("あ", "ん"), ("ァ", "ヶ"), ("가", "갿"), ("🀀", "🫿"), ("😀", "🙏"), ("←", "⇿"), ("！", "ﾠ"),
    ("\x00", "\x1f"), ("\x7f", "\x9f"), ("\u0300", "\u036f"), ("\u200b", "\u200f"), ("\ufff0", "\ufffd"), ("𐀀", "𐀿"),
]  # fmt: skip
JOINED = ["👩\u200d🚀", "🐿\ufe0f", "👍🏽", "🇫🇷", "e\u0301", "n\u0303o", "ก\u0e33", "क\u094dष", "\u1100\u1161", "\ufeff"]


def random_texts(count: int, seed: int) -> list[str]:
    """Strings of a few pieces each; random() alone draws them, whose sequence Python keeps the same."""
    draw = random.Random(seed).random
    one_of = lambda choices: choices[int(draw() * len(choices))]

    def piece() -> str:
        kind = draw()
        if kind < 0.55:
            return one_of(WORDS)
        if kind < 0.62:
            return one_of(SPECIAL)
        if kind < 0.70:
            return one_of(JOINED)
        first, last = map(ord, one_of(RANGES))
        return "".join(chr(first + int(draw() * (last - first + 1))) for _ in range(1 + int(4 * draw())))

    return ["".join(piece() + one_of(BLANKS) for _ in range(int(9 * draw()))) for _ in range(count)]


def of_clip() -> list[str]:
    """The strings that golden/tokenizers/clip_real has the tokens for."""
    return [*PROMPTS, *TEXTS, *random_texts(150, seed=0)]
