"""Makes transformers and lm-eval know this package's models, without importing either.

`import drt` takes milliseconds, and stays so: what is here is registered with one of those libraries once a program
imports it, and a model's module is imported once the library is asked for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPES = ("drt", "window", "full_attention", "landmark", "block_recurrent")


class _Configurations(dict[str, Any]):
    """What a registry of configurations holds beside the library's: ours register when one is asked for.

    To import them earlier would import modules of the library in the midst of its own imports.
    """

    def __contains__(self, model_type: object) -> bool:
        return model_type in MODEL_TYPES or super().__contains__(model_type)

    def __missing__(self, model_type: str) -> Any:
        if model_type not in MODEL_TYPES:
            raise KeyError(model_type)
        import_module("drt.models")
        return super().__getitem__(model_type)


def _add_auto_classes(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = _Configurations(mapping._extra_content)


def _add_lm_eval_model(module: ModuleType) -> None:
    registry = import_module("lm_eval.api.registry").model_registry
    registry.register("drt", target="drt.eval.lm_eval:DRTLM")


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _add_auto_classes,
    "lm_eval.models": _add_lm_eval_model,
}


class _AfterImport:
    """A finder of modules that leaves the finding to the others, and acts on a module once it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        action = _ACTIONS.get(name)
        if action is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = _then(spec.loader.exec_module, action)  # type: ignore[method-assign]
                return spec
        return None


def _then(execute: Callable[[ModuleType], None], action: Callable[[ModuleType], None]) -> Any:
    def exec_module(module: ModuleType) -> None:
        execute(module)
        action(module)

    return exec_module


def register() -> None:
    """Register with the libraries that are imported already, and with others as soon as they are."""
    sys.meta_path.insert(0, _AfterImport())
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            action(sys.modules[name])
