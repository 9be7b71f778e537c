"""A child of the gateway: when it counts as started, and how it ends. `tests/serve/test_vllm.py` has the real one."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import httpx
import pytest

from slimtune.errors import ConfigError
from slimtune.serve.child import vllm_child

SERVER = """#!{python}
import http.server, json, os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
{at_a_signal}
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        told = {{"words": sys.argv[1:], "key": os.environ["VLLM_API_KEY"], "pids": [os.getpid(), child.pid]}}
        self.wfile.write(json.dumps(told).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers).serve_forever()
"""


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("at_a_signal", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"], ids=["obeys", "stays"])
def test_it_ends_with_all_of_its_processes(tmp_path: Path, at_a_signal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.serve.child._END_SECONDS", 1.0)
    name = program(tmp_path / "vllm", SERVER.format(python=sys.executable, at_a_signal=at_a_signal))
    with vllm_child(name, "a/model", 20, ["--max-loras", "3"]) as (url, key):
        told = httpx.get(url).json()
        assert told["words"][:2] == ["serve", "a/model"]
        assert told["words"][-4:] == ["--max-lora-rank", "32", "--max-loras", "3"]
        assert told["key"] == key
        assert key not in told["words"]
        assert all(map(runs, told["pids"]))
    end = time.monotonic() + 10
    while any(map(runs, told["pids"])):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_that_ends_before_it_answers_is_told(tmp_path: Path) -> None:
    name = program(tmp_path / "vllm", "#!/bin/sh\nexit 3\n")
    with pytest.raises(ConfigError, match="ended with 3"), vllm_child(name, "a/model", 8, []):
        pass


def test_a_rank_that_it_has_no_room_for(tmp_path: Path) -> None:
    name = program(tmp_path / "vllm", "#!/bin/sh\n")
    with pytest.raises(ConfigError, match="up to rank 512, and one here has 600"), vllm_child(name, "m", 600, []):
        pass
    with pytest.raises(ConfigError, match="no program"), vllm_child(str(tmp_path / "nowhere"), "m", 8, []):
        pass
