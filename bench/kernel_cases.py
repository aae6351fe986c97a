"""Every kernel of the package in the configurations that bench.machine_code reads: what runs, and what could spill."""

from __future__ import annotations

import triton.language as tl

from a3po_kernels.backends.triton import gradient, one_launch, policy_terms, scaling, selection, statistics, tokens
from a3po_kernels.backends.triton.min_p import finish_min_p_kernel, min_p_kernel
from bench.gpus import LIMIT_VOCABULARY
from bench.kernel_case import Case

_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def _compute(dtype: str):
    return tl.float64 if dtype == "fp64" else tl.float32


def _passes(name: str) -> int | None:
    return {"statistics": 1, "gradient": 2, "one": 2, "min-p": 1}.get(name.split()[0])


def _read_case(
    name: str, kernel=statistics.row_statistics_kernel, dtype: str = "bf16", columns: int = LIMIT_VOCABULARY,
    **constants,
) -> Case:  # fmt: skip
    """A kernel that reads tiles of a row."""
    size = _SIZES[dtype]
    lanes = statistics.lanes_of(columns, size)
    defaults = {
        "temperature_ptr": None, "column_stride": 1, "HAS_SOFTCAP": False, "LOADS": "aligned", "EVEN": True,
        "LANES": lanes, "UNROLL": statistics._UNROLL[lanes], "FIRST": True,
        "LAST": True, "STAGE": "all", "largest_ptr": None, "COMPUTE": _compute(dtype),
    }  # fmt: skip
    merged = {**defaults, **constants}
    # A pointer or a stride that is given is an argument, not a constant.
    merged = {key: value for key, value in merged.items() if key in kernel.arg_names and value != "argument"}
    if "state_ptr" in kernel.arg_names and merged["FIRST"] and merged["LAST"]:
        merged["state_ptr"] = None
    registers = statistics.registers_of(lanes, size, merged["HAS_SOFTCAP"], merged["LOADS"])
    return Case(
        name, kernel, merged, None, dtype, statistics.warps_of(lanes), passes=_passes(name),
        registers=None if kernel is min_p_kernel else registers, fused=False,
    )  # fmt: skip


def _gradient_case(name: str, dtype: str = "bf16", **constants) -> Case:
    block = gradient._BLOCK_BYTES // _SIZES[dtype]
    defaults = {
        "temperature_ptr": None, "column_stride": 1, "out_column_stride": 1, "HAS_SOFTCAP": False, "LOADS": "aligned",
        "BLOCK": block, "COMPUTE": _compute(dtype),
    }  # fmt: skip
    merged = {key: value for key, value in {**defaults, **constants}.items() if value != "argument"}
    return Case(
        name, gradient.logits_gradient_kernel, merged, None, dtype, gradient._WARPS, passes=_passes(name),
        registers=gradient._REGISTERS, fused=False,
    )  # fmt: skip


def _one_launch_case(name: str, dtype: str = "bf16", columns: int = LIMIT_VOCABULARY, **constants) -> Case:
    size = _SIZES[dtype]
    lanes = statistics.lanes_of(columns, size)
    stores = constants.get("STORES", "aligned")
    block = lanes * one_launch._BLOCK_BYTES_PER_LANE[stores] // size
    defaults = {
        "temperature_ptr": None, "reference_ptr": None, "importance_ptr": None, "column_stride": 1,
        "out_column_stride": 1, "KIND": "clip", "ESTIMATOR": "k3", "HAS_ENTROPY": False, "HAS_SOFTCAP": False,
        "LOADS": "aligned", "STORES": "aligned", "EVEN": True, "LANES": lanes,
        "UNROLL": one_launch._UNROLL, "BLOCK": block,
        "COMPUTE": _compute(dtype),
    }  # fmt: skip
    merged = {key: value for key, value in {**defaults, **constants}.items() if value != "argument"}
    warps = one_launch.warps_of(lanes)
    pointers = {"rollout_ptr": "*i32"}
    return Case(
        name, one_launch.one_launch_kernel, merged, None, dtype, warps, pointers=pointers, passes=_passes(name),
        registers=one_launch.registers_of(dtype == "fp64", merged["HAS_SOFTCAP"], merged["LOADS"], stores),
        fused=False, amd_warps=lanes // 64,
    )  # fmt: skip


_OPTIONAL = ("reference_ptr", "importance_ptr", "proxy_ptr", "replaced_ptr", "d_entropy_ptr")


def _terms_case(name: str, absent: tuple[str, ...] = _OPTIONAL, **constants) -> Case:
    block = policy_terms._BLOCK
    words = {"KIND": "clip", "SEQUENCE": False, "OWN": False, "ESTIMATOR": "k3"}
    defaults = {**words, "BLOCK": block, "COMPUTE": tl.float32}
    merged = {**dict.fromkeys(absent), **defaults, **constants}
    pointers = {"rollout_ptr": "*i32"}
    registers = policy_terms.REGISTERS
    return Case(
        name, policy_terms.policy_terms_kernel, merged, block, num_warps=policy_terms.warps_of(merged["KIND"]),
        pointers=pointers, registers=registers, fused=False,
    )  # fmt: skip


def _without(*given: str) -> tuple[str, ...]:
    """What is absent where these are there."""
    return tuple(name for name in _OPTIONAL if name not in given)


def _rules_case(name: str, two: bool) -> Case:
    constants = {
        "scale_a_ptr": None, "scale_b_ptr": None, "FIRST": True, "TWO": two, "POLARITY_A": 1, "POLARITY_B": -1,
        "HIGH_A": False, "HIGH_B": True, "CEIL_A": False, "CEIL_B": False, "DIGITS": 8, "BLOCK": selection._BLOCK,
    }  # fmt: skip
    return Case(name, selection.token_rules_kernel, constants, selection._BLOCK, pointers={"selected_ptr": "*i8"})


def _token_cases() -> list[Case]:
    block = tokens._BLOCK
    read = {"polarity_ptr": None, "importance_ptr": None, "polarity_out_ptr": None, "importance_out_ptr": None,
            "ADVANTAGES": True, "POLARITY": False, "IMPORTANCE": False, "BLOCK": block,
            "COMPUTE": tl.float32}  # fmt: skip
    pointers = {"targets_out_ptr": "*i64", "mask_ptr": "*i8", "tokens_ptr": "*i8", "rollout_ptr": "*i32"}
    total = {"divisor_ptr": None, "TOTAL": "tokens", "PER_ROLLOUT": False, "BLOCK": 256, "COMPUTE": tl.float32}
    return [
        Case("read tokens", tokens.read_tokens_kernel, read, block, pointers=pointers),
        Case("count kept", tokens.count_kept_kernel, {"BLOCK": block}, block),
        Case("normalizer", tokens.normalizer_kernel, total, 256),
        Case("metrics", policy_terms.policy_metrics_kernel, {"weight_ptr": None, "BLOCK": 64}, 64),
    ]


def _scale_case(name: str, dtype: str) -> Case:
    constants = {"SAME": dtype == "bf16", "DENSE": True, "BLOCK": scaling._BLOCK, "COMPUTE": tl.float32}
    pointers = {"gradient_ptr": f"*{dtype}", "out_ptr": "*bf16"}
    return Case(name, scaling.scale_kernel, constants, None, dtype, scaling._WARPS, pointers=pointers)


def cases() -> list[Case]:
    """Every kernel, in the configurations that matter for speed or that could spill."""
    short = 32000
    parts = {"BLOCK": statistics.MERGED_ROWS, "COMPUTE": tl.float32}
    select = {"HIGH": False, "CEIL": False, "DIGITS": 8, "BLOCK": selection._BLOCK}
    return [
        _read_case("statistics bf16"),
        _read_case("statistics bf16 short", columns=short),
        _read_case("statistics bf16 softcap", HAS_SOFTCAP=True),
        _read_case("statistics fp32", dtype="fp32"),
        _read_case("statistics fp64", dtype="fp64"),
        _read_case("statistics bf16 shifted", LOADS="shifted", EVEN=False),
        _read_case("statistics bf16 strided", LOADS="strided", column_stride="argument"),
        _read_case("statistics fp16 temperature", dtype="fp16", temperature_ptr="argument"),
        _read_case("statistics bf16 tile", FIRST=False, LAST=False),
        _gradient_case("gradient bf16", grad_entropy_ptr=None),
        _gradient_case("gradient bf16 entropy"),
        _gradient_case("gradient bf16 entropy softcap", HAS_SOFTCAP=True),
        _gradient_case("gradient bf16 shifted", LOADS="shifted", grad_entropy_ptr=None),
        _gradient_case("gradient fp32 entropy", "fp32"),
        _gradient_case("gradient fp64 entropy", "fp64"),
        _gradient_case("gradient bf16 strided", column_stride="argument", LOADS="strided"),
        _one_launch_case("one launch bf16"),
        _one_launch_case("one launch bf16 short", columns=short),
        _one_launch_case("one launch bf16 shifted", LOADS="shifted", STORES="shifted", EVEN=False),
        _one_launch_case(
            "one launch bf16 strided", LOADS="strided", STORES="strided", column_stride="argument",
            out_column_stride="argument",
        ),
        _one_launch_case("one launch bf16 softcap entropy", HAS_SOFTCAP=True, HAS_ENTROPY=True),
        _one_launch_case(
            "one launch fp32 sapo kl", "fp32", KIND="sapo", ESTIMATOR="k3-ratio", reference_ptr="argument"
        ),
        _one_launch_case("one launch fp64", "fp64"),
        _one_launch_case("one launch bf16 dppo-kl", KIND="dppo-kl"),
        _one_launch_case(
            "one launch bf16 ratio kl weights", KIND="ratio", reference_ptr="argument", importance_ptr="argument"
        ),
        _read_case("min-p bf16", min_p_kernel),
        _read_case("min-p bf16 shifted", min_p_kernel, LOADS="shifted", EVEN=False),
        _read_case("min-p bf16 largest", min_p_kernel, STAGE="largest"),
        _read_case("min-p bf16 part", min_p_kernel, STAGE="part", largest_ptr="argument"),
        Case("merge parts", statistics.merge_parts_kernel, {"temperature_ptr": None, **parts}, statistics.MERGED_ROWS),
        Case("finish min-p", finish_min_p_kernel, parts, statistics.MERGED_ROWS),
        Case("select fp32", selection.select_kernel, select, selection._BLOCK, pointers={"out_ptr": "*i8"}),
        _rules_case("one rule", False),
        _rules_case("two rules", True),
        *_token_cases(),
        _terms_case("terms clip"),
        _terms_case("terms clip sequence", SEQUENCE=True),
        _terms_case("terms cispo", KIND="cispo"),
        _terms_case("terms sapo", KIND="sapo"),
        _terms_case("terms everything", absent=()),
        _terms_case("terms clip own gradient", SEQUENCE=True, OWN=True),
        _terms_case("terms clip own gradient, kl and weights", _without("proxy_ptr", "replaced_ptr"), SEQUENCE=True,
                    OWN=True),
        _terms_case("terms everything sequence", absent=(), SEQUENCE=True),
        _terms_case("terms dppo-tv", KIND="dppo-tv"),
        _terms_case("terms dppo-kl, kl and weights", _without("proxy_ptr", "replaced_ptr"), KIND="dppo-kl"),
        _terms_case("terms gmpo", KIND="gmpo", SEQUENCE=True),
        _terms_case("terms gmpo kl", _without("reference_ptr"), KIND="gmpo", SEQUENCE=True),
        _terms_case("terms ratio", KIND="ratio"),
        _terms_case("terms none", KIND="none"),
        _terms_case("terms reinforce weights", _without("importance_ptr"), KIND="reinforce"),
        _scale_case("scale in place", "bf16"),
        _scale_case("scale and cast", "fp32"),
    ]  # fmt: skip
