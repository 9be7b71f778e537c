"""A parallel adapter reads the input of its feed-forward, wherever and however often the block is run."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtune
from slimtune.errors import TargetError
from tensors import (
    adapter_gradients,
    adapter_tensors,
    assert_all_near,
    assert_near,
    copies,
    loss_of,
    predict,
    randomize,
    trainable,
)
from zoo import BERT, GPT2, LLAMA, T5, VIT, Specimen

each_specimen = pytest.mark.parametrize("specimen", [LLAMA, GPT2, BERT, T5, VIT], ids=lambda specimen: specimen.name)


def parallel(**options: Any) -> slimtune.BottleneckConfig:
    return slimtune.BottleneckConfig(placement="parallel", **{"reduction_factor": 4, "scaling": 4.0, **options})


def tuned(specimen: Specimen, **options: Any) -> Any:
    return randomize(slimtune, slimtune.get_peft_model(specimen.model(), parallel(**options))).eval()


def noted(model: nn.Module) -> list[Any]:
    """What the model's adapters hold of a forward."""
    deltas = [delta for module in model.modules() for delta in getattr(module, "deltas", {}).values()]
    return [delta.noted.x for delta in deltas if getattr(delta, "noted", None) is not None]


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(8)
    loss_of(model.train(), batch).backward()
    return copies(adapter_gradients(slimtune, model))


@pytest.mark.parametrize("specimen", [LLAMA, GPT2, BERT, T5], ids=lambda specimen: specimen.name)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradient_checkpointing_gives_the_same_gradients(specimen: Specimen, use_reentrant: bool) -> None:
    expected = gradients(tuned(specimen, dropout=0.3), specimen.batch())
    model = tuned(specimen, dropout=0.3)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_all_near(gradients(model, specimen.batch()), expected)
    assert noted(model)
    assert all(x is None for x in noted(model))


@each_specimen
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"])
def test_a_copy_reads_its_own_input(specimen: Specimen, copier: Any) -> None:
    model = tuned(specimen)
    expected = predict(model, specimen.batch())
    twin = copier(model)
    randomize(slimtune, model, seed=9)
    assert torch.equal(predict(twin, specimen.batch()), expected)
    assert not torch.equal(predict(model, specimen.batch()), expected)
    own, others = ({id(d.noted) for m in each.modules() for d in getattr(m, "deltas", {}).values()
                    if getattr(d, "noted", None)} for each in (model, twin))  # fmt: skip
    assert not own & others


@each_specimen
def test_switching_disabling_and_detaching(specimen: Specimen) -> None:
    base = predict(specimen.model(), specimen.batch())
    model = tuned(specimen)
    expected = predict(model, specimen.batch())
    with model.disable_adapter():
        assert torch.equal(predict(model, specimen.batch()), base)
    model.add_adapter("other", parallel())
    randomize(slimtune, model, "other", seed=9)
    assert torch.equal(predict(model, specimen.batch()), expected)
    model.set_adapter("other")
    assert not torch.equal(predict(model, specimen.batch()), expected)
    model.delete_adapter("other")
    assert torch.equal(predict(model, specimen.batch()), expected)
    assert torch.equal(predict(model.unload(), specimen.batch()), base)


class Block(nn.Module):
    """A feed-forward under names of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.exit = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.exit(torch.tanh(self.entry(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x


def named() -> Any:
    torch.manual_seed(0)
    config = parallel(target_modules=["entry", "exit"], input_modules=["entry"], bottleneck_size=3,
                      reduction_factor=None)  # fmt: skip
    return randomize(slimtune, slimtune.get_peft_model(Blocks(), config))


def by_hand(model: Any, x: Tensor) -> Tensor:
    tensors = adapter_tensors(slimtune, model)
    for i in (0, 1, 0, 1):
        key = f"base_model.model.blocks.{i}.exit.adapter_"
        z = F.relu(F.linear(x, tensors[f"{key}down.weight"], tensors[f"{key}down.bias"]))
        f = 4.0 * F.linear(z, tensors[f"{key}up.weight"], tensors[f"{key}up.bias"])
        entry, out = model.blocks[i].entry, model.blocks[i].exit
        x = x + F.linear(torch.tanh(F.linear(x, entry.weight, entry.bias)), out.weight, out.bias) + f
    return x


def test_projections_named_by_hand_and_blocks_that_are_run_twice(tmp_path: Any) -> None:
    model, x = named(), torch.randn(4, 6)
    assert_near(model(x), by_hand(model, x))
    assert {name.partition(".deltas.")[0] for name in trainable(model)} == {"blocks.0.exit", "blocks.1.exit"}
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    reread = slimtune.PeftModel.from_pretrained(Blocks(), tmp_path)
    assert torch.equal(reread(x), model(x))


def test_the_input_is_not_kept_alive() -> None:
    model = named().requires_grad_(False)
    seen: list[Any] = []
    model.blocks[0].entry.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    model(torch.randn(4, 6))
    gc.collect()
    assert len(seen) == 2
    assert all(ref() is None for ref in seen)
    assert noted(model) == [None] * 4


def test_threads_do_not_read_each_other_s_inputs() -> None:
    """Each thread waits in the middle of its feed-forward until the other one is there too."""
    model = named()
    inputs = [torch.randn(4, 6), torch.randn(4, 6)]
    expected = [by_hand(model, x).detach() for x in inputs]
    barrier = threading.Barrier(2)

    def wait(*_: Any) -> None:
        barrier.wait(timeout=30)

    for block in model.blocks:
        block.entry.register_forward_hook(wait)
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: model(inputs[i]).detach()})) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for i in (0, 1):
        assert_near(found[i], expected[i])


def test_two_parallel_adapters_at_once_both_read_the_same_input() -> None:
    model, x = named(), torch.randn(4, 6)
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("other", config)
    randomize(slimtune, model, "other", seed=5)
    changes = []
    block = model.blocks[0]
    base = model.adapter_state
    for names in (("default",), ("other",), ("default", "other")):
        with base.using(applied=names):
            changes.append(block(x))
    with base.using(applied=()):
        plain = block(x)
    assert_near(changes[2] - plain, changes[0] + changes[1] - 2 * plain)


def test_rows_of_a_batch_under_their_own_adapters() -> None:
    model = tuned(LLAMA)
    model.add_adapter("other", parallel())
    randomize(slimtune, model, "other", seed=9)
    ids = LLAMA.batch()["input_ids"]
    expected = []
    for row, name in enumerate(("other", "default")):
        model.set_adapter(name)
        expected.append(predict(model, {"input_ids": ids[row : row + 1]}))
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=["other", "default"]).logits
    assert_near(found, torch.cat(expected))


def test_a_feed_forward_in_chunks() -> None:
    """BERT can run its feed-forward over parts of the sequence."""
    model = tuned(BERT)
    ids = torch.randint(4, 100, (2, 8))
    expected = predict(model, {"input_ids": ids})
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 2
    assert_near(predict(model, {"input_ids": ids}), expected)


def test_generation_with_a_cache_is_generation_without() -> None:
    model = tuned(LLAMA)
    prompt = torch.randint(4, 100, (2, 5))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with_cache, without = (model.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    torch.compiler.reset()
    model = tuned(LLAMA)
    expected = predict(model, LLAMA.batch())
    assert_near(predict(torch.compile(model, backend="aot_eager"), LLAMA.batch()), expected)
    small, x = named(), torch.randn(4, 6)
    assert_near(torch.compile(small, backend="aot_eager", fullgraph=True)(x), small(x))
    torch.compiler.reset()


class Backwards(nn.Module):
    """A block that calls what it names `exit` first."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.exit = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.entry(self.exit(x))


def test_projections_named_the_wrong_way_round_are_an_error() -> None:
    config = parallel(target_modules=["entry", "exit"], input_modules=["entry"])
    model = slimtune.get_peft_model(Backwards(), config)
    with pytest.raises(TargetError, match="before the input of its feed-forward"):
        model(torch.randn(2, 6))
