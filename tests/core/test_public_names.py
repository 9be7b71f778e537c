"""The public names are peft's, with peft's arguments and defaults, and importing them costs nothing until used."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from typing import Any

import peft
import pytest

import slimtune
from tensors import plain

SHARED = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "IA3Config",
    "LNTuningConfig",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "TaskType",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
]
METHODS = {
    "PeftModel": [
        "active_adapters",
        "add_adapter",
        "add_weighted_adapter",
        "delete_adapter",
        "disable_adapter",
        "disable_adapter_layers",
        "enable_adapter_layers",
        "from_pretrained",
        "get_base_model",
        "get_nb_trainable_parameters",
        "load_adapter",
        "merge_adapter",
        "merge_and_unload",
        "print_trainable_parameters",
        "save_pretrained",
        "set_adapter",
        "unload",
        "unmerge_adapter",
    ],
}


def test_importing_slimtune_loads_neither_torch_nor_transformers() -> None:
    script = "import sys, slimtune; print([m for m in ('torch', 'transformers', 'numpy', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_using_slimtune_never_loads_peft() -> None:
    script = (
        "import sys, slimtune\n"
        "for name in slimtune.__all__: getattr(slimtune, name)\n"
        "print([m for m in ('peft', 'bitsandbytes', 'trl', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", SHARED)
def test_a_name_of_peft_is_there(name: str) -> None:
    assert hasattr(peft, name), "the oracle knows it"
    assert callable(getattr(slimtune, name))
    assert name in dir(slimtune)
    assert name in slimtune.__all__


def test_type_checkers_and_editors_see_every_public_name() -> None:
    """Re-exported as PEP 484 has it, `import X as X`: at run time the names are imported on first use."""
    tree = ast.parse(inspect.getsource(slimtune))
    found = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert {alias.asname for alias in found if alias.name == alias.asname} == {*slimtune.__all__} - {"__version__"}


@pytest.mark.parametrize("name", [name for name in slimtune.__all__ if name != "__version__"])
def test_every_public_name_says_what_it_is(name: str) -> None:
    public = getattr(slimtune, name)
    said = (inspect.getdoc(public) or "").strip()
    assert said
    # A dataclass without a docstring is given its signature for one.
    assert not said.startswith(f"{name}(")
    for member, value in vars(public).items() if inspect.isclass(public) else ():
        if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | classmethod)):
            assert inspect.getdoc(getattr(public, member)), f"{name}.{member}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="LoraKonfig"):
        _ = slimtune.LoraKonfig


FUNCTIONS = ["get_peft_model", "get_peft_model_state_dict", "set_peft_model_state_dict"]
# Arguments of peft without a meaning here: hardware that it moves parts to by hand, or methods that we lack.
MISSING = {
    "get_peft_model": {"mixed", "revision", "low_cpu_mem_usage"},
    "set_peft_model_state_dict": {"ignore_mismatched_sizes", "low_cpu_mem_usage"},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_peft_s_arguments_with_its_defaults(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(lib, name)).parameters for lib in (slimtune, peft))
    expected = {key: value.default for key, value in theirs.items() if key not in MISSING.get(name, set())}
    assert {key: ours[key].default for key in expected if key in ours} == expected
    positional = [key for key in theirs if key in expected][:3]
    assert list(ours)[:3] == positional


@pytest.mark.parametrize("name", METHODS["PeftModel"])
def test_a_method_takes_peft_s_first_arguments_with_their_defaults(name: str) -> None:
    oracle: Any = getattr(peft.PeftModel, name, None) or getattr(peft.LoraModel, name)
    own = getattr(slimtune.PeftModel, name)
    if not callable(oracle):
        assert isinstance(own, property)
        return
    ours, theirs = (dict(inspect.signature(function).parameters) for function in (own, oracle))
    named = {k: p for k, p in theirs.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    shared = {key: plain(parameter.default) for key, parameter in named.items() if key in ours}
    # More may be left out here: `load_adapter(folder)` names the adapter "default".
    more_optional = {"adapter_name", "model_id"}
    assert {key: plain(ours[key].default) for key in shared.keys() - more_optional} == {
        key: shared[key] for key in shared.keys() - more_optional
    }
    required = [key for key, parameter in named.items() if parameter.default is parameter.empty]
    assert set(required) <= set(ours)
