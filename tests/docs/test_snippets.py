"""The snippets that everybody copies from peft's documentation, with nothing but the import changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tensors import predict
from zoo import LLAMA, T5

SEQ2SEQ_TRAINING = """
from transformers import AutoModelForSeq2SeqLM
from peft import get_peft_config, get_peft_model, LoraConfig, TaskType
model_name_or_path = "BASE"

peft_config = LoraConfig(
    task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
)

model = AutoModelForSeq2SeqLM.from_pretrained(model_name_or_path)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()
""".replace("get_peft_config, ", "")

QUICKSTART = """
import torch
from transformers import AutoModelForCausalLM
from peft import LoraConfig, TaskType, get_peft_model

model = AutoModelForCausalLM.from_pretrained("BASE", device_map="cpu")
peft_config = LoraConfig(
    r=16,
    lora_alpha=32,
    task_type=TaskType.CAUSAL_LM,
    # target_modules=["q_proj", "v_proj", ...]  # optionally indicate target modules
)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

# perform training on your dataset, e.g. using transformers Trainer, then save the model
model.save_pretrained("ADAPTER")
"""

INFERENCE = """
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel

model = AutoModelForCausalLM.from_pretrained("BASE", device_map="cpu")
model = PeftModel.from_pretrained(model, "ADAPTER")
input_ids = torch.tensor([[5, 6, 7]])
outputs = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=5)
"""

AUTO_CLASS = """
import torch
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("ADAPTER")
model.eval()
input_ids = torch.tensor([[5, 6, 7]])
outputs = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=5)
"""

MERGING = """
from transformers import AutoModelForCausalLM
from peft import PeftModel

base_model = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(base_model, "ADAPTER")
merged_model = model.merge_and_unload()
merged_model.save_pretrained("MERGED")
"""

SWITCHING = """
from transformers import AutoModelForCausalLM
from peft import PeftModel

model = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(model, "ADAPTER", adapter_name="one")
model.load_adapter("ADAPTER", adapter_name="two")
model.set_adapter("two")
model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type="linear")
model.set_adapter("both")
model.delete_adapter("one")
with model.disable_adapter():
    base_output = model(input_ids).logits
output = model(input_ids).logits
"""

OWN_MODULE = """
import torch
from torch import nn
from peft import LoraConfig, get_peft_model

class MLP(nn.Module):
    def __init__(self, num_units_hidden=200):
        super().__init__()
        self.seq = nn.Sequential(
            nn.Linear(20, num_units_hidden),
            nn.ReLU(),
            nn.Linear(num_units_hidden, num_units_hidden),
            nn.ReLU(),
            nn.Linear(num_units_hidden, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, X):
        return self.seq(X)

config = LoraConfig(
    target_modules=["seq.0", "seq.2"],
    modules_to_save=["seq.4"],
)

model = MLP()
peft_model = get_peft_model(model, config)
peft_model.print_trainable_parameters()
output = peft_model(torch.randn(3, 20))
"""

LOAD_TO_TRAIN = """
from transformers import AutoModelForCausalLM
from peft import PeftConfig, PeftModel

config = PeftConfig.from_pretrained("ADAPTER")
model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
lora_model = PeftModel.from_pretrained(model, "ADAPTER", is_trainable=True)
trainable = [name for name, parameter in lora_model.named_parameters() if parameter.requires_grad]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a seq2seq base, and a place for what the snippets write."""
    root = tmp_path_factory.mktemp("snippets")
    LLAMA.model().save_pretrained(root / "base")
    T5.model().save_pretrained(root / "t5")
    return {"BASE": root / "base", "T5": root / "t5", "ADAPTER": root / "adapter", "MERGED": root / "merged"}


def run(snippet: str, folders: dict[str, Path], library: str = "slimtune", **names: object) -> dict[str, object]:
    """The names that the snippet leaves, after the one change that users make."""
    changed = snippet.replace("from peft import", f"from {library} import")
    assert library == "peft" or "peft import" not in changed
    for placeholder, path in folders.items():
        changed = changed.replace(f'"{placeholder}"', repr(str(path)))
    scope: dict[str, object] = {"__name__": "snippet", **names}
    exec(compile(changed, "snippet", "exec"), scope)
    return scope


def test_the_snippet_of_the_readme(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run(QUICKSTART, folders)
    assert capsys.readouterr().out.startswith("trainable params: ")
    assert {path.name for path in folders["ADAPTER"].iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_the_snippets_after_training(folders: dict[str, Path]) -> None:
    """Inference, the automatic class and the merge answer alike; switching runs through."""
    run(QUICKSTART, folders)
    answers = [run(snippet, folders)["outputs"] for snippet in (INFERENCE, AUTO_CLASS)]
    assert torch.equal(*answers)
    run(MERGING, folders)
    merged = AutoModelForCausalLM.from_pretrained(folders["MERGED"])
    adapted = run(INFERENCE, folders)["model"]
    batch = LLAMA.batch()
    torch.testing.assert_close(predict(merged, batch), predict(adapted, batch), rtol=1e-4, atol=1e-5)
    scope = run(SWITCHING, folders, input_ids=batch["input_ids"])
    assert list(scope["model"].peft_config) == ["two", "both"]
    assert run(LOAD_TO_TRAIN, folders)["trainable"] != []


def test_the_snippet_for_seq2seq(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    scope = run(SEQ2SEQ_TRAINING, {**folders, "BASE": folders["T5"]})
    assert isinstance(scope["model"], type(AutoModelForSeq2SeqLM.from_pretrained(folders["T5"])))
    assert "trainable%" in capsys.readouterr().out


def test_the_snippet_for_a_model_of_one_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for library in ("slimtune", "peft"):
        run(OWN_MODULE, {}, library)
        printed.append(capsys.readouterr().out.strip())
    assert printed[0] == printed[1]
