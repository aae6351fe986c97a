"""Registers, spills, loads, barriers and instructions per element of every kernel, read from its machine code.

Kernels are compiled ahead of time as the launcher would compile them; no GPU is needed. The peers' forward kernels
stand beside ours where they are installed, and with each GPU the two times that no kernel of so many instructions and
bytes can beat there (bench/gpus.py).

    python -m bench.machine_code [--quick] [target ...]    # writes bench/results/machine_code.jsonl for all targets
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.language as tl
from tqdm.auto import tqdm
from triton import compile as triton_compile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from a3po_kernels.ops import _surrogate_kernels, _token_kernels, select_tokens, surrogate, token_logprobs
from a3po_kernels.ops import min_p as min_p_op
from bench.gpus import GPUS, LIMIT_ROWS, LIMIT_VOCABULARY

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

RESULTS = Path(__file__).resolve().parent / "results" / "machine_code.jsonl"
_FP64 = (
    "exponent_scale", "logit_scale", "softcap", "log2_min_p", "low", "high", "dual_clip", "delta", "tau_positive",
    "tau_negative", "kl_coef", "entropy_coef", "beta",
)  # fmt: skip
_POINTERS = {
    "targets_ptr": "*i64", "offsets_ptr": "*i64", "tokens_ptr": "*i1", "replaced_ptr": "*i1", "selected_ptr": "*i1",
    "eligible_ptr": "*i8",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration; `elements` is what one trip of its hot loop (or one program) handles.

    A peer's kernel brings its own `types`; `passes` is how often it reads or writes the logits (None: not at all).
    """

    name: str
    kernel: object
    constants: dict
    elements: int
    dtype: str = "bf16"
    num_warps: int = 4
    types: dict | None = None
    passes: int | None = None
    source: str = "ours"

    def signature(self) -> dict[str, str]:
        if self.types is not None:
            return self.types
        types = {}
        for name in self.kernel.arg_names:
            if name in self.constants:
                types[name] = "constexpr"
            elif name in ("logits_ptr", "grad_ptr"):
                types[name] = f"*{self.dtype}"
            elif name.endswith("_ptr"):
                default = "*i8" if self.kernel is select_tokens.select_kernel and name == "out_ptr" else "*fp32"
                types[name] = _POINTERS.get(name, default)
            elif name in _FP64:
                types[name] = "fp64"
            else:
                types[name] = "i32" if name in ("n_columns", "n_rollouts", "rows_per_batch") else "i64"
        return types


def _vocabulary_case(name: str, kernel, elements: int, num_warps: int, dtype: str = "bf16", **constants) -> Case:
    size = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[dtype]
    defaults = {
        "temperature_ptr": None, "column_stride": 1, "grad_column_stride": 1, "HAS_SOFTCAP": False, "ALIGNED": True,
        "SPLIT": token_logprobs.SPLIT, "LANES": token_logprobs._LANES, "VEC": 16 // size, "SPLITS": 5,
        "ROWS": token_logprobs._FINISH_ROWS, "BLOCK": token_logprobs._GRADIENT_BYTES // size,
        "COMPUTE": tl.float64 if dtype == "fp64" else tl.float32,
    }  # fmt: skip
    merged = {**defaults, **constants}
    # A pointer that is given is an argument, not a constant.
    merged = {key: value for key, value in merged.items() if key in kernel.arg_names and value != "argument"}
    passes = {"gradient": 2, "finish": None, "fold": None}.get(name.split()[0], 1)
    return Case(name, kernel, merged, elements, dtype, num_warps, passes=passes)


_OPTIONAL = ("reference_ptr", "importance_ptr", "proxy_ptr", "replaced_ptr", "d_entropy_ptr")


def _terms_case(name: str, absent: tuple[str, ...] = _OPTIONAL, **constants) -> Case:
    defaults = {"KIND": "clip", "SEQUENCE": False, "ESTIMATOR": "k3", "BLOCK": surrogate._BLOCK, "COMPUTE": tl.float32}
    merged = {**dict.fromkeys(absent), **defaults, **constants}
    return Case(name, _surrogate_kernels.policy_terms_kernel, merged, surrogate._BLOCK)


def cases() -> list[Case]:
    """Every kernel, in the configurations that matter for speed or that could spill."""
    forward, gradient = _token_kernels.partial_statistics_kernel, _token_kernels.logits_gradient_kernel
    finish, min_p = _token_kernels.finish_statistics_kernel, _token_kernels.min_p_kernel
    lanes, capped, tile = token_logprobs._LANES, token_logprobs._CAPPED_LANES, token_logprobs._GRADIENT_BYTES
    per_token = {"temperature_ptr": "argument"}  # a pointer: one temperature a token
    select = {"HIGH": False, "CEIL": False, "DIGITS": 8, "BLOCK": select_tokens._BLOCK}
    sums = {"SEQUENCE": True, "BLOCK": surrogate._BLOCK, "COMPUTE": tl.float32}
    return [
        _vocabulary_case("statistics bf16", forward, 2 * lanes * 8, 4),
        _vocabulary_case("statistics bf16 softcap", forward, 2 * capped * 8, 4, HAS_SOFTCAP=True, LANES=capped),
        _vocabulary_case("statistics fp32", forward, 2 * lanes * 4, 4, "fp32"),
        _vocabulary_case("statistics fp64", forward, 2 * lanes * 2, 4, "fp64"),
        _vocabulary_case("statistics bf16 unaligned", forward, 2 * lanes * 8, 4, ALIGNED=False),
        _vocabulary_case("statistics fp16 temperature", forward, 2 * lanes * 8, 4, "fp16", **per_token),
        _vocabulary_case("finish bf16", finish, token_logprobs._FINISH_ROWS, 4, state_ptr=None, FIRST=True, LAST=True),
        _vocabulary_case("fold bf16 tile", finish, token_logprobs._FINISH_ROWS, 4, FIRST=False, LAST=False),
        _vocabulary_case("gradient bf16", gradient, tile // 2, 8, grad_entropy_ptr=None),
        _vocabulary_case("gradient bf16 entropy", gradient, tile // 2, 8),
        _vocabulary_case("gradient bf16 entropy softcap", gradient, tile // 2, 8, HAS_SOFTCAP=True),
        _vocabulary_case("gradient fp32 entropy", gradient, tile // 4, 8, "fp32"),
        _vocabulary_case("gradient fp64 entropy", gradient, tile // 8, 8, "fp64"),
        _vocabulary_case("gradient bf16 transposed", gradient, tile // 2, 8, column_stride="argument", ALIGNED=False),
        _vocabulary_case("min-p bf16", min_p, min_p_op._BLOCK, 4, BLOCK=min_p_op._BLOCK),
        Case("select fp32", select_tokens.select_kernel, select, select_tokens._BLOCK),
        Case("rollout sums", _surrogate_kernels.rollout_sums_kernel, sums, surrogate._BLOCK),
        _terms_case("terms clip"),
        _terms_case("terms clip sequence", SEQUENCE=True),
        _terms_case("terms cispo", KIND="cispo"),
        _terms_case("terms sapo", KIND="sapo"),
        _terms_case("terms everything", absent=()),
    ]  # fmt: skip


def compile_case(case: Case, target: str):
    """Compiles a case; pointers are 16-byte aligned, and so is the vocabulary where the case says ALIGNED."""
    kernel, types = case.kernel, case.signature()
    attributes = {}
    for position, name in enumerate(kernel.arg_names):
        aligned = types[name].startswith("*") or (name == "n_columns" and case.constants.get("ALIGNED", True))
        if types[name] != "constexpr" and aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs=case.constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "enable_fp_fusion": True}
    return triton_compile(source, target=TARGETS[target], options=options)


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of one kernel shows. Loop figures are those of its longest innermost loop (0 without)."""

    registers: int
    spills: int  # bytes of local (scratch) memory
    shared: int
    instructions: int
    widest_load: int
    barriers_in_loop: int
    loop_instructions: int
    per_element: float


def inspect(case: Case, target: str) -> MachineCode:
    """Compiles a case and reads its machine code, once for its name."""
    key = (case.source, case.name, target)
    if key not in _seen:
        read = _read_amd if target.startswith("gfx") else _read_nvidia
        _seen[key] = read(case, compile_case(case, target))
    return _seen[key]


_seen: dict[tuple[str, str, str], MachineCode] = {}


def _innermost(code: list[tuple[str, str]], labels: dict[str, int], is_branch) -> list[str]:
    """The instructions of the longest loop that holds no other loop."""
    loops = []
    for position, (name, operands) in enumerate(code):
        if is_branch(name):
            target = next((labels[label] for label in re.findall(r"[.\w$]+", operands) if label in labels), None)
            if target is not None and target < position:
                loops.append((target, position))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if not inner:
        return []
    start, stop = max(inner, key=lambda loop: loop[1] - loop[0])
    return [name for name, _ in code[start : stop + 1]]


def _figures(case: Case, threads: int, code, labels, is_branch, barrier: str, widths) -> dict:
    loop = _innermost(code, labels, is_branch)
    names = [name for name, _ in code]
    counted = loop or names
    return {
        "instructions": len(names),
        "widest_load": max(
            (width for name in names for pattern, width in widths if re.match(pattern, name)), default=0
        ),
        "barriers_in_loop": sum(name.startswith(barrier) for name in loop),
        "loop_instructions": len(loop),
        "per_element": len(counted) * threads / case.elements,
    }


def _read_nvidia(case: Case, compiled) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])

        def tool(path: str, *arguments: str) -> str:
            return subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True).stdout

        text = tool(knobs.nvidia.nvdisasm.path, "-c")
        usage = tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    # The function's own line: a library routine of its own name may follow.
    resources = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    code, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]+)(.*);", line):
            code.append((instruction[1], instruction[2]))
    while code and code[-1][0] in ("NOP", "BRA"):  # The trap behind the end of the function.
        code.pop()
    widths = ((r"LDG\.E\.128", 128), (r"LDG\.E\.64", 64), (r"LDG\.E\.U16", 16), (r"LDG\.E$", 32))
    figures = _figures(case, case.num_warps * 32, code, labels, lambda name: name in ("BRA", "BRA.U"), "BAR", widths)
    spills = int(resources["STACK"]) + int(resources["LOCAL"])
    return MachineCode(int(resources["REG"]), spills, compiled.metadata.shared, **figures)


def _read_amd(case: Case, compiled) -> MachineCode:
    text = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])

    code, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):.*Loop Header", line):  # Blocks laid out backwards are no loops.
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\t([sv]_\w+|global_\w+|buffer_\w+|ds_\w+|flat_\w+)\b(.*)", line):
            code.append((instruction[1], instruction[2]))
    widths = (
        (r"(global|buffer)_load_dwordx4", 128),
        (r"(global|buffer)_load_dwordx2", 64),
        (r"global_load_dword$", 32),
    )
    figures = _figures(
        case,
        case.num_warps * 64,
        code,
        labels,
        lambda name: name.startswith(("s_cbranch", "s_branch")),
        "s_barrier",
        widths,
    )
    # Scalar registers spill into vector registers, not into memory; scratch memory is what costs.
    spills = metadata("private_segment_fixed_size") + metadata("vgpr_spill_count")
    return MachineCode(metadata("vgpr_count"), spills, compiled.metadata.shared, **figures)


def data(targets: list[str], extra: list[Case] | tuple[Case, ...] = ()) -> list[dict]:
    """A row for each kernel and target: MachineCode's fields, and for each GPU of the target its limits."""
    rows = []
    listed = [(target, case) for target in targets for case in [*cases(), *extra]]
    for target, case in (bar := tqdm(listed, desc="machine code", leave=False)):
        bar.set_postfix_str(f"{target} {case.name}", refresh=False)
        found = inspect(case, target)
        row = {"kernel": case.name, "source": case.source, "dtype": case.dtype, "target": target,
               "triton": triton.__version__, **asdict(found)}  # fmt: skip
        limits = {}
        if case.passes is not None:
            limits = {gpu.name: gpu.limits(found.per_element, case.dtype, case.passes) for gpu in GPUS
                      if gpu.target == target}  # fmt: skip
        rows.append({**row, "rows": LIMIT_ROWS, "vocabulary": LIMIT_VOCABULARY, "limits_ms": limits})
    return rows


def main() -> None:
    from bench.machine_code_peers import peer_cases

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=", ".join(TARGETS))
    parser.add_argument("--quick", action="store_true", help="sm_90 alone")
    args = parser.parse_args()
    targets = ["sm_90"] if args.quick else args.targets
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")

    header = ("kernel", "source", "target", "registers", "spills", "shared", "load", "barriers", "instr/element",
              "limits: instructions | bytes, ms")  # fmt: skip
    found = data(targets or list(TARGETS), peer_cases())
    table = [header]
    for row in found:
        limits = "; ".join(
            f"{gpu} {times['instructions']:.2f} | {times['bytes']:.2f}" for gpu, times in row["limits_ms"].items()
        )
        keys = ("kernel", "source", "target", "registers", "spills", "shared", "widest_load", "barriers_in_loop")
        whole = "" if row["loop_instructions"] else " (whole)"
        table.append((*(str(row[key]) for key in keys), f"{row['per_element']:.2f}{whole}", limits))
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not targets:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    main()
