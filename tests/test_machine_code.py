"""What the compiled kernels are, on every target, with no GPU: spills, load widths, barriers, instructions."""

from __future__ import annotations

import pytest
import triton

from bench.machine_code import TARGETS, cases, inspect

CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills(name, target):
    found = inspect(CASES[name], target)
    assert found.spills == 0
    assert found.instructions > 0 and found.registers > 0


@pytest.mark.parametrize(
    "name", ["statistics bf16", "statistics fp32", "gradient bf16", "gradient fp32 entropy", "min-p bf16"]
)
def test_loads_are_128_bits_wide(name, target):
    assert inspect(CASES[name], target).widest_load == 128


@pytest.mark.parametrize("name", ["statistics bf16", "statistics bf16 softcap", "statistics fp32"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_no_barrier_in_the_vocabulary_loop(name, architecture):
    found = inspect(CASES[name], architecture)
    assert found.loop_instructions > 0 and found.barriers_in_loop == 0


@pytest.mark.parametrize("name", ["statistics bf16", "statistics fp32", "gradient bf16", "gradient fp32 entropy"])
def test_enough_bytes_in_flight(name):
    """An H200's SM takes 4.8e12 / 132 bytes a second: 25 KB under way at a latency of 700 ns, and half as many more."""
    found = inspect(CASES[name], "sm_90")
    assert found.load_bytes >= 16
    assert found.bytes_in_flight == found.load_bytes * 32 * found.warps_resident >= 38 * 1024


def test_forward_instructions_per_element():
    """At full bandwidth an H200 has 13.8 issue slots per bf16 element of a read-only kernel; we take 9 at most."""
    found = inspect(CASES["statistics bf16"], "sm_90")
    assert found.per_element <= 9.0, f"Triton {triton.__version__}: {found}"
    assert found.registers <= 64, "two thirds of full occupancy or better"


def test_gradient_instructions_per_element():
    """A kernel that reads and writes has twice the slots: 27.6. The whole program is counted, both of its paths."""
    assert inspect(CASES["gradient bf16"], "sm_90").per_element <= 16.0
    assert inspect(CASES["gradient bf16 entropy"], "sm_90").per_element <= 20.0


def test_the_reader_sees_what_it_should():
    """Unaligned logits load element by element, and fp64 is no cheap loop: the figures above are not vacuous."""
    assert inspect(CASES["statistics bf16 unaligned"], "sm_90").per_element > 15.0
    assert inspect(CASES["statistics fp64"], "sm_90").per_element > 30.0
    assert inspect(CASES["select fp32"], "sm_90").barriers_in_loop > 0
