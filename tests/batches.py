"""Random batches shared by the tests, and comparisons with the reference."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

import a3po_kernels
import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PRESETS = (
    "grpo", "dr_grpo", "dapo", "psr", "nsr", "w_reinforce", "fork_tokens", "lp_reg", "a3po", "gspo", "cispo", "sapo",
)  # fmt: skip
NEW_PRESETS = ("dppo", "vespo", "gmpo", "gspo_token", "luspo", "topr", "kl_cov", "clip_cov")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class RandomBatch:
    """A padded batch and the same tokens packed; every row that is no token holds NaN."""

    logits: Tensor
    targets: Tensor
    advantages: Tensor
    keywords: dict[str, Tensor]
    lengths: list[int] = field(default_factory=list)

    def packed(self) -> RandomBatch:
        """The first `lengths` tokens of each rollout, one after another, with cu_seqlens."""
        rows = torch.cat([torch.arange(n) + i * self.targets.shape[1] for i, n in enumerate(self.lengths)])
        rows = rows.to(self.targets.device)

        def pack(values):
            if isinstance(values, dict):
                return {name: pack(value) for name, value in values.items()}
            return values.flatten(0, 1)[rows] if values.shape[:2] == self.targets.shape else values

        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        keywords = {name: pack(value) for name, value in self.keywords.items()}
        keywords["cu_seqlens"] = ends.to(self.targets.device)
        return RandomBatch(pack(self.logits), pack(self.targets), pack(self.advantages), keywords, self.lengths)


def random_batch(
    seed: int, *, rollouts=5, length=11, vocabulary=37, dtype=torch.float64, device="cpu", per_token=False, scale=2.0
) -> RandomBatch:
    """Rollouts of different lengths (one of them empty), of every polarity, near but off the current policy."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = (scale * normal(rollouts, length, vocabulary)).to(dtype)
    targets = torch.randint(0, vocabulary, (rollouts, length), generator=generator)
    lengths = [int(n) for n in torch.randint(1, length + 1, (rollouts,), generator=generator)]
    lengths[0], lengths[-1] = length, 0
    mask = torch.arange(length)[None, :] < torch.tensor(lengths)[:, None]
    mask = mask & (torch.rand(rollouts, length, generator=generator) > 0.15)  # tool calls inside a rollout
    ignored = torch.rand(rollouts, length, generator=generator) > 0.95
    targets = targets.masked_fill(ignored, -100)
    signs = torch.tensor([1.0, -1.0, 0.0])[torch.arange(rollouts) % 3].double()
    advantages = signs * (0.5 + torch.rand(rollouts, generator=generator).double())
    if per_token:
        advantages = normal(rollouts, length)
    current = torch.log_softmax(logits.double(), -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    tokens = mask & ~ignored
    keywords = {
        "old_logprobs": (current + 0.3 * normal(rollouts, length)).clamp(max=0.0),
        "ref_logprobs": (current + 0.2 * normal(rollouts, length)).clamp(max=0.0),
        "old_entropy": normal(rollouts, length).abs(),
        "min_p_logprobs": (current + 0.5 * normal(rollouts, length)).clamp(max=0.0),
        "importance_weights": 0.5 + torch.rand(rollouts, length, generator=generator).double(),
    }
    keywords = {name: value.masked_fill(~tokens, torch.nan).to(device) for name, value in keywords.items()}
    logits = logits.masked_fill(~tokens.unsqueeze(-1), torch.nan)
    keywords["mask"] = mask.to(device)
    return RandomBatch(logits.to(device), targets.to(device), advantages.to(device), keywords, lengths)


def unlikely(batch: RandomBatch, nats: float) -> RandomBatch:
    """The batch, its targets and all its log-probs that much less likely: room above them for extreme ratios."""
    rows = batch.targets.clamp(min=0).unsqueeze(-1)
    batch.logits.scatter_add_(-1, rows, torch.full_like(rows, -nats, dtype=batch.logits.dtype))
    for name in batch.keywords.keys() & {"old_logprobs", "ref_logprobs", "min_p_logprobs"}:
        batch.keywords[name] -= nats
    return batch


def preset(name: str, **overrides):
    """The same preset of the package and of the reference; lp_reg with a quantile that selects something here.

    clip_cov takes all candidates, for which of more it draws is not the reference's.
    """
    if name == "lp_reg":
        overrides.setdefault("quantile", 0.3)
    if name == "clip_cov":
        overrides.setdefault("ratio", 1.0)
    return getattr(a3po_kernels, name)(**overrides), getattr(reference, name)(**overrides)


def keywords_for(name: str, keywords: dict[str, Tensor]) -> dict[str, Tensor]:
    """All keywords, less those that only Lp-Reg reads for the others."""
    return {key: value for key, value in keywords.items() if name == "lp_reg" or key != "min_p_logprobs"}


def run(module, batch: RandomBatch, objective, *, double=False, **keywords):
    """(output, gradient of the logits) of policy_loss; `double` runs it on fp64 copies on the CPU (the reference)."""

    def convert(value):
        if isinstance(value, dict):
            return {name: convert(part) for name, part in value.items()}
        if not isinstance(value, Tensor) or not double:
            return value
        return value.cpu().double() if value.is_floating_point() else value.cpu()

    logits = convert(batch.logits).detach().clone().requires_grad_()
    keywords = {name: convert(value) for name, value in {**batch.keywords, **keywords}.items()}
    output = module.policy_loss(
        logits, convert(batch.targets), convert(batch.advantages), objective=objective, **keywords
    )
    output.loss.backward()
    return output, logits.grad


def largest_error(got: Tensor, expected: Tensor) -> float:
    """The largest absolute difference in fp64; NaN only where both are NaN."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    assert torch.equal(got.isnan(), expected.isnan()), "NaN in different places"
    equal = (got == expected) | got.isnan()
    return (got - expected).masked_fill(equal, 0.0).abs().max().item() if got.numel() else 0.0


def assert_outputs(output, gradients, expected, expected_gradients, tolerance=1e-12) -> None:
    """Loss, gradients, per-token outputs and every metric agree, the tolerance relative to what is above 1."""

    def check(what, got, truth):
        truth = torch.as_tensor(truth)
        size = max(1.0, truth[truth.isfinite()].abs().max().item()) if truth.isfinite().any() else 1.0
        error = largest_error(torch.as_tensor(got), truth)
        assert error <= tolerance * size, f"{what}: {error:.3g}"

    check("loss", output.loss, expected.loss)
    for got, truth in zip(gradients, expected_gradients, strict=True):
        check("gradient", got, truth)
    for part in ("logprobs", "entropy", "weights"):
        check(part, getattr(output, part), getattr(expected, part))
    assert set(output.metrics) == set(expected.metrics)
    for key, value in expected.metrics.items():
        check(key, output.metrics[key], value)
