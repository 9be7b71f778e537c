"""A folder to a repository of the Hub: what may go there, whether it may be written, and the upload.

`check_access` asks all that can be asked before there is anything to push, so that a training of hours does not end in
a refusal. `push` uploads the files of an adapter, a model or a classifier, and nothing that looks like a secret.
"""

from __future__ import annotations

import fnmatch
import glob
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimtune.errors import AdapterFileError, ConfigError, PushError, SlimtuneError, first_line, listing
from slimtune.storage.foreign import described, reading_files, refuse_special_files
from slimtune.storage.hub import without_bars
from slimtune.storage.text_files import read_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi

KINDS = {
    "an adapter": ("adapter_config.json", "adapter_model*.safetensors"),
    "a model": ("config.json", "model*.safetensors"),
    "a classifier on features": ("features.json", "classifier.safetensors"),
    "a LoRA of diffusers": ("pytorch_lora_weights.safetensors",),
    "a model in GGUF": ("*.gguf",),
}
"""What can be pushed, by the files that a folder of it holds at least."""

_STAYS = ("checkpoint-*", "runs", "__pycache__", ".*")
"""Folders and hidden files that belong to this machine: checkpoints, logs of trackers, caches."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")
_SECRET_NAMES = (".env", ".env.*", ".netrc", ".git-credentials", "*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*")
_TEXTS = (".json", ".jsonl", ".yaml", ".yml", ".txt", ".md", ".jinja", ".py", ".toml", ".cfg", ".ini", ".sh")
_SECRETS = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9]{32,}\b"
    rb"|\bsk-(?:proj|ant|live)-[\w-]{24,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
"""Tokens of the Hub, of GitHub, of AWS, of those who sell answers, and private keys."""


@dataclass(frozen=True)
class Contents:
    """What of a folder is pushed.

    Attributes:
        kind: one of KINDS.
        files: relative to the folder.
        left_out: the names in the folder that stay on this machine.
        local_base: the folder that an adapter names as its base, which nobody else has.
    """

    folder: Path
    kind: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    local_base: str | None

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum((self.folder / name).stat().st_size for name in self.files)


@dataclass(frozen=True)
class Pushed:
    """Where a folder is on the Hub now."""

    repository: str
    revision: str
    url: str
    commit: str


@reading_files()
def contents_of(folder: Path) -> Contents:
    """The files of a folder that a push would send.

    Raises:
        AdapterFileError: nothing in it can be pushed.
        PushError: it holds a secret or a pickle.
    """
    if not folder.is_dir():
        raise AdapterFileError(f"there is no folder {folder} to push; pass what train, merge or slim wrote")
    refuse_special_files(folder, AdapterFileError)
    kind = next((kind for kind, needed in KINDS.items() if all(_holds(folder, name) for name in needed)), None)
    if kind is None:
        names = listing(path.name for path in folder.iterdir()) or "nothing"
        raise AdapterFileError(
            f"{folder} holds neither an adapter nor a model (found: {names}); pass the folder that train, merge or "
            "slim wrote"
        )
    every = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    sent = [path for path in every if not any(_matches(part, _STAYS) for part in path.parts)]
    left_out = sorted(path.name for path in folder.iterdir() if _matches(path.name, _STAYS))
    # In all files, also those that wouldn't be sent: a key that lies there today is pushed by another tool tomorrow.
    if secrets := [str(path) for path in every if _matches(path.name, _SECRET_NAMES)]:
        raise PushError(f"{folder} holds what looks like a secret ({listing(secrets)}); take it out of the folder")
    for path in sent:
        # Not in weights: among gigabytes of random bytes some look like anything.
        if path.suffix in _TEXTS and _SECRETS.search((folder / path).read_bytes()):
            # The secret itself is left out of the sentence, which may be logged.
            raise PushError(f"{folder / path} holds what looks like a token or a private key; take it out of the file")
    if pickles := [str(path) for path in sent if _matches(path.name, _PICKLES)]:
        raise PushError(
            f"{folder} holds pickled files ({listing(pickles)}), which can run any code where they are loaded; remove "
            "them, or save their tensors as safetensors"
        )
    return Contents(folder, kind, tuple(path.as_posix() for path in sent), tuple(left_out), _local_base(folder))


def check_access(repository: str, private: bool = False) -> str:
    """Ask the Hub whether this user may write to a repository, and give its whole name.

    Args:
        private: whether it is to be private, which one that exists has to be already.

    Raises:
        ConfigError: no name of a repository, no token, or a repository that exists and is public.
        PushError: the Hub can't be reached, or it refuses.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(
            f"'{repository}' can't be the name of a repository ({first_line(error)}); pass NAME or ORGANISATION/NAME"
        ) from error
    if get_token() is None:
        raise ConfigError("no token of the Hub is on this machine; log in with hf auth login, or set HF_TOKEN")
    api = _api()
    with _asking("who the token belongs to"):
        user = api.whoami()
    # Fine-grained tokens have another role, and what they may do is asked of the repository below.
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(
            f"the token of {user['name']} may only read; make one that may write, and log in with hf auth login"
        )
    whole = repository if "/" in repository else f"{user['name']}/{repository}"
    with _asking(f"whether '{whole}' may be written"):
        try:
            is_private = bool(api.model_info(whole).private)
            api.auth_check(whole, write=True)
        except RepositoryNotFoundError as error:
            # It will be made, which the Hub lets one do under one's own name and in one's organisations.
            owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
            if whole.partition("/")[0] not in owners:
                raise PushError(
                    f"there is no repository '{whole}' that {user['name']} can see, and it can only be made under "
                    f"{listing(owners)}; check the name"
                ) from error
            return whole
    if private and not is_private:
        raise ConfigError(f"'{whole}' exists and is public; leave --private out, or choose another name")
    return whole


def push(contents: Contents, repository: str, private: bool = False, revision: str | None = None) -> Pushed:
    """Upload files to a repository, which is made if it is not there, and its branch too.

    Args:
        repository: as `check_access` gave it.
        revision: the branch; main by default.

    Raises: PushError, with the folder as it was.
    """
    api = _api()
    with _asking(f"for '{repository}' to take {contents.folder}"), without_bars(not sys.stderr.isatty()):
        # None and not False: an organisation may have private repositories as its default.
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=contents.folder,
            revision=revision,
            commit_message=f"Upload {contents.kind} with slimtune",
            # Patterns, in which a bracket of a name would mean something else.
            allow_patterns=[glob.escape(name) for name in contents.files],
        )
        # The Hub applies the repository's own .gitignore to an upload, without an error.
        missing = set(contents.files) - set(api.list_repo_files(repository, revision=revision))
    if missing:
        raise PushError(
            f"'{repository}' has not taken {listing(missing)}; see whether a .gitignore in the repository leaves that "
            "out, and try again"
        )
    return Pushed(repository, revision or "main", f"{api.endpoint}/{repository}", str(done.oid))


def _holds(folder: Path, pattern: str) -> bool:
    return any(path.is_file() for path in folder.glob(pattern))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _local_base(folder: Path) -> str | None:
    """The base that an adapter names, where that is a path of this machine."""
    try:
        named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    # "organisation/name" is no path, unless a folder of that name lies here: then it was loaded from there.
    is_path = isinstance(named, str) and (Path(named).is_absolute() or named.startswith(".") or Path(named).is_dir())
    return named if is_path else None


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="slimtune")


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Have whatever the client raises while it talks to the Hub be one sentence. Raises: PushError."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        # The server's own words say which right is missing; the client's begin with the address.
        said = error.server_message or first_line(error)
        advice = {
            401: "log in with hf auth login",
            403: "use a token that may write there",
            404: "check the name",
            429: "wait, and try again",
        }.get(status, "try again")
        raise PushError(f"asked {what}, the Hub answered {status} ({said}); {advice}") from error
    except SlimtuneError:
        raise
    except Exception as error:
        raise PushError(f"the Hub can't be asked {what} ({described(error)}); go online, and try again") from error
