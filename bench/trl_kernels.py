"""TRL's kernel modules from the files of the installed package, without the imports of trl itself.

`import trl.kernels` runs trl/__init__, which wants datasets, accelerate and more; the kernels want torch and Triton.
The modules get a package name of their own, so that a later `import trl` is the real one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_PACKAGE = "_trl_alone"


def _package(name: str, **contents) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(contents)
    return module


def _around() -> dict[str, ModuleType]:
    """What the kernel modules import beside each other."""

    def maybe_gather_lm_head_ctx(*parameters):  # what trl.trainer.utils gives without DeepSpeed ZeRO-3
        return contextlib.nullcontext()

    return {
        _PACKAGE: _package(_PACKAGE),
        f"{_PACKAGE}.kernels": _package(f"{_PACKAGE}.kernels"),
        f"{_PACKAGE}.trainer": _package(f"{_PACKAGE}.trainer"),
        f"{_PACKAGE}.trainer.utils": _package(
            f"{_PACKAGE}.trainer.utils", maybe_gather_lm_head_ctx=maybe_gather_lm_head_ctx
        ),
    }


def _transformers() -> dict[str, ModuleType]:
    """A stand-in for the one function of it that they ask, where it is not installed."""
    if importlib.util.find_spec("transformers") is not None:
        return {}
    utils = _package("transformers.utils", is_triton_available=lambda: True)
    return {"transformers": _package("transformers", utils=utils), "transformers.utils": utils}


@functools.cache
def load(name: str) -> ModuleType:
    """trl.kernels.<name>, by path. ModuleNotFoundError where trl is not installed or has no such file."""
    spec = importlib.util.find_spec("trl")  # of a package that is not inside another: nothing of it runs
    places = [Path(place) / "kernels" / f"{name}.py" for place in (spec.submodule_search_locations if spec else ())]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ModuleNotFoundError(f"no trl.kernels.{name} is installed")
    for parent, module in _around().items():
        sys.modules.setdefault(parent, module)
    own = f"{_PACKAGE}.kernels.{name}"
    found = importlib.util.spec_from_file_location(own, path)
    module = importlib.util.module_from_spec(found)
    stand_ins = _transformers()
    sys.modules.update({own: module, **stand_ins})
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[own]
        raise
    finally:
        for key in stand_ins:
            del sys.modules[key]
    return module
