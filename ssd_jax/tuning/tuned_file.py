"""The TOML file that `ssd-jax tune` writes and `generate` reads."""

import dataclasses
import errno
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from ssd_jax.engine.speculation import DraftLen
from ssd_jax.engine.ssd_options import Fallback, check_fan_out
from ssd_jax.errors import ConfigError, SsdJaxError, shortened, shown
from ssd_jax.fan_out import FanOut, Guesses
from ssd_jax.field_checks import Probability, Range, check, check_fields
from ssd_jax.json_files import is_device
from ssd_jax.tuning.speed import Setting, Times
from ssd_jax.verification import Verification
from ssd_jax.whole_file import write_whole

SCHEMA = 1
_HEAD = """\
# Options of speculative speculative decoding, chosen from measurements by `ssd-jax tune`.
# Read by `ssd-jax generate --method ssd --tuned FILE`; flags given beside it win.
"""
_COMMENTS = {
    "choice": "What was chosen. Fan-out lists say how many bonus tokens are guessed for 0, 1, ...\n"
    "# draft_len accepted tokens.",
    "expected": "What that should reach, for one row of the batch; shares are from 0 to 1.\n"
    "# From crossover_batch rows on the n-gram fallback is the faster one (inf: never).",
    "times": "Seconds. verify_s: passes over 0, 1, 2, ... drafted tokens; lookup_s: until a "
    "prepared\n# draft is there; neural_s: how much longer a fallback of k tokens by the draft "
    "model takes,\n# [a, b] for a + b k; ngram_s: the same for n-grams; prepare_s: [a, b, c] for "
    "preparing r\n# outcomes, a + k (b + c r).",
    "outcomes": "How drafts of the most tokens tried came out, prepared ones (after_hit) and the\n"
    "# fallback's (after_miss): how many had 0, 1, ... tokens accepted, and how often the bonus\n"
    "# token was the first, second, ... guess.",
    "measured": "Where and for what all this was measured; another machine, model or sampling\n"
    "# needs a tuning of its own.",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The options as the file has them; see `Setting`."""

    draft_len: DraftLen
    fan_out_after_hit: tuple[Guesses, ...]
    fan_out_after_miss: tuple[Guesses, ...]
    fallback: Fallback
    miss_weight: Probability

    def __post_init__(self) -> None:
        check_fields(self)
        fan_out = FanOut(after_hit=self.fan_out_after_hit, after_miss=self.fan_out_after_miss)
        check_fan_out(self.draft_len, fan_out)

    @property
    def setting(self) -> Setting:
        """The options as the rest of the package takes them."""
        return Setting(
            draft_len=self.draft_len,
            fan_out=FanOut(after_hit=self.fan_out_after_hit, after_miss=self.fan_out_after_miss),
            fallback=self.fallback,
            miss_weight=self.miss_weight,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the choice should reach, for one row."""

    hit_rate: float
    tokens_per_round: float
    round_s: float
    tokens_per_s: float
    autoregressive_tokens_per_s: float
    crossover_batch: Annotated[float, Range("above 0", lambda rows: rows > 0, wide=True)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeFigures:
    """Outcome counts of the longest drafts."""

    accepted_after_hit: tuple[int, ...]
    accepted_after_miss: tuple[int, ...]
    guesses_after_hit: tuple[int, ...]
    guesses_after_miss: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Where and for what a tuning was made."""

    date: str
    target: str
    draft: str
    target_devices: str
    draft_devices: str
    cpu_cores: int
    jax: str
    batch_size: int
    verification: Verification
    temperature: float
    num_prompts: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """All that a tuned file says."""

    choice: Choice
    expected: Expected
    times: Times
    outcomes: OutcomeFigures
    measured: Measured


def write_tuned(path: Path, tuned: Tuned) -> None:
    """Write the file, in one go.

    Raises:
        ConfigError: it cannot be written.
    """
    lines = [_HEAD + f"schema = {SCHEMA}"]
    for table in dataclasses.fields(tuned):
        lines += ["", f"# {_COMMENTS[table.name]}", f"[{table.name}]"]
        values = dataclasses.asdict(getattr(tuned, table.name))
        lines += [f"{name} = {_toml(value)}" for name, value in values.items()]
    write_whole(path, ("\n".join(lines) + "\n").encode())


def read_tuned(path: Path) -> Tuned:
    """What a tuned file says.

    Raises:
        ConfigError: there is no such file, or it is not one that this version writes.
    """
    try:
        if is_device(path):
            raise OSError(errno.EINVAL, "it is a device")
        content: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The tuned file {path} cannot be read ({error.strerror}): make one with `ssd-jax tune`"
            f" --out {path}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"The tuned file {path} should be TOML, but it is not ({shortened(str(error), 200)}): "
            "make it anew with `ssd-jax tune`."
        ) from error
    schema = content.pop("schema", None)
    if schema != SCHEMA or isinstance(schema, bool):
        raise ConfigError(
            f"The tuned file {path} should have schema = {SCHEMA}, got {shown(schema)}: make it "
            "anew with `ssd-jax tune`."
        )
    try:
        _same_names(Tuned, content, "the file")
        tables = {
            field.name: _read_table(field.type, content[field.name], field.name)
            for field in dataclasses.fields(Tuned)
        }
    except SsdJaxError as error:
        raise ConfigError(
            f"The tuned file {path} is not as `ssd-jax tune` writes it: {error} Mend it or make it "
            "anew."
        ) from error
    return Tuned(**tables)


def _toml(value: object) -> str:
    """A value as TOML, whose numbers, lists and strings are JSON's but for infinity."""
    text = json.dumps(value, ensure_ascii=False)
    return {"Infinity": "inf"}.get(text, text.replace("\x7f", "\\u007f"))


def _read_table(kind: Any, table: object, name: str) -> Any:  # noqa: ANN401 (one class a table)
    if not isinstance(table, dict):
        raise ConfigError(f"[{name}] should be a table, got {table!r}.")
    _same_names(kind, table, f"[{name}]")
    hints = get_type_hints(kind, include_extras=True)
    return kind(
        **{entry: check(f"{name}.{entry}", value, hints[entry]) for entry, value in table.items()}
    )


def _same_names(kind: Any, table: dict[str, Any], where: str) -> None:  # noqa: ANN401
    wanted = {field.name for field in dataclasses.fields(kind)}
    for problem, names in (("knows no", set(table) - wanted), ("lacks", wanted - set(table))):
        if names:
            raise ConfigError(f"{where} {problem} {', '.join(sorted(names))}.")
