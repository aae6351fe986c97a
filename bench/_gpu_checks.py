"""What bench.on_gpu checks in its own process: every preset by every route against fp64, and determinism."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import a3po_kernels
import reference
from reference import loss as reference_loss
from reference.batch import read_batch

PRESETS = (
    "grpo", "dr_grpo", "dapo", "psr", "nsr", "w_reinforce", "fork_tokens", "lp_reg", "a3po", "gspo", "cispo", "sapo",
)  # fmt: skip
LOGITS_ROUTES = ("logits", "logits in place", "logits one-launch", "logits two-stage")
ROUTES = (*LOGITS_ROUTES, "linear one-pass", "linear recompute")
# Their coefficients depend on other tokens' current statistics: policy_loss refuses route="one-launch".
TWO_STAGES = ("fork_tokens", "lp_reg", "gspo")
WHOLE_BATCH = ("fork_tokens", "lp_reg")  # in one chunk, to be formed in one pass
SLICE = 32  # rows (and columns of the weight's gradient) that are compared
# Twice what rounding the output once to this dtype may cost.
GRADIENT_BOUND = {torch.bfloat16: 2**-8, torch.float32: 1e-5}


@dataclass
class Case:
    """A batch, and in fp64 from its very logits: log-probs, entropy [N] and what a slice of the gradient needs."""

    logits: Tensor
    hidden: Tensor
    weight: Tensor
    batch: dict
    logprobs: Tensor
    entropy: Tensor
    log_p: Tensor  # [SLICE, V], of `rows`
    probabilities: Tensor  # [N, SLICE], of `columns`
    rows: Tensor
    columns: Tensor


def make_case(rows: int, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    rollouts, length = 8, rows // 8
    hidden = normal(rollouts, length, width).to(dtype)
    weight = normal(vocabulary, width).mul_(2 / width**0.5).to(dtype)
    logits = hidden @ weight.t()
    targets = torch.randint(0, vocabulary, (rollouts, length), generator=generator, device=device)
    chosen = torch.randperm(rows, generator=generator, device=device)[:SLICE].sort().values
    columns = torch.randperm(vocabulary, generator=generator, device=device)[:SLICE].sort().values
    logprobs, entropy, shares = [], [], []
    for part, index in zip(logits.flatten(0, 1).split(256), targets.flatten().split(256), strict=True):
        log_p = torch.log_softmax(part.double(), -1)
        logprobs.append(log_p.gather(1, index.unsqueeze(1)).squeeze(1))
        entropy.append(-(log_p.exp() * log_p).sum(1))
        shares.append(log_p[:, columns].exp())
    logprobs, entropy = torch.cat(logprobs), torch.cat(entropy)
    shape = targets.shape
    old = (logprobs + 0.15 * normal(rows)).clamp(max=0.0).view(shape).float()
    batch = {
        "targets": targets,
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 2.0, -2.0, 1.0], device=device),
        "old_logprobs": old,
        "old_entropy": (entropy + 0.1 * normal(rows)).view(shape).float(),
        "min_p_logprobs": (old + 0.2 * normal(rows).view(shape)).clamp(max=0.0),
    }
    log_p = torch.log_softmax(logits.flatten(0, 1)[chosen].double(), -1)
    return Case(logits, hidden, weight, batch, logprobs, entropy, log_p, torch.cat(shares), chosen, columns)


def expected(case: Case, preset: str) -> tuple[float, Tensor, Tensor]:
    """By reference/ in fp64: the loss, and its gradient with respect to every log-prob and entropy [N]."""
    objective = getattr(reference, preset)()
    batch = {name: value.cpu() for name, value in case.batch.items()}
    read = read_batch(
        batch["targets"], None, None, -100, torch.float64, advantages=batch["advantages"], polarity=None,
        importance_weights=None, ref_logprobs=None, old_logprobs=batch["old_logprobs"],
        old_entropy=batch["old_entropy"], min_p_logprobs=batch["min_p_logprobs"],
    )  # fmt: skip
    leaves = [x.cpu().clone().requires_grad_() for x in (case.logprobs, case.entropy)]
    shaping = reference_loss.shape_tokens(objective, read, *(x.detach() for x in leaves), 0)
    scale = reference_loss.loss_denominator_arguments(objective, batch["targets"], None, None)
    value = reference_loss.objective_value(objective, read, shaping, *leaves, *scale)
    gradients = torch.autograd.grad(value, leaves)
    return value.item(), *(g.to(case.logprobs.device) for g in gradients)


def relative(found: Tensor, right: Tensor) -> float:
    """Frobenius norm of the error over that of the right value (the error itself where that is 0)."""
    norm = right.norm().item()
    return (found.double() - right).norm().item() / (norm or 1.0)


def logits_loss(case: Case, route: str, **options) -> tuple[a3po_kernels.PolicyLossOutput, Tensor]:
    """policy_loss by one of LOGITS_ROUTES, and the leaf that gets the gradient."""
    kind = route.removeprefix("logits").strip()
    leaf = case.logits.clone().requires_grad_()
    source = leaf.view_as(leaf)  # a leaf itself may not be written in place
    out = a3po_kernels.policy_loss(
        source, case.batch["targets"], case.batch["advantages"], inplace_backward=kind == "in place",
        route=kind if kind in ("one-launch", "two-stage") else "auto", **options,
    )  # fmt: skip
    return out, leaf


def chunk_bytes(case: Case, preset: str) -> int:
    """What a one-pass chunk takes: the batch where it must be whole, else two of its eight rollouts."""
    whole = case.logits.numel() * case.logits.element_size()
    return whole if preset in WHOLE_BATCH else whole // 4


def refused(case: Case, preset: str, route: str) -> dict:
    """That policy_loss says no where one launch cannot know a token's coefficient."""
    said = None
    try:
        objective = getattr(a3po_kernels, preset)()
        given = {name: case.batch[name] for name in ("old_logprobs", "min_p_logprobs")}
        logits_loss(case, route, objective=objective, **given)
    except ValueError as error:
        said = str(error)
    return {"preset": preset, "route": route, "refused": said, "passed": said is not None and "one-launch" in said}


def check(case: Case, preset: str, route: str, right: tuple[float, Tensor, Tensor]) -> dict:
    """One preset by one route against `right`, its expected(): errors, their bounds, and whether all hold."""
    if route == "logits one-launch" and preset in TWO_STAGES:
        return refused(case, preset, route)
    loss, d_logp, d_entropy = right
    objective = getattr(a3po_kernels, preset)()
    targets, advantages = case.batch["targets"], case.batch["advantages"]
    rest = {name: case.batch[name] for name in ("old_logprobs", "old_entropy", "min_p_logprobs")}
    flat = targets.flatten()
    # dz = g_l (onehot - p) - g_H p (log p + H), on the slice of rows.
    p = case.log_p.exp()
    rows = -d_logp[case.rows, None] * p - d_entropy[case.rows, None] * p * (case.log_p + case.entropy[case.rows, None])
    rows.scatter_add_(1, flat[case.rows, None], d_logp[case.rows, None])
    dtype = case.logits.dtype
    if route.startswith("logits"):
        out, leaf = logits_loss(case, route, objective=objective, **rest)
        out.loss.backward()
        errors = {"logits gradient": relative(leaf.grad.flatten(0, 1)[case.rows], rows)}
        statistic_bound = 1e-4
    else:
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        name = route.split()[1]
        out = a3po_kernels.linear_policy_loss(
            hidden, weight, targets, advantages, objective=objective, route=name,
            max_chunk_bytes=chunk_bytes(case, preset), **rest,
        )  # fmt: skip
        out.loss.backward()
        share = case.probabilities
        columns = -d_logp[:, None] * share - d_entropy[:, None] * share * (share.log() + case.entropy[:, None])
        columns += d_logp[:, None] * (flat[:, None] == case.columns)
        flat_hidden = case.hidden.flatten(0, 1).double()
        errors = {
            "hidden gradient": relative(hidden.grad.flatten(0, 1)[case.rows], rows @ case.weight.double()),
            "weight gradient": relative(weight.grad[case.columns], columns.t() @ flat_hidden),
        }
        # Its tiles of logits are rounded to the dtype after a sum in another order than the whole product's.
        statistic_bound = 1e-4 if dtype == torch.float32 else 2**-5
    bound = GRADIENT_BOUND[dtype] * (1 if route.startswith("logits") else 2)
    error = (out.logprobs.flatten().double() - case.logprobs).abs().mean().item()
    held = all(value <= bound for value in errors.values()) and error <= statistic_bound
    # A mean over the tokens: what their log-probs lose by rounding either way cancels.
    held = held and abs(out.loss.item() - loss) <= max(statistic_bound / 16, 1e-4)
    forced = route.split(" ", 1)[-1]
    if forced in ("one-launch", "two-stage", "one-pass", "recompute"):
        held = held and out.route == forced
    return {
        "preset": preset, "route": route, "taken": out.route, "loss": out.loss.item(), "loss_fp64": loss,
        "mean_logprob_error": error, "gradient_errors": errors, "gradient_bound": bound, "passed": bool(held),
    }  # fmt: skip


def check_all(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device, presets=PRESETS, routes=ROUTES
) -> list[dict]:
    case = make_case(rows, vocabulary, width, dtype, device)
    found = []
    for preset in presets:
        right = expected(case, preset)
        found += [check(case, preset, route, right) for route in routes]
    return found


def deterministic(rows: int, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Two runs of each route, bit by bit; and some of the rows alone give what they gave among the others."""
    case = make_case(rows, vocabulary, width, dtype, device)
    targets, advantages, old = (case.batch[name] for name in ("targets", "advantages", "old_logprobs"))
    found = []
    for route in ROUTES:

        def run(route=route) -> list[Tensor]:
            common = {"objective": a3po_kernels.a3po(), "old_logprobs": old}
            if route.startswith("logits"):
                out, *leaves = logits_loss(case, route, **common)
            else:
                leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
                out = a3po_kernels.linear_policy_loss(*leaves, targets, advantages, route=route.split()[1], **common)
            out.loss.backward()
            return [out.loss.detach(), out.logprobs, out.entropy, *(leaf.grad for leaf in leaves)]

        first, second = run(), run()
        found.append({"check": f"same bits twice, {route}", "passed": all(map(torch.equal, first, second))})
    whole = a3po_kernels.token_logprobs(case.logits, targets)
    alone = a3po_kernels.token_logprobs(case.logits[2:3, 3:5].contiguous(), targets[2:3, 3:5])
    same = all(torch.equal(a[2:3, 3:5], b) for a, b in zip(whole, alone, strict=True))
    return [*found, {"check": "same bits alone and among other rows", "passed": same}]
