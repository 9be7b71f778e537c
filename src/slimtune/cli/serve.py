"""`slimtune serve`: one base and many adapters behind OpenAI's API."""

from __future__ import annotations

import logging
import shlex
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimtune.cli.options import Base, Device, Dtype, Json, Quantize, TrustRemoteCode, parse
from slimtune.console.screen import print_json, say
from slimtune.errors import ConfigError, SlimtuneError, check_choice, counted, require

if TYPE_CHECKING:
    from slimtune.models.load import LoadOptions
    from slimtune.serve.backend import Backend
    from slimtune.serve.registry import Registry

_LIMITS, _REMOTE = "Limits", "Other servers"
_ENGINES = ("embedded", "vllm", "openai")
_LOG_LEVELS = ("info", "warning", "error")


def serve(
    base: Base,
    adapters: Annotated[
        Path | None, typer.Option("--adapters", metavar="DIR", help="A folder of adapter folders, each by its name.")
    ] = None,
    adapter: Annotated[
        list[str], typer.Option("--adapter", "-a", metavar="[NAME=]DIR", help="One more adapter; repeatable.")
    ] = [],  # noqa: B006 - typer copies it
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tenants and their keys; slimtune serve-key makes it.")
    ] = None,
    host: Annotated[str, typer.Option(help="Another one than the own machine needs --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Answers written at once; by default 16, or as many as fit.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="The most tokens of a prompt and its answer.")] = None,
    adapter_memory: Annotated[
        int | None, typer.Option(min=1, metavar="BYTES", help="What loaded adapters may take; idle ones make room.")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.", rich_help_panel=_LIMITS)] = 256,
    queue_timeout: Annotated[float, typer.Option(help="Seconds to wait for.", rich_help_panel=_LIMITS)] = 60.0,
    request_timeout: Annotated[float, typer.Option(help="Seconds of a request.", rich_help_panel=_LIMITS)] = 600.0,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a body.", rich_help_panel=_LIMITS)] = 4_000_000,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that running answers have to end at a stop.", rich_help_panel=_LIMITS)
    ] = 60.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    engine: Annotated[
        str,
        typer.Option(
            help="embedded; vllm, started here or at --url; openai: servers at --url.", rich_help_panel=_REMOTE
        ),
    ] = "embedded",
    url: Annotated[
        list[str], typer.Option(help="Where they are; repeatable, for several replicas.", rich_help_panel=_REMOTE)
    ] = [],  # noqa: B006 - typer copies it
    url_key: Annotated[
        str | None, typer.Option(envvar="SLIMTUNE_URL_KEY", help="Their API key.", rich_help_panel=_REMOTE)
    ] = None,
    vllm: Annotated[
        str, typer.Option(metavar="PROGRAM", help="Started where there is no --url.", rich_help_panel=_REMOTE)
    ] = "vllm",
    vllm_options: Annotated[
        str, typer.Option(metavar="WORDS", help="Of vllm serve, as one text.", rich_help_panel=_REMOTE)
    ] = "",
    converted: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where AdaLoRA, VeRA and LoHa are written as LoRA; vLLM has to see it, too.",
            rich_help_panel=_REMOTE,
        ),
    ] = None,
    log_level: Annotated[
        str, typer.Option(help="info: a line for each request and what changes; warning; error.")
    ] = "info",
    as_json: Json = False,
) -> None:
    """Serve a base and its adapters over OpenAI's API: all methods in one batch, keys and limits for each tenant.

    The field "model" names an adapter, NAME or NAME@VERSION, or "base". Ctrl-C and SIGTERM end running answers and
    refuse new ones; a second one stops at once. With --json, the address is a line of JSON.

    With --engine vllm the same keys, limits and names stand in front of vLLM, which is started as a child, or runs at
    --url with MODEL as its name for the base. With --engine openai any server of OpenAI's API does; --adapter
    NAME=MODEL then names its other models.

    Example: slimtune serve smollm2-135m-instruct --adapters adapters --keys keys.yaml --host 0.0.0.0
    """
    _require_libraries()
    from slimtune.engine.model import SLOTS
    from slimtune.models.load import LoadOptions
    from slimtune.serve.child import MODEL, vllm_child
    from slimtune.serve.gateway import Gateway, GatewaySettings
    from slimtune.serve.registry import Registry, folders_of
    from slimtune.serve.remote import RemoteBackend
    from slimtune.serve.server import check_host, run
    from slimtune.serve.tenants import Keyring
    from slimtune.storage.source import name_elsewhere

    check_choice("--log-level", log_level, _LOG_LEVELS)
    _log_to_errors(log_level)
    check_host(host, keys)
    # What can be wrong without a model comes before a model is loaded.
    keyring = Keyring(keys)
    named = {name: Path(folder) for name, folder in parse(adapter).items()}
    check_choice("--engine", engine, _ENGINES)
    _check_engine(engine, url, converted, adapters)
    settings = GatewaySettings(
        base=base, adapters=adapters, queue=queue, queue_timeout=queue_timeout, request_timeout=request_timeout,
        max_body=max_body,
    )  # fmt: skip
    with ExitStack() as stack:
        backend: Backend
        if engine == "embedded":
            loading = LoadOptions(dtype, device, trust_remote_code, quantize, computes="tokens")
            backend = _backend(base, loading, slots, context)
        else:
            model = base
            if engine == "vllm" and not url:
                folders = [*(folders_of(adapters) if adapters else {}).values(), *named.values()]
                child = vllm_child(vllm, name_elsewhere(base), _largest_rank(folders), shlex.split(vllm_options))
                model, (address, url_key) = MODEL, stack.enter_context(child)
                url = [address]
            backend = RemoteBackend(url, model, slots or SLOTS, url_key, loads=engine == "vllm", converted=converted)
        registry = Registry(backend, adapter_memory, reserved=base, patience=queue_timeout)
        if engine == "openai":
            for name, folder in named.items():
                registry.register(name, folder, is_folder=False)
        else:
            _register(registry, adapters, named)

        def tell(url: str) -> None:
            served = [known.versioned for known in registry if known.state != "broken"]
            if as_json:
                print_json({"url": url, "base": base, "adapters": served})
            say(f"serving {base} and {counted(len(served), 'adapter')} at {url}; Ctrl-C stops", to_errors=True)

        if not run(Gateway(backend, registry, keyring, settings), host, port, drain_timeout, tell):
            say("stopped before all answers had ended", to_errors=True)
            raise typer.Exit(1)


def _check_engine(engine: str, url: list[str], converted: Path | None, adapters: Path | None) -> None:
    """Raises: ConfigError, for options that don't go together."""
    if engine == "embedded" and url:
        raise ConfigError("--url is of servers that run already; pass --engine vllm or openai with it")
    if engine == "openai" and not url:
        raise ConfigError("--engine openai needs --url, where the server is")
    if converted is not None and engine != "vllm":
        raise ConfigError("--converted is for --engine vllm; the embedded engine takes every method as it is")
    if engine == "openai" and adapters is not None:
        raise ConfigError("--engine openai loads no adapters; name models of the servers with --adapter NAME=MODEL")


def _largest_rank(folders: list[Path]) -> int:
    """Of the adapters in these folders; what can't be read is refused where it is registered."""
    from slimtune.models.compatibility import largest_rank
    from slimtune.models.headers import read_object
    from slimtune.storage.source import ADAPTER

    ranks = [0]
    for folder in folders:
        with suppress(SlimtuneError):
            ranks.append(largest_rank(read_object(folder / ADAPTER)))
    return max(ranks)


def _require_libraries() -> None:
    require("fastapi", extra="serve", purpose="serving")
    require("httpx", extra="serve", purpose="serving")
    require("prometheus-client", extra="serve", purpose="serving")
    require("uvicorn", extra="serve", purpose="serving")


def _log_to_errors(level: str) -> None:
    """Log what the server does; of libraries, what is wrong."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("slimtune.serve").setLevel(level.upper())


def _backend(base: str, options: LoadOptions, slots: int | None, context: int | None) -> Backend:
    """What answers: an engine for a base that writes text, or an encoder. Raises: ConfigError."""
    from slimtune.engine.engine import Engine
    from slimtune.models.load import load_model
    from slimtune.serve.encoder import EncoderBackend
    from slimtune.serve.local import EngineBackend
    from slimtune.storage.source import folder_of, is_adapter

    if is_adapter(base):
        raise ConfigError(f"{base} is an adapter; pass its base, and the adapter with --adapter {base}")
    model, tokenizer = load_model(base, None, options)
    if tokenizer is None:
        raise ConfigError(f"{base} has no tokenizer; save the tokenizer into the folder of the model")
    if hasattr(model, "can_generate") and model.can_generate():
        return EngineBackend(Engine(model, tokenizer, slots=slots, context=context))
    model, tokenizer = load_model(base, "features", options)
    return EncoderBackend(model, tokenizer, Path(folder_of(base)))


def _register(registry: Registry, root: Path | None, named: dict[str, Path]) -> None:
    """Enrol the adapters; one of a folder that is damaged is told of and listed so, for the others can be served."""
    from slimtune.serve.registry import folders_of
    from slimtune.storage.source import folder_of

    for name, folder in (folders_of(root) if root else {}).items():
        if name in named:
            continue
        try:
            registry.register(name, folder)
        except SlimtuneError as error:
            registry.enrol_broken(name, folder, str(error))
            say(f"'{name}' is not served: {error}", to_errors=True)
    for name, folder in named.items():
        registry.register(name, folder if folder.is_dir() else Path(folder_of(str(folder))))
