"""Incremental detokenising: text as tokens come, never a broken character."""

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from ssd_jax.errors import CheckpointError
from ssd_jax.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PIECE_DECODERS = frozenset({"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"})


class Detokenizer:
    """Text of a growing sequence of ids that follow a prompt.

    For any way of cutting the ids into pushes, the texts of all pushes and of `flush`, put behind
    `tokenizer.decode` of the prompt's ids, join to `tokenizer.decode` of all ids. The cost per
    token does not depend on what came before. Special tokens are never put before the decoder, as a
    skipped first token would otherwise change how the next one is read.

    Raises:
        CheckpointError: the tokenizer's decoder is not one whose text only ever grows.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._skipped = tokenizer.special_ids() if skip_special_tokens else frozenset()
        self._decoder = _decoder_for(tokenizer)
        self._decoder.begin([i for i in prompt_ids if i not in self._skipped])

    def push(self, ids: Sequence[int]) -> str:
        """Text that these ids make final; what a later id could still change is held."""
        return self._decoder.push([i for i in ids if i not in self._skipped])

    def flush(self) -> str:
        """Text that was held; the detokenizer then starts a new sequence."""
        return self._decoder.flush()


class _Decoder(Protocol):
    """What the two ways of decoding have in common."""

    def begin(self, prompt_ids: Sequence[int]) -> None: ...

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


def _decoder_for(tokenizer: Tokenizer) -> _Decoder:
    """The way of decoding that fits the tokenizer."""
    kinds = set(tokenizer.decoder_kinds())
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return _ByteLevelDecoder(tokenizer)
    if kinds <= _PIECE_DECODERS:
        return _PieceDecoder(tokenizer, byte_fallback="ByteFallback" in kinds)
    raise CheckpointError(
        f"Expected a tokenizer that decodes with ByteLevel or with {sorted(_PIECE_DECODERS)}, "
        f"got {sorted(kinds)}; use a checkpoint with one of those."
    )


class _ByteLevelDecoder:
    """Decoding of byte-level BPE: every token is some bytes, and the bytes are UTF-8.

    Holds at most three bytes: a started character. Bytes that are no character become U+FFFD, one
    for each longest run that could have begun one, as in the tokenizers library.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_of = byte_alphabet()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Nothing: a token's bytes do not depend on those before it."""

    def push(self, ids: Sequence[int]) -> str:
        """Text of all characters that these ids complete."""
        return self._utf8.decode(b"".join(map(self._token_bytes, ids)))

    def flush(self) -> str:
        """U+FFFD for a character that was started and never completed."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def _token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; a token with a letter outside the byte alphabet is plain text."""
        literal = self._tokenizer.literal_tokens.get(token_id)
        if literal is not None:
            return literal.encode("utf-8")
        token = self._tokenizer.id_to_token(token_id) or ""
        if all(letter in self._byte_of for letter in token):
            return bytes(self._byte_of[letter] for letter in token)
        return token.encode("utf-8")


class _PieceDecoder:
    """Decoding of tokens that are text themselves, SentencePiece style.

    Tokens are read with the last finished one as context, so that the space which the decoder
    strips from a leading token is stripped only from the first of the sequence. A run of byte
    tokens is held to its end: the library reads it as one, and a single bad byte turns all its
    bytes to U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, *, byte_fallback: bool) -> None:
        self._tokenizer = tokenizer
        self._byte_fallback = byte_fallback
        self._context: list[int] = []
        self._pending: list[int] = []

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Take the end of the prompt as context, so that a space behind it is kept."""
        known = [i for i in prompt_ids if self._tokenizer.id_to_token(i) is not None]
        start = len(known) - 1
        while start > 0 and self._is_byte(self._tokenizer.id_to_token(known[start]) or ""):
            start -= 1
        self._context = known[max(start, 0) :]

    def push(self, ids: Sequence[int]) -> str:
        """Text up to the last id that is not a byte token."""
        num_final = 0
        for token_id in ids:
            token = self._tokenizer.id_to_token(token_id)
            if token is None:
                continue
            self._pending.append(token_id)
            if not self._is_byte(token):
                num_final = len(self._pending)
        return self._release(num_final)

    def flush(self) -> str:
        """Text of the byte tokens at the end."""
        text = self._release(len(self._pending))
        self._context = []
        return text

    def _release(self, count: int) -> str:
        """Text of the first `count` pending tokens, which become the context of the next."""
        if count == 0:
            return ""
        final, self._pending = self._pending[:count], self._pending[count:]
        known = self._decode(self._context)
        text = self._decode(self._context + final)
        self._context = final[-1:]
        # A prompt may end within a character, which the new bytes complete.
        return text[len(known) :] if text.startswith(known) else self._decode(final)

    def _is_byte(self, token: str) -> bool:
        return self._byte_fallback and _BYTE_TOKEN.fullmatch(token) is not None

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def byte_alphabet() -> dict[str, int]:
    """Byte that each letter of the byte-level alphabet stands for.

    Bytes that are visible Latin-1 letters stand for themselves; the others, in order, are the
    letters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(0x100)) - set(visible))
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + index): byte for index, byte in enumerate(hidden)
    }
