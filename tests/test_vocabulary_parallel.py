"""A vocabulary split over 2 and 4 gloo processes equals one process, and every rank has the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from batches import INTERPRETED, NEW_PRESETS, PRESETS
from ranks import on_ranks
from split_heads import Case, V, bounds, rows_of, run_case, run_cases, same_bits

import a3po_kernels

ROUTES = ("one-pass", "recompute")
BATCH_UNIT = ("fork_tokens", "lp_reg", "kl_cov", "clip_cov")
UNEVEN = {2: ((5, 32), (37, 0), (0, 37)), 4: ((1, 20, 0, 16), (0, 0, 37, 0))}
SHARED = ("loss", "logprobs", "entropy", "weights", "metrics", "d_a")


def _cases(ranks: int) -> list[Case]:
    uneven, empty, *_ = UNEVEN[ranks]
    chunks = {"max_chunk_bytes": 8 * V * 7}  # 7 rows of an even head
    made = []
    for name in (*PRESETS, *NEW_PRESETS):
        for route in ROUTES:
            size = {} if name in BATCH_UNIT and route == "one-pass" else {"max_chunk_bytes": 8 * V * 14}
            made.append(Case(f"{name} {route}", name, packed=route == "recompute", options={"route": route, **size}))
        made.append(Case(f"{name} logits", name, "policy_loss", sizes=uneven, packed=name in PRESETS[::2]))
    for sizes in UNEVEN[ranks]:
        made += [
            Case(f"{sizes} one-pass", "dapo", sizes=sizes, options={"route": "one-pass", **chunks}),
            Case(f"{sizes} recompute", "gspo", sizes=sizes, options={"route": "recompute", **chunks}, told=False),
            Case(f"{sizes} logits", "a3po", "policy_loss", sizes=sizes, told=False),
            Case(f"{sizes} min-p", call="min_p_token_logprobs", sizes=sizes, options={"softcap": 4.0}),
        ]
    every = ("bias", "lora", "temperature")
    for layout in ("replicated", "sequence_sharded"):
        for route in ROUTES:
            options = {"route": route, "softcap": 5.0, "logit_scale": 0.7, **chunks}
            kind = {"layout": layout, "options": options, "sizes": uneven, "padding": 3}
            made += [
                Case(f"{layout} {route} all", "a3po", extras=every, **kind),
                Case(f"{layout} {route} packed", "dapo", extras=("bias",), packed=True, **kind),
                Case(f"{layout} {route} frozen", "grpo", extras=("frozen",), **kind),
                Case(f"{layout} {route} plan", "psr", extras=("plan",), **kind),
                Case(f"{layout} {route} on-policy", "lp_reg", extras=("on_policy",), layout=layout, sizes=uneven,
                     options={"route": route}),
            ]  # fmt: skip
        made.append(Case(f"{layout} log-probs", call="linear_token_logprobs", layout=layout, extras=every))
        made.append(Case(f"{layout} min-p", call="linear_min_p_token_logprobs", layout=layout, sizes=empty))
    for route in ROUTES:
        for reduction in ("reduce_scatter", "partial"):
            options = {"route": route, "grad_hidden": reduction, **chunks}
            made.append(Case(f"{route} {reduction}", "dapo", options=options))
            made.append(Case(f"{route} {reduction} lora", "nsr", options=options, extras=("lora",), packed=True))
    made += [
        Case("main_grad", "dapo", extras=("main_grad",), dtype=torch.float32, options=chunks),
        Case("bf16", "dapo", dtype=torch.bfloat16, options={"route": "one-pass", **chunks}),
        Case("fp16", "grpo", dtype=torch.float16, options={"route": "one-pass", **chunks}),
        Case("log-probs of logits", call="token_logprobs", sizes=uneven, padding=2, extras=("temperature",)),
        Case("in place", call="token_logprobs", options={"inplace_backward": True}),
        Case("active rows", "psr", options={"statistics": "active", "compaction": "exact"}),
        Case("every row", "psr", options={"compaction": "none", "route": "one-pass"}),
    ]
    assert len({case.name for case in made}) == len(made)
    return made if ranks == 2 else made[::2]  # four processes are slow to start on two cores


@pytest.fixture(scope="module")
def results():
    found = {}

    def of(ranks: int):
        if ranks not in found:
            cases = _cases(ranks)
            each = on_ranks(ranks, run_cases, cases)
            found[ranks] = {case.name: [rank[i] for rank in each] for i, case in enumerate(cases)}
        return found[ranks]

    return of


def joined(case: Case, name: str, parts: list, ranks: int) -> torch.Tensor:
    """The whole of what each rank has a part of."""
    if name == "d_hidden":
        if case.layout == "sequence_sharded":
            return torch.cat(parts, -2)
        if case.reduction == "all_reduce":
            return parts[0]
        if case.reduction == "reduce_scatter":
            length = parts[0].shape[-2]
            for rank, part in enumerate(parts):
                mine = rows_of(case, length, rank, ranks)
                assert not part[..., : mine.start, :].any() and not part[..., mine.stop :, :].any()
        return torch.stack(parts).double().sum(0)
    if name in ("d_weight", "d_bias", "d_b", "main_grad", "d_logits"):
        dim = -1 if name == "d_logits" else 0
        pieces = []
        for part, (first, stop) in zip(parts, bounds(case, ranks), strict=True):
            pieces.append(part.narrow(dim, 0, stop - first))
            rest = part.narrow(dim, stop - first, part.shape[dim] - (stop - first))
            assert (rest == (1.0 if name == "main_grad" else 0.0)).all()  # padding has no gradient
        return torch.cat(pieces, dim)
    return parts[0]


def check(case: Case, parts: list, ranks: int) -> None:
    for part in parts:
        assert not isinstance(part, str), part
        assert part["twice"], "another run gives other bits"
    whole = run_case(replace(case, options={k: v for k, v in case.options.items() if k != "backend"}))
    assert set(whole) == set(parts[0]) - {"twice"}
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[case.dtype]
    for name, expected in whole.items():
        each = [part[name] for part in parts]
        if name in SHARED or (name == "d_hidden" and case.layout == "replicated" and case.reduction == "all_reduce"):
            assert all(same_bits(each[0], other) for other in each[1:]), f"{name} differs between the ranks"
        if name == "metrics":
            for key, value in expected.items():
                torch.testing.assert_close(each[0][key], value, rtol=tolerance, atol=tolerance, msg=key)
        elif isinstance(expected, torch.Tensor):
            got = joined(case, name, each, ranks).to(expected.dtype)
            size = max(expected.abs().max().item(), 1e-3) if expected.isfinite().all() and expected.numel() else 1.0
            torch.testing.assert_close(
                got, expected, rtol=tolerance, atol=tolerance * size, msg=lambda m, name=name: f"{name}: {m}"
            )
        elif expected is None:
            assert all(x is None for x in each), name
        elif name == "route" and case.call == "policy_loss":
            assert each[0] == "two-stage"
        else:
            assert each == [expected] * ranks, name


def case_of(name: str, ranks: int) -> Case:
    return next(case for case in _cases(ranks) if case.name == name)


@pytest.mark.skipif(INTERPRETED, reason="natively")
@pytest.mark.parametrize(("ranks", "name"), [(ranks, case.name) for ranks in (2, 4) for case in _cases(ranks)])
def test_split_equals_whole(results, ranks, name):
    check(case_of(name, ranks), results(ranks)[name], ranks)


def compiled() -> list:
    """A whole graph, collectives in it, beside the call as it is."""
    rank, found = dist.get_rank(), []
    for name in ("a3po recompute", "sequence_sharded recompute all", "log-probs of logits"):
        plain = run_case(case_of(name, 2), rank, 2)
        with pytest.MonkeyPatch.context() as patch:
            for call in ("linear_policy_loss", "token_logprobs"):
                whole = torch.compile(getattr(a3po_kernels, call), fullgraph=True, backend="aot_eager")
                patch.setattr(a3po_kernels, call, whole)
            traced = run_case(case_of(name, 2), rank, 2)
        found.append([name for name in plain if not same_bits(plain[name], traced[name])])
    return found


@pytest.mark.skipif(INTERPRETED, reason="natively")
def test_compiled_whole():
    """The same bits, but for what torch.compile sums in another order."""
    for rank in on_ranks(2, compiled):
        assert all(set(different) <= {"metrics", "loss"} for different in rank), rank


# With the Triton kernels, on two processes in the interpreter or on two GPUs: each kernel that knows of parts.
KERNELS = (
    "a3po one-pass", "gspo recompute", "(5, 32) one-pass", "(37, 0) one-pass", "(37, 0) logits", "(5, 32) min-p",
    "replicated one-pass all", "sequence_sharded recompute all", "sequence_sharded one-pass on-policy", "fp16",
    "log-probs of logits", "replicated min-p",
)  # fmt: skip


@pytest.fixture(scope="module")
def by_kernels():
    on = "cpu" if INTERPRETED else "cuda"
    if on == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    cases = [replace(case, options={**case.options, "backend": "triton"})
             for case in map(lambda name: case_of(name, 2), KERNELS)]  # fmt: skip
    each = on_ranks(2, run_cases, cases, on, device=on)
    return {case.name: (case, [rank[i] for rank in each]) for i, case in enumerate(cases)}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "kernels", [pytest.param("triton", marks=pytest.mark.interpreter if INTERPRETED else pytest.mark.cuda)]
)
def test_kernels_on_two_ranks_equal_pytorch_on_one(by_kernels, kernels, name):
    case, parts = by_kernels[name]
    check(case, parts, 2)
