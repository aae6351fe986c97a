"""Helpers of the reference's own tests: examples whose numbers can be worked out by hand.

The vocabulary is of two, logits [log p, log(1 - p)] and target 0, so that logp = log p; old_logprobs = log p - log r,
so that the ratio is r. On-policy (r = 1) the clip's loss of a token is just -A.
"""

import math

import torch

import reference as ref

F64 = torch.float64
INF, NAN = math.inf, math.nan


def close(actual, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(torch.as_tensor(actual, dtype=F64), expected, rtol=tol, atol=tol, equal_nan=True)


def random_logits(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, generator=generator, dtype=F64)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


def binary(p, r=None):
    """Logits, targets and (with r) old log-probabilities of tokens with probability p and ratio r."""
    p = torch.as_tensor(p, dtype=F64)
    logits = torch.stack([p.log(), (1 - p).log()], -1).requires_grad_()
    targets = torch.zeros(p.shape, dtype=torch.long)
    return logits, targets, None if r is None else p.log() - torch.as_tensor(r, dtype=F64).log()


def rollout_loss(objective, p, advantages, r=None, **kwargs):
    """Loss and dL/dlogp. With V = 2, dL/dz_0 = dL/dlogp (1 - p) + dL/dH p(1 - p)(...); no entropy term here."""
    logits, targets, old = binary(p, r)
    out = ref.policy_loss(
        logits, targets, torch.as_tensor(advantages, dtype=F64), objective=objective, old_logprobs=old, **kwargs
    )
    out.loss.backward()
    return out, logits.grad[..., 0] / (1 - torch.as_tensor(p, dtype=F64))
