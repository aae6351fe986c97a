"""What the compiled kernels are, on every target, with no GPU: spills, loads, barriers, the order of every sum."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import triton
import triton.language as tl
from triton import compile as triton_compile
from triton.compiler import ASTSource

from bench.gpus import CORES
from bench.machine_code import TARGETS, cases, compile_case, inspect

CASES = {case.name: case for case in cases()}
NVIDIA = [name for name in TARGETS if not name.startswith("gfx")]
# Sums over the vocabulary stand in these; of min-p's largest logit there is none.
SUMMING = [name for name in CASES if name.startswith(("statistics", "one launch", "min-p")) and "largest" not in name]
UNFUSED = [name for name in CASES if name.startswith(("statistics", "gradient", "one launch", "min-p", "terms"))]


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_hot_loops_spill_nothing(name, target):
    """A value may wait on the stack while the loops run (`spills` counts the bytes), if no trip stores or loads it."""
    found = inspect(CASES[name], target)
    assert found.spills_in_loop == 0, found
    assert found.instructions > 0 and found.registers > 0


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].registers])
@pytest.mark.parametrize("architecture", NVIDIA)
def test_registers_are_what_the_launchers_allow(name, architecture):
    assert inspect(CASES[name], architecture).registers <= CASES[name].registers


@pytest.mark.parametrize("name", ["one launch bf16", "one launch bf16 short", "one launch bf16 shifted"])
def test_one_launch_fills_a_processor(name):
    """2048 threads: the arithmetic of one row hides the reads of another."""
    found = inspect(CASES[name], "sm_90")
    assert found.registers <= 32 and found.warps_resident == CORES["sm_90"].warps


WIDE = [
    "statistics bf16", "statistics bf16 short", "statistics bf16 shifted", "statistics fp32", "gradient bf16",
    "gradient bf16 shifted", "gradient fp32 entropy", "one launch bf16", "one launch bf16 short",
    "one launch bf16 shifted", "min-p bf16", "scale in place", "scale and cast",
]  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_every_load_of_the_hot_loops_is_128_bits_wide(name, target):
    assert inspect(CASES[name], target).narrowest_load == 128


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("statistics", "one launch"))])
def test_no_barrier_in_the_vocabulary_loops(name, target):
    found = inspect(CASES[name], target)
    assert found.loop_instructions > 0 and found.barriers_in_loop == 0


IN_FLIGHT = ["statistics bf16", "statistics bf16 short", "statistics fp32", "gradient bf16", "gradient fp32 entropy",
             "one launch bf16", "one launch bf16 short"]  # fmt: skip


@pytest.mark.parametrize("name", IN_FLIGHT)
def test_enough_bytes_in_flight(name):
    """An H200's SM takes 4.8e12 / 132 bytes a second: 25 KB under way at a latency of 700 ns, and half as many more."""
    found = inspect(CASES[name], "sm_90")
    assert found.load_bytes >= 16
    assert found.bytes_in_flight == found.load_bytes * 32 * found.warps_resident >= 38 * 1024


@pytest.mark.parametrize(
    ("name", "most"),
    [("statistics bf16", 13.8), ("statistics bf16 short", 13.8), ("gradient bf16", 8.0), ("one launch bf16", 27.6)],
)
def test_instructions_per_element(name, most):
    """At full bandwidth an H200 has 13.8 issue slots per bf16 element read, and as many per element written."""
    assert inspect(CASES[name], "sm_90").per_element < most


def test_the_reader_sees_what_it_should():
    """The figures above are not vacuous: strided logits load element by element, fp64 is no cheap loop, and so on."""
    strided = inspect(CASES["statistics bf16 strided"], "sm_90")
    assert strided.per_element > 15.0 and strided.narrowest_load == 16
    assert inspect(CASES["statistics fp64"], "sm_90").per_element > 30.0
    assert inspect(CASES["select fp32"], "sm_90").barriers_in_loop > 0
    aligned, shifted = (inspect(CASES[f"statistics bf16{kind}"], "sm_90") for kind in ("", " shifted"))
    assert aligned.load_bytes == shifted.load_bytes == 32, "what is read twice counts once"
    both, one = (inspect(CASES[name], "sm_90").per_element for name in ("one launch bf16", "gradient bf16"))
    assert both > one + 5.0, "the statistics' loop and the gradient's"


REDUCE = re.compile(
    r'"tt\.reduce"\([^)]*\) <\{axis = (\d+) : i32\}> \(\{(.*?)\n\s*\}\) : \(tensor<((?:\d+x)+)[^\n]* ->', re.DOTALL
)
ARITHMETIC = re.compile(r"arith\.(?:addf|subf|mulf|divf)|math\.")


def float_sums(text: str) -> Counter[int]:
    """The lengths of the axes that a kernel in Triton's IR reduces by arithmetic on floats, and how often."""
    found = REDUCE.findall(text)
    assert len(found) == text.count('"tt.reduce"')
    return Counter(int(shape.split("x")[int(axis)]) for axis, body, shape in found if ARITHMETIC.search(body))


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", SUMMING)
def test_no_layout_can_change_the_order_of_a_sum(name, architecture):
    """a + b = b + a, and nothing more: a sum over three floats or more has the order that a register layout gives it,

    which follows from the alignment of a row. So each tt.reduce that adds has two entries (or one), before the passes
    that choose layouts and after them, and what pairs the entries up keeps their order. Two rows of the same bits
    differed on a GPU where this did not hold: odd vocabularies, misaligned views.
    """
    compiled = compile_case(CASES[name], architecture)
    sums = float_sums(compiled.asm["ttir"])
    assert sums and max(sums) <= 2, sums
    assert float_sums(compiled.asm["ttgir"]) == sums
    for unordered in ("allow_reorder", "tt.scan", "tt.atomic", "tt.dot", "tt.histogram"):
        assert unordered not in compiled.asm["ttir"]


@triton.jit
def _sum_of_a_row(x_ptr, out_ptr, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, tl.max(x, axis=0))
    if PAIRS:
        tl.store(out_ptr + 1 + tl.arange(0, BLOCK // 2), tl.sum(tl.reshape(x, (BLOCK // 2, 2)), axis=1))
    else:
        tl.store(out_ptr + 1, tl.sum(x, axis=0))


@triton.jit
def _product_and_sum(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x * tl.load(x_ptr + BLOCK + at) + x)


def _compile(kernel, target: str, *, dtype: str = "fp32", fused: bool = False, **constants):
    types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", **dict.fromkeys(constants, "constexpr")}
    return triton_compile(
        ASTSource(kernel, types, constexprs=constants), target=TARGETS[target], options={"enable_fp_fusion": fused}
    )


def test_the_check_of_the_order_can_fail():
    """A sum over 64 lanes is found; pairs pass, and so do a maximum and a sum of integers over 64."""
    asm = {name: _compile(_sum_of_a_row, "sm_90", BLOCK=64, **kind).asm["ttir"]
           for name, kind in {"row": {"PAIRS": False}, "pairs": {"PAIRS": True},
                              "integers": {"PAIRS": False, "dtype": "i32"}}.items()}  # fmt: skip
    assert {name: float_sums(text) for name, text in asm.items()} == {"row": {64: 1}, "pairs": {2: 1}, "integers": {}}
    assert all(text.count('"tt.reduce"') == 2 for text in asm.values())


def products_may_fuse(compiled) -> bool:
    """Whether a compiler behind Triton could still make one instruction of a product and a sum."""
    if compiled.metadata.enable_fp_fusion or re.search(r"\bcontract\b|\bfast\b|fmuladd", compiled.asm["llir"]):
        return True
    # What is rounded on its own (.rn) stays so, in PTX.
    return bool(re.search(r"\b(?:mul|add|sub)(?:\.ftz)?\.f(?:32|64)\b", compiled.asm.get("ptx", "")))


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", UNFUSED)
def test_fused_multiply_adds_are_those_of_the_source(name, architecture):
    """What a compiler fuses may differ from kernel to kernel, and kernels that share a formula share its bits."""
    assert not products_may_fuse(compile_case(CASES[name], architecture))


def test_the_check_of_fusion_can_fail():
    for architecture, one in (("sm_90", "fma.rn.f32"), ("gfx942", "v_fmac_f32")):
        fused, apart = (_compile(_product_and_sum, architecture, fused=kind, BLOCK=64) for kind in (True, False))
        assert products_may_fuse(fused) and not products_may_fuse(apart)
        code = "amdgcn" if architecture.startswith("gfx") else "ptx"
        assert one in fused.asm[code] and one not in apart.asm[code]
