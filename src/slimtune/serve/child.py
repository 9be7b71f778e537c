"""vLLM as a child of the gateway: on a port of this machine alone, with a key that nobody else has, ended with it."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx

from slimtune.errors import ConfigError
from slimtune.serve.address import listen

logger = logging.getLogger("slimtune.serve")

MODEL = "base"
"""What the child calls its model."""
_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""
_ADAPTERS = 8
"""How many of them it holds in a batch."""
_END_SECONDS = 20.0


@contextmanager
def vllm_child(program: str, model: str, rank: int, options: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The address and the key of a vLLM that answers; it ends with the block.

    Args:
        rank: the largest of the adapters.
        options: of `vllm serve`, before all of ours.

    Raises:
        ConfigError: there is no such program, it takes no such rank, or it ended before it answered.
    """
    found = shutil.which(program)
    if found is None:
        raise ConfigError(
            f"no program '{program}' was found; install vLLM into an environment of its own and pass --vllm PROGRAM, "
            "or --url of one that runs"
        )
    room = next((most for most in _RANKS if most >= rank), None)
    if room is None:
        raise ConfigError(f"vLLM takes adapters up to rank {_RANKS[-1]}, and one here has {rank}; leave it out")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    key = secrets.token_urlsafe(32)
    command = [
        found, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL,
        "--enable-lora", "--max-loras", str(_ADAPTERS), "--max-lora-rank", str(room), *options,
    ]  # fmt: skip
    # The key not among the words, which everybody on the machine can read.
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": key}
    # Its lines to ours of errors: those of output may be JSON for a program. A session of its own, or Ctrl-C would end
    # it before its answers have ended.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    logger.info("vLLM is started at %s; its own lines follow", url)
    try:
        _wait(process, url)
        yield url, key
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait for its first answer, however long its weights take. Raises: ConfigError, where it has ended."""
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise ConfigError(f"vllm ended with {process.returncode} before it answered; its lines above say why")


def _end(process: subprocess.Popen[bytes]) -> None:
    # The group: its engine is a process of its own below it.
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(_END_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
