"""Models by name: a folder of this machine, or `OWNER/NAME[@REVISION]` on the Hugging Face hub.

The hub is `huggingface_hub`'s business: its cache, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and
its progress bar are in force here. It is imported once a name is not a folder, which costs most of
a second, and nothing but a name on the hub uses the network.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssd_jax.config import model_config_from_hf
from ssd_jax.errors import CheckpointError, ConfigError, shortened, shown
from ssd_jax.json_files import is_file, read_json_object

_FORM = "OWNER/NAME or OWNER/NAME@REVISION"
_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\S+))?", re.ASCII)
_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SMALL_FILES = (
    _CONFIG,
    _INDEX,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
_ELSEWHERE = "*/*"  # folders of a repository hold the same model in other formats
_OTHER_FORMATS = (".gguf", ".bin", ".pth", ".pt", ".onnx", ".safetensors")


def model_folder(name: str | Path, *, quiet: bool = False) -> Path:
    """The folder that a name means, fetched into the hub's cache if it is one on the hub.

    A folder of that name wins, and then there is no network access. On the hub, the small files
    come first and `config.json` is judged before any weight is fetched. Files that were fetched
    whole are never fetched twice. `quiet` leaves out the progress bars.

    Raises:
        CheckpointError: it is neither, or it cannot be fetched or is not safetensors.
        ConfigError: the model on the hub is not supported.
    """
    text = os.path.expanduser(str(name))  # a shell leaves the tilde of --model=~/folder alone
    if text and os.path.isdir(text):
        return Path(text)
    if is_file(Path(text)):
        raise CheckpointError(_about_file(Path(text)))
    parts = _NAME.fullmatch(text)
    if parts is None:
        raise CheckpointError(
            f"Expected a checkpoint folder or a name on the Hugging Face hub ({_FORM}), got "
            f"{shown(text, 200)}: there is no such folder, and names on the hub look different; "
            "correct it."
        )
    return _fetch(parts["repo"], parts["revision"], quiet=quiet)


def _about_file(path: Path) -> str:
    where = shortened(str(path), 200)
    if path.suffix == ".gguf":
        return (
            f"Expected a checkpoint folder or a name on the Hugging Face hub ({_FORM}), got the "
            f"GGUF file {where}; name the safetensors checkpoint that it was made from."
        )
    return (
        f"Expected a checkpoint folder or a name on the Hugging Face hub ({_FORM}), got the file "
        f"{where}; name the folder that it is in."
    )


def _fetch(repo: str, revision: str | None, *, quiet: bool) -> Path:
    """The folder in the hub's cache that holds the model, after what was missing was fetched.

    Weights come one file after the other in this thread, where Ctrl-C ends it at once:
    `snapshot_download` has threads, which go on to the end of their files.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 (tqdm's own)
            super().__init__(*args, **(options | {"disable": True}))

    with _in_words(repo, revision):
        folder = Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(_SMALL_FILES),
                ignore_patterns=_ELSEWHERE,
                tqdm_class=NoBar,
            )
        )
    if is_file(folder / _CONFIG):
        try:
            model_config_from_hf(read_json_object(folder / _CONFIG))
        except ConfigError as error:
            raise ConfigError(f"The model {repo} on the hub cannot be run: {error}") from error

    with _in_words(repo, revision), _bars(shown=not quiet):
        try:
            for file in (_CONFIG, *_weight_files(folder)):
                huggingface_hub.hf_hub_download(repo, file, revision=folder.name)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            names = huggingface_hub.HfApi().list_repo_files(repo, revision=folder.name)
            raise CheckpointError(_about_formats(repo, names)) from error
    return folder


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """With or without the hub's progress bars, whose switch is the whole process's."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if shown or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _weight_files(folder: Path) -> tuple[str, ...]:
    """The files that the index names, or the single one."""
    if not is_file(folder / _INDEX):
        return (_SINGLE,)
    shards = read_json_object(folder / _INDEX).get("weight_map")
    named = shards.values() if isinstance(shards, dict) else ()
    return tuple(sorted({file for file in named if isinstance(file, str)})) or (_SINGLE,)


def _about_formats(repo: str, names: list[str]) -> str:
    found = sorted({Path(name).suffix for name in names} & set(_OTHER_FORMATS))
    has = f"weights in {', '.join(found)} files" if found else "no weights"
    advice = "name the repository that has the model in the Hugging Face layout"
    if found and ".gguf" not in found:
        advice = "save it again with transformers' save_pretrained and name that folder"
    return (
        f"Expected {_CONFIG} and {_SINGLE} (or {_INDEX} and its files) in {repo} on the hub, which "
        f"has {has} instead; {advice}."
    )


@contextmanager
def _in_words(repo: str, revision: str | None) -> Iterator[None]:
    """Everything that fetching can fail with, as one sentence.

    Raises:
        CheckpointError: whatever was raised within.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # it comes from several libraries, by version of huggingface_hub
        raise CheckpointError(_sentence(repo, revision, error)) from error


def _sentence(repo: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants, errors

    hub, cache = constants.ENDPOINT, shortened(str(constants.HF_HUB_CACHE), 200)
    chain = list(_causes(error))
    told: dict[type[Exception], Callable[[], str]] = {
        errors.HFValidationError: lambda: (
            f"Expected a folder or a name on the hub ({_FORM}), got {shown(repo)}, which is "
            "neither; correct it."
        ),
        errors.GatedRepoError: lambda: (
            f"{repo} is gated: its owner gives access on request; ask for it at {hub}/{repo}, then "
            "run `hf auth login` or set HF_TOKEN."
        ),
        errors.RevisionNotFoundError: lambda: (
            f"{repo} on the hub has no revision {shown(revision)}; name a branch, tag or commit "
            "that it has, or none."
        ),
        errors.RepositoryNotFoundError: lambda: (
            f"There is no folder {repo} here and no public model {repo} at {hub}; correct the "
            "name, or set HF_TOKEN if it is private."
        ),
        errors.OfflineModeIsEnabled: lambda: (
            f"There is no folder {repo} here, the hub's cache {cache} does not hold all of the "
            "model of that name, and HF_HUB_OFFLINE forbids to fetch it; unset that once."
        ),
    }
    for kind, tell in told.items():
        if any(isinstance(one, kind) for one in chain):
            return tell()
    status = next((one.response.status_code for one in chain if _has_answer(one)), None)
    if status in (401, 403):
        return (
            f"The hub at {hub} refuses {repo} to you (HTTP {status}); ask its owner for access and "
            "set HF_TOKEN to a token that has it."
        )
    if status is not None:
        return (
            f"The hub at {hub} answered HTTP {status} for {repo}; try again later, or name a folder"
            " that holds the model."
        )
    for one in chain:
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"The disk of the hub's cache {cache} is full; free some, or set HF_HOME."
        if isinstance(one, OSError) and one.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return (
                f"The hub's cache {cache} cannot be written ({one.strerror}); make it writable or "
                "set HF_HOME."
            )
    reason = shortened(" ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split()), 160)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"There is no folder {repo} here, and the hub at {hub}, which may have a model of that "
            f"name, cannot be reached ({reason}); check the network and HF_ENDPOINT, or correct the"
            " name."
        )
    return (
        f"Fetching {repo} from {hub} broke off ({reason}); run the same command again, files that "
        "are complete are kept."
    )


def _has_answer(error: BaseException) -> bool:
    return getattr(error, "response", None) is not None


def _causes(error: BaseException | None) -> Iterator[Any]:
    """The error, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
