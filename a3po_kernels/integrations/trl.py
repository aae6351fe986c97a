"""A3POTrainer: TRL's GRPOTrainer whose loss, from the hidden states on, is linear_policy_loss (TRL >= 1.16)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import nanmax, nanmin

from ..losses.batch import reads_old_entropy
from ..losses.rows import RowPlan, plan_rows
from ..losses.stages import PolicyLossOutput
from ..objectives import Cispo, Clip, Objective, PolarityWeights
from ._trl_config import A3POConfig, ratio_bounds
from ._trl_images import KEYS, images_of, some_rollouts
from .transformers import check_head, min_p_logprobs_from_model, policy_loss_from_model, token_logprobs_from_model

__all__ = ["A3POConfig", "A3POTrainer"]


def _kept_tokens(objective: Objective, positive: Tensor, negative: Tensor, zero: Tensor) -> Tensor:
    """How many tokens the objective keeps of so many by polarity, but for the rounding of its selections."""
    kept = {1: positive, -1: negative, 0: zero}
    for rule in objective.shaping:
        if isinstance(rule, PolarityWeights):
            weights = {1: rule.positive, -1: rule.negative, 0: rule.zero}
            kept = {sign: count * (callable(weights[sign]) or weights[sign] != 0) for sign, count in kept.items()}
        elif rule.rest_scale == 0:
            kept = {s: c * rule.ratio if rule.polarity in (None, s) else c for s, c in kept.items()}
    return kept[1] + kept[-1] + kept[0]


class A3POTrainer(GRPOTrainer):
    """GRPOTrainer with the objectives of this package; the constructor and everything else is TRL's.

    The loss is computed from the hidden states by linear_policy_loss with the model's own head (bias, LoRA, softcap and
    logit scale): no logits are formed, and old and reference log-probs come from the same kernels. With
    objective="grpo" or "dapo" and TRL's bounds, loss and gradients are those of GRPOTrainer up to rounding.

    Divisors are TRL's: token-mean divides by the tokens of the whole optimizer step over all processes (the tokens the
    objective keeps, for psr, nsr and fork_tokens), the others by rollouts, accumulation included. The step that drives
    schedules is the trainer's global_step, which checkpoints save and restore.

    Vision-language models train as TRL trains them: their text head computes the loss, and the images go to the model.

    Each slice of a generation batch that a loss gets has a "row_plan" (see plan_rows), made when TRL cuts it, so that
    the loss waits for nothing on a GPU. Who changes a slice's mask or advantages after _prepare_inputs takes it out.

    Metrics are TRL's (entropy, kl, clip_ratio/*, cispo_clip_ratio, aux_loss, policy_loss with an entropy bonus, ...)
    and entropy/positive, entropy/negative, selected_fraction/positive, selected_fraction/negative, active_fraction,
    weight_beta.

    Args:
        model: a causal LM of transformers, or its name, as GRPOTrainer takes it.
        reward_funcs: TRL's reward functions, models or their names.
        args: an A3POConfig; None: its defaults, with a folder named after the model.
        rest, options: GRPOTrainer's other arguments: train_dataset, processing_class, peft_config, ...

    Raises:
        TypeError, ValueError: at construction, for arguments that are no A3POConfig, FSDP1, an adapter on the head
            (TRL's own check), and heads that cannot be read; under FSDP2 and DeepSpeed
            ZeRO-3, which shard the head, the last in the first step.
    """

    _tag_names = ["trl", "a3po"]  # noqa: RUF012 (TRL's attribute)
    _name = "A3PO"
    _paper = {  # noqa: RUF012
        "title": "Rethinking Sample Polarity in Reinforcement Learning with Verifiable Rewards",
        "id": "2512.21625",
    }

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: A3POConfig | None = None, *rest: Any, **options: Any
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or type(model).__name__
            args = A3POConfig(f"{name.split('/')[-1]}-A3PO")
        if not isinstance(args, A3POConfig):
            raise TypeError(f"args must be an A3POConfig; got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, *rest, **options)
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
            raise ValueError("FSDP1 is not supported by A3POTrainer: set fsdp_version to 2")
        self.policy_objective = args.build_objective()
        if not (self.is_fsdp_enabled or getattr(args.deepspeed_plugin, "zero_stage", 0) == 3):
            check_head(self.model)  # which those shard: there its first use checks it

    # -- statistics of the old and the reference policy ---------------------------------------------------------------

    def _head_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "max_chunk_bytes": self.args.head_chunk_bytes,
            "compaction": self.args.head_compaction,
        }
        if self.args.cast_lm_head_to_fp32:
            options["head_dtype"] = torch.float32
        return options

    def _in_batches(self, function: Any, model: Any, batch: Mapping[str, Tensor], size: int | None, options: dict):
        """function's results for slices of the batch."""
        rollouts = len(batch["input_ids"])
        results = []
        for start in range(0, rollouts, size or rollouts):
            part = some_rollouts(batch, start, min(start + (size or rollouts), rollouts))
            with self.accelerator.autocast():
                results.append(function(model, part, **options))
        return results

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False,
        compute_aux_loss=False, **images,
    ):  # fmt: skip
        unknown = [name for name in images if name not in KEYS]
        if compute_aux_loss or unknown:  # TRL asks for neither where A3POTrainer calls
            raise TypeError(f"A3POTrainer scores no {'compute_aux_loss' if compute_aux_loss else unknown[0]}")
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": attention_mask[:, -logits_to_keep:],
            **images_of(images),
        }
        stats = self._in_batches(token_logprobs_from_model, model, batch, batch_size, self._head_options())
        entropies = torch.cat([s.entropy for s in stats]) if compute_entropy else None
        return torch.cat([s.logprobs for s in stats]), entropies, None

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        objective = self.policy_objective
        mask = self._token_mask(output)
        if objective.normalize_over == "selected":
            advantages = output["advantages"].reshape(len(mask), -1)
            counts = [(mask * condition).sum() for condition in (advantages > 0, advantages < 0, advantages == 0)]
            totals = self.accelerator.gather(torch.stack(counts).unsqueeze(0)).sum(0)
            output["num_kept_in_batch"] = _kept_tokens(objective, *totals.float())
        if "old_per_token_logps" in output:
            self._add_old_statistics(output)
        return output

    @torch.no_grad()
    def _add_old_statistics(self, output: dict[str, Any]) -> None:
        """What some objectives want of the policy that sampled, once it is no longer the current one."""
        objective = self.policy_objective
        wants_entropy = reads_old_entropy(objective)
        if not wants_entropy and objective.low_probability is None:
            return
        batch = self._model_batch(output)
        size, options = self.args.per_device_train_batch_size, self._head_options()
        if wants_entropy:
            stats = self._in_batches(token_logprobs_from_model, self.model, batch, size, options)
            output["old_entropy"] = torch.cat([s.entropy for s in stats])
        if objective.low_probability is not None:
            # The proxy is defined before temperature.
            del options["temperature"]
            options["min_p"] = objective.low_probability.min_p
            proxies = self._in_batches(min_p_logprobs_from_model, self.model, batch, size, options)
            output["min_p_logprobs"] = torch.cat(proxies)

    # -- the rows of the loss -----------------------------------------------------------------------------------------

    def _row_plan(self, inputs: Mapping[str, Any]) -> RowPlan | None:
        """The rows of one slice that may have a gradient; on a GPU it waits for their number."""
        if self.args.head_compaction not in ("auto", "exact"):
            return None
        return plan_rows(self._token_mask(inputs), inputs["advantages"], objective=self.policy_objective)

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        # TRL has shuffled and cut the generation batch: the slices are what the losses get, once or num_iterations
        # times. All are planned at once, while the device is idle after generation; in evaluation there is one.
        for part in self._buffered_inputs if self.model.training else [inputs]:
            plan = part.get("row_plan")
            if plan is None or plan.objective != self.policy_objective:
                part["row_plan"] = self._row_plan(part)
        return inputs

    # -- the loss -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _token_mask(inputs: Mapping[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

    def _model_batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            "completion_mask": self._token_mask(inputs),
            **images_of(inputs),
        }

    def _denominator(self, inputs: Mapping[str, Any], training: bool) -> Tensor | float:
        """What TRL divides by: one accumulation window's tokens over all processes, or this batch's rollouts."""
        objective = self.policy_objective
        windows = self.current_gradient_accumulation_steps if training else 1
        if objective.aggregation == "token-mean":
            kept = objective.normalize_over == "selected"
            tokens = inputs["num_kept_in_batch" if kept else "num_items_in_batch"]
            share = tokens.clamp(min=1.0) / self.accelerator.num_processes
            return share * windows / self.args.steps_per_generation if training else share
        rollouts = float(len(inputs["completion_ids"]) * windows)
        return rollouts * self.max_completion_length if objective.aggregation.endswith("-norm") else rollouts

    def _compute_loss(self, model, inputs):
        training = self.model.training
        batch = some_rollouts(self._model_batch(inputs), 0, len(inputs["completion_ids"]))
        batch["advantages"] = inputs["advantages"]
        for name, key in (
            ("old_logprobs", "old_per_token_logps"), ("ref_logprobs", "ref_per_token_logps"),
            ("old_entropy", "old_entropy"), ("min_p_logprobs", "min_p_logprobs"),
        ):  # fmt: skip
            if inputs.get(key) is not None:
                batch[name] = inputs[key]
        if self.use_vllm and self.vllm_importance_sampling_correction:
            ratio = inputs["importance_sampling_ratio"]
            batch["importance_weights"] = ratio.squeeze(1) if ratio.shape[1] == 1 else ratio
        windows = self.current_gradient_accumulation_steps if training else 1
        if self.aux_loss_enabled:
            batch["output_router_logits"] = True
        with self.accelerator.autocast():
            out = policy_loss_from_model(
                model, batch, self.policy_objective, plan=inputs.get("row_plan"), step=self.state.global_step,
                denominator=self._denominator(inputs, training), route=self.args.head_route,
                statistics=self.args.head_statistics, **self._head_options(),
                aux_loss_coef=self.router_aux_loss_coef / windows if self.aux_loss_enabled else 0.0,
            )  # fmt: skip
        self._log_policy("train" if training else "eval", inputs, batch, out)
        return out.loss

    # -- metrics ------------------------------------------------------------------------------------------------------

    def _policy_loss(
        self, training: bool, inputs: Mapping[str, Any], mask: Tensor, out: PolicyLossOutput
    ) -> Tensor:
        """The loss without its entropy bonus and router loss, 0-d, as TRL logs it: a mean over this micro-batch's
        rollouts, or token-mean's share of an accumulation window."""
        objective = self.policy_objective
        windows = self.current_gradient_accumulation_steps if training else 1
        kept = (out.weights != 0).to(out.entropy.dtype)
        entropy = (out.entropy * kept).sum(-1)
        if objective.aggregation == "seq-mean-token-mean":
            entropy = entropy / (kept if objective.normalize_over == "selected" else mask).sum(-1).clamp(min=1.0)
        loss = out.loss.detach() + objective.entropy_coef * (entropy.sum() / self._denominator(inputs, training))
        if "aux_loss" in out.metrics:
            loss = loss - self.router_aux_loss_coef / windows * out.metrics["aux_loss"]
        return loss if objective.aggregation == "token-mean" else loss * windows

    @torch.no_grad()
    def _log_policy(
        self, mode: str, inputs: Mapping[str, Any], batch: Mapping[str, Tensor], out: PolicyLossOutput
    ) -> None:
        """Appends TRL's metrics and ours; means are over the computed tokens of all processes."""
        objective, metrics = self.policy_objective, self._metrics[mode]
        mask = batch["completion_mask"].to(out.entropy.dtype)
        known = mask * self._computed(out)
        advantages = inputs["advantages"].reshape(len(mask), -1).expand_as(mask)
        positive, negative = known * (advantages > 0), known * (advantages < 0)
        means: dict[str, tuple[Tensor, Tensor]] = {
            "entropy": (out.entropy * known, known),
            "entropy/positive": (out.entropy * positive, positive),
            "entropy/negative": (out.entropy * negative, negative),
            "selected_fraction/positive": (out.metrics["selected_fraction_positive"] * positive.sum(), positive),
            "selected_fraction/negative": (out.metrics["selected_fraction_negative"] * negative.sum(), negative),
            "active_fraction": (out.metrics["active_fraction"] * mask.sum(), mask),
        }
        if "ref_logprobs" in batch:
            means["kl"] = (out.metrics["kl"] * known.sum(), known)
        low, high = self._clipped(batch, out, known, advantages)
        # One ratio a rollout is one value a rollout, as in TRL.
        weight = known if low.shape[1] > 1 else self._computed(out).any(-1, keepdim=True).to(mask.dtype)
        if isinstance(objective.surrogate, Clip):
            means["clip_ratio/low_mean"] = (low * weight, weight)
            means["clip_ratio/high_mean"] = (high * weight, weight)
            means["clip_ratio/region_mean"] = ((low + high) * weight, weight)
        elif isinstance(objective.surrogate, Cispo):
            means["cispo_clip_ratio"] = (high * weight, weight)
        sums = torch.stack([torch.stack([values.sum(), count.sum()]) for values, count in means.values()])
        for name, (total, count) in zip(means, self.accelerator.reduce(sums, reduction="sum").tolist(), strict=True):
            # Without a token TRL's means are 0; a polarity without one is left out of the log's mean.
            nothing = float("nan") if name.endswith(("/positive", "/negative")) else 0.0
            metrics[name].append(total / count if count else nothing)
        metrics["weight_beta"].append(out.metrics["weight"].item())
        if isinstance(objective.surrogate, Clip):
            per_rollout = torch.stack([(x * weight).sum(-1) / weight.sum(-1) for x in (low, high)], dim=-1)
            lows, highs = self.accelerator.gather(per_rollout).unbind(-1)
            metrics["clip_ratio/low_min"].append(nanmin(lows).item())
            metrics["clip_ratio/high_max"].append(nanmax(highs).item())
        if "aux_loss" in out.metrics:
            aux_loss = self.accelerator.gather_for_metrics(out.metrics["aux_loss"])
            metrics["aux_loss"].append(aux_loss.mean().item())
        if objective.entropy_coef:
            policy_loss = self._policy_loss(mode == "train", inputs, mask, out)
            metrics["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
            if mode == "train" and self.accelerator.sync_gradients:
                metrics["entropy_coef"].append(objective.entropy_coef)

    def _computed(self, out: PolicyLossOutput) -> Tensor:
        """Where there are statistics, bool [B, T]: with statistics="active" not at every token."""
        if self.args.head_statistics == "all":
            return torch.ones_like(out.weights, dtype=torch.bool)
        # The others have no weight, and 0 for both; so has a dropped token of probability 1, which is left out too.
        return (out.weights != 0) | (out.logprobs != 0) | (out.entropy != 0)

    def _clipped(
        self, batch: Mapping[str, Tensor], out: PolicyLossOutput, mask: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """1 where the lower or the upper bound clips, [B, T], or [B, 1] for a ratio per rollout."""
        objective = self.policy_objective
        gap = (out.logprobs - batch.get("old_logprobs", out.logprobs)) * mask
        if objective.ratio_level != "token":
            gap = gap.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
            advantages = advantages[:, :1]
        ratio = gap.exp()
        lowest, highest = ratio_bounds(objective)
        return ((ratio < lowest) & (advantages < 0)).float(), ((ratio > highest) & (advantages > 0)).float()
