"""Registers, spills, loads, bytes in flight and instructions per element of every kernel, from its machine code.

Kernels are compiled ahead of time as the launcher would compile them; no GPU is needed. The peers' forward kernels
stand beside ours where they are installed, and with each GPU the two times that no kernel of so many instructions and
bytes can beat there (bench/gpus.py). Bytes in flight are what decided on a GPU: the loads of one trip of the hot loop
that a thread may have under way, times the threads that a core (SM, compute unit) holds at once. They are the most
there can be, and a kernel whose bandwidth times the memory's latency asks for more waits.

Spills are told apart: a value that waits on the stack while the loops run is read once, one that is stored or read
in a hot loop is paid for with every trip.

    python -m bench.machine_code [--quick | target ...]
    python -m bench.machine_code --save    # all targets, to bench/results/machine_code.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from tqdm.auto import tqdm
from triton import compile as triton_compile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.gpus import CORES, GPUS, LIMIT_ROWS, LIMIT_VOCABULARY
from bench.kernel_case import Case
from bench.kernel_cases import cases
from bench.machine_code_peers import peer_cases

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

RESULTS = Path(__file__).resolve().parent / "results" / "machine_code.jsonl"


def compile_case(case: Case, target: str):
    """Compiles a case; pointers are 16-byte aligned, and the vocabulary is a multiple of 16 unless rows are shifted.

    So are all integers of a peer's kernel, its strides among them, if it does not forbid that they are specialised.
    """
    kernel, types = case.kernel, case.signature()
    even = case.constants.get("LOADS") != "shifted"
    attributes = {}
    for position, parameter in enumerate(kernel.params):
        kind = types[parameter.name]
        whole = even if case.source == "ours" and parameter.name == "n_columns" else case.source != "ours"
        aligned = kind.startswith("*") or (kind in ("i32", "i64") and whole and not parameter.do_not_specialize)
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs=case.constants, attrs=attributes)
    options = {"num_warps": _warps(case, target), "enable_fp_fusion": case.fused}
    if case.registers is not None and not target.startswith("gfx"):
        options["maxnreg"] = case.registers
    return triton_compile(source, target=TARGETS[target], options=options)


def _warps(case: Case, target: str) -> int:
    """As the launchers choose: no program has more than 1024 threads."""
    if target.startswith("gfx") and case.amd_warps is not None:
        return case.amd_warps
    return min(case.num_warps, 1024 // CORES[target].warp)


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of one kernel shows. Loop figures are those of its hot loops, together (0 without).

    `per_element` is the instructions of all hot loops; `load_bytes` what the loads of a trip bring a thread, in that
    hot loop where it is least, and `narrowest_load` theirs too (of the whole program, without a loop);
    `warps_resident` how many warps a core holds at once, by registers and shared memory.
    """

    registers: int
    spills: int  # bytes of local (scratch) memory
    spills_in_loop: int  # instructions of a trip that store or load there
    shared: int
    instructions: int
    narrowest_load: int  # bits
    barriers_in_loop: int
    loop_instructions: int
    per_element: float
    load_bytes: int
    warps_resident: int
    bytes_in_flight: int


def inspect(case: Case, target: str) -> MachineCode:
    """Compiles a case and reads its machine code, once for its name."""
    key = (case.source, case.name, target)
    if key not in _seen:
        read = _read_amd if target.startswith("gfx") else _read_nvidia
        _seen[key] = read(case, target, compile_case(case, target))
    return _seen[key]


_seen: dict[tuple[str, str, str], MachineCode] = {}


def nvidia_load(name: str) -> int:
    """Bytes a thread of a global load (LDG, or LDGSTS to shared memory); 0 for any other instruction."""
    parts = name.split(".")
    if parts[0] not in ("LDG", "LDGSTS"):
        return 0
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((sizes[part] for part in parts[1:] if part in sizes), 4)


def amd_load(name: str) -> int:
    """Bytes a thread of a global load; 0 for any other instruction."""
    match = re.match(r"(?:global|buffer)_load_(dwordx[234]|dword|\w+)", name)
    if match is None:
        return 0
    sizes = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    return sizes.get(match[1], 1 if "byte" in match[1] else 2)


@dataclass(frozen=True)
class Isa:
    """How instructions are called: each field but `load` is what the name of such an instruction begins with."""

    load: Callable[[str], int]
    store: tuple[str, ...]
    exponential: tuple[str, ...]
    barrier: tuple[str, ...]
    local: tuple[str, ...]

    def has(self, trip: list[str], kind: tuple[str, ...]) -> bool:
        return any(name.startswith(kind) for name in trip)


NVIDIA = Isa(nvidia_load, ("STG",), ("MUFU.EX2",), ("BAR",), ("LDL", "STL"))
AMD = Isa(amd_load, ("global_store", "buffer_store"), ("v_exp_",), ("s_barrier",), ("scratch_",))

CONDITIONAL = "?"  # before the operands of an instruction under a predicate


def _label(operands: str) -> str:
    found = re.search(r"\.L_x_\d+", operands)
    return found[0] if found else ""


def nvidia_trips(code: list[tuple[str, str]], labels: dict[str, int]) -> list[list[str]]:
    """The instructions of one trip of each loop that holds no other.

    A trip takes one side of an if: it falls through, jumps where the code jumps whatever the condition, and ends where
    the code may first go back.
    """

    def target(position: int) -> int | None:
        name, operands = code[position]
        named = re.findall(r"[.\w$]+", operands) if name in ("BRA", "BRA.U") else []
        return next((labels[label] for label in named if label in labels), None)

    loops: dict[int, int] = {}  # first instruction -> last that goes back to it
    for at in range(len(code)):
        if (goal := target(at)) is not None and goal < at:
            loops[goal] = at
    inner = [a for a in loops.items() if not any(a[0] < b[0] and b[1] <= a[1] for b in loops.items())]
    found = []
    for start, stop in inner:
        at, trip = start, []
        while at <= stop:
            name, operands = code[at]
            trip.append(name)
            goal = target(at)
            if goal == start:
                break
            always = not operands.startswith(CONDITIONAL)
            at = goal if always and goal is not None and at < goal <= stop else at + 1
        found.append(trip)
    return found


def amd_trips(text: str) -> tuple[list[str], list[list[str]]]:
    """All instructions, and those of each loop that holds no other: LLVM notes with every block whose it is.

    A trip takes both sides of an if, since lanes may differ.
    """
    names: list[str] = []
    loops: dict[str, list[str]] = {}
    inner = set()
    block = loop = ""
    for line in text.splitlines():
        if label := re.match(r"(?:\.L|; %)(bb\.\d+|BB\w+):", line):
            block, loop = label[1], ""
        # A header's note may come a line later.
        if note := re.search(r"in Loop: Header=(\w+)|This (Inner )?Loop Header", line):
            loop = note[1] or block
            inner |= {block} if note[2] else set()
        elif instruction := re.match(r"\t((?:[sv]|global|buffer|ds|flat|scratch)_\w+)\b", line):
            names.append(instruction[1])
            loops.setdefault(loop, []).append(instruction[1])
    return names, [trip for loop, trip in loops.items() if loop in inner]


def hot_loops(found: list[list[str]], isa: Isa, streams: bool) -> list[list[str]]:
    """Of the trips of the inner loops: the longest, of those that load where some do.

    A kernel that streams has a hot loop for each thing it does to the elements (with stores or without, with
    exponentials or without): of its kind the one that loads most, and that with the fewest instructions. Others are
    the masked ends of rows, or what remains of an unrolled loop.
    """

    def preference(trip: list[str]) -> tuple[int, int]:
        return -sum(map(isa.load, trip)), len(trip)

    loading = [trip for trip in found if any(map(isa.load, trip))]
    if not streams or not loading:
        longest = max(loading or found, key=len, default=None)
        return [] if longest is None else [longest]
    kinds: dict[tuple[bool, bool], list[str]] = {}
    for trip in sorted(loading, key=preference):
        kinds.setdefault((isa.has(trip, isa.store), isa.has(trip, isa.exponential)), trip)
    return list(kinds.values())


def _figures(
    case: Case, target: str, isa: Isa, registers: int, shared: int, names: list[str], trips: list[list[str]]
) -> dict:  # fmt: skip
    """MachineCode's fields but for the spilled bytes, from the instructions' names and the trips of the inner loops."""
    core, warps = CORES[target], _warps(case, target)
    streams = case.elements is None
    loops = hot_loops(trips, isa, streams)
    per_element, loaded = 0.0, []
    for trip in loops or [names]:
        bytes_loaded = sum(map(isa.load, trip))
        if streams:
            elements = bytes_loaded / case.bytes_loaded(isa.has(trip, isa.store))
            bytes_loaded = int(elements * case.size)
        else:
            elements = case.elements / (warps * core.warp)
        per_element += len(trip) / elements
        loaded.append(bytes_loaded)
    counted = [name for trip in loops or [names] for name in trip]
    resident = core.resident_warps(registers, warps, shared)
    return {
        "registers": registers,
        "spills_in_loop": sum(name.startswith(isa.local) for trip in loops for name in trip),
        "shared": shared,
        "instructions": len(names),
        "narrowest_load": 8 * min(filter(None, map(isa.load, counted)), default=0),
        "barriers_in_loop": sum(name.startswith(isa.barrier) for trip in loops for name in trip),
        "loop_instructions": sum(map(len, loops)),
        "per_element": per_element,
        "load_bytes": min(loaded),
        "warps_resident": resident,
        "bytes_in_flight": min(loaded) * core.warp * resident,
    }


def _read_nvidia(case: Case, target: str, compiled) -> MachineCode:
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
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]+)(.*);", line):
            code.append((instruction[2], (CONDITIONAL if instruction[1] else "") + instruction[3]))
    # The trap behind the end of the function: a branch to itself, and what pads it.
    while code and code[-1][0] in ("NOP", "BRA"):
        if code[-1][0] == "BRA" and labels.get(_label(code[-1][1])) != len(code) - 1:
            break
        code.pop()
    registers, shared = int(resources["REG"]), compiled.metadata.shared
    spills = int(resources["STACK"]) + int(resources["LOCAL"])
    names = [name for name, _ in code]
    figures = _figures(case, target, NVIDIA, registers, shared, names, nvidia_trips(code, labels))
    return MachineCode(spills=spills, **figures)


def _read_amd(case: Case, target: str, compiled) -> MachineCode:
    text = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])

    names, trips = amd_trips(text)
    registers, shared = metadata("vgpr_count"), compiled.metadata.shared
    # Scalar registers spill into vector registers, not into memory; scratch memory is what costs.
    spills = metadata("private_segment_fixed_size") + metadata("vgpr_spill_count")
    return MachineCode(spills=spills, **_figures(case, target, AMD, registers, shared, names, trips))


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=", ".join(TARGETS))
    parser.add_argument("--quick", action="store_true", help="sm_90 alone")
    parser.add_argument("--save", action="store_true", help="all targets, over the committed rows")
    args = parser.parse_args()
    targets = ["sm_90"] if args.quick else args.targets
    if args.save and targets:
        parser.error("--save keeps every target: name none, and no --quick")
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")

    header = ("kernel", "source", "target", "registers", "spills", "in loop", "shared", "load", "barriers",
              "instr/element", "warps", "KB in flight", "limits: instructions | bytes, ms")  # fmt: skip
    found = data(targets or list(TARGETS), peer_cases())
    table = [header]
    for row in found:
        limits = "; ".join(
            f"{gpu} {times['instructions']:.2f} | {times['bytes']:.2f}" for gpu, times in row["limits_ms"].items()
        )
        keys = ("kernel", "source", "target", "registers", "spills", "spills_in_loop", "shared", "narrowest_load",
                "barriers_in_loop")  # fmt: skip
        whole = "" if row["loop_instructions"] else " (whole)"
        table.append((*(str(row[key]) for key in keys), f"{row['per_element']:.2f}{whole}",
                      str(row["warps_resident"]), f"{row['bytes_in_flight'] / 1024:.0f}{whole}", limits))  # fmt: skip
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if args.save:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    main()
