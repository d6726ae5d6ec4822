"""The tokens of Qwen-VL (2023) around pictures and boxes, on top of its text model's tokenizer. Imports no torch.

They follow the text model's special tokens. Those around references and boxes are ordinary text to whoever writes or reads
it, `<ref>the dog</ref><box>(10,20),(300,400)</box>`: prompts may have them, and answers show them. Those around pictures
are special: what a client writes in a conversation never becomes one of them.
"""

from tokenizers import AddedToken, Regex, normalizers
from transformers import PreTrainedTokenizerFast

__all__ = ["BOX_TOKENS", "IMAGE_TOKENS", "add_image_tokens"]

BOX_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_TOKENS = ("<img>", "</img>", "<imgpad>")
PLACE = r"<img>(?>[^<\n]*(?:<(?!/?img>)[^<\n]*)*)</img>"
"""A pair on one line with none of the two between them. It is looked for in whatever clients send: no character is looked at for more
than one `<img>`, however many of them are never closed."""


def add_image_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """`tokenizer` with `BOX_TOKENS` and `IMAGE_TOKENS`, where it does not have them; it is changed.

    In the models' own form of a prompt, `Picture 1: <img>ADDRESS</img>`, the address stands for the picture. Here pictures
    come beside the prompt, so that whatever stands between the two tokens, or nothing, becomes the placeholder.
    """
    known = tokenizer.get_added_vocab()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in BOX_TOKENS if token not in known])
    # Looked for in normalised text, so that the placeholder is put there first.
    tokenizer.add_tokens([AddedToken(token, normalized=True, special=True) for token in IMAGE_TOKENS if token not in known])
    backend = tokenizer.backend_tokenizer
    place = normalizers.Replace(Regex(PLACE), "<img><imgpad></img>")
    backend.normalizer = place if backend.normalizer is None else normalizers.Sequence([place, backend.normalizer])
    return tokenizer
