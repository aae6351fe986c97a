"""A preset's signature is all that it takes: each keyword by name, with the default in force, and in its help."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import a3po_kernels as ak
from a3po_kernels.named_objectives import CLIP_OVERRIDES, OVERRIDES

ROOT = Path(__file__).resolve().parents[1]
# A value of each keyword that is no preset's default, and that goes with the defaults of the others.
OTHER = {
    "kl_coef": 0.3, "kl_estimator": "k1", "kl_clamp": 2.0, "entropy_coef": 0.01, "log_ratio_coef": 0.2,
    "ratio_weights": (ak.OffPolicyMask(0.5),), "epsilon_low": 0.35, "epsilon_high": 1.45, "dual_clip": 4.0,
    "delta": 5.0, "positive_weight": 0.6, "negative_weight": 0.7, "ratio": 0.4, "rounding": "ceil",
    "normalize_over": "all", "quantile": 0.3, "min_p": 0.1, "beta": 0.5, "rho": 3.0, "alpha": 0.1,
    "schedule": ak.CosineDecay(), "metric": "entropy", "source": "current", "positive_metric": "entropy",
    "negative_metric": "entropy", "polarity": "positive", "tau_positive": 2.0, "tau_negative": 3.0,
    "divergence": "kl", "delta_low": 0.3, "delta_high": 0.3, "ratio_cap": 3.0, "k_positive": 1.0,
    "lambda_positive": 1.0, "k_negative": 1.0, "lambda_negative": 1.0, "level": "token", "penalty": 0.7, "low": 0.5,
    "high": 4.0, "seed": 3,
}  # fmt: skip
# Presets whose surrogate has one ratio_level: another is refused.
FIXED = {"dppo": "token", "gmpo": "sequence", "vespo": "token", "topr": "token"}
EVERY = [(name, key) for name, preset in ak.presets.items() for key in inspect.signature(preset).parameters]


def parameters(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(ak.presets[name]).parameters)


def other(name: str, key: str):
    """A value of a preset's keyword that is not its default."""
    default = parameters(name)[key].default
    if key == "ratio_level":
        return "sequence-token" if default == "token" else "token"
    if key == "aggregation":
        return "seq-mean-token-sum" if default == "token-mean" else "token-mean"
    return OTHER[key]


@pytest.mark.parametrize("name", ak.presets)
def test_the_signature_has_a_name_for_each_keyword(name):
    kinds = {parameter.kind for parameter in parameters(name).values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    wanted = set(OVERRIDES) | (set(CLIP_OVERRIDES) if isinstance(ak.presets[name]().surrogate, ak.Clip) else set())
    assert wanted <= set(parameters(name))
    assert inspect.signature(ak.presets[name]).return_annotation == "Objective"


@pytest.mark.parametrize(("name", "key"), EVERY)
def test_a_default_is_the_one_in_force(name, key):
    """Given it is the preset as it is, and another value is another objective: the keyword is read."""
    preset, default = ak.presets[name], parameters(name)[key].default
    assert default is not inspect.Parameter.empty
    assert preset(**{key: default}) == preset()
    if key == "ratio_level" and name in FIXED:
        with pytest.raises(ValueError, match=f"ratio_level must be '{FIXED[name]}'"):
            preset(ratio_level=other(name, key))
    else:
        assert preset(**{key: other(name, key)}) != preset()


@pytest.mark.parametrize("name", ak.presets)
def test_the_common_keywords_are_the_objectives_fields(name):
    """Each lands in the field of its name, and no other."""
    preset = ak.presets[name]
    for key in OVERRIDES:
        if key == "ratio_level" and name in FIXED:
            continue
        value = other(name, key)
        made = preset(**{key: value})
        held = (*preset().ratio_weights, *value) if key == "ratio_weights" else value
        assert made == replace(preset(), **{key: held}), key
    for key in CLIP_OVERRIDES if "dual_clip" in parameters(name) else ():
        surrogate = preset(**{key: OTHER[key]}).surrogate
        assert surrogate == replace(preset().surrogate, **{key: OTHER[key]}), key


@pytest.mark.parametrize("name", ak.presets)
def test_help_describes_each_keyword_with_its_default(name):
    text = pydoc.plain(pydoc.render_doc(ak.presets[name]))
    described = {
        word.strip() for line in re.findall(r"^ {8}(\w[\w, ]*): \S", text, re.MULTILINE) for word in line.split(",")
    }
    assert described >= set(parameters(name))
    for key, parameter in parameters(name).items():
        assert re.search(rf"\b{key}: '[^']*' = {re.escape(repr(parameter.default))}", text), key
    assert "Returns:" in text and "Raises:" in text
    assert max(map(len, text.splitlines()[4:])) <= 120


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ak.dapo(epsilon_lo=0.1), r"'epsilon_lo' of dapo \(did you mean 'epsilon_low'\?\); it takes"),
        (lambda: ak.grpo(kl_coeff=0.1), r"'kl_coeff' of grpo \(did you mean 'kl_coef'\?\)"),
        (lambda: ak.a3po(rhoo=2.0), r"'rhoo' of a3po \(did you mean 'rho'\?\); it takes rho, alpha, "),
        (lambda: ak.cispo(dual_clip=3.0), "'dual_clip' of cispo; it takes epsilon_high, epsilon_low, kl_coef, "),
        (lambda: ak.topr(levle="token"), r"did you mean 'level'\?"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_preset_is_itself_in_other_processes():
    """By the name of its module, which pickle and a registry look it up by."""
    import pickle

    for preset in ak.presets.values():
        assert pickle.loads(pickle.dumps(preset)) is preset
        assert getattr(ak.named_objectives, preset.__name__) is preset


@pytest.mark.slow
def test_a_type_checker_sees_the_keywords(tmp_path):
    """As an editor does: nothing but the source is read."""
    pytest.importorskip("mypy")
    page = tmp_path / "page.py"
    page.write_text(
        "import a3po_kernels as ak\n"
        "ak.dapo(kl_coef=0.1, epsilon_high=0.3, dual_clip=3.0)\n"
        "ak.dapo(kl_coeff=0.1)\n"
        "ak.cispo(dual_clip=3.0)\n"
        'ak.topr(entropy_coef="a")\n'
        "reveal_type(ak.a3po)\n"
    )
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--config-file=", "--ignore-missing-imports",
               "--follow-imports=silent", f"--cache-dir={tmp_path / 'cache'}", str(page)]  # fmt: skip
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    found = re.findall(r"page\.py:(\d+): (?:error|note): ((?!.* defined in).*)", said)
    assert [int(line) for line, _ in found] == [3, 4, 5, 6], said
    assert 'Unexpected keyword argument "kl_coeff"' in found[0][1] and "dual_clip" in found[1][1]
    assert all(f"{key}: " in found[3][1] for key in parameters("a3po")), found[3][1]
