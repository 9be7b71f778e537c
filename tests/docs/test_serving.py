"""The page on serving: its Python runs against a started server, its files parse and name what is there."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.serve.tenants import Tenant
from small_server import Started, save_adapter, started

ROOT = Path(__file__).parents[2] / "docs"
PAGE = (ROOT / "serving.md").read_text()
FILES = ROOT / "serving"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    root = tmp_path_factory.mktemp("page")
    save_adapter(root / "support", 1)
    with started(root) as running:
        yield running


@pytest.fixture(scope="module")
def options() -> set[str]:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    return set(re.findall(r"--[a-z-]+", shown))


def test_the_python_runs(server: Started, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), "serving.md", "exec"), {})
    assert capsys.readouterr().out.startswith("support@1 ")


def test_options_exist(options: set[str]) -> None:
    commands = re.findall(r"^(?:\$ )?slimtune (serve|serve-key) ((?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
    assert len(commands) >= 7
    key = set(re.findall(r"--[a-z-]+", CliRunner().invoke(app, ["serve-key", "--help"], env={"COLUMNS": "200"}).output))
    for name, rest in commands:
        for option in re.findall(r"\s(--[a-z-]+)", rest.partition("#")[0]):
            assert option in (options if name == "serve" else key), option
    for option in re.findall(r"`(--[a-z-]+)", PAGE):
        assert option in options, option


def test_routes_exist(server: Started) -> None:
    paths = set(server.get("/openapi.json").json()["paths"])
    named = set(re.findall(r"`(?:GET |POST )?(/(?:v1/)?[a-z_/]+)`", PAGE))
    assert named >= {"/v1/chat/completions", "/health", "/metrics", "/v1/unload_lora_adapter"}
    assert named <= paths


def test_the_keys_file_is_one() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for name, fields in yaml.safe_load(text)["tenants"].items():
        assert Tenant(name=name, **fields).may_use("acme-1")


def test_the_dockerfile_starts_the_server(options: set[str]) -> None:
    text = re.sub(r"\\\n", " ", (ROOT.parent / "Dockerfile").read_text())
    text = "FROM" + next(stage for stage in text.split("FROM") if " AS serve" in stage)
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    known = {"FROM", "ARG", "RUN", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {step[0] for step in steps} <= known
    by_name = dict(steps)
    command = json.loads(by_name["ENTRYPOINT"]) + json.loads(by_name["CMD"])
    assert command[:2] == ["slimtune", "serve"]
    assert {part for part in command if part.startswith("--")} <= options
    assert by_name["USER"] != "root"
    assert by_name["STOPSIGNAL"] == "SIGTERM"


def test_the_unit_starts_the_server(options: set[str]) -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(FILES / "slimtune.service")
    command = shlex.split(unit["Service"]["ExecStart"])
    assert command[1] == "serve"
    assert {part for part in command if part.startswith("--")} <= options
    assert float(unit["Service"]["TimeoutStopSec"]) > float(command[command.index("--drain-timeout") + 1])
    assert "-HUP" in unit["Service"]["ExecReload"]


def test_the_manifest_starts_the_server(options: set[str], server: Started) -> None:
    parts = {part["kind"]: part for part in yaml.safe_load_all((FILES / "kubernetes.yaml").read_text())}
    assert set(parts) == {"Deployment", "PersistentVolumeClaim", "Service"}
    pod = parts["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(argument.split("=") for argument in container["args"][1:])
    assert set(flags) <= options
    assert pod["terminationGracePeriodSeconds"] > float(flags["--drain-timeout"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server.get(container[probe]["httpGet"]["path"]).status_code == 200
    mounted, known = {m["name"] for m in container["volumeMounts"]}, {v["name"] for v in pod["volumes"]}
    assert mounted == known
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [parts["PersistentVolumeClaim"]["metadata"]["name"]]
    assert parts["Service"]["spec"]["selector"] == parts["Deployment"]["spec"]["template"]["metadata"]["labels"]


def test_the_dashboard_shows_metrics_that_are_there(server: Started) -> None:
    server.post("/v1/completions", {"model": "support", "prompt": "x", "max_tokens": 2})
    exposed = set(re.findall(r"^(slimtune_\w+?)(?:\{| )", server.get("/metrics").text, re.MULTILINE))
    dashboard = json.loads((FILES / "grafana.json").read_text())
    expressions = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    wanted = set(re.findall(r"slimtune_\w+", expressions))
    assert len(wanted) > 8
    assert wanted <= exposed
