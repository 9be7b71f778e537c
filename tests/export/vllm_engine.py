"""Run by vLLM's own Python in `test_vllm`: what vLLM answers under each adapter, or why it doesn't take it.

VLLM_PYTHON vllm_engine.py REQUEST.json ANSWER.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# In this process, so that what refuses an adapter is raised here; and on the CPU without a compiler.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def main(request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapters: dict[str, str] = request["adapters"]
    options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": request["max_rank"]} if adapters else {}
    engine = LLM(request["model"], dtype=request["dtype"], enforce_eager=True, max_model_len=64, seed=0, **options)
    settings = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)

    def answer(lora: Any = None) -> list[int]:
        prompt: Any = {"prompt_token_ids": request["prompt"]}
        outputs = engine.generate([prompt], settings, use_tqdm=False, lora_request=lora)
        return list(outputs[0].outputs[0].token_ids)

    answers: dict[str, Any] = {"base": answer()}
    for number, (name, folder) in enumerate(adapters.items(), 1):
        lora = LoRARequest(name, number, folder)
        try:
            # By itself first: an adapter that is refused within a step takes the engine with it.
            engine.llm_engine.add_lora(lora)
            answers[name] = answer(lora)
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
    return answers


if __name__ == "__main__":
    answers = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answers))
