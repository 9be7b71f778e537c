"""Making smaller and exporting: the commands behind the forms, downloads that stay in their folder, and the page."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from browser import browser
from slimtune.slim.measure import SlimRow
from slimtune.slim.recipe import shipped
from slimtune.slim.report import SlimReport, write_report
from slimtune.studio.exports import read_export, slim_recipes
from slimtune.studio.jobs import Jobs
from small_text_model import orders, write_lines
from studio_browser import PHONE, check_accessible, listening_studio, tab_of
from studio_client import open_studio
from studio_runs import save_runs


def save_slimmed(runs: Path) -> Path:
    """A folder as `slimtune slim` leaves it."""
    folder = runs / "smaller"
    folder.mkdir(parents=True)
    figures: dict[str, Any] = {
        "resident_bytes": 10**9, "decode_speed": 40.0, "decode_ratio": 1.0, "prefill_speed": 900.0,
        "prefill_ratio": 1.0, "perplexity": 12.5, "score": 0.9, "interval": (0.8, 0.95), "kl": 0.0, "same_first": 1.0,
        "forgetting": 0.0, "engines": ["slimtune"],
    }  # fmt: skip
    rows = [SlimRow("untouched", 270_000_000, **figures), SlimRow("quantize", 90_000_000, **figures)]
    write_report(folder, SlimReport("tiny", rows))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base, runs = save_runs(tmp_path_factory.mktemp("slim"))
    save_slimmed(runs)
    return base, runs


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands wait: they have tests of their own, and the flow in a browser runs one."""
    monkeypatch.setattr(Jobs, "run_on", lambda self: None)


def test_a_file_is_downloaded_as_it_is(made: tuple[Path, Path]) -> None:
    client = open_studio(made[1])
    for name in ("orders", "주문"):
        sent = client.get(f"/slim/files/{name}/adapter_model.safetensors")
        assert sent.content == (made[1] / name / "adapter_model.safetensors").read_bytes()
        assert sent.headers["content-disposition"].startswith("attachment")
        assert sent.headers["content-type"] == "application/octet-stream"


OUTSIDE = [
    "../tiny/config.json", "..%2ftiny%2fconfig.json", "%2e%2e/tiny/config.json", "orders/../../tiny/config.json",
    "orders/..%2f..%2ftiny%2fconfig.json", "orders/%2fetc%2fpasswd", "orders//etc/passwd", ".studio/secret",
    "orders/linked.json", "orders/linked/config.json", "orders/adapter_config.json%00.txt", "orders/inner", "orders/",
    "linked-run/config.json", "orders/./adapter_config.json/x", "..%5ctiny%5cconfig.json",
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_what_leads_out_of_a_run_is_not_sent(tmp_path: Path, path: str) -> None:
    base, runs = save_runs(tmp_path)
    (runs / ".studio").mkdir()
    (runs / ".studio" / "secret").write_text("secret")
    (runs / "orders" / "inner").mkdir()
    (runs / "orders" / "linked.json").symlink_to(base / "config.json")
    (runs / "orders" / "linked").symlink_to(base)
    (runs / "linked-run").symlink_to(base)
    refused = open_studio(runs).get(f"/slim/files/{path}")
    assert refused.status_code == 404, refused.text
    assert "secret" not in refused.text
    assert "hidden_size" not in refused.text


def test_an_archive_holds_the_files_of_a_run_and_no_links(tmp_path: Path) -> None:
    base, runs = save_runs(tmp_path)
    (runs / "주문" / "inner").mkdir()
    # Larger than a part in which it is sent.
    (runs / "주문" / "inner" / "large.bin").write_bytes(bytes(range(256)) * 10_000)
    (runs / "주문" / "linked.json").symlink_to(base / "config.json")
    (runs / "주문" / "linked").symlink_to(base)
    sent = open_studio(runs).get("/slim/archives/주문.zip")
    assert sent.headers["content-disposition"] == "attachment; filename*=UTF-8''%EC%A3%BC%EB%AC%B8.zip"
    with zipfile.ZipFile(io.BytesIO(sent.content)) as packed:
        assert packed.testzip() is None
        names = {path.relative_to(runs).as_posix() for path in (runs / "주문").iterdir() if path.is_file()}
        names -= {"주문/linked.json"}
        assert set(packed.namelist()) == names | {"주문/inner/large.bin"}
        assert packed.read("주문/inner/large.bin") == bytes(range(256)) * 10_000
    for name in ("nothing", "..", "..%2ftiny", ".studio"):
        assert open_studio(runs).get(f"/slim/archives/{name}.zip").status_code == 404


@pytest.mark.usefixtures("waiting")
def test_what_the_forms_run_are_commands(tmp_path: Path) -> None:
    _, runs = save_runs(tmp_path, "orders")
    rows = write_lines(tmp_path / "rows.jsonl", *({"messages": each.messages()} for each in orders(4)))
    client = open_studio(runs)
    exports = "slimtune export RUNS/orders --to"
    for path, form, name, command in (
        (
            "exports", {"to": "gguf", "kind": "Q8_0"}, "orders-gguf",
            f"{exports} gguf --type Q8_0 --output RUNS/orders-gguf --json",
        ),
        ("exports", {"to": "hf", "kind": "Q8_0"}, "orders-merged", f"{exports} hf --output RUNS/orders-merged --json"),
        ("exports", {"to": "vllm"}, "orders-vllm", f"{exports} vllm --output RUNS/orders-vllm --json"),
        (
            "models", {"how": "quantize:W8A16"}, "orders-w8a16",
            "slimtune quantize RUNS/orders --scheme W8A16 --output RUNS/orders-w8a16",
        ),
        (
            "models", {"how": "slim-int4", "data": str(rows), "changes": "stop.task=-0.05 data.held_out=0.2"},
            "orders-slim-int4",
            f"slimtune slim RUNS/.studio/recipes/orders-slim-int4.yaml model=RUNS/orders data.train={rows} "
            "stop.task=-0.05 data.held_out=0.2 --output RUNS/orders-slim-int4",
        ),
    ):  # fmt: skip
        answer = client.post(f"/slim/{path}", data={"run": "orders"} | form)
        assert answer.headers.get("hx-redirect") == f"/slim/results/{name}", answer.text
        assert Jobs(runs).latest()[name].command == command.replace("RUNS", str(runs))
        assert name in client.get("/slim").text
    assert (runs / ".studio" / "recipes" / "orders-slim-int4.yaml").read_text() == shipped()["slim-int4"]
    client.post("/slim/results/orders-gguf/stop")
    assert Jobs(runs).latest()["orders-gguf"].state == "stopped"


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize(
    ("path", "form", "status", "said"),
    [
        ("exports", {"run": "../tiny"}, 404, "no name of a run"),
        ("exports", {"run": "nothing"}, 422, "neither an adapter nor a model"),
        ("exports", {"run": "smaller", "to": "peft"}, 422, "choose gguf, ollama"),
        ("exports", {"run": "orders", "to": "--help"}, 422, "choose gguf"),
        ("models", {"run": "orders", "how": "slim-int4"}, 422, "name the file"),
        ("models", {"run": "orders", "how": "slim-int4", "data": "x.jsonl", "changes": "stop.tusk=1"}, 422, "tusk"),
        (
            "models",
            {"run": "orders", "how": "slim-int4", "data": "x.jsonl", "changes": "--overwrite"},
            422,
            "no setting",
        ),
        (
            "models",
            {"run": "orders", "how": "slim-int4", "data": "x.jsonl", "changes": "evaluation.scorer=x.py:f"},
            422,
            "code in a file",
        ),
        ("models", {"run": "orders", "how": "../recipe", "data": "x.jsonl"}, 422, "no recipe"),
        ("models", {"run": "orders", "how": "quantize:W1"}, 422, "W4A16"),
    ],
)
def test_what_can_not_be_is_said_and_not_queued(
    made: tuple[Path, Path], path: str, form: dict[str, str], status: int, said: str
) -> None:
    refused = open_studio(made[1]).post(f"/slim/{path}", data=form)
    assert (refused.status_code, said in refused.text) == (status, True), refused.text
    assert not list(Jobs(made[1]))


def test_the_steps_of_all_recipes_are_listed() -> None:
    steps = {recipe.name: [kind for kind, _ in recipe.steps] for recipe in slim_recipes()}
    assert steps["slim-all"] == ["tune", "prune", "distill", "quantize"]
    assert steps.keys() == shipped().keys()


def test_the_report_of_the_steps_is_a_table_and_a_page_in_a_sandbox(made: tuple[Path, Path], tmp_path: Path) -> None:
    client = open_studio(made[1])
    page = client.get("/slim/results/smaller").text
    assert "untouched" in page
    assert "270.0 MB" in page
    report = client.get("/slim/results/smaller/report")
    assert report.headers["content-security-policy"].startswith("sandbox;")
    assert report.text == (made[1] / "smaller" / "slim_report.html").read_text()
    (save_slimmed(tmp_path) / "slim_report.json").write_text('{"model": "tiny", "rows": [{}]}')
    assert "slim_report.json can&#39;t be read" in open_studio(tmp_path).get("/slim/results/smaller").text
    assert client.get("/slim/results/nothing").status_code == 404


def test_an_adapter_says_how_it_is_used(made: tuple[Path, Path]) -> None:
    base, runs = made
    uses = {use.program: use for use in read_export(runs, Jobs(runs), "orders").uses}
    assert uses["vLLM"].line == f"vllm serve {base} --enable-lora --lora-modules orders={runs}/orders"
    assert uses["peft"].line == f"PeftModel.from_pretrained(model, '{runs}/orders')"
    assert f"{runs}/orders --to gguf-lora --output {runs}/orders-gguf-lora" in uses["llama.cpp"].line


def test_a_gguf_file_is_made_and_downloaded_in_a_browser(tmp_path: Path) -> None:
    _, runs = save_runs(tmp_path, "orders")
    with browser() as opened, listening_studio(runs) as url, tab_of(opened) as tab:
        tab.goto(f"{url}/slim")
        tab.check("[value=ollama]")
        # The adapter is random, and in fewer bits it would stray too far.
        tab.select_option("[name=kind]", "F32")
        tab.click("#export-form button.primary")
        tab.wait_for_url("**/slim/results/orders-ollama")
        # The page is loaded again by itself once the command has ended.
        tab.locator(".files").wait_for(timeout=240_000)
        told = json.loads(Jobs(runs).latest()["orders-ollama"].log_tail().splitlines()[-1])
        assert tab.locator("#use-1").inner_text().strip() == told["use"]
        with tab.expect_download() as download:
            tab.click("text=model.gguf")
        assert Path(download.value.path()).read_bytes() == (runs / "orders-ollama" / "model.gguf").read_bytes()
        with tab.expect_download() as download:
            tab.click("text=Download all")
        with zipfile.ZipFile(download.value.path()) as packed:
            assert sorted(packed.namelist()) == ["orders-ollama/Modelfile", "orders-ollama/model.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "changes", "steps"),
    [
        ("slim-int8", "evaluation.max_new_tokens=8", ["00-model", "01-quantize"]),
        # What it asks of perplexity is for a model that knows a language.
        ("slim-width", "stop.perplexity=100", ["00-model", "01-prune", "02-distill"]),
    ],
)
def test_a_recipe_of_steps_is_run_and_reported_in_a_browser(
    recipe: str, changes: str, steps: list[str], tmp_path: Path
) -> None:
    _, runs = save_runs(tmp_path, "orders")
    rows = write_lines(tmp_path / "rows.jsonl", *({"messages": each.messages()} for each in orders(40)))
    name = f"orders-{recipe}"
    with browser() as opened, listening_studio(runs) as url, tab_of(opened) as tab:
        tab.goto(f"{url}/slim?run=orders")
        tab.check(f"[value={recipe}]")
        tab.fill("#slim-form [name=data]", str(rows))
        tab.fill("#slim-form [name=changes]", changes)
        tab.click("#slim-form button.primary")
        tab.wait_for_url(f"**/slim/results/{name}")
        # The page is loaded again by itself once the command has ended.
        report = tab.frame_locator("iframe.report")
        report.locator("h1").wait_for()
        (job,) = Jobs(runs)
        assert (job.state, job.arguments[0]) == ("done", "slim"), job.log_tail()
        told = json.loads((runs / name / "slim_report.json").read_text())
        assert [row["name"] for row in told["rows"]] == steps
        for shown in (report.locator("tbody tr"), tab.locator("section tbody tr")):
            cells = [row.locator("th, td").all_inner_texts() for row in shown.all()]
            assert [row[0] for row in cells] == steps
            assert [row[5] for row in cells] == [f"{row['perplexity']:.2f}" for row in told["rows"]]
        assert tab.locator(".files a", has_text="model.safetensors").count() == 1
        tab.goto(f"{url}/runs/{name}")
        tab.locator("#actions a").click()
        tab.wait_for_url(f"**/slim/results/{name}")
        # It is a model like others now, and can be exported.
        tab.goto(f"{url}/slim?run={name}")
        assert tab.locator("#export-form [name=run]").input_value() == name


@pytest.mark.parametrize(("size", "language", "scheme"), [(PHONE, "ko-KR", "dark"), ((1280, 900), "en-US", "light")])
def test_the_pages_are_accessible_at_a_phone_and_at_a_desk(
    made: tuple[Path, Path], size: tuple[int, int], language: str, scheme: str
) -> None:
    with browser() as opened, listening_studio(made[1]) as url, tab_of(opened, size, language, scheme) as tab:
        for path in ("", "/results/smaller", "/results/orders"):
            tab.goto(f"{url}/slim{path}")
            if not path:
                tab.check("[value=slim-all]")
            tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            check_accessible(tab)
