"""logprob_policy_loss: the same loss and gradient as policy_loss has, from log-probs that something else computed."""

from __future__ import annotations

import pytest
import torch

import a3po_kernels as ak

OBJECTIVES = {
    "a3po": ak.a3po(), "a3po-current": ak.a3po(source="current"),
    "dapo-entropy": ak.dapo(entropy_coef=0.1, kl_coef=0.2),
    "fork_tokens": ak.fork_tokens(), "lp_reg": ak.lp_reg(quantile=0.5), "gspo": ak.gspo(), "cispo": ak.cispo(),
    "sapo": ak.sapo(), "psr": ak.psr(), "dr_grpo": ak.dr_grpo(),
}  # fmt: skip


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 11, 17, generator=generator, dtype=dtype)
    targets = torch.randint(0, 17, (4, 11), generator=generator)
    logp = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    mask = torch.arange(11) < torch.tensor([11, 3, 0, 7])[:, None]
    noise = torch.randn(3, 4, 11, generator=generator, dtype=dtype)
    return logits, targets, {
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.2], dtype=dtype), "mask": mask,
        "old_logprobs": logp - 0.3 * noise[0], "ref_logprobs": logp + 0.2 * noise[1],
        "min_p_logprobs": logp + noise[2], "step": 20,
    }  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_policy_loss_from_the_logprobs_on(name):
    logits, targets, keywords = batch()
    whole, part = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = ak.policy_loss(whole, targets, objective=OBJECTIVES[name], **keywords)
    expected.loss.backward()
    # NaN where there is no token must not matter.
    stats = ak.token_logprobs(part, targets)
    hole = ~keywords["mask"]
    out = ak.logprob_policy_loss(
        stats.logprobs.masked_fill(hole, float("nan")), objective=OBJECTIVES[name],
        entropy=stats.entropy.masked_fill(hole, float("nan")), **keywords,
    )  # fmt: skip
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(part.grad, whole.grad, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(out.weights, expected.weights)
    assert out.route == "logprobs"
    for key, value in expected.metrics.items():
        torch.testing.assert_close(out.metrics[key], value, atol=1e-13, rtol=1e-12)


def test_packed_rollouts():
    logits, targets, keywords = batch()
    mask = keywords.pop("mask")
    lengths = mask.sum(1)
    packed = {k: v[mask] if torch.is_tensor(v) and v.ndim == 2 else v for k, v in keywords.items()}
    logp = ak.token_logprobs(logits, targets).logprobs
    padded = ak.logprob_policy_loss(logp, objective=ak.gspo(), mask=mask, **keywords)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    out = ak.logprob_policy_loss(logp[mask], objective=ak.gspo(), cu_seqlens=cu_seqlens, **packed)
    torch.testing.assert_close(out.loss, padded.loss, atol=1e-14, rtol=1e-14)


def test_without_an_entropy():
    logits, targets, keywords = batch()
    logp = ak.token_logprobs(logits, targets).logprobs
    out = ak.logprob_policy_loss(logp, objective=ak.a3po(), **keywords)
    assert out.metrics["entropy"].isnan() and not out.entropy.any()
    for objective in (ak.fork_tokens(), ak.dapo(entropy_coef=0.1), ak.a3po(metric="entropy", source="current")):
        with pytest.raises(ValueError, match="entropy"):
            ak.logprob_policy_loss(logp, objective=objective, **keywords)
    # The old policy's entropy is something else, and may be given.
    out = ak.logprob_policy_loss(logp, objective=ak.a3po(metric="entropy"), old_entropy=logp.abs(), **keywords)
    assert out.loss.isfinite()


def test_mistakes_are_named():
    logits, targets, keywords = batch()
    logp = ak.token_logprobs(logits, targets).logprobs
    with pytest.raises(ValueError, match="min_p_logprobs"):
        ak.logprob_policy_loss(logp, objective=ak.lp_reg(), advantages=keywords["advantages"])
    with pytest.raises(ValueError, match="entropy must have shape"):
        ak.logprob_policy_loss(logp, objective=ak.dapo(), entropy=logp[:2], **keywords)
    with pytest.raises(ValueError, match=r"logprobs must have shape \[B, T\]"):
        ak.logprob_policy_loss(logp[0], objective=ak.dapo(), **keywords)
    with pytest.raises(ValueError, match=r"objective.*got 'dopa'"):
        ak.logprob_policy_loss(logp, objective="dopa", **keywords)
