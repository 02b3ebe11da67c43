"""PEFT's common tests, with a host in place of the models that they download.

They need diffusers only to recognise its pipelines; an empty class stands in for one.
"""

from __future__ import annotations

import inspect
import unittest
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from peft import IA3Config, LoHaConfig, LoraConfig

from tests.upstream.attaching import attached_at_birth
from tests.upstream.hosts import ModelTester
from tests.upstream.outcomes import Outcomes, run_all
from tests.upstream.sdist import fetch, import_tests

_ATTENTION = ["q_proj", "v_proj"]
_CASES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "lora": (LoraConfig, {"target_modules": _ATTENTION, "r": 8, "init_lora_weights": False}),
    "loha": (LoHaConfig, {"target_modules": _ATTENTION, "r": 4, "init_weights": False}),
    "ia3": (IA3Config, {"target_modules": _ATTENTION, "feedforward_modules": [], "init_ia3_weights": False}),
}
_PIPELINE = {"StableDiffusionPipeline": type("StableDiffusionPipeline", (), {})}


def peft_tests() -> type[Any]:
    """``PeftCommonTester`` of the installed version."""
    return import_tests(fetch("peft"), "peft_tests", "testing_common", {"diffusers": _PIPELINE}).PeftCommonTester


def run_peft_tests(common: type[Any], host: str, *, attached: bool) -> Outcomes:
    """The outcomes of all tests that take a model and a configuration, for each kind of adapter."""
    tester = ModelTester(host)
    model_class = tester.host.model_class
    contents: dict[str, Any] = {
        "torch_device": "cpu",
        "transformers_class": _Factory(tester),
        "prepare_inputs_for_testing": lambda self: _inputs(tester),
    }
    for name, method in inspect.getmembers(common, inspect.isfunction):
        required = [p.name for p in inspect.signature(method).parameters.values() if p.default is p.empty]
        if name.startswith("_test_") and required == ["self", "model_id", "config_cls", "config_kwargs"]:
            for kind, (config, options) in _CASES.items():
                contents[f"{name[1:]}_{kind}"] = _test(method, config, options)
    case: Any = type(f"{model_class.__name__}PeftTest", (common, unittest.TestCase), contents)
    with attached_at_birth(model_class) if attached else nullcontext():
        return run_all(case, unittest.defaultTestLoader.getTestCaseNames(case))


def _test(method: Callable[..., None], config: type[Any], options: dict[str, Any]) -> Callable[[Any], None]:
    return lambda self: method(self, "tiny-host", config, dict(options))


def _inputs(tester: ModelTester) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tester.prepare_config_and_inputs_for_common()[1]


class _Factory:
    """The class whose ``from_pretrained`` the tests call: gives the same host each time, or what a folder holds."""

    def __init__(self, tester: ModelTester) -> None:
        self._tester = tester

    def from_pretrained(self, name: str, **options: Any) -> Any:
        """The host, in the dtype asked for."""
        model_class = self._tester.host.model_class
        if name != "tiny-host":
            return model_class.from_pretrained(name, **options)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = self._tester.get_config()
            config._name_or_path = name
            model = model_class(config)
        return model.to(options.get("dtype", torch.float32)).eval()
