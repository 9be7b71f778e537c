"""SmolLM2 with adapters of several methods in one batch, asked over HTTP at once: each answers as by itself."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import torch

from slimtune import IA3Config, LoraConfig, PeftModel, get_peft_model
from slimtune.engine.engine import Engine
from slimtune.serve.gateway import Gateway, GatewaySettings
from slimtune.serve.local import EngineBackend
from slimtune.serve.registry import Registry, folders_of
from slimtune.serve.tenants import Keyring
from small_server import Started, listening

CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["o_proj"]),
    "ia3": IA3Config(),
}
HELLO: Any = [{"role": "user", "content": "Name a river in Germany."}]


def test_methods_mixed_in_one_batch_answer_as_by_themselves(
    smollm2: Any, smollm2_tokenizer: Any, tmp_path: Path
) -> None:
    ids = smollm2_tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_tensors="pt")["input_ids"]

    def alone(model: Any) -> str:
        with torch.no_grad():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        return smollm2_tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    expected = {"base": alone(smollm2)}
    for name, config in CONFIGS.items():
        adapted = get_peft_model(copy.deepcopy(smollm2), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / name)
        expected[name] = alone(PeftModel.from_pretrained(copy.deepcopy(smollm2), tmp_path / name).eval())
    assert len(set(expected.values())) > 2

    backend = EngineBackend(Engine(copy.deepcopy(smollm2), smollm2_tokenizer, slots=4, context=128))
    registry = Registry(backend)
    for name, folder in folders_of(tmp_path).items():
        registry.register(name, folder)
    answers: dict[str, str] = {}
    with listening(Gateway(backend, registry, Keyring(None), GatewaySettings())) as url:
        client = Started(None, url).client()  # type: ignore[arg-type]

        def ask(name: str) -> None:
            answer = client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=8)
            answers[name] = str(answer.choices[0].message.content)

        threads = [threading.Thread(target=ask, args=(name,)) for name in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == expected
