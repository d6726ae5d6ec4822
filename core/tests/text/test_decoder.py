"""Incremental decoding against whole decoding by the `tokenizers` library, and stop strings against a plain search."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from light_core.text.decoder import Detokenizer, IncrementalDecoder

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "naïve café — „Größe“ …",
    "日本語のテキスト、한국어 텍스트, русский текст",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 😀😀 \U0001f9d1\U0001f3fd",
    "e\u0301 combining, \u200b zero width, \ufeff bom, \ufffd replacement",
    "नमस्ते दुनिया\tקטן\r\n\x00end  two  spaces ",
]


def create_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:3] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool name>", special=False), AddedToken("größer", special=False)])
    return tokenizer


def create_byte_fallback() -> Tokenizer:
    """Shaped like SentencePiece's: word pieces with a leading mark, bytes for the rest."""
    words = ["▁", "▁Hello", "▁world", "H", "e", "l", "o", "é", ",", "日", "▁日本"]
    vocab = {piece: index for index, piece in enumerate(["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


BYTE_LEVEL = create_byte_level()
BYTE_FALLBACK = create_byte_fallback()
SHARED = Detokenizer(BYTE_LEVEL)
VOCAB = BYTE_LEVEL.get_vocab_size()
BYTE_IDS = [BYTE_LEVEL.token_to_id(char) for char in pre_tokenizers.ByteLevel.alphabet()]


def stream(decoder: IncrementalDecoder, token_ids: list[int], sizes: random.Random | None = None) -> str:
    """All of the output's text, pushed in runs of random length."""
    text, at = "", 0
    while at < len(token_ids) and decoder.stop_hit is None:
        count = sizes.randint(1, 4) if sizes else 1
        text += decoder.push(token_ids[at : at + count])[0]
        at += count
    return text + decoder.finish()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(text: str) -> None:
    token_ids = BYTE_LEVEL.encode(text).ids
    assert stream(IncrementalDecoder(BYTE_LEVEL), token_ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_ends_within_a_character(text: str) -> None:
    decoder = IncrementalDecoder(SHARED)
    shown = ""
    for token_id in BYTE_LEVEL.encode(text).ids:
        shown += decoder.push([token_id])[0]
        assert text.startswith(shown)


@settings(max_examples=400)
@given(st.lists(st.integers(0, VOCAB + 5)), st.lists(st.integers(0, VOCAB - 1), max_size=12), st.booleans(), st.randoms())
def test_byte_level_equals_whole_decoding(token_ids: list[int], prompt: list[int], skip: bool, sizes: random.Random) -> None:
    decoder = IncrementalDecoder(SHARED, prompt, skip_special_tokens=skip)
    assert stream(decoder, token_ids, sizes) == BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)


def test_byte_level_on_many_random_byte_strings() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        lead = rng.choice(([0xE4, 0xBD, 0xA0], [0xF0, 0x9F, 0x98, 0x80], [0xC3, 0xA9], [0xFF], [0x41]))
        raw = [byte for _ in range(rng.randint(1, 8)) for byte in lead[: rng.randint(1, len(lead))]]
        token_ids = [BYTE_IDS_BY_VALUE[byte] for byte in raw]
        assert stream(IncrementalDecoder(SHARED), token_ids) == BYTE_LEVEL.decode(token_ids)


BYTE_IDS_BY_VALUE = {SHARED.token_bytes(token_id)[0]: token_id for token_id in BYTE_IDS}


def test_a_prompt_that_ends_within_a_character_does_not_leak() -> None:
    face = [BYTE_IDS_BY_VALUE[byte] for byte in "😀".encode()]
    decoder = IncrementalDecoder(SHARED, face[:3])
    assert stream(decoder, [face[3], BYTE_IDS_BY_VALUE[0x41]]) == "\ufffdA"

    fallback = [BYTE_FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    prompt = [BYTE_FALLBACK.token_to_id("▁Hello"), *fallback[:3]]
    text = stream(IncrementalDecoder(BYTE_FALLBACK, prompt), [fallback[3], BYTE_FALLBACK.token_to_id("▁world")])
    assert text == "\ufffd world"


@settings(max_examples=200)
@given(st.text(alphabet=" Helo,é日😀ß", max_size=30), st.booleans())
def test_byte_fallback_equals_whole_decoding_after_the_prompt(text: str, with_prompt: bool) -> None:
    prompt = [BYTE_FALLBACK.token_to_id("▁Hello")] if with_prompt else []
    pieces = []
    for char in text.replace(" ", "▁"):
        token_id = BYTE_FALLBACK.token_to_id(char)
        pieces += [token_id] if token_id is not None else [BYTE_FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in char.encode()]
    whole = BYTE_FALLBACK.decode(prompt + pieces)[len("Hello") if with_prompt else 0 :]
    assert stream(IncrementalDecoder(BYTE_FALLBACK, prompt), pieces) == whole


@settings(max_examples=200)
@given(st.lists(st.integers(0, BYTE_FALLBACK.get_vocab_size() - 1), max_size=80), st.lists(st.integers(2, 257), max_size=8))
def test_byte_fallback_survives_any_tokens(token_ids: list[int], prompt: list[int]) -> None:
    """Where the bytes are no UTF-8, whole decoding also destroys characters before them; the words must be there."""
    text = stream(IncrementalDecoder(BYTE_FALLBACK, prompt), token_ids)
    for word in ("Hello", "world"):
        assert text.count(word) >= token_ids.count(BYTE_FALLBACK.token_to_id(f"▁{word}"))


def test_the_window_stays_short() -> None:
    """A run of 5,000 tokens that never becomes a character is linear work, and none of its text is lost."""
    lone = BYTE_FALLBACK.token_to_id("<0xE4>")
    decoder = IncrementalDecoder(BYTE_FALLBACK)
    assert stream(decoder, [lone] * 5000) == "\ufffd" * 5000
    assert len(decoder._stream._pending) <= 32  # type: ignore[union-attr]


def test_special_tokens() -> None:
    end = BYTE_LEVEL.token_to_id("<|end|>")
    token_ids = [*BYTE_LEVEL.encode("one").ids, end, *BYTE_LEVEL.encode("two").ids, BYTE_LEVEL.token_to_id("<tool name>")]
    assert stream(IncrementalDecoder(BYTE_LEVEL), token_ids) == "onetwo<tool name>"
    assert stream(IncrementalDecoder(BYTE_LEVEL, skip_special_tokens=False), token_ids) == "one<|end|>two<tool name>"


def test_transformers_tokenizers() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL, clean_up_tokenization_spaces=True)
    for text in TEXTS:
        assert stream(IncrementalDecoder(tokenizer), BYTE_LEVEL.encode(text + " .").ids) == text + " ."


class SlowTokenizer:
    """What a tokenizer written in Python offers."""

    all_special_ids = (1,)

    def decode(self, token_ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        return BYTE_FALLBACK.decode(token_ids, skip_special_tokens=skip_special_tokens)


def test_slow_tokenizers() -> None:
    hello, world = (BYTE_FALLBACK.token_to_id(piece) for piece in ("▁Hello", "▁world"))
    assert stream(IncrementalDecoder(SlowTokenizer(), [hello]), [world, 1, hello]) == " world Hello"


# ------------------------------------------------------------------------------------------ stop strings


def cut(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """The definition, character by character."""
    for end in range(1, len(text) + 1):
        found = [one for one in stop if text[:end].endswith(one)]
        if found:
            hit = max(found, key=len)
            return text[: end if include else end - len(hit)], hit
    return text, None


@settings(max_examples=500)
@given(
    st.text(alphabet="abcé日", max_size=40),
    st.lists(st.text(alphabet="abcé日", min_size=1, max_size=5), min_size=1, max_size=4),
    st.booleans(),
    st.randoms(),
)
def test_stop_strings(text: str, stop: list[str], include: bool, sizes: random.Random) -> None:
    expected, hit = cut(text, stop, include)
    decoder = IncrementalDecoder(SHARED, stop=stop, include_stop=include)
    shown, token_ids, at = "", BYTE_LEVEL.encode(text).ids, 0
    while at < len(token_ids) and decoder.stop_hit is None:
        count = sizes.randint(1, 3)
        piece, _ = decoder.push(token_ids[at : at + count])
        shown += piece
        at += count
        assert expected.startswith(shown)
    assert shown + decoder.finish() == expected
    assert decoder.stop_hit == hit


def test_stop_string_across_tokens_is_held_back_and_released() -> None:
    byte = BYTE_IDS_BY_VALUE
    decoder = IncrementalDecoder(SHARED, stop=["</s>", "STOP"])
    assert decoder.push([byte[ord("x")], byte[ord("<")]]) == ("x", None)
    assert decoder.push([byte[ord("/")]]) == ("", None)
    assert decoder.push([byte[ord("b")]]) == ("</b", None)
    assert decoder.push([byte[ord(char)] for char in "y</s>zz"]) == ("y", "</s>")
    assert decoder.num_tokens == 9
    assert decoder.push([byte[ord("z")]]) == ("", "</s>")
    assert decoder.finish() == ""


def test_held_text_is_released_at_the_end() -> None:
    decoder = IncrementalDecoder(SHARED, stop=["abcd"])
    assert decoder.push(BYTE_LEVEL.encode("xabc").ids) == ("x", None)
    assert decoder.finish() == "abc"


def test_unfinished_character_at_the_end() -> None:
    decoder = IncrementalDecoder(SHARED)
    assert decoder.push([BYTE_IDS_BY_VALUE[0xE4], BYTE_IDS_BY_VALUE[0xBD]]) == ("", None)
    assert decoder.finish() == "\ufffd"
