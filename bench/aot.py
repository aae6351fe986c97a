"""Compiles a Triton kernel ahead of time, with no GPU, and reads its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compile_kernel(kernel, signature: dict[str, str], constants: dict[str, object], target: str, num_warps: int = 4):
    """Compiles as the launcher would: pointers and the integers whose type ends in ':16' are divisible by 16."""
    types, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else signature[name]
        divisible = kind.startswith("*") or kind.endswith(":16")
        types[name] = kind.removesuffix(":16")
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps, "enable_fp_fusion": True})


def sass(compiled) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tool = knobs.nvidia.nvdisasm.path
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
