"""A new method is one file: written here, it attaches, learns, is stored and found, with no edit anywhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import slimtune.methods

METHOD = '''
"""A toy: y = base(x) + b, with b trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.config import TargetedConfig, register
from slimtune.core.delta import Delta, trainable_dtype, wrong_kind
from slimtune.core.frozen import Dense, Frozen, Site


@register
@dataclass
class ToyConfig(TargetedConfig):
    peft_type: str | None = "TOY"

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> Delta:
        if site.kind != "linear":
            raise wrong_kind(site, "the toy", "linear layers")
        return ToyDelta(site, autocast_adapter_dtype)


class ToyDelta(Delta):
    def __init__(self, site: Site, autocast: bool) -> None:
        super().__init__()
        dtype = trainable_dtype(site.base.weight(site.module).dtype, autocast)
        self.shift = nn.Parameter(torch.zeros(site.base.features(site.module)[1], dtype=dtype))

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        return (y + self.shift).to(y.dtype)

    def fold(self, dense: Dense) -> Dense:
        return dense | {"bias": dense["bias"] + self.shift}
'''

USE = """
import dataclasses
import pathlib
import re
import sys

import torch

import slimtune
import slimtune.methods

slimtune.methods.__path__.append(sys.argv[1])
sys.path.insert(0, sys.argv[2])

from kinds import KINDS, attach, cases, configs, methods_for
from slimtune.core.config import methods
from tensors import adapter_tensors, loss_of, predict, randomize, trainable
from zoo import LLAMA

assert "TOY" in methods()
assert "ToyConfig" in dir(slimtune)
assert slimtune.ToyConfig is methods()["TOY"]

linear = next(kind for kind in KINDS if kind.name == "linear")
assert "TOY" in methods_for(linear)
assert [kind.name for kind in KINDS if "TOY" in methods_for(kind) and kind.name.startswith("conv")] == []
assert type(configs("TOY", linear).example()) is slimtune.ToyConfig
assert {config.peft_type for _, config in (cases(among=("TOY",)).example() for _ in range(3))} == {"TOY"}
randomize(slimtune, attached := attach(linear, slimtune.ToyConfig(target_modules=["site"])))
expected = attached(linear.input())
attached.merge_adapter()
torch.testing.assert_close(attached(linear.input()), expected)

batch = LLAMA.batch()
model = slimtune.get_peft_model(LLAMA.model(), slimtune.ToyConfig())
assert torch.equal(predict(model, batch), predict(LLAMA.model(), batch))
optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
losses = []
for _ in range(5):
    optimizer.zero_grad()
    losses.append(loss_of(model.train(), batch))
    losses[-1].backward()
    optimizer.step()
assert losses[-1] < losses[0]
model.save_pretrained(sys.argv[3])
reread = slimtune.PeftModel.from_pretrained(LLAMA.model(), sys.argv[3])
assert type(reread.peft_config["default"]) is slimtune.ToyConfig
assert torch.equal(predict(reread, batch), predict(model, batch))
assert "base_model.model.model.layers.0.self_attn.q_proj.shift" in adapter_tensors(slimtune, reread)

import json
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.models.compatibility import verdicts
from slimtune.recipe.method import methods as known

# Neither peft nor another engine has it, and everything that speaks of engines says so.
assert not any(verdict.takes for verdict in verdicts({"peft_type": "TOY"}, []))
assert verdicts({"peft_type": "TOY"}, [])[0].note == "TOY is unknown to it"
assert json.loads(CliRunner().invoke(app, ["methods", "toy", "--json"]).stdout)["in_peft"] is False
assert "unknown to peft" in CliRunner().invoke(app, ["methods", "toy"]).stdout
assert "read by peft" in CliRunner().invoke(app, ["methods", "dora"]).stdout
page = (pathlib.Path(sys.argv[2]).parent / "docs" / "methods.md").read_text()
for row, in_peft in (("`peft` and slimtune", True), ("slimtune alone", False)):
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {row} |")]
    named = set(re.findall("`([a-z0-9-]+)`", line.split("|")[2]))
    assert named == {m.name for m in known().values() if m.is_adapter and m.in_peft == in_peft} - {"toy"}, row

# A method made from another one's config isn't in peft by its descent.
from slimtune.core.config import register

heir = type("HeirConfig", (slimtune.LoraConfig,), {"peft_type": "HEIR", "__annotations__": {"peft_type": "str | None"}})
assert slimtune.LoraConfig.in_peft and not register(dataclasses.dataclass(heir)).in_peft

from methods.test_methods import applicable

assert ("TOY", "llama") in applicable()
print("done")
"""


def test_one_file_is_enough(tmp_path: Path) -> None:
    """In a process of its own, which leaves the registry of this one as it is."""
    folder, tests = tmp_path / "more_methods", Path(__file__).parents[1]
    folder.mkdir()
    (folder / "toy.py").write_text(METHOD)
    arguments = [sys.executable, "-W", "ignore", "-c", USE, str(folder), str(tests), str(tmp_path / "tuned")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr[-2000:]
    assert "toy" not in {path.stem for path in Path(slimtune.methods.__path__[0]).iterdir()}
