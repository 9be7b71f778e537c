"""Who may ask: keys by their hash, and what each tenant may use."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimtune.errors import ConfigError
from slimtune.serve.openai import ApiError
from slimtune.storage.atomic import write_file
from slimtune.storage.text_files import dump, read_mapping

BASE = "base"
"""The name of the base without any adapter."""


class Tenant(BaseModel):
    """A customer, as keys.yaml describes it.

    Attributes:
        keys: their SHA-256. A key is 32 random bytes, which nobody finds by trying, so a slow hash adds nothing.
        adapters: names that it may use, with `*` and `?` as in file names.
        base: whether it may use the base.
        admin: whether it may load and unload adapters, see all of them, and read the metrics.
        requests_per_minute: beyond it, 429.
        tokens_per_minute: prompts and answers; an answer that has begun is finished, and the next has to wait for it.
        concurrency: the most answers at once; what is beyond waits.
        queue: the most requests that wait; beyond it, 429.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    keys: tuple[Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")], ...] = ()
    adapters: tuple[str, ...] = ()
    base: bool = True
    admin: bool = False
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    concurrency: Annotated[int, Field(ge=1)] | None = None
    queue: Annotated[int, Field(ge=0)] | None = None

    def may_use(self, model: str) -> bool:
        """Whether the tenant may use the base or an adapter, by its name without the version."""
        if model == BASE:
            return self.base or self.admin
        return self.admin or any(fnmatchcase(model, pattern) for pattern in self.adapters)


ANYBODY = Tenant(name="anybody", adapters=("*",), admin=True)
"""Who asks where there are no keys, which is on the own machine only."""


class Keyring:
    """The tenants by their keys; without a file, everybody is `ANYBODY`."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.tenants: dict[str, Tenant] = {}
        self._by_hash: dict[str, Tenant] = {}
        self.reload()

    def reload(self) -> None:
        """Read the file again; raises ConfigError, and then the keys from before are good."""
        if self.path is None:
            return
        self.tenants = read_tenants(self.path)
        # Looked up by the hash: the time that takes tells nothing of how much of a key was right.
        self._by_hash = {digest: tenant for tenant in self.tenants.values() for digest in tenant.keys}

    def tenant_of(self, authorization: str | None) -> Tenant:
        """Whose key an `Authorization: Bearer` header holds. Raises: ApiError 401."""
        if self.path is None:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        tenant = self._by_hash.get(hash_of(key.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            what = "the API key is not known" if key else "no API key was sent; send Authorization: Bearer KEY"
            raise ApiError(401, what, "invalid_api_key", kind="authentication_error")
        return tenant


def hash_of(key: str) -> str:
    """A key as it is stored."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_tenants(path: Path) -> dict[str, Tenant]:
    """The tenants of a keys file by name. Raises: ConfigError."""
    content = read_mapping(path, "keys file")
    stored = content.get("tenants")
    if not isinstance(stored, dict) or set(content) != {"tenants"}:
        raise ConfigError(f"the keys file {path} must hold one entry, tenants; make it with slimtune serve-key")
    tenants = {}
    owners: dict[str, str] = {}
    for name, entry in stored.items():
        try:
            tenants[str(name)] = Tenant(**{**(entry or {}), "name": str(name)})
        except (ValidationError, TypeError) as error:
            raise ConfigError(f"tenant '{name}' in {path}: {_finding(error)}") from error
        for digest in tenants[str(name)].keys:
            if digest in owners:
                raise ConfigError(f"one key in {path} belongs to '{owners[digest]}' and to '{name}'; make two")
            owners[digest] = str(name)
    return tenants


def _finding(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "an entry must be a mapping of fields"
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"unknown field '{place}'; the fields are {', '.join(sorted(set(Tenant.model_fields) - {'name'}))}"
    return f"{place}: {first['msg']}"


def add_key(path: Path, name: str, changes: Mapping[str, Any]) -> str:
    """Give a tenant one more key, and these fields; the key, which is kept nowhere else. Raises: ConfigError."""
    tenants = read_tenants(path) if path.exists() else {}
    key = "sk-" + secrets.token_urlsafe(32)
    tenant = tenants.get(name, Tenant(name=name))
    fields = tenant.model_dump() | dict(changes) | {"keys": (*tenant.keys, hash_of(key))}
    try:
        tenants[name] = Tenant.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"tenant '{name}': {_finding(error)}") from error
    stored = {
        tenant.name: tenant.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
        for tenant in tenants.values()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a server that reads the file at this moment never sees half of it.
    write_file(path, dump({"tenants": stored}))
    return key
