"""Placeholders in prompts: each becomes its item's tokens, whatever else a text holds."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from light_core.errors import RequestError
from light_core.media.places import ItemMark, MediaKind, MediaPlaces, media_kinds
from light_core.text.chat import ChatTemplate, MediaContent, plain_messages
from light_core.text.tokenizer import Tokenizer as LightTokenizer
from light_core.types import MediaEncoder

WORDS = ["<unk>", "<s>", "a", "b", "c", "user", "<", "image", ">", "<image>"]
VOCAB = 10
TOKEN = MediaKind("vision", "image", "<image>", 9, "<image>")
TEXT = MediaKind("vision", "image", "[[PIC]]", None, "[[PIC]] ")
PARTS_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for part in m.content %}{% if part.type == 'image' %}<image> {% else %}{{ part.text }}"
    "{% endif %}{% endfor %} {% endfor %}"
)
TEXT_TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> LightTokenizer:
    rust = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    hf = PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>", bos_token="<s>")
    hf.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return LightTokenizer(hf)


def fill(places: MediaPlaces, found: object, *counts: int) -> tuple[list[int], list[int]]:
    return places.fill(found, [ItemMark("image", count) for count in counts], "prompt")


def test_a_placeholder_that_is_a_token(tokenizer: LightTokenizer) -> None:
    places = MediaPlaces([TOKEN], tokenizer, VOCAB)
    found = places.encode("a <image> b<image>c", tokenizer.encode_marked)
    assert fill(places, found, 3, 1) == ([2, 9, 9, 9, 3, 9, 4], [1, 5])
    assert fill(places, places.find([9, 2, 9]), 2, 2) == ([9, 9, 2, 9, 9], [0, 3])


def test_a_placeholder_that_is_text(tokenizer: LightTokenizer) -> None:
    places = MediaPlaces([TEXT], tokenizer, VOCAB)
    found = places.encode("[[PIC]]a b[[PIC]][[PIC]]", tokenizer.encode_marked)
    assert fill(places, found, 1, 2, 1) == ([0, 2, 3, 0, 0, 0], [0, 3, 5])
    begun = places.encode_prompt("a [[PIC]] b", lambda text, special: ([1] if special else []) + tokenizer.encode_marked(text), True)
    assert fill(places, begun, 1) == ([1, 2, 0, 3], [2])


def test_the_tokenizers_id_goes_before_the_encoders(tokenizer: LightTokenizer) -> None:
    assert fill(
        MediaPlaces([MediaKind("v", "image", "<image>", 7, "")], tokenizer, VOCAB),
        [2],
    ) == ([2], [])
    places = MediaPlaces([MediaKind("v", "image", "<image>", 7, "")], tokenizer, VOCAB)
    assert fill(places, places.find([7, 9]), 1) == ([7, 9], [1])
    alone = MediaPlaces([MediaKind("v", "image", "<image>", 7, "")], None, VOCAB)
    assert fill(alone, alone.find([7, 9]), 2) == ([7, 7, 9], [0])


def test_a_placeholder_beyond_the_models_vocabulary_is_filled_with_what_it_has(tokenizer: LightTokenizer) -> None:
    places = MediaPlaces([TOKEN], tokenizer, 9)
    assert fill(places, places.encode("a <image>", tokenizer.encode_marked), 2) == ([2, 0, 0], [1])


@pytest.mark.parametrize("counts", [(), (1, 1)])
def test_places_and_items_are_counted(tokenizer: LightTokenizer, counts: tuple[int, ...]) -> None:
    places = MediaPlaces([TOKEN], tokenizer, VOCAB)
    with pytest.raises(RequestError, match=f"1 placeholders .*'<image>'.* for {len(counts)} items") as caught:
        fill(places, places.find([2, 9]), *counts)
    assert caught.value.param == "prompt"


def test_encoders_say_what_stands_for_items() -> None:
    encoder = MediaEncoder("vision", "image", dict, len, None, placeholder="<p>", token_id=3)
    assert media_kinds([encoder]) == (MediaKind("vision", "image", "<p>", 3, "<p>"),)
    with pytest.raises(RequestError, match="takes text, image, not audio"):
        MediaPlaces(media_kinds([encoder]), None, VOCAB).marker("audio")


# ------------------------------------------------------------------------------------------- conversations


def conversation(tokenizer: LightTokenizer, kind: MediaKind, template: str, *messages: dict[str, object]) -> tuple[str, list[int], int]:
    """Text, ids (an item has 2 tokens) and number of items."""
    places, compiled = MediaPlaces([kind], tokenizer, VOCAB), ChatTemplate(template)
    content = MediaContent(places.marker, places.literal, compiled.takes_parts())
    text = compiled.render(plain_messages(messages, tokenizer.mark, content))
    ids, _ = fill(places, places.encode(text, tokenizer.encode_marked), *[2] * len(content.items))
    return text, ids, len(content.items)


PICTURE = {"type": "image_url", "image_url": {"url": "data:"}}
A, B = ({"type": "text", "text": letter} for letter in "ab")


def test_which_templates_take_parts() -> None:
    assert ChatTemplate(PARTS_TEMPLATE).takes_parts()
    for template in (TEXT_TEMPLATE, "{{ messages[0].content | trim }}", "{{ messages | tojson }}", "x"):
        assert not ChatTemplate(template).takes_parts(), template


@pytest.mark.parametrize(("kind", "template"), [(TOKEN, TEXT_TEMPLATE), (TOKEN, PARTS_TEMPLATE), (TEXT, TEXT_TEMPLATE)])
def test_parts_keep_their_order(tokenizer: LightTokenizer, kind: MediaKind, template: str) -> None:
    fill_id = 9 if kind is TOKEN else 0
    _, ids, count = conversation(
        tokenizer, kind, template, {"role": "user", "content": [PICTURE, A, PICTURE, B]}, {"role": "user", "content": [B, PICTURE]}
    )
    assert count == 3 and ids == [5, fill_id, fill_id, 2, fill_id, fill_id, 3, 5, 3, fill_id, fill_id]


def test_texts_side_by_side_are_lines(tokenizer: LightTokenizer) -> None:
    """But for a template that takes parts, which would write one after the other."""
    message = {"role": "user", "content": [A, B, PICTURE, A]}
    assert conversation(tokenizer, TEXT, TEXT_TEMPLATE, message)[0] == "user a\nb[[PIC]] a "
    assert conversation(tokenizer, TOKEN, PARTS_TEMPLATE, message)[0] == "user ab<image> a "


@pytest.mark.parametrize(("kind", "literal"), [(TOKEN, "<image>"), (TEXT, "[[PIC]]")])
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
@pytest.mark.parametrize("count", [1, 1000])
def test_a_placeholders_text_in_a_message_is_text(tokenizer: LightTokenizer, kind: MediaKind, literal: str, role: str, count: int) -> None:
    for content in (literal * count, [{"type": "text", "text": literal * count}], [{"type": "text", "text": literal * count}, PICTURE]):
        _, ids, num_items = conversation(tokenizer, kind, TEXT_TEMPLATE, {"role": role, "content": content})
        assert num_items == (isinstance(content, list) and PICTURE in content)
        assert ids.count(9) == 2 * (num_items if kind is TOKEN else 0)


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_what_stands_around_a_placeholder_is_text_too(tokenizer: LightTokenizer, role: str) -> None:
    """A tokenizer may put a placeholder between the special tokens that begin and end one, and assistants' texts are not marked."""
    around = MediaKind("vision", "image", "[[PIC]]", None, "<image>[[PIC]]<image>")
    text, ids, count = conversation(tokenizer, around, TEXT_TEMPLATE, {"role": role, "content": "see <image>b"})
    assert count == 0 and 9 not in ids and "<image>" not in text
    _, ids, count = conversation(tokenizer, around, TEXT_TEMPLATE, {"role": role, "content": [A, PICTURE]})
    assert count == 1 and ids.count(9) == 2


@pytest.mark.parametrize("template", [TEXT_TEMPLATE, PARTS_TEMPLATE])
def test_a_placeholder_in_two_pieces_is_none(tokenizer: LightTokenizer, template: str) -> None:
    halves = [{"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}]
    _, ids, _ = conversation(tokenizer, TOKEN, template, {"role": "user", "content": halves})
    assert 9 not in ids


def test_other_parts_are_refused(tokenizer: LightTokenizer) -> None:
    for part in ({"type": "video_url"}, {"type": ["image_url"]}, {"type": None}, "x", 3, {"type": "text", "text": 5}):
        with pytest.raises(RequestError, match=r"messages\[0\]\.content") as caught:
            conversation(tokenizer, TOKEN, TEXT_TEMPLATE, {"role": "user", "content": [part]})
        assert "parts of type text and image_url" in str(caught.value) or part == {"type": "text", "text": 5}


def test_continuing_a_message_of_parts() -> None:
    template = ChatTemplate(PARTS_TEMPLATE)
    messages = [{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "so far"}]}]
    assert template.render(messages, continue_final_message=True) == "assistant <image> so far"
