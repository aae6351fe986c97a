"""A3POConfig: TRL's GRPOConfig with an objective of this package."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ..core.checks import check_word
from ..losses.linear import ROUTES, STATISTICS
from ..named_objectives import as_objective, presets
from ..objectives import Cispo, Clip, Objective, OffPolicyMask, TokenRule, Vespo
from ..ops.head_arguments import check_chunk_bytes, check_compaction
from ._presets import build_objective, preset_keywords

# Field of the configuration -> keyword of the presets.
KEYWORDS = {
    "rho": "rho",
    "alpha": "alpha",
    "token_ratio": "ratio",
    "selection_metric": "metric",
    "selection_source": "source",
    "positive_metric": "positive_metric",
    "negative_metric": "negative_metric",
    "selection_polarity": "polarity",
    "selection_rounding": "rounding",
    "normalize_over": "normalize_over",
    "positive_weight": "positive_weight",
    "negative_weight": "negative_weight",
    "low_probability_quantile": "quantile",
    "low_probability_min_p": "min_p",
    "low_probability_beta": "beta",
    "dual_clip": "dual_clip",
    "divergence": "divergence",
    "delta_low": "delta_low",
    "delta_high": "delta_high",
    "ratio_cap": "ratio_cap",
    "topr_level": "level",
    "covariance_penalty": "penalty",
    "covariance_low": "low",
    "covariance_high": "high",
    "log_ratio_coef": "log_ratio_coef",
    "kl_estimator": "kl_estimator",
    "kl_clamp": "kl_clamp",
    "aggregation": "aggregation",
    "epsilon": "epsilon_low",
    "epsilon_high": "epsilon_high",
    "delta": "delta",
}
# TRL's fields of one objective, which TRL leaves unread with another.
_OWN_FIELDS = {
    "sapo": ("sapo_temperature_pos", "sapo_temperature_neg"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
}


# Keywords of a preset that fields of TRL's own set.
TRLS_OWN = {
    "kl_coef": "beta", "entropy_coef": "entropy_coef", "ratio_level": "importance_sampling_level",
    "ratio_weights": "off_policy_mask_threshold",
}  # fmt: skip


def _pickle_error(value: Any) -> Exception | None:
    """What pickle says against a value, in the protocol of torch.save."""
    try:
        pickle.dumps(value, protocol=2)
    except Exception as error:  # pickle raises whatever the value's own methods do
        return error
    return None


def _check_pickles(objective: Objective) -> None:
    """Raises ValueError for an objective that no checkpoint could hold: TRL saves the configuration with each."""
    if _pickle_error(objective) is None:
        return
    parts = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective) if f.name != "shaping"}
    for i, rule in enumerate(objective.shaping):
        parts.update({f"shaping[{i}].{f.name}": getattr(rule, f.name) for f in dataclasses.fields(rule)})
    for name, value in parts.items():
        error = _pickle_error(value)
        if error is not None:
            raise ValueError(
                f"objective cannot be pickled, as TRL's checkpoints want: {name} = {value!r} ({error}); take a "
                "schedule of a3po_kernels (LinearDecay, CosineDecay, ...) or a function at the top level of a module"
            ) from error
    raise ValueError(f"objective cannot be pickled, as TRL's checkpoints want: {_pickle_error(objective)}")


def _option(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class A3POConfig(GRPOConfig):
    """GRPOConfig in which `objective` takes the place of `loss_type`; its other fields mean what they mean in TRL.

    A field of an objective that is None keeps the preset's default, and one that the objective does not take raises
    ValueError. `beta` is the KL coefficient, as in TRL; A3PO's own beta(step) comes from `rho` and `alpha`.
    `entropy_coef` weighs the entropy of each token, aggregated as the policy term is (TRL: the mean over a
    micro-batch's tokens, whatever the aggregation).

    Refused with a ValueError: an Objective that cannot be pickled (a lambda as a schedule), which TRL's checkpoints do
    with the whole configuration; any loss_type, top_entropy_quantile (objective="fork_tokens" selects exactly),
    use_adaptive_entropy; off_policy_mask_threshold with vLLM; a rule by named scores; and a KL term with
    use_bias_correction_kl, TRL's default, under a ratio per rollout.
    """

    loss_type: str | None = _option("Not taken: the objective sets the loss.")
    objective: str = _option(
        f"What is optimised: {', '.join(presets)}; in Python also an a3po_kernels.Objective.", "a3po"
    )
    rho: float | None = _option("a3po: scale of the selected tokens, beta(step) = max(1, rho - alpha * step).")
    alpha: float | None = _option("a3po: what that scale loses per optimizer step.")
    token_ratio: float | None = _option(
        "a3po, fork_tokens, kl_cov, clip_cov: share of the tokens that is selected, in (0, 1]."
    )
    selection_metric: str | None = _option("a3po: 'probability' or 'entropy'.")
    selection_source: str | None = _option("a3po: select by the 'old' or by the 'current' policy.")
    positive_metric: str | None = _option("a3po: selection_metric in positive rollouts.")
    negative_metric: str | None = _option("a3po: selection_metric in negative rollouts.")
    selection_polarity: str | None = _option("a3po: 'both', or the rule of 'positive' or 'negative' rollouts alone.")
    selection_rounding: str | None = _option("fork_tokens: 'floor' or, as in its released code, 'ceil'.")
    normalize_over: str | None = _option("fork_tokens: divide by the 'selected' tokens or by 'all'.")
    positive_weight: float | None = _option("w_reinforce, a3po: weight of positive rollouts.")
    negative_weight: float | None = _option("w_reinforce, a3po: weight of negative rollouts.")
    low_probability_quantile: float | None = _option("lp_reg: share of the negative tokens that are candidates.")
    low_probability_min_p: float | None = _option("lp_reg: kappa of the min-p proxy.")
    low_probability_beta: float | None = _option("lp_reg: coefficient of its regulariser.")
    divergence: str | None = _option("dppo: 'tv' or 'kl'.")
    delta_low: float | None = _option("dppo: bound of the divergence downwards.")
    delta_high: float | None = _option("dppo: bound of the divergence upwards.")
    ratio_cap: float | None = _option("dppo: cap of the ratio. Off if None.")
    topr_level: str | None = _option("topr: the ratio of the 'sequence', its 'geometric' mean, or the 'token'.")
    covariance_penalty: float | None = _option("kl_cov: coefficient of |log ratio| at the selected tokens.")
    covariance_low: float | None = _option("clip_cov: candidates have a covariance above this.")
    covariance_high: float | None = _option("clip_cov: candidates have a covariance below this.")
    log_ratio_coef: float | None = _option("Coefficient of the squared log ratio to the behaviour policy.")
    dual_clip: float | None = _option("Dual clip c > 1: where A < 0, the loss is at most -A * c. Off if None.")
    kl_estimator: str | None = _option(
        "Estimator of the KL term: 'k1', 'k2', 'k3' or 'k3-ratio'. By default as in TRL: 'k3-ratio' with "
        "use_bias_correction_kl, else 'k3'."
    )
    kl_clamp: float | None = _option("Bound of the log ratio to the reference policy in the KL term. Off if None.")
    aggregation: str | None = _option(
        "'token-mean' (over all tokens of an optimizer step), 'seq-mean-token-mean', 'seq-mean-token-sum' or "
        "'seq-mean-token-sum-norm' (divided by max_completion_length)."
    )
    epsilon: float | None = _option("Clipping bound; alone it sets both, as in TRL. None: the objective's own bounds.")
    head_route: str = _option("linear_policy_loss's route: 'auto', 'one-pass' or 'recompute'.", "auto")
    head_compaction: str = _option(
        "'exact' leaves rows without a gradient out of the head's products; 'none' computes every row.", "exact"
    )
    head_statistics: str = _option(
        "'all', or 'active': skip the statistics of tokens that cannot have a gradient, which are then no part of the "
        "metrics' means.", "all"
    )
    head_chunk_bytes: int | None = _option("Budget of the tile of logits that exists at a time.")

    def __post_init__(self):
        super().__post_init__()
        refused = {
            "top_entropy_quantile": "objective='fork_tokens' with token_ratio selects by entropy",
            "use_adaptive_entropy": "only a constant entropy_coef is supported",
        }
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        if self.loss_type is not None:
            near = f", objective={self.loss_type!r} perhaps" if self.loss_type in presets else ""
            raise ValueError(
                f"loss_type = {self.loss_type!r} is not supported by A3POConfig: the objective, here "
                f"{str(self.objective)[:40]!r}, sets the loss: give objective= and aggregation= instead{near}"
            )
        check_word("head_route", self.head_route, ROUTES)
        check_word("head_statistics", self.head_statistics, STATISTICS)
        check_compaction("head_compaction", self.head_compaction)
        check_chunk_bytes("head_chunk_bytes", self.head_chunk_bytes)
        for name, reason in refused.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} = {getattr(self, name)!r} is not supported by A3POConfig: {reason}")
        if self.off_policy_mask_threshold is not None and self.use_vllm:
            raise ValueError(
                "off_policy_mask_threshold with use_vllm is not supported by A3POConfig: TRL masks by the sampler's "
                "log-probs, and the loss gets the trainer's"
            )
        objective = self.build_objective()
        _check_pickles(objective)
        for rule in objective.shaping:
            if isinstance(rule, TokenRule) and not rule.reads_policy:
                raise ValueError(f"objective selects by the score {rule.metric!r}, which TRL's trainers do not have")
            keeps = isinstance(rule, TokenRule) and rule.rest_scale == 0
            inexact = isinstance(rule, TokenRule) and (rule.quantile, rule.threshold) != (None, None)
            if keeps and inexact and objective.normalize_over == "selected":
                raise ValueError(
                    "normalize_over='selected' divides by the tokens that a step keeps, and how many a rule with a "
                    "quantile or a threshold keeps is not known ahead"
                )
        folds = any(isinstance(weight, Vespo) for weight in objective.ratio_weights)
        if folds and self.use_vllm and self.vllm_importance_sampling_mode.startswith("sequence"):
            raise ValueError(
                "vespo takes the sampler's ratios token by token, as in TRL: set vllm_importance_sampling_mode to "
                f"'token_truncate' or 'token_mask'; got {self.vllm_importance_sampling_mode!r}"
            )
        wanted = objective.kl_coef
        if vars(self)["beta"] not in (0.0, wanted):
            raise ValueError(f"beta = {vars(self)['beta']} and the objective's kl_coef = {wanted} differ")
        self.beta = wanted  # TRL loads a reference model for it

    def build_objective(self) -> Objective:
        """The objective that the fields describe."""
        if not isinstance(self.objective, (str, Objective)):
            as_objective(self.objective)  # raises
        options = {keyword: getattr(self, name) for name, keyword in KEYWORDS.items()}
        given = [name for name, keyword in KEYWORDS.items() if options[keyword] is not None]
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        idle = [
            (owner, name)
            for owner, names in _OWN_FIELDS.items()
            for name in names
            if self.objective != owner and getattr(self, name) != defaults[name]
        ]
        if isinstance(self.objective, Objective):
            given += [name for _, name in idle]
            given += [name for name in ("entropy_coef", "off_policy_mask_threshold") if getattr(self, name)]
            if self.importance_sampling_level != "token":
                given.append("importance_sampling_level")
            if given:
                raise ValueError(f"{given[0]} is a field of the presets; set it on the Objective that was given")
            return self.objective
        if idle:
            owner, name = idle[0]
            raise ValueError(f"{name} is of the objective {owner!r} and means nothing to {self.objective!r}")
        if self.epsilon is not None and self.objective == "cispo":
            raise ValueError("epsilon means nothing to the objective 'cispo', as in TRL: its bound is epsilon_high")
        if self.epsilon is not None and self.epsilon_high is None:
            options["epsilon_high"] = self.epsilon
        if self.objective == "sapo":
            options.update(tau_positive=self.sapo_temperature_pos, tau_negative=self.sapo_temperature_neg)
        if self.objective == "vespo":
            options.update(
                k_positive=self.vespo_k_pos, lambda_positive=self.vespo_lambda_pos, k_negative=self.vespo_k_neg,
                lambda_negative=self.vespo_lambda_neg,
            )  # fmt: skip
        if self.off_policy_mask_threshold is not None:
            options["ratio_weights"] = (OffPolicyMask(self.off_policy_mask_threshold),)
        if self.importance_sampling_level != "token":
            options["ratio_level"] = self.importance_sampling_level
        if self.beta and self.kl_estimator is None and self.use_bias_correction_kl:
            level = presets[self.objective]().ratio_level if self.objective in presets else "token"
            if self.importance_sampling_level == "sequence" or level != "token":
                raise ValueError(
                    "use_bias_correction_kl = True, TRL's default, weighs the KL term by the ratio, which is supported "
                    "for a ratio per token; set use_bias_correction_kl=False"
                )
            options["kl_estimator"] = "k3-ratio"
        if self.objective in presets:
            # CISPO and SAPO have them too, at 0 unless given.
            options.update({k: v for k, v in {"kl_coef": self.beta, "entropy_coef": self.entropy_coef}.items() if v})
        return build_objective(self.objective, options, {**{k: name for name, k in KEYWORDS.items()}, **TRLS_OWN})

    def to_dict(self) -> dict[str, Any]:
        """As TrainingArguments.to_dict, with the values in force for trackers and checkpoints.

        Fields that are None hold what the preset takes by default, where it takes them; an Objective is spelled out.
        """
        fields = super().to_dict()
        objective = self.build_objective()
        in_force: dict[str, Any] = {}
        if isinstance(self.objective, Objective):
            fields["objective"] = str(self.objective)
        else:
            parameters = inspect.signature(presets[self.objective]).parameters.values()
            in_force = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
        if isinstance(objective.surrogate, Clip):
            in_force |= dataclasses.asdict(objective.surrogate)
        elif isinstance(objective.surrogate, Cispo):
            in_force["epsilon_high"] = objective.surrogate.epsilon_high
        own = ("aggregation", "normalize_over", "log_ratio_coef", "kl_estimator", "kl_clamp")
        in_force |= {name: getattr(objective, name) for name in own}
        takes = None if isinstance(self.objective, Objective) else preset_keywords(self.objective)
        own_metrics = {"positive": self.positive_metric, "negative": self.negative_metric}
        if None not in (own_metrics.get(p) for p in own_metrics if self.selection_polarity in (None, "both", p)):
            in_force.pop("metric", None)  # every rule has its own
        for name, keyword in KEYWORDS.items():
            if fields[name] is None and (takes is None or keyword in takes):
                fields[name] = in_force.get(keyword)
        fields["importance_sampling_level"] = objective.ratio_level
        fields["entropy_coef"] = objective.entropy_coef
        return fields


def ratio_bounds(objective: Objective) -> tuple[float, float]:
    """(low, high) outside of which a ratio counts as clipped; without a bound -inf and inf."""
    surrogate = objective.surrogate
    if isinstance(surrogate, Clip):
        return 1.0 - surrogate.epsilon_low, 1.0 + surrogate.epsilon_high
    if isinstance(surrogate, Cispo):
        low = float("-inf") if surrogate.epsilon_low is None else 1.0 - surrogate.epsilon_low
        return low, surrogate.epsilon_high
    return float("-inf"), float("inf")
