"""CustomSurrogate: every built-in surrogate written as one is itself, on every route; what it declares is checked."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from batches import INTERPRETED, largest_error, random_batch, run

import a3po_kernels as ak
from a3po_kernels import CustomSurrogate, Objective

# -- the built-in surrogates, as somebody would write them ------------------------------------------------------------


def clip(t, low=0.2, high=0.28, dual=None, delta=None):
    free = -t.advantages * (t.ratio if delta is None else t.ratio.clamp(max=delta))
    loss = torch.maximum(free, -t.advantages * t.ratio.clamp(1 - low, 1 + high))
    return loss if dual is None else torch.where(t.advantages < 0, loss.minimum(-t.advantages * dual), loss)


def dual_clip(t):
    return clip(t, dual=1.1)


def two_sided(t):
    return clip(t, delta=1.15)


def sequence(t):
    ratio = t.rollout_mean(t.log_ratio).clamp(-20, 20).exp()
    return torch.maximum(-t.advantages * ratio, -t.advantages * ratio.clamp(0.8, 1.2))


def cispo(t):
    return -t.ratio.clamp(max=1.28).detach() * t.advantages * t.logprobs


def sapo(t):
    tau = 1.0 + 0.05 * (t.advantages <= 0).to(t.advantages.dtype)
    return -t.advantages * 4 / tau * torch.sigmoid(tau * (t.ratio - 1))


def reinforce(t):
    return -t.advantages * t.logprobs


PAIRS = {
    "clip": (ak.dapo(), clip, "token"),
    "dual clip": (ak.dapo(dual_clip=1.1), dual_clip, "token"),
    "delta": (ak.dapo(delta=1.15), two_sided, "token"),
    "sequence": (ak.gspo(), sequence, "rollout"),
    "cispo": (ak.cispo(kl_coef=0.1), cispo, "token"),
    "sapo": (ak.sapo(entropy_coef=0.05), sapo, "token"),
    "reinforce": (Objective(surrogate=ak.Reinforce(), kl_coef=0.05, kl_estimator="k3-ratio"), reinforce, "token"),
    "a3po": (ak.a3po(), clip, "token"),
    "fork_tokens": (ak.fork_tokens(ratio=0.4), clip, "token"),
    "psr": (ak.psr(epsilon_high=0.28), clip, "token"),
}  # fmt: skip


def as_custom(name):
    built_in, function, depends_on = PAIRS[name]
    return built_in, replace(built_in, surrogate=CustomSurrogate(function, depends_on), ratio_level="token")


def as_linear(batch, **options):
    """linear_policy_loss of logits that are hidden @ I: (output, gradients of hidden and weight)."""
    hidden = batch.logits.clone().requires_grad_()
    weight = torch.eye(hidden.shape[-1], dtype=hidden.dtype, device=hidden.device, requires_grad=True)
    out = ak.linear_policy_loss(hidden, weight, batch.targets, batch.advantages, **{**batch.keywords, **options})
    out.loss.backward()
    return out, hidden.grad, weight.grad


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_built_in_surrogates_written_as_functions(name, packed, backend, device):
    """Loss, gradient, weights and metrics on the logits, the linear head's routes and the log-probs."""
    if INTERPRETED and (packed or name not in ("clip", "sequence", "fork_tokens")):
        pytest.skip("the interpreter is slow; the function is PyTorch")
    built_in, custom = as_custom(name)
    batch = random_batch(3, rollouts=6, dtype=torch.float64, device=device)
    batch = batch.packed() if packed else batch
    options = {"min_p_logprobs": None, "backend": backend, "step": 5}
    expected, truth = run(ak, batch, built_in, **options)
    found, gradient = run(ak, batch, custom, **options)
    assert found.route == "two-stage"
    results = [(found, gradient)]
    routes = [{"route": "recompute"}, {"route": "one-pass"}, {"max_chunk_bytes": 8 * 37 * 23}, {"statistics": "active"}]
    for keywords in routes:
        out, d_hidden, d_weight = as_linear(batch, objective=custom, **options, **keywords)
        theirs, _, weight_truth = as_linear(batch, objective=built_in, **options, **keywords)
        # A function may have a gradient where the advantage is 0, so that fewer rows can be left out.
        assert out.route == theirs.route and largest_error(d_weight, weight_truth) < 1e-12
        if "statistics" in keywords:
            out = out._replace(metrics=expected.metrics)  # means over the computed tokens, of which there are more
        results.append((out, d_hidden))
    for out, gradient in results:
        assert largest_error(out.loss, expected.loss) < 1e-12 and largest_error(gradient, truth) < 1e-12
        assert torch.equal(out.weights, expected.weights)
        for key in ("kl", "approx_kl", "active_fraction", "token_count", "weight"):
            torch.testing.assert_close(out.metrics[key], expected.metrics[key], rtol=1e-12, atol=1e-14)
    keywords = {k: v for k, v in batch.keywords.items() if k not in ("min_p_logprobs", "old_entropy")}
    keywords["mask"] = keywords["mask"] & (batch.targets != -100)  # no targets are given there
    logp, entropy = (x.clone().requires_grad_() for x in (expected.logprobs, expected.entropy))

    def on_logprobs(objective):
        out = ak.logprob_policy_loss(
            logp, batch.advantages, objective=objective, entropy=entropy, **keywords, backend=backend, step=5
        )
        return out.loss, *torch.autograd.grad(out.loss, (logp, entropy), allow_unused=True, materialize_grads=True)

    for mine, theirs in zip(on_logprobs(custom), on_logprobs(built_in), strict=True):
        assert largest_error(mine, theirs) < 1e-12


def test_everything_that_a_function_may_read(backend, device):
    """Gradients through log-probs, entropy and rollout sums, against autograd through plain PyTorch."""
    batch = random_batch(9, rollouts=5, dtype=torch.float64, device=device)
    tokens = batch.keywords["mask"] & (batch.targets != -100)

    def function(t):
        gap = t.logprobs - t.ref_logprobs
        entropy = t.rollout_mean(t.entropy)
        return t.advantages * t.ratio * entropy + gap.square() * t.weights + t.rollout_sum(gap) * t.polarity

    objective = Objective(surrogate=CustomSurrogate(function, "rollout"), aggregation="seq-mean-token-mean")
    keywords = {"min_p_logprobs": None, "importance_weights": None}
    out, gradient = run(ak, batch, objective, backend=backend, **keywords)

    logits = batch.logits.clone().masked_fill(~tokens.unsqueeze(-1), 0.0).requires_grad_()
    x = torch.log_softmax(logits, -1)
    logp = x.gather(-1, batch.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(x.exp() * x).sum(-1)
    old, reference = (batch.keywords[k].masked_fill(~tokens, 0.0) for k in ("old_logprobs", "ref_logprobs"))
    count = tokens.sum(-1, keepdim=True).clamp(min=1)

    def total(values):
        return (values * tokens).sum(-1, keepdim=True)

    advantages = batch.advantages.unsqueeze(-1)
    gap = logp - reference
    loss = advantages * (logp - old).exp() * total(entropy) / count + gap.square() + total(gap) * advantages.sign()
    loss = (total(loss) / count).sum() / (tokens.any(-1)).sum()
    loss.backward()
    assert largest_error(out.loss, loss) < 1e-12
    assert largest_error(gradient, logits.grad) < 1e-12


@pytest.mark.parametrize("function", [clip, sequence])
@pytest.mark.parametrize("linear", [False, True])
def test_a_broken_row_has_no_plausible_gradient(function, linear, backend, device):
    """A clamp's derivative of NaN is 0, which would pass for sound; other rollouts keep their numbers."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).to(device)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64).to(device)
    hidden[0, 1] = torch.nan
    targets = torch.zeros(2, 3, dtype=torch.long, device=device)
    keywords = {
        "old_logprobs": torch.full((2, 3), -2.0, device=device), "backend": backend,
        "objective": Objective(surrogate=CustomSurrogate(function, "rollout")),
    }  # fmt: skip
    leaf = (hidden if linear else hidden @ weight.T).clone().requires_grad_()
    advantages = torch.ones(2, device=device)
    if linear:
        found = ak.linear_policy_loss(leaf, weight, targets, advantages, **keywords)
    else:
        found = ak.policy_loss(leaf, targets, advantages, **keywords)
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    assert found.loss.isnan() and gradient[0, 1].isnan().all()
    assert gradient[1].isfinite().all() and gradient[1].any()


def test_a_function_that_is_nan_elsewhere(backend, device):
    """What it gives for rows that are no token, or for dropped ones, reaches neither the loss nor a gradient."""
    batch = random_batch(4, dtype=torch.float64, device=device)

    def fragile(t):
        return -t.advantages * (t.old_logprobs.abs() / t.old_logprobs.abs()) * t.logprobs / t.mask  # 0 / 0

    objective = replace(ak.psr(), surrogate=CustomSurrogate(fragile))
    plain = replace(ak.psr(), surrogate=ak.Reinforce())
    out, gradient = run(ak, batch, objective, backend=backend, min_p_logprobs=None)
    expected, truth = run(ak, batch, plain, backend=backend, min_p_logprobs=None)
    assert largest_error(out.loss, expected.loss) < 1e-12 and largest_error(gradient, truth) < 1e-12
    assert gradient.any()


# -- what it declares -------------------------------------------------------------------------------------------------


def a_rollout_sum(t):
    return t.advantages * t.rollout_sum(t.logprobs)


def a_batch_mean(t):
    return (t.advantages - t.advantages.mean()) * t.logprobs


def a_selected_share(t):
    return -t.advantages * t.logprobs / (1 + t.selected.sum())


@pytest.mark.parametrize(
    ("function", "declared"),
    [(a_rollout_sum, "token"), (sequence, "token"), (a_batch_mean, "token"), (a_batch_mean, "rollout"),
     (a_selected_share, "rollout")],
)  # fmt: skip
def test_a_wrong_declaration_is_found(function, declared, backend, device):
    batch = random_batch(2, dtype=torch.float32, device=device)
    for linear in (False, True):
        objective = Objective(surrogate=CustomSurrogate(function, declared))
        with pytest.raises(ValueError, match=f"depends_on='{declared}' depends on other tokens"):
            if linear:
                as_linear(batch, objective=objective, min_p_logprobs=None, backend=backend)
            else:
                run(ak, batch, objective, min_p_logprobs=None, backend=backend)


def test_the_check_runs_once(backend, device):
    calls = []

    def counted(t):
        calls.append(t.mask.numel())
        return -t.advantages * t.ratio

    batch = random_batch(2, dtype=torch.float32, device=device)
    objective = Objective(surrogate=CustomSurrogate(counted))
    run(ak, batch, objective, min_p_logprobs=None, backend=backend)
    first = len(calls)
    run(ak, batch, objective, min_p_logprobs=None, backend=backend)
    assert first > 2 and len(calls) == first + 1


def test_whole_units_stay_together(backend, device):
    """A rollout's function is never given part of a rollout, a batch's never part of the batch."""
    batch = random_batch(6, rollouts=6, dtype=torch.float64, device=device)
    options = {"min_p_logprobs": None, "backend": backend}
    small = {"max_chunk_bytes": 8 * 37 * 13}
    rollout = Objective(surrogate=CustomSurrogate(a_rollout_sum, "rollout"))
    whole, truth, _ = as_linear(batch, objective=rollout, route="recompute", **options)
    cut, gradient, _ = as_linear(batch, objective=rollout, route="one-pass", **small, **options)
    assert largest_error(cut.loss, whole.loss) < 1e-12 and largest_error(gradient, truth) < 1e-12
    everything = Objective(surrogate=CustomSurrogate(a_batch_mean, "batch"))
    assert as_linear(batch, objective=everything, **small, **options)[0].route == "recompute"
    with pytest.raises(ValueError, match="needs a chunk that holds a whole batch"):
        as_linear(batch, objective=everything, route="one-pass", **small, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CustomSurrogate(1.0), TypeError, "loss must be a function"),
        (lambda: CustomSurrogate(clip, "tokens"), ValueError, "depends_on must be one of token, rollout, batch"),
        (lambda: Objective(surrogate=CustomSurrogate(clip), ratio_level="sequence"), ValueError, "rollout_mean"),
        (lambda: replace(ak.lp_reg(), surrogate=CustomSurrogate(clip)), ValueError, "low_probability"),
    ],
)
def test_wrong_compositions(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t: t.logprobs.sum(), r"must give a floating-point tensor \[N\] = .*got \[\] of"),
        (lambda t: t.logprobs > 0, r"got \[8\] of torch.bool"),
        (lambda t: 1.0, "got float"),
    ],
)
def test_wrong_results_are_named(function, message, backend, device):
    batch = random_batch(2, dtype=torch.float32, device=device)
    objective = Objective(surrogate=CustomSurrogate(function))
    with pytest.raises(ValueError, match=message):
        run(ak, batch, objective, min_p_logprobs=None, backend=backend)


def test_what_was_not_given_is_named(backend, device):
    batch = random_batch(2, dtype=torch.float32, device=device)
    to_reference = Objective(surrogate=CustomSurrogate(lambda t: t.advantages * (t.logprobs - t.ref_logprobs)))
    with pytest.raises(ValueError, match="reads ref_logprobs, which was not given"):
        run(ak, batch, to_reference, min_p_logprobs=None, ref_logprobs=None, backend=backend)
    with_entropy = Objective(surrogate=CustomSurrogate(lambda t: t.advantages * t.entropy * t.logprobs))
    logp = -torch.rand(2, 3, device=device)
    with pytest.raises(ValueError, match="reads entropy, which was not given"):
        ak.logprob_policy_loss(logp, torch.ones(2, device=device), objective=with_entropy, backend=backend)


def test_one_launch_is_closed_to_it(backend, device):
    batch = random_batch(2, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="autograd finds the coefficients of a CustomSurrogate"):
        run(ak, batch, as_custom("clip")[1], min_p_logprobs=None, backend=backend, route="one-launch")


def test_pickle_copy_and_modules(backend, device):
    """It pickles when its function does, compares by it, and goes into the modules."""
    _, objective = as_custom("clip")
    batch = random_batch(2, dtype=torch.float32, device=device)
    keywords = {k: v for k, v in batch.keywords.items() if k != "min_p_logprobs"}
    module = ak.PolicyLoss(objective, backend=backend)
    expected = module(batch.logits, batch.targets, batch.advantages, **keywords).loss
    for again in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):
        assert again == objective
        module = ak.PolicyLoss(again, backend=backend)
        assert torch.equal(module(batch.logits, batch.targets, batch.advantages, **keywords).loss, expected)
    assert as_custom("clip")[1] == objective and hash(objective) == hash(as_custom("clip")[1])


@pytest.mark.parametrize("name", ["clip", "sequence"])
@pytest.mark.parametrize("linear", [False, True])
def test_under_compile(name, linear, backend, device):
    if INTERPRETED:
        pytest.skip("what is compiled here are not the kernels")
    _, objective = as_custom(name)
    batch = random_batch(3, dtype=torch.float32, device=device)
    keywords = {k: v for k, v in batch.keywords.items() if k != "min_p_logprobs"}
    weight = torch.eye(batch.logits.shape[-1], device=device)

    def step(logits):
        options = {"objective": objective, "backend": backend, **keywords}
        if linear:
            out = ak.linear_policy_loss(logits * 1.0, weight, batch.targets, batch.advantages, **options)
        else:
            out = ak.policy_loss(logits * 1.0, batch.targets, batch.advantages, **options)
        return out.loss, out.metrics["active_fraction"]

    logits = batch.logits.clone().requires_grad_()
    loss, active = step(logits)
    (expected,) = torch.autograd.grad(loss, logits)
    torch._dynamo.reset()
    found, share = torch.compile(step, fullgraph=True, backend="aot_eager")(logits)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(share, active)


def test_a_double_backward_raises_and_no_grad_gives_values(backend, device):
    batch = random_batch(2, dtype=torch.float64, device=device)
    keywords = {k: v for k, v in batch.keywords.items() if k != "min_p_logprobs"}
    options = {"objective": as_custom("clip")[1], "backend": backend, **keywords}
    logits = batch.logits.clone().requires_grad_()
    loss = ak.policy_loss(logits, batch.targets, batch.advantages, **options).loss
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.nan_to_num().pow(2).sum(), logits, allow_unused=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = ak.policy_loss(logits, batch.targets, batch.advantages, **options)
        assert torch.equal(out.loss, loss) and not out.loss.requires_grad
