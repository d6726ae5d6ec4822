"""Text to token ids and back: one thread-safe view of a model's tokenizer.

Not here: incremental decoding of a growing output (`text/decoder.py`), chat templates (`text/chat.py`). Callers: the
HTTP server, the detokeniser, the offline API.
"""

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from light_core.errors import ModelError, RequestError

__all__ = ["GENERATION_DEFAULTS", "LITERAL_MARK", "Tokenizer", "import_without_torch", "load_tokenizer", "read_end_tokens"]

logger = logging.getLogger(__name__)

GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Entries of generation_config.json that stand in for what a client leaves out."""

LITERAL_MARK = "\ufdd0"
"""A Unicode noncharacter. `Tokenizer.encode_marked` cuts text there, so that a special token's text with a mark in it
is encoded as ordinary text and never as the token."""

_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_CONTROL_FORM = re.compile(r"<[|｜].*[|｜]>")
"""Of added tokens that nobody means as text. Some tokenizers do not call all of them special, not even `<｜User｜>`, which
begins a turn."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A model's tokenizer. Every method may be called from any thread; none keeps state between calls.

    Args:
        hf: the transformers tokenizer. It is the wrapper's own: its truncation and padding are switched off.
        generation_defaults: sampling defaults of the model, names of `GENERATION_DEFAULTS`.
    """

    def __init__(self, hf: Any, generation_defaults: Mapping[str, float] | None = None) -> None:
        self._hf = hf
        self._lock = threading.Lock()
        # transformers sets truncation on the shared Rust object in each call, which is not safe across threads; the
        # Rust object itself is, as long as nobody changes it.
        self._backend = getattr(hf, "backend_tokenizer", None) if getattr(hf, "is_fast", False) else None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        added = {int(token_id): token for token_id, token in hf.added_tokens_decoder.items()}
        self._added = {token_id: str(token) for token_id, token in added.items()}
        self.special_ids = frozenset(hf.all_special_ids) | {token_id for token_id, token in added.items() if token.special}
        self.special_strings = frozenset(hf.all_special_tokens) | {str(token) for token in added.values() if token.special}
        self.generation_defaults: Mapping[str, float] = MappingProxyType(dict(generation_defaults or {}))
        self.vocab_size = len(hf)
        self._kind = _piece_kind(self._backend)
        self._control_pattern = _alternatives(self.special_strings | set(filter(_CONTROL_FORM.fullmatch, self._added.values())))
        self._pieces: dict[int, bytes] = {}

    @property
    def hf(self) -> Any:
        """The transformers tokenizer, to read from; calling it is not thread safe."""
        return self._hf

    @property
    def chat_template(self) -> str | Mapping[str, str] | None:
        """The Jinja source, or several by name ("default", "tool_use"), or None."""
        template: str | Mapping[str, str] | None = getattr(self._hf, "chat_template", None)
        return template

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Role to text, e.g. {"bos_token": "<s>"}; what chat templates see."""
        return {name: str(value) for name, value in self._hf.special_tokens_map.items() if isinstance(value, str)}

    def max_token_chars(self) -> int | None:
        """The most characters that one token can stand for, or None where unknown text of any length is one token."""
        if self._kind == "plain":
            return None
        return max((len(piece) for piece in self._hf.get_vocab()), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; the text of special tokens becomes those tokens.

        Args:
            text: any string.
            add_special_tokens: put the tokenizer's own begin and end tokens around it.

        Raises:
            RequestError: `text` holds a lone surrogate, which no encoding of Unicode can carry.
        """
        try:
            if self._backend is not None:
                ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
                return ids
            with self._lock:
                return list(self._hf.encode(text, add_special_tokens=add_special_tokens))
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError("the text is not valid Unicode: it holds a lone surrogate", "prompt") from error

    def mark(self, text: str) -> str:
        """`text` with the text of each special token, and of others of their form, cut by `LITERAL_MARK`, for `encode_marked`."""
        text = text.replace(LITERAL_MARK, "")
        if self._control_pattern is None:
            return text
        return self._control_pattern.sub(lambda found: found[0][0] + LITERAL_MARK + found[0][1:], text)

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of `text`, without added special tokens; marked special tokens are ordinary text."""
        return [token for part in text.split(LITERAL_MARK) if part for token in self.encode(part, add_special_tokens=False)]

    def added_id(self, text: str) -> int | None:
        """The id of `text` if it is an added token, which is found whatever stands around it; else None."""
        return next((token_id for token_id, token in self._added.items() if token == text), None)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; incomplete code points become U+FFFD. Spaces are not cleaned up."""
        if self._backend is not None:
            text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
            return text
        with self._lock:
            return str(self._hf.decode(list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one token stands for (perhaps part of a code point); b"" for an id without text."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._read_piece(token_id)
        return piece

    def token_text(self, token_id: int) -> str:
        """The text of one token; a part of a code point is written as `bytes:\\xe4`, so that texts stay distinct."""
        piece = self.token_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def _read_piece(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._hf.convert_ids_to_tokens(token_id) if 0 <= token_id < self.vocab_size else None
        if not isinstance(piece, str):
            return b""
        if self._kind == "byte_level" and all(char in _UNICODE_TO_BYTE for char in piece):
            return bytes(_UNICODE_TO_BYTE[char] for char in piece)
        if self._kind == "byte_fallback":
            found = _BYTE_PIECE.fullmatch(piece)
            return bytes([int(found[1], 16)]) if found else piece.replace("▁", " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()


def load_tokenizer(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    model_folder: str | os.PathLike[str] | None = None,
    made: Any | None = None,
) -> Tokenizer:
    """Loads the tokenizer of a model. Code that a repository brings along is never run.

    Args:
        folder: a local folder, or a hub id.
        revision: branch, tag or commit of a hub id.
        model_folder: where generation_config.json lies, if not in `folder`.
        made: the tokenizer that the model's plugin made of the files in `folder`; None lets transformers read them.

    Raises:
        ModelError: there is no tokenizer that transformers can load by itself, or its files are not valid.
    """
    hf = made if made is not None else _read_tokenizer(os.fspath(folder), revision)
    source = Path(model_folder if model_folder is not None else folder)
    return Tokenizer(hf, _generation_defaults(_read_json(source / "generation_config.json")))


def import_without_torch() -> None:
    """Imports transformers' tokenizers as if torch were not installed, for a process that handles text alone: half of the time and
    a third of the memory. transformers goes without torch in this process from then on; others import it as ever.

    Does nothing where either is there already. While it runs, no other thread may import torch.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # Python takes it for missing
    is_advice_wanted = _NO_ADVICE not in os.environ
    os.environ.setdefault(_NO_ADVICE, "1")  # transformers would tell everybody to install torch
    try:
        from transformers import AutoTokenizer  # noqa: F401
    finally:
        del modules["torch"]
        if is_advice_wanted:
            del os.environ[_NO_ADVICE]


def _read_tokenizer(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        with _without_type_warning():
            return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False, local_files_only=os.path.isdir(name))
    except Exception as error:
        if "trust_remote_code" in str(error):
            remedy = "use a tokenizer that transformers has itself: Light runs no code of a model repository (trust_remote_code)"
        else:
            remedy = "give --tokenizer a folder with tokenizer.json and tokenizer_config.json, or --skip-tokenizer-init"
        cause = " ".join(str(error).split())[:500]
        raise ModelError(f"the tokenizer of {name!r} cannot be loaded", f"{type(error).__name__}: {cause}", remedy) from error


class _TokenizerFile(msgspec.Struct):
    """What is read of tokenizer.json, which may be large."""

    added_tokens: list[dict[str, Any]] = []


def read_end_tokens(
    config: Mapping[str, Any], model_folder: str | os.PathLike[str], tokenizer_folder: str | os.PathLike[str] | None
) -> frozenset[int]:
    """Ids of the tokens that end an output: those of config.json and generation_config.json, and the tokenizer's own.

    Chat models are often published with an end of turn that their tokenizer alone names. Reads files and loads no
    tokenizer, so that the engine's process can do without one.

    Args:
        config: config.json.
        model_folder: of generation_config.json.
        tokenizer_folder: of tokenizer_config.json; None leaves the tokenizer out.

    Raises:
        ModelError: a file is not valid JSON.
    """
    sources = [config.get("eos_token_id"), _text_config(config).get("eos_token_id")]
    sources.append(_read_json(Path(model_folder) / "generation_config.json").get("eos_token_id"))
    if tokenizer_folder is not None:
        sources.append(_tokenizer_end(Path(tokenizer_folder)))
    ends = [end for source in sources for end in (source if isinstance(source, list) else [source])]
    return frozenset(end for end in ends if type(end) is int and end >= 0)


def _tokenizer_end(folder: Path) -> int | None:
    """Id of the tokenizer's end-of-sequence token, if its files name one among the added tokens."""
    settings = _read_json(folder / "tokenizer_config.json")
    token = settings.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return None
    added = settings.get("added_tokens_decoder")
    for token_id, entry in (added if isinstance(added, dict) else {}).items():
        if isinstance(entry, dict) and entry.get("content") == text:
            return int(token_id) if token_id.isdecimal() else None
    path = folder / "tokenizer.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile).added_tokens if path.is_file() else []
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path.name} is not valid", f"{path}: {error}", "restore the file from the model's repository") from error
    return next((entry.get("id") for entry in found if entry.get("content") == text), None)


@contextmanager
def _without_type_warning() -> Iterator[None]:
    """Keeps back transformers' warning of a model type that it does not know: the type is the plugin's business."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("You are using a model of type")

    source = logging.getLogger("transformers.configuration_utils")
    source.addFilter(is_wanted)
    try:
        yield
    finally:
        source.removeFilter(is_wanted)


def _generation_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    from light_core.sampling_params import SamplingParams

    kept: dict[str, float] = {}
    for name in GENERATION_DEFAULTS:
        value = generation.get(name)
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})
        except RequestError as error:
            logger.warning("generation_config.json: %s is ignored", error)
        else:
            kept[name] = value
    return kept


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    value = config.get("text_config")
    return value if isinstance(value, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path.name} is not valid JSON", f"{path}: {error}", "restore the file from the model's repository") from error
    return value if isinstance(value, dict) else {}


def _piece_kind(backend: Any) -> str:
    """How vocabulary entries spell bytes: "byte_level" (GPT-2), "byte_fallback" (SentencePiece) or "plain"."""
    if backend is None or backend.decoder is None:
        return "plain"
    decoder = bytes(backend.decoder.__getstate__())
    if b'"ByteLevel"' in decoder:
        return "byte_level"
    return "byte_fallback" if b'"ByteFallback"' in decoder else "plain"


def _alternatives(strings: frozenset[str]) -> re.Pattern[str] | None:
    wanted = sorted((text for text in strings if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, wanted))) if wanted else None


def _unicode_to_byte() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_UNICODE_TO_BYTE: Mapping[str, int] = MappingProxyType(_unicode_to_byte())
