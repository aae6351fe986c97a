"""The peers' forward kernels as their launchers compile them, for the table of bench.machine_code."""

from __future__ import annotations

from bench import trl_kernels
from bench.gpus import LIMIT_VOCABULARY
from bench.harness import version
from bench.kernel_case import Case


def _case(
    name: str, source: str, kernel, pointers: dict, numbers: dict, constants: dict, block: int, warps: int
) -> Case:
    """`pointers` and `numbers` give types by argument; the others are constants (None for an argument left out)."""
    types = {name: {**pointers, **numbers}.get(name, "constexpr") for name in kernel.arg_names}
    return Case(name, kernel, constants, block, num_warps=warps, types=types, passes=1, source=source)


def _trl() -> list[Case]:
    chunked_logprob, logprob_entropy = (trl_kernels.load(name) for name in ("chunked_logprob", "logprob_entropy"))
    source = f"trl {version('trl')}"
    strides = ("logits_batch_stride", "logits_row_stride", "index_batch_stride", "index_row_stride")
    logits = _case(
        "statistics bf16, TRL logits kernel", source, logprob_entropy._forward_kernel,
        {"logits_ptr": "*bf16", "index_ptr": "*i64", "row_mask_ptr": "*i64", "logprobs_ptr": "*fp32",
         "entropy_ptr": "*fp32", "log_z_ptr": "*fp32", "expected_logit_ptr": "*fp32"},
        {**dict.fromkeys((*strides, "mask_batch_stride", "mask_row_stride"), "i64"), "rows_per_batch": "i32"},
        {"n_cols": LIMIT_VOCABULARY, "TEMPERATURE": 1.0, "HAS_MASK": False,
         "BLOCK_SIZE": logprob_entropy._BLOCK_SIZE},
        logprob_entropy._BLOCK_SIZE, 4,
    )  # fmt: skip
    block = chunked_logprob._BLOCK_SIZE
    state = ("max", "sum_exp", "x_sum_exp", "sq_sum_exp", "z_sum", "max_before_target", "target_logit")
    tile = _case(
        "fold of a tile bf16, TRL head", source, chunked_logprob._forward_kernel,
        {"mm_ptr": "*bf16", "targets_ptr": "*i64", **{f"{name}_ptr": "*fp32" for name in state}},
        {"mm_stride": "i64", "vocab_start": "i32", "n_cols": "i32", "logit_scale": "fp32", "softcap": "fp32",
         "inv_t": "fp32"},
        {"HAS_SOFTCAP": False, "HAS_ENTROPY": True, "HAS_LOG_SUM_SQ_PROBS": False, "HAS_MEAN_LOGITS": False,
         "HAS_IS_TOP1": False, "BLOCK_SIZE": block},
        block, 4,
    )  # fmt: skip
    return [logits, tile]


def _liger() -> list[Case]:
    from liger_kernel.ops import grpo_loss

    block = 2048
    absent = dict.fromkeys(("REF_LOGP", "COMPLETION_MASK", "VLLM_IS_RATIO", "PHI_SEQ", "KL"))
    settings = {
        "TEMPERATURE": 1.0, "BETA": 0.0, "EPS_LOW": 0.2, "EPS_HIGH": 0.28, "LOSS_TYPE": 0, "SAPO_TEMP_POS": 1.0,
        "SAPO_TEMP_NEG": 1.05, "DELTA": 0.0, "USE_BIAS_CORRECTION_KL": False, "L": 1024, "N": LIMIT_VOCABULARY,
        "BLOCK_N": block,
    }  # fmt: skip
    kernel = _case(
        "log-sum-exp bf16 without entropy, Liger", f"liger-kernel {version('liger-kernel')}",
        grpo_loss._grpo_loss_fwd_kernel,
        {"LOGITS": "*bf16", "OLD_LOGP": "*fp32", "INPUT_IDS": "*i64", "ADVANTAGES": "*fp32", "LOSS": "*fp32",
         "LSE": "*fp32", "IS_CLIPPED": "*fp32"},
        {"VLLM_IS_RATIO_STRIDE": "i32"}, {**absent, **settings}, block, 1,
    )  # fmt: skip
    return [kernel]


def peer_cases() -> list[Case]:
    """Those whose package is installed; a line for those that are not."""
    found: list[Case] = []
    for package, make in (("trl", _trl), ("liger-kernel", _liger)):
        if version(package) is None:
            print(f"{package}: skipped, not installed")
        else:
            found += make()
    return found
