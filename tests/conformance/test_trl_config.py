"""integrations.trl: fields of A3POConfig become the objective, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import a3po_kernels as ak

pytest.importorskip("trl")
import tiny
from datasets import Dataset
from transformers import HfArgumentParser

from a3po_kernels.integrations import _trl_config
from a3po_kernels.integrations.trl import A3POConfig, A3POTrainer

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]


def built(**options):
    return A3POConfig("unused", report_to=[], use_cpu=True, bf16=False, **options).build_objective()


def test_fields_become_the_objective():
    assert built() == ak.a3po()
    assert built(rho=3.0, alpha=0.1, token_ratio=0.1, dual_clip=3.0) == ak.a3po(3.0, 0.1, 0.1, dual_clip=3.0)
    assert built(selection_metric="entropy", selection_source="current") == ak.a3po(metric="entropy", source="current")
    assert built(objective="dapo") == ak.dapo()
    assert built(objective="dapo", epsilon_high=0.3) == ak.dapo(epsilon_high=0.3)
    assert built(objective="grpo", epsilon=0.1) == ak.grpo(epsilon_low=0.1, epsilon_high=0.1)
    assert built(objective="grpo", epsilon=0.1, epsilon_high=0.3) == ak.grpo(epsilon_low=0.1, epsilon_high=0.3)
    assert built(objective="grpo", beta=0.2) == ak.grpo(kl_coef=0.2, kl_estimator="k3-ratio")
    assert built(objective="grpo", beta=0.2, use_bias_correction_kl=False) == ak.grpo(kl_coef=0.2)
    assert built(objective="grpo", beta=0.2, kl_estimator="k1") == ak.grpo(kl_coef=0.2, kl_estimator="k1")
    assert built(objective="grpo", importance_sampling_level="sequence") == ak.gspo()
    assert built(objective="sapo", sapo_temperature_pos=2.0) == ak.sapo(tau_positive=2.0)
    assert built(objective="lp_reg", low_probability_quantile=0.1, low_probability_beta=2.0) == ak.lp_reg(0.1, beta=2.0)
    assert built(objective="w_reinforce", positive_weight=0.3) == ak.w_reinforce(0.3)
    assert built(objective="dapo", entropy_coef=0.01, aggregation="seq-mean-token-mean") == ak.dapo(
        entropy_coef=0.01, aggregation="seq-mean-token-mean"
    )
    own = ak.a3po(schedule=ak.CosineDecay())
    assert built(objective=own) is own


def test_a_config_is_a_command_line_and_json():
    parser = HfArgumentParser(A3POConfig)
    arguments = "--output_dir unused --objective a3po --rho 1.5 --token_ratio 0.1 --use_cpu --bf16 no".split()
    (config,) = parser.parse_args_into_dataclasses(arguments)
    assert config.build_objective() == ak.a3po(1.5, ratio=0.1)
    own = A3POConfig("unused", objective=ak.a3po(), report_to=[], use_cpu=True, bf16=False)
    assert "TokenRule" in json.loads(own.to_json_string())["objective"]
    helps = {f.name: f.metadata.get("help") for f in A3POConfig.__dataclass_fields__.values()}
    assert all(helps[name] for name in ("objective", "rho", "alpha", "token_ratio", "epsilon", "head_route"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ppo"}, "objective must be an Objective or one of a3po, .*; got 'ppo'"),
        ({"objective": "dapo", "rho": 2.0}, "rho means nothing to the objective 'dapo', which takes .*epsilon_high"),
        ({"objective": "dapo", "rho": 2.0}, "takes aggregation, beta, delta, .*, importance_sampling_level, kl_clamp"),
        ({"objective": "cispo", "dual_clip": 2.0}, "dual_clip means nothing"),
        ({"objective": "cispo", "epsilon": 0.2}, "its bound is epsilon_high"),
        ({"objective": "sapo", "epsilon": 0.2}, "epsilon means nothing"),
        ({"objective": "a3po", "token_ratio": 1.5}, "ratio"),
        ({"objective": ak.dapo(), "rho": 2.0}, "rho is a field of the presets"),
        ({"objective": ak.a3po(schedule=ak.CosineDecay()), "rho": 3.0}, "rho is a field of the presets"),
        ({"objective": ak.a3po(schedule=ak.CosineDecay()), "alpha": 0.1}, "alpha is a field of the presets"),
        ({"rho": 0.5}, r"^rho must be finite and lie in \[1.0"),
        ({"selection_polarity": "positive", "negative_metric": "entropy"},
         "^negative_metric must be left out where selection_polarity is 'positive'"),
        ({"selection_metric": "entropy", "positive_metric": "entropy", "negative_metric": "entropy"},
         "^selection_metric must be left out where every rule has its own, positive_metric and negative_metric"),
        ({"objective": "topr", "importance_sampling_level": "sequence"}, "Reinforce reads no ratio"),
        ({"sapo_temperature_pos": 2.0}, "^sapo_temperature_pos is of the objective 'sapo' and means nothing to 'a3po'"),
        ({"objective": "sapo", "vespo_k_pos": 1.0}, "^vespo_k_pos is of the objective 'vespo' and means nothing"),
        ({"objective": ak.vespo(), "vespo_k_pos": 1.0}, "^vespo_k_pos is a field of the presets"),
        ({"objective": ak.dapo(kl_coef=0.1), "beta": 0.2}, "differ"),
        ({"loss_type": "grpo"}, "loss_type = 'grpo' is not supported"),
        ({"loss_type": "dapo"}, "the objective, here 'a3po', sets the loss: give .*, objective='dapo' perhaps"),
        ({"objective": "gspo", "loss_type": "bnpo"}, "here 'gspo', sets the loss: give objective= and .* instead$"),
        ({"objective": "A3PO"}, r"got 'A3PO'; did you mean 'a3po'\?"),
        ({"token_ratio": 20}, r"^token_ratio must lie in \(0, 1\]; got 20"),
        ({"objective": "fork_tokens", "token_ratio": 0.0}, "^token_ratio must lie in"),
        ({"rho": -1.0}, "^rho must be finite"),
        ({"selection_polarity": "up"}, "^selection_polarity must be one of both"),
        ({"selection_metric": "margin"}, "^selection_metric must be one of probability, entropy"),
        ({"objective": "kl_cov", "covariance_penalty": -1.0}, "^covariance_penalty must be finite"),
        ({"objective": "grpo", "epsilon": -0.5}, "^epsilon must be finite"),
        ({"head_route": "onepass"}, "^head_route must be one of auto, one-pass, recompute; got 'onepass'"),
        ({"head_statistics": "some"}, "^head_statistics must be one of all, active"),
        ({"head_compaction": "exakt"}, "^head_compaction must be 'auto', 'exact', 'none' or .*; got 'exakt'"),
        ({"head_chunk_bytes": 0}, "^head_chunk_bytes must be positive; got 0"),
        ({"top_entropy_quantile": 0.2}, "fork_tokens"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
        ({"off_policy_mask_threshold": 0.5, "use_vllm": True}, "off_policy_mask_threshold with use_vllm"),
        ({"objective": "gspo", "beta": 0.1}, "set use_bias_correction_kl=False"),
    ],
)
def test_what_is_not_supported_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        built(**options)


def test_a_number_that_is_none_is_named_as_it_was_written():
    for options in ({"rho": "2"}, {"epsilon": "0.2"}, {"covariance_low": "1", "objective": "clip_cov"}):
        with pytest.raises(TypeError, match=f"^{next(iter(options))} must be a number; got str"):
            built(**options)


def test_an_objective_that_is_none():
    for wrong, message in ((["a3po"], "got list"), (ak.a3po, r"got function; call it: a3po\(\)")):
        with pytest.raises(TypeError, match=message):
            built(objective=wrong)


def logged(**options):
    return A3POConfig("unused", report_to=[], use_cpu=True, bf16=False, **options).to_dict()


def test_what_is_logged_is_in_force_and_taken_again():
    """Of each preset, and of A3PO where each rule has its own metric, which leaves the common one out."""
    own = ({"positive_metric": "entropy", "negative_metric": "probability"},
           {"selection_polarity": "positive", "positive_metric": "entropy"})  # fmt: skip
    assert [logged(**options)["selection_metric"] for options in ({}, *own)] == ["probability", None, None]
    for options in ({"objective": name} for name in ak.presets):
        fields = logged(**options)
        again = {name: fields[name] for name in (*_trl_config.KEYWORDS, "importance_sampling_level")}
        assert built(**options, **again) == built(**options), options
    for options in own:
        assert built(**{name: logged(**options)[name] for name in _trl_config.KEYWORDS}) == built(**options)


def test_a_tracker_gets_the_values_in_force():
    fields = logged()
    expected = {
        "objective": "a3po", "rho": 2.0, "alpha": 0.005, "token_ratio": 0.2, "epsilon": 0.2, "epsilon_high": 0.28,
        "aggregation": "token-mean", "selection_metric": "probability", "loss_type": None, "dual_clip": None,
        "importance_sampling_level": "token", "beta": 0.0, "divergence": None, "positive_weight": 1.0,
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected
    assert logged(rho=3.0, epsilon_high=0.4)["rho"] == 3.0
    assert logged(objective="grpo", epsilon=0.1)["epsilon_high"] == 0.1
    assert logged(objective="grpo", beta=0.2)["kl_estimator"] == "k3-ratio"
    assert logged(objective="cispo")["epsilon_high"] == 1.28
    assert logged(objective="gspo")["importance_sampling_level"] == "sequence"
    own = logged(objective=ak.dapo(epsilon_high=0.5, entropy_coef=0.1))
    assert (own["epsilon"], own["epsilon_high"], own["entropy_coef"], own["rho"]) == (0.2, 0.5, 0.1, None)


@pytest.mark.parametrize("name", ak.presets)
def test_what_is_logged_is_the_objective(name):
    """Given back as the configuration's fields, the values in force are the same objective."""
    fields = logged(objective=name)
    own = (*_trl_config.KEYWORDS, "objective", "importance_sampling_level", "entropy_coef")
    assert built(**{key: fields[key] for key in own}) == built(objective=name)


# -- an objective is saved with every checkpoint ----------------------------------------------------------------------


def halved(step):
    """A schedule as users write it."""
    return 1.0 + 1.0 / (1.0 + step)


@dataclass(frozen=True)
class Growing:
    """A schedule with a function of its own inside."""

    function: Callable

    def __call__(self, step):
        return self.function(step)


def nested(step):
    def schedule(step):
        return 1.0

    return schedule


@pytest.mark.parametrize(
    "objective",
    ["a3po", ak.a3po(), ak.a3po(schedule=ak.CosineDecay()), ak.a3po(schedule=halved), ak.a3po(schedule=Growing(halved)),
     ak.lp_reg(), ak.gspo(kl_coef=0.1)],
    ids=["a name", "a3po", "cosine", "a function", "a callable object", "lp_reg", "gspo"],
)  # fmt: skip
def test_an_objective_survives_training_args(objective, tmp_path):
    """As Trainer._save writes it, and a user reads it."""
    config = A3POConfig("unused", objective=objective, report_to=[], use_cpu=True, bf16=False)
    torch.save(config, tmp_path / "training_args.bin")
    back = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert back.build_objective() == config.build_objective()


@pytest.mark.parametrize(
    ("objective", "part"),
    [
        (ak.a3po(schedule=lambda step: 1.0), r"shaping\[0\]\.selected_scale = <function <lambda>"),
        (ak.a3po(schedule=nested(0)), r"shaping\[0\]\.selected_scale = <function nested.<locals>\.schedule"),
        (ak.a3po(schedule=Growing(lambda step: 1.0)), r"shaping\[0\]\.selected_scale = Growing\(function=<function"),
        (
            ak.Objective(shaping=(ak.PolarityWeights(), ak.TokenRule(selected_scale=lambda step: 2.0))),
            r"shaping\[1\]\.selected_scale",
        ),
    ],
)
def test_what_no_checkpoint_could_hold_is_refused(objective, part):
    with pytest.raises(ValueError, match=rf"objective cannot be pickled.*: {part}.*LinearDecay.*top level of a module"):
        built(objective=objective)


def test_a_checkpoint_holds_the_objective(tmp_path):
    """TRL's own save_checkpoint; a lambda died here."""
    objective = ak.a3po(schedule=halved)
    tiny.build().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    args = A3POConfig(
        str(tmp_path), objective=objective, per_device_train_batch_size=4, num_generations=4, max_steps=1,
        max_completion_length=4, save_strategy="steps", save_steps=1, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["1+2="] * 4})
    A3POTrainer(str(tmp_path / "model"), lambda completions, **_: [1.0] * len(completions), args, data).train()
    saved = torch.load(tmp_path / "checkpoint-1/training_args.bin", weights_only=False)
    assert isinstance(saved, A3POConfig) and saved.build_objective() == objective
