"""An objective from a preset's name and the options that a trainer's configuration gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..named_objectives import CLIP_OVERRIDES, OVERRIDES, find_preset, presets
from ..objectives import Clip, Objective


def preset_keywords(name: str) -> set[str]:
    """The keywords that a preset takes; raises ValueError for an unknown name.

    A function of somebody else's in the registry that takes **keywords is taken to hand them to a preset.
    """
    preset = find_preset(name)
    parameters = inspect.signature(preset).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    if len(named) == len(parameters):
        return named
    return named | set(OVERRIDES) | (set(CLIP_OVERRIDES) if isinstance(preset().surrogate, Clip) else set())


def build_objective(name: str, options: Mapping[str, Any], spelled: Mapping[str, str] | None = None) -> Objective:
    """The preset `name` with the options that are not None; raises ValueError for one that it does not take.

    spelled: what the caller's configuration calls an option, for the message; it has no other where it is given.
    """
    spelled = spelled or {}
    takes = preset_keywords(name)
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in takes:
            known = sorted(spelled.get(option, option) for option in takes if option in spelled or not spelled)
            names = ", ".join(known)
            raise ValueError(f"{spelled.get(key, key)} means nothing to the objective {name!r}, which takes {names}")
    try:
        return presets[name](**given)
    except (TypeError, ValueError) as error:
        raise type(error)(_respelled(str(error), given, spelled)) from error


def _respelled(message: str, given: Mapping[str, Any], spelled: Mapping[str, str]) -> str:
    """A preset's message about its keywords, by what the configuration calls it."""
    for key in given:
        name = spelled.get(key, key)
        if message.startswith(f"{key} must "):
            message = name + message.removeprefix(key)
        message = message.replace(f" where {key} is ", f" where {name} is ")
    return message
