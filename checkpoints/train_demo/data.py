"""Corpus, tokenizer and token arrays for the demo pair.

`python -m checkpoints.train_demo.data --corpus DIR --out DIR` reads the corpus files and the
running interpreter's standard library, holds out about 2 % of each domain, trains a byte-level BPE
and writes flat uint16 token arrays. The trainer reads them with `load_split`, `load_meta` and
`sample_batch`.
"""

import argparse
import gzip
import json
import os
import re
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from ssd_jax.errors import SsdJaxError

Split = Literal["train", "heldout"]

DOMAINS = ("math", "prose", "instruct", "python")
END_OF_TEXT, USER, ASSISTANT, END = SPECIALS = (
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
END_OF_TEXT_ID = 0

HELDOUT_SHARE = 0.02
HELDOUT_MIN_BYTES = 150_000
BPE_SAMPLE_BYTES = 5_000_000  # per domain
# The interpreter's tests are twice the size of its library and repeat themselves; 40 % keeps them
# a minority.
TEST_SHARE = 0.4
ENCODE_CHUNK = 256  # documents encoded at a time, so that memory stays small

# Alternatives in order: clitic, word, up to three digits, punctuation, newlines, indentation. A run
# of spaces leaves its last one to the word or sign after it, so " def" is one token at any depth.
SPLIT_PATTERN = "|".join(
    (
        "(?<=\\p{L})['\u2019]\\p{L}{1,2}(?!\\p{L})",
        r" ?[\p{L}\p{M}]+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"\n+",
        r" +(?= [^\s\p{N}])",
        r" +",
        r"[^\S\n ]+",
    )
)

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = ns.system + message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '<|user|>\\n' + ns.system + message['content'] + '<|end|>\\n' -}}
{%- set ns.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{- '<|assistant|>\\n' + message['content'] + '<|end|>\\n' -}}
{%- else -%}
{{- raise_exception('Roles are system, user and assistant; got ' + message['role'] + '.') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

# Licence by source: what stands before the colon in a document's `src`.
LICENCES = {
    "GSM8K-train": "MIT",
    "TAL-SCQ5K-EN-train": "MIT",
    "AQuA-dev": "Apache-2.0",
    "DeepMind-mathematics": "Apache-2.0",
    "ELTeC-eng": "public domain texts, CC-BY markup",
    "tinyshakespeare": "public domain text (not itemised in the data README)",
    "nltk-state_union": "public domain",
    "nltk-inaugural": "public domain",
    "PEPs": "public domain",
    "rust-rfcs": "MIT OR Apache-2.0",
    "rust-book": "MIT OR Apache-2.0",
    "rust-reference": "MIT OR Apache-2.0",
    "EIPs": "CC0-1.0",
    "18F-handbook": "CC0-1.0",
    "opensource.guide": "CC-BY",
    "swcarpentry-python": "CC-BY",
    "OpenAssistant-en100": "Apache-2.0",
    "OASST2-filtered": "Apache-2.0",
    "tldr-pages": "CC-BY-4.0",
    "Taskmaster-4": "CC-BY-4.0",
    "python-stdlib": "PSF-2.0",
}
# Part of this source is code edits from third-party repositories, so its stated licence is
# doubtful.
EXCLUDED_SOURCES = frozenset({"OctoPack-OASST"})

_INSTRUCTION = re.compile(r"\A### Instruction:\n(.*?)\n+### Response:\n(.*)\Z", re.DOTALL)
_TURN = re.compile(r"^(User|Assistant):[ \n]", re.MULTILINE)


class DataError(SsdJaxError):
    """Training data that is absent, of unknown origin, or too small for what is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text with its source (a key of `LICENCES`)."""

    text: str
    source: str

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode())

    @property
    def digest(self) -> bytes:
        """A 16-byte hash of the text: the same on every machine and in every run."""
        return blake2b(self.text.encode(), digest_size=16).digest()


def parse_turns(text: str) -> list[tuple[str, str]] | None:
    """Return (role marker, content) turns that start with the user and end with the assistant.

    Two forms are known: one "### Instruction:" with one "### Response:", and lines that open with
    "User:" or "Assistant:". Neighbouring turns of one speaker are joined; an unanswered last user
    turn is dropped. None if the text has neither form or nothing is left.
    """
    if match := _INSTRUCTION.match(text):
        return [(USER, match[1].strip()), (ASSISTANT, match[2].strip())]
    _, *parts = _TURN.split(text)
    turns: list[tuple[str, str]] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = USER if speaker == "User" else ASSISTANT
        if turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n\n{content.strip()}")
        else:
            turns.append((role, content.strip()))
    if turns and turns[-1][0] == USER:
        turns.pop()
    return turns if turns and turns[0][0] == USER else None


def render_turns(turns: Sequence[tuple[str, str]]) -> str:
    """Return the turns as `CHAT_TEMPLATE` writes them, without the leading `<|endoftext|>`."""
    return "".join(f"{role}\n{content}{END}\n" for role, content in turns)


def read_corpus_domain(corpus: Path, domain: str) -> Iterator[Document]:
    """Yield the documents of one corpus file; those of `instruct` in the chat template's form.

    Texts that spell out a special token are left out, since they would be encoded as that token.

    Raises:
        DataError: the file is absent, or names a source whose licence is not on record.
    """
    path = corpus / f"{domain}.jsonl.gz"
    if not path.is_file():
        raise DataError(
            f"Expected the corpus file {path}, found none; point --corpus at its folder."
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            text, source = record["text"], record["src"].partition(":")[0]
            if source in EXCLUDED_SOURCES:
                continue
            if source not in LICENCES:
                raise DataError(
                    f"Expected sources with a known licence in {path}, got {source!r}; "
                    "add it to LICENCES once its licence is known to permit training."
                )
            if any(special in text for special in SPECIALS):
                continue
            if domain == "instruct":
                turns = parse_turns(text)
                if turns is None:
                    continue
                text = render_turns(turns)
            yield Document(text=text, source=source)


def read_stdlib(root: Path) -> list[Document]:
    """Return the Python files under `root`, tests capped at `TEST_SHARE` of all bytes.

    Left out: installed packages, code-page tables, generated build settings (they hold paths of one
    machine), lib2to3's fixtures, files that are not UTF-8 and files that spell out a special token.
    """
    library: list[Document] = []
    tests: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if "site-packages" in parts or parts[0] == "encodings" or "_sysconfigdata" in path.name:
            continue
        if parts[:2] == ("lib2to3", "tests"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip() or any(special in text for special in SPECIALS):
            continue
        is_test = bool({"test", "tests", "idle_test"} & set(parts))
        (tests if is_test else library).append(Document(text=text, source="python-stdlib"))
    room = sum(document.num_bytes for document in library) * TEST_SHARE / (1 - TEST_SHARE)
    for document in sorted(tests, key=lambda document: document.digest):
        if document.num_bytes <= room:
            library.append(document)
            room -= document.num_bytes
    return library


def split_documents(documents: Sequence[Document]) -> dict[Split, list[Document]]:
    """Return the documents without exact duplicates, split by the hash of their text.

    Held out are all texts whose hash lies in the lowest `HELDOUT_SHARE` of its range, and then the
    next ones in hash order until there are `HELDOUT_MIN_BYTES`. Both lists are in hash order.
    """
    unique = {document.digest: document for document in documents}
    limit = int(HELDOUT_SHARE * 2**32)
    split: dict[Split, list[Document]] = {"train": [], "heldout": []}
    heldout_bytes = 0
    for digest, document in sorted(unique.items()):
        is_low = int.from_bytes(digest[:4], "big") < limit
        if is_low or heldout_bytes < HELDOUT_MIN_BYTES:
            split["heldout"].append(document)
            heldout_bytes += document.num_bytes
        else:
            split["train"].append(document)
    return split


def sample_texts(documents: Sequence[Document], num_bytes: int, seed: int) -> Iterator[str]:
    """Yield randomly chosen texts, special tokens cut out, until `num_bytes` are reached."""
    markers = re.compile("|".join(map(re.escape, SPECIALS)))
    for index in np.random.default_rng(seed).permutation(len(documents)):
        if num_bytes <= 0:
            return
        num_bytes -= documents[index].num_bytes
        yield markers.sub("", documents[index].text)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of exactly `vocab_size` entries whose ids 0 to 3 are `SPECIALS`.

    Raises:
        DataError: the texts are too few for that many entries, or the ids would not fit uint16.
    """
    if not len(SPECIALS) + 256 <= vocab_size <= 2**16:
        raise DataError(
            f"Expected a vocabulary of 260 to 65536 entries, got {vocab_size}; change --vocab-size."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"Expected {vocab_size} tokenizer entries, got {tokenizer.get_vocab_size()}; "
            "give more text or a smaller --vocab-size."
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)],
    )
    return tokenizer


def encode_documents(
    tokenizer: Tokenizer, documents: Sequence[Document], advance: Callable[[int], None]
) -> np.ndarray:
    """Return all documents as one flat uint16 array, each behind `<|endoftext|>`.

    `advance` is called with the number of documents done since the last call.
    """
    arrays = [np.zeros(0, np.uint16)]
    for start in range(0, len(documents), ENCODE_CHUNK):
        chunk = documents[start : start + ENCODE_CHUNK]
        encodings = tokenizer.encode_batch_fast(
            [document.text for document in chunk], add_special_tokens=False
        )
        arrays += [np.array([END_OF_TEXT_ID, *e.ids], np.uint16) for e in encodings]
        advance(len(chunk))
    return np.concatenate(arrays)


def describe_sources(documents: Sequence[Document]) -> list[dict[str, str | int]]:
    """Return per source its name, licence, number of documents and bytes of text."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for document in documents:
        sizes[document.source].append(document.num_bytes)
    return [
        {
            "name": name,
            "licence": LICENCES[name],
            "num_docs": len(sizes[name]),
            "text_bytes": sum(sizes[name]),
        }
        for name in sorted(sizes)
    ]


def write_atomically(path: Path, content: str | np.ndarray) -> None:
    """Write a text or array file under a temporary name and move it to `path` when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                np.save(file, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def prepare(corpus: Path, out: Path, vocab_size: int, seed: int, progress: Progress) -> dict:
    """Write tokenizer, token arrays and, last, meta.json into `out`; return meta.json's content."""
    (out / "meta.json").unlink(missing_ok=True)  # an interrupted run must not look complete
    reading = progress.add_task("read", total=len(DOMAINS))
    splits: dict[str, dict[Split, list[Document]]] = {}
    for domain in DOMAINS:
        if domain == "python":
            documents = read_stdlib(Path(sysconfig.get_paths()["stdlib"]))
        else:
            documents = list(read_corpus_domain(corpus, domain))
        splits[domain] = split_documents(documents)
        progress.advance(reading)

    training = progress.add_task("train the tokenizer", total=None)
    sample = (
        text
        for domain in DOMAINS
        for text in sample_texts(splits[domain]["train"], BPE_SAMPLE_BYTES, seed)
    )
    tokenizer = train_tokenizer(sample, vocab_size)
    write_tokenizer(tokenizer, out / "tokenizer")
    progress.update(training, total=1, completed=1)

    meta: dict = {"vocab_size": vocab_size, "end_of_text_id": END_OF_TEXT_ID, "seed": seed}
    meta["domains"] = {}
    for domain, split in splits.items():
        entry = meta["domains"][domain] = {}
        for name, documents in split.items():
            task = progress.add_task(f"encode {domain} ({name})", total=len(documents))
            tokens = encode_documents(
                tokenizer, documents, lambda done, task=task: progress.advance(task, done)
            )
            write_atomically(out / f"{name}_{domain}.npy", tokens)
            entry[name] = {
                "num_docs": len(documents),
                "text_bytes": sum(document.num_bytes for document in documents),
                "num_tokens": len(tokens),
            }
        entry["sources"] = describe_sources(split["train"] + split["heldout"])
    write_atomically(out / "meta.json", json.dumps(meta, indent=2) + "\n")
    return meta


def load_meta(out: Path) -> dict:
    """Return what meta.json in `out` holds.

    Raises:
        DataError: there is none, so `out` was not prepared or not to the end.
    """
    path = out / "meta.json"
    if not path.is_file():
        raise DataError(
            f"Expected prepared data with {path}, found none; "
            "run python -m checkpoints.train_demo.data first."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def load_split(out: Path, split: Split) -> dict[str, np.ndarray]:
    """Return the flat uint16 tokens of each domain, memory-mapped read-only."""
    domains = load_meta(out)["domains"]
    return {name: np.load(out / f"{split}_{name}.npy", mmap_mode="r") for name in domains}


def sample_batch(
    arrays: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    *,
    step: int,
    seed: int,
    batch_size: int,
    seq_len: int,
) -> np.ndarray:
    """Return int32 windows [batch_size, seq_len + 1]: a pure function of its arguments.

    Each row draws a domain by weight, then a start uniformly; windows may cross document borders.

    Raises:
        DataError: a weight names no array or is negative, all are 0, or an array is too short.
    """
    names = sorted(name for name, weight in weights.items() if weight != 0)
    if not names or min(weights.values()) < 0 or not set(names) <= set(arrays):
        raise DataError(
            f"Expected weights of at least 0, one above it, over {sorted(arrays)}, "
            f"got {dict(weights)}; correct the mixture."
        )
    if shortest := [name for name in names if len(arrays[name]) <= seq_len]:
        raise DataError(
            f"Expected more than {seq_len} tokens in every domain, got fewer in {shortest}; "
            "shorten seq_len or set their weight to 0."
        )
    shares = np.array([weights[name] for name in names], np.float64)
    rng = np.random.default_rng([seed, step])
    rows = []
    for index in rng.choice(len(names), size=batch_size, p=shares / shares.sum()):
        array = arrays[names[index]]
        start = int(rng.integers(len(array) - seq_len))
        rows.append(array[start : start + seq_len + 1])
    return np.stack(rows).astype(np.int32)


def main() -> None:
    """Prepare the data as the command line asks."""
    parser = argparse.ArgumentParser(description="Prepare the demo pair's training data.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the .jsonl.gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokenizer entries (4096)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tokenizer's sample (0)")
    args = parser.parse_args()
    try:
        with Progress(console=Console(stderr=True)) as progress:
            prepare(args.corpus, args.out, args.vocab_size, args.seed, progress)
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
