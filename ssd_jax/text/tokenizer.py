"""Tokenizers: text to ids and back, from the files of a checkpoint folder."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ssd_jax.errors import CheckpointError, RequestError, shortened, shown
from ssd_jax.json_files import is_file, read_json_object, read_text, shown_path
from ssd_jax.text.chat_template import render_chat
from ssd_jax.text.template_process import TemplateProcess

_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_ADDED_TOKENS = "added_tokens.json"
_GENERATION_CONFIG = "generation_config.json"
_MODEL_CONFIG = "config.json"
_TOKEN_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_TEMPLATE_TEXT = "chat_template.jinja"
_TEMPLATE_JSON = "chat_template.json"
_FILES = (
    *(_TOKENIZER_CONFIG, _SPECIAL_TOKENS, _ADDED_TOKENS, _GENERATION_CONFIG),
    *(_MODEL_CONFIG, _TEMPLATE_JSON),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokenizer:
    """A tokenizer with the special ids and the chat template of its checkpoint.

    `special_tokens` are the names and texts that a chat template sees. `processor_adds_bos` says
    that tokenizer.json itself puts BOS in front, `config_adds_bos` that tokenizer_config.json asks
    for it. `generation_config` is what generation_config.json holds, for `recommended_sampling`.
    `template_process` is where the template runs, started when it first does.
    `literal_tokens` are tokens that `decode` writes as they are instead of reading their bytes.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    special_tokens: Mapping[str, str | Sequence[str]]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat_template: str | None
    processor_adds_bos: bool
    config_adds_bos: bool
    generation_config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    template_process: TemplateProcess = field(default_factory=TemplateProcess, repr=False)
    literal_tokens: Mapping[int, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "literal_tokens", self._literal_tokens())

    def _literal_tokens(self) -> dict[int, str]:
        """Added tokens of a byte-level tokenizer that stand for their own text, by id.

        They are found in the text as it is written, never by their bytes. The library decodes them
        as bytes all the same where each letter could stand for one: "<Größe>" came out as
        "<Gr\ufffd\ufffde>". llama.cpp writes them as they are, as we do. A token that is listed as
        added but is the model's own as well stays bytes: the model may mean a part of a character.
        """
        if not set(self.decoder_kinds()) <= {"ByteLevel", "Fuse"}:
            return {}
        added = self.backend.get_added_tokens_decoder()
        return {
            token_id: token.content
            for token_id, token in added.items()
            if not token.content.isascii() and self.backend.model.token_to_id(token.content) is None
        }

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        """Id of every token, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, or None if the tokenizer has no such token."""
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Token of an id, or None if the tokenizer has no such id."""
        return self.backend.id_to_token(token_id)

    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out when it skips special tokens."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def special_tokens_by_text(self) -> dict[str, int]:
        """Ids of `special_ids`, by the text of the token."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def decoder_kinds(self) -> tuple[str, ...]:
        """Names of the decoding steps in order, such as ("Replace", "ByteFallback", "Fuse")."""
        decoder = self.backend.decoder
        if decoder is None:
            return ()
        return tuple(_decoder_kinds(json.loads(decoder.__getstate__())))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with the specials that the checkpoint asks for in front and behind.

        A text that already begins with BOS gets no second one.

        Raises:
            RequestError: the text holds a lone surrogate, so it is not Unicode text; or the
                tokenizer has no way to write it.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"Expected valid Unicode text, got a broken character at position {error.start}; "
                "pass the text as UTF-8."
            ) from error
        try:
            with _panics_are_exceptions():
                ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:
            raise RequestError(
                "Expected a text that the checkpoint's tokenizer can encode, but it failed "
                f"({shortened(str(error), 200)}); fetch tokenizer.json again."
            ) from error
        if not add_special_tokens or self.bos_id is None:
            return ids
        if self.processor_adds_bos:
            return ids[1:] if ids[:2] == [self.bos_id, self.bos_id] else ids
        if self.config_adds_bos and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a conversation; the template writes all specials, so none are added to it.

        Raises:
            RequestError: the checkpoint has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise RequestError(
                "Expected a checkpoint with a chat template, got one without; "
                "send a plain prompt, or add chat_template.jinja to the checkpoint folder."
            )
        text = render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            tools=tools,
            extra=extra,
            process=self.template_process,
        )
        return self.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; ids that the tokenizer does not know give no text."""
        if not self.literal_tokens:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        skipped = self.special_ids() if skip_special_tokens else ()
        texts = []
        for is_literal, run in itertools.groupby(ids, self.literal_tokens.__contains__):
            if is_literal:
                texts += [self.literal_tokens[i] for i in run if i not in skipped]
            else:
                texts.append(self.backend.decode([*run], skip_special_tokens=skip_special_tokens))
        return "".join(texts)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Tokenizer of a checkpoint folder; only tokenizer.json must be there.

    Raises:
        CheckpointError: a file is missing, damaged, or names a token that does not exist.
    """
    backend = _load_backend(folder / "tokenizer.json")
    files = {name: _read_json(folder / name) for name in _FILES}
    backend = _with_added_tokens(backend, folder, files)
    bos_ids = _special_token(backend, folder, files, "bos_token")
    eos_ids = _special_token(backend, folder, files, "eos_token")
    bos_ids += _listed_ids(folder, files, "bos_token_id")
    bos_id = bos_ids[0] if bos_ids else None
    adds_bos = files[_TOKENIZER_CONFIG].get("add_bos_token") is True
    if adds_bos and bos_id is None:
        raise CheckpointError(
            f"Expected a bos_token in {shown_path(folder / _TOKENIZER_CONFIG)} because "
            "add_bos_token is true, got none; name the token or set add_bos_token to false."
        )
    return Tokenizer(
        backend=backend,
        special_tokens=_special_tokens(files),
        bos_id=bos_id,
        eos_ids=tuple(dict.fromkeys(_listed_ids(folder, files, "eos_token_id") + eos_ids)),
        chat_template=_chat_template(folder, files),
        processor_adds_bos=bos_id is not None and backend.encode("").ids[:1] == [bos_id],
        config_adds_bos=adds_bos,
        generation_config=files[_GENERATION_CONFIG],
    )


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    """Tokenizer in a tokenizer.json, without what that may ask for in training.

    That is truncation, padding, and dropout, which encodes a text in another way each time.
    """
    if not is_file(path):
        raise CheckpointError(
            f"Expected a tokenizer at {shown_path(path)}, found no such file; "
            "give a checkpoint folder that holds tokenizer.json."
        )
    try:
        with _panics_are_exceptions():
            backend = tokenizers.Tokenizer.from_file(str(path))
            backend.no_truncation()
            backend.no_padding()
            if isinstance(backend.model, tokenizers.models.BPE):
                backend.model.dropout = None
            backend.encode("")  # which puts in the special tokens, and they may not exist
            return backend
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise CheckpointError(
            f"Expected a tokenizer in {shown_path(path)}, but it cannot be read "
            f"({shortened(str(error), 200)}); "
            "fetch that file again."
        ) from error


@contextmanager
def _panics_are_exceptions() -> Iterator[None]:
    """Raise what the library's Rust code panics with as an Exception, which it is not by itself."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    """Object in a JSON file, empty if there is no such file."""
    return read_json_object(path) if path.exists() else {}


def _with_added_tokens(
    backend: tokenizers.Tokenizer, folder: Path, files: Mapping[str, Mapping[str, Any]]
) -> tokenizers.Tokenizer:
    """The tokenizer with the tokens and flags that stand in the files beside tokenizer.json.

    As in transformers: entries of added_tokens_decoder replace those of tokenizer.json, and what is
    named as a special token is one.
    """
    known = backend.get_added_tokens_decoder()
    stated = _stated_tokens(folder, files)
    plain = {token.content for token in known.values()}
    tokens = [
        token
        for _, (token, file) in sorted(stated.items())
        if file.name == _TOKENIZER_CONFIG or token.content not in plain  # the other has no flags
    ]
    contents = {token.content for token in (*known.values(), *tokens)}
    named = _special_tokens(files)
    for name, texts in named.items():
        for text in (texts,) if isinstance(texts, str) else texts:
            is_required = name in ("bos_token", "eos_token") and backend.token_to_id(text) is None
            if text not in contents and not is_required:  # `_special_token` refuses those
                tokens.append(AddedToken(text, special=True))
                contents.add(text)
    same = {repr(token) for token in known.values()}
    tokens = [token for token in tokens if repr(token) not in same]
    for special, group in itertools.groupby(tokens, key=lambda token: token.special):
        (backend.add_special_tokens if special else backend.add_tokens)(list(group))
    for number, (token, file) in stated.items():
        if backend.token_to_id(token.content) != number:
            raise CheckpointError(
                f"Expected the id {number} of {shown(token.content)} in {shown_path(file)} to be "
                "that of tokenizer.json, or the next one after those there, got "
                f"{backend.token_to_id(token.content)}; correct the entry or fetch both files "
                "again."
            )
    specials = {token.content for token in known.values() if token.special}
    if any(token.content in specials and not token.special for token in tokens):
        return tokenizers.Tokenizer.from_str(backend.to_str())  # which alone forgets a special one
    return backend


def _stated_tokens(
    folder: Path, files: Mapping[str, Mapping[str, Any]]
) -> dict[int, tuple[AddedToken, Path]]:
    """Added tokens that are given with their ids beside tokenizer.json, and where they are."""
    stated: dict[int, tuple[AddedToken, Path]] = {}
    legacy = files[_ADDED_TOKENS]
    decoder = files[_TOKENIZER_CONFIG].get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        decoder = {"": decoder}  # refused below
    plain = [(number, {"content": text}, _ADDED_TOKENS) for text, number in legacy.items()]
    full = [(number, entry, _TOKENIZER_CONFIG) for number, entry in decoder.items()]
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for number, entry, file in plain + full:
        content = _content(entry)
        given = {
            flag: entry[flag] for flag in flags if isinstance(entry, Mapping) and flag in entry
        }
        try:
            token_id = int(number) if isinstance(number, str) and len(number) < 20 else number
        except ValueError:
            token_id = None
        if (
            content is None
            or not isinstance(token_id, int)
            or not 0 <= token_id < 2**31
            or not all(isinstance(value, bool) for value in given.values())
        ):
            raise CheckpointError(
                f"Expected added tokens in {shown_path(folder / file)} to have an id, a text and "
                f"flags that are true or false, got {shown(number)}: {shown(entry)}; correct that "
                "entry."
            )
        stated[token_id] = (AddedToken(content, **given), folder / file)
    return stated


def _special_token(
    backend: tokenizers.Tokenizer,
    folder: Path,
    files: Mapping[str, Mapping[str, Any]],
    name: str,
) -> tuple[int, ...]:
    """Id of `bos_token` or `eos_token`; none where the files name none."""
    for file in (_TOKENIZER_CONFIG, _SPECIAL_TOKENS):
        entry = files[file].get(name)
        token = _content(entry)
        if token is None and entry is None:
            continue
        token_id = backend.token_to_id(token) if token is not None else None
        if token_id is None:
            raise CheckpointError(
                f"Expected {name} in {shown_path(folder / file)} to be a token of tokenizer.json, "
                f"got {shown(entry if token is None else token)}; correct that entry."
            )
        return (token_id,)
    return ()


def _content(entry: object) -> str | None:
    """Text of a token, which may be given alone or with its flags."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    if not isinstance(text, str) or not text or any("\ud800" <= c <= "\udfff" for c in text):
        return None
    return text


def _special_tokens(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str | Sequence[str]]:
    """Texts of all special tokens by name, as transformers passes them to a chat template."""
    special: dict[str, str | Sequence[str]] = {}
    for file in (_SPECIAL_TOKENS, _TOKENIZER_CONFIG):  # the later one wins
        for name in _TOKEN_NAMES:
            token = _content(files[file].get(name))
            if token is not None:
                special[name] = token
        for name in ("additional_special_tokens", "extra_special_tokens"):
            entries = files[file].get(name)
            if isinstance(entries, Mapping):  # each has a name of its own, such as image_token
                special |= {k: text for k, v in entries.items() if (text := _content(v))}
            elif isinstance(entries, list):
                special[name] = [text for entry in entries if (text := _content(entry))]
    return special


def _listed_ids(folder: Path, files: Mapping[str, Mapping[str, Any]], name: str) -> tuple[int, ...]:
    """Ids under `bos_token_id` or `eos_token_id` (one or a list), generation settings first."""
    vocab_size = files[_MODEL_CONFIG].get("vocab_size")
    limit = vocab_size if isinstance(vocab_size, int) and 0 < vocab_size < 2**31 else 2**31
    ids: list[int] = []
    for file in (_GENERATION_CONFIG, _MODEL_CONFIG):
        entry = files[file].get(name)
        values = entry if isinstance(entry, list) else [entry]
        for value in values:
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
                raise CheckpointError(
                    f"Expected {name} in {shown_path(folder / file)} to be a token id below "
                    f"{limit} or a list of them, got {shown(entry)}; correct that entry."
                )
            ids.append(value)
    return tuple(ids)


def _chat_template(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Chat template from its own file, else from the tokenizer's settings, else None."""
    if (folder / _TEMPLATE_TEXT).exists():
        return read_text(folder / _TEMPLATE_TEXT)
    for file in (_TEMPLATE_JSON, _TOKENIZER_CONFIG):
        entry = files[file].get("chat_template")
        if isinstance(entry, list):
            entry = _default_template(entry)
        if isinstance(entry, str):
            return entry
        if entry is not None:
            raise CheckpointError(
                f"Expected chat_template in {folder / file} to be text or a list of named "
                f"templates, got a {type(entry).__name__}; correct that entry."
            )
    return None


def _default_template(entries: list[Any]) -> object:
    """Template named "default" in a list of named ones, None if there is none."""
    named = [entry for entry in entries if isinstance(entry, dict)]
    return next((entry.get("template") for entry in named if entry.get("name") == "default"), None)


def _decoder_kinds(decoder: Mapping[str, Any]) -> list[str]:
    """Names of the steps of a serialised decoder, sequences flattened."""
    if decoder["type"] != "Sequence":
        return [decoder["type"]]
    return [kind for step in decoder["decoders"] for kind in _decoder_kinds(step)]
