"""Reading, setting and comparing tensors of adapters: the same for a model of slimtune and one of peft."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import peft
import torch
from torch import Tensor, nn


def adapter_tensors(library: ModuleType, model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter under its names on disk; what peft adds of the base's own embeddings is left out."""
    return library.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def randomize(library: ModuleType, model: nn.Module, adapter: str = "default", seed: int = 2) -> nn.Module:
    """Moves each tensor of the adapter to a random place, so that the adapter changes the output."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        key: 0.2 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for key, tensor in sorted(adapter_tensors(library, model, adapter).items())
    }
    library.set_peft_model_state_dict(model, drawn, adapter_name=adapter)
    return model


def adapter_gradients(library: ModuleType, model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The gradients of an adapter under its names on disk; a parameter without one is left out."""
    by_address = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    gradients = {}
    for key, tensor in adapter_tensors(library, model, adapter).items():
        parameter = by_address.get(tensor.data_ptr())  # None for a buffer
        if parameter is not None and parameter.grad is not None:
            gradients[key] = parameter.grad.reshape(tensor.shape)
    return gradients


def activate(model: nn.Module, adapters: list[str]) -> None:
    """Several adapters at once; peft has this on its inner model only."""
    owner = model.base_model if isinstance(model, peft.PeftModel) else model
    owner.set_adapter(adapters)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def prediction(output: Any) -> Tensor:
    """The tensor that a model is asked for."""
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss; for a model without one, a sum in which no two elements weigh the same."""
    output = model(**batch)
    if isinstance(output, Tensor):
        weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).reshape(output.shape)
        return (output * weights).sum()
    return output.loss


@torch.no_grad()
def predict(model: nn.Module, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    model.eval()
    return prediction(model(**batch, **kwargs))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference against the largest expected value."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_near(actual: Tensor, expected: Tensor, bound: float = 1e-5, what: str = "tensor") -> None:
    error = relative_error(actual, expected)
    assert error <= bound, f"{what}: relative error {error:.2e} is above {bound:.0e}"


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names, and tensors equal to the bit."""
    assert sorted(actual) == sorted(expected)
    different = [key for key in expected if not torch.equal(actual[key], expected[key])]
    assert different == []


def assert_all_near(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert sorted(actual) == sorted(expected)
    for key, tensor in expected.items():
        assert_near(actual[key], tensor, bound, key)


def parts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name; of one that is made of others, as torchao's, those."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        inside = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        found |= {f"{key}.{name}": getattr(tensor, name) for name in inside} or {key: tensor}
    return found


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in parts(tensors).items()}


def plain(value: Any) -> Any:
    """A config's value as it would look in JSON: enums as their text, sets as sorted lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: plain(item) for key, item in dataclasses.asdict(value).items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value.value) if hasattr(value, "value") else value
