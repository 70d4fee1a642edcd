"""Keeps torch.compile out of this package: its calls run as they are, between compiled parts.

The compiler would follow a collective down to the core, with tensors that have no memory. It is
told when it is loaded, by whomever: to import it takes seconds.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

RULES = "torch._dynamo.trace_rules"  # says which files are not compiled; there since torch 2.2
PACKAGE = __name__.partition(".")[0]
COMPILED = {"sync_batchnorm"}  # evaluation has no collectives in it


def stay_out() -> None:
    """Local. What this package calls, like the module in a model, is still compiled."""
    if RULES in sys.modules:
        _add_rules(sys.modules[RULES])
    else:
        sys.meta_path.insert(0, _Finder())


def _add_rules(rules: ModuleType) -> None:
    for module in pkgutil.iter_modules(sys.modules[PACKAGE].__path__):
        if module.name not in COMPILED:
            rules.add(f"{PACKAGE}.{module.name}")


class _Finder(MetaPathFinder):
    """Waits for the import of the rules, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != RULES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads the rules as their own loader does, and adds ours."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _add_rules(module)
