"""The benchmarks: rows have the documented fields, pages show nothing else, and providers compute the same."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
import textwrap
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from bench import (
    _compare,
    bench_host,
    bench_memory,
    gpus,
    harness,
    machine_code,
    profile_step,
    providers,
    report,
    scaling,
    trl_kernels,
)
from bench.harness import Problem

ROOT = Path(__file__).resolve().parents[1]
COMPARED = sorted(path for path in harness.RESULTS.rglob("*.jsonl") if path.stem in ("logits", "linear", "selection"))


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_rows_have_the_documented_fields(path):
    rows = harness.read(path)
    assert rows
    for row in rows:
        assert row.keys() == harness.SCHEMA.keys()
        if row["skipped"]:
            assert row["median_ms"] is None and row["ratio"] is None and row["percent_of_limit"] is None
        else:
            assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
            assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
            assert row["repeats"] >= 3 and row["commit"] and row["versions"]["torch"]
    assert {row["baseline"] for row in rows} <= {row["provider"] for row in rows}


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_every_number_of_a_page_is_in_the_rows(page):
    """The blocks are what the rows give, and no table with a measure stands outside of one."""
    text = page.read_text()
    assert report.BLOCK.search(text)
    assert report.render(text, report.blocks()) == text, "run: python -m bench.report"
    cells = re.findall(r"^\|.*\|$", report.BLOCK.sub("", text), re.MULTILINE)
    assert not [cell for cell in cells if re.search(r"\d (ms|MB|%|GB/s)\b", cell)]


def test_every_table_that_is_made_is_on_a_page():
    on_pages = {name for page in report.PAGES for name in report.BLOCK.findall(page.read_text())}
    assert on_pages == report.blocks().keys()


def test_the_summary_is_of_the_rows():
    """The README's table beside the rows themselves: times, memory and limit; a peer that did not run has none."""
    folder = harness.RESULTS / "nvidia-h200"
    rows = {
        (name, row["provider"], row["active_fraction"]): row
        for name in ("logits", "linear") for row in report.rows_of(name, folder)
        if row["mode"] == "both" and row["dtype"] == "bf16"
    }  # fmt: skip
    lines = [line.split("|")[1:-1] for line in report.summary([folder]).splitlines() if line.startswith("|")]
    table = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}
    for label, *names in report.SUMMARY:
        measured = [rows.get((name, names[name == "linear"], 1.0)) for name in ("logits", "linear")]
        assert (label in table) == any(row and not row["skipped"] for row in measured)
        if label not in table:
            continue
        for at, (name, share) in enumerate((("logits", 1.0), ("linear", 1.0), ("linear", 0.2))):
            row = rows.get((name, names[name == "linear"], share))
            if row is None or row["skipped"]:
                assert table[label][2 * at : 2 * at + 2] == ["–", "–"]
                continue
            time, memory = (float(cell.split()[0]) for cell in table[label][2 * at : 2 * at + 2])
            assert time == pytest.approx(row["median_ms"], rel=0.05) and abs(memory - row["peak_mb"]) <= 0.5
            assert float(table["the limit"][2 * at].split()[0]) == pytest.approx(row["limit_ms"], rel=0.05)


def test_the_summary_begins_with_the_saving():
    """The sentence's times and memory are those of the table's columns from hidden states, ours and TRL's."""
    folder = harness.RESULTS / "nvidia-h200"
    text = report.summary([folder]).split("\n")[0]
    pairs = [(float(ms), float(gb)) for ms, gb in re.findall(r"(\d+) ms and (\d\.\d) GB", text)]
    rows = {(row["provider"], row["active_fraction"]): row for row in report.rows_of("linear", folder)
            if row["mode"] == "both" and row["dtype"] == "bf16"}  # fmt: skip
    wanted = [rows[name, share] for share in (1.0, 0.2) for name in ("ours, one pass", "TRL head")]
    assert pairs == [(round(row["median_ms"]), round(row["peak_mb"] / 1000, 1)) for row in wanted]
    assert "2528 MB" in text  # 8320 x 151936 in bf16


def test_a_changed_number_is_found():
    text = report.PAGES[0].read_text()
    made = report.blocks()
    number = re.search(r"\d+ ms", made["gpu-summary"])[0]
    assert report.render(text.replace(number, "12345 ms"), made) != text.replace(number, "12345 ms")
    with pytest.raises(KeyError):
        report.render("<!-- data:nothing -->\n<!-- end -->", made)


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_a_page_says_which_gpu_and_which_commit_or_that_none_was_measured(page):
    assert report.gpu([]) == report.NOT_MEASURED
    text = page.read_text()
    measured = [path for path in harness.RESULTS.iterdir() if path.is_dir() and path.name != "cpu"]
    assert (report.NOT_MEASURED in text) == (not measured)
    for folder in measured:
        rows = [row for name in ("logits", "linear") for row in report.rows_of(name, folder)]
        assert rows and {row["device"].lower().replace(" ", "-") for row in rows} == {folder.name}
        assert all(row["device"] in text and row["commit"] in text for row in rows)


def test_two_runs_are_two_tables():
    """A time of one run never stands beside another's, and who could not run in one is not said to be missing."""
    problem = {"rows": 8, "vocabulary": 100, "hidden": None, "dtype": "bf16", "active_fraction": 1.0}
    times = {"median_ms": 2.0, "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0, "limit_ms": 1.0, "versions": {}}

    def rows(run: int, skipped: str | None) -> list[dict]:
        found = []
        for provider, reason in (("eager", None), ("peer", skipped)):
            for mode in ("forward", "both"):
                row = dict.fromkeys(harness.SCHEMA) | problem | times | {"percent_of_limit": 50.0}
                found.append(row | {"run": run, "provider": provider, "mode": mode, "skipped": reason})
        return found

    text = report.comparison([*rows(1, "not installed"), *rows(2, None)])
    first, second = text.split("run 2, not to be compared")
    assert "| eager |" in first and "| peer |" not in first
    assert "| eager |" in second and "| peer |" in second and "Not run here" not in text
    assert "Not run here: peer: not installed" in report.comparison(rows(1, "not installed"))


def test_limits():
    """DESIGN's passes and products, for f = 0.25."""
    logits = Problem("logits", 8, 100, dtype=torch.bfloat16, active_fraction=0.25)
    assert [harness.limit(logits, mode) for mode in harness.MODES] == [(1600, 0), (2000, 0), (3200, 0)]
    linear = Problem("linear", 8, 100, 16, active_fraction=0.25)
    work = 8 * 100 * 16
    assert [harness.limit(linear, mode)[1] for mode in harness.MODES] == [2 * work, work, 3 * work]
    assert harness.limit(Problem("selection", 10), "forward") == (50, 0)
    assert harness.limit_ms(*harness.limit(logits, "both"), logits, {"copy": 3.2e6}) == pytest.approx(1.0)
    assert harness.limit_ms(1, 1, linear, {"copy": 1.0}) is None


def test_gpu_limits():
    """DESIGN: at full bandwidth an H200 issues 13.8 instructions a bf16 element of a kernel that only reads."""
    h200 = next(gpu for gpu in gpus.GPUS if gpu.name == "H200")
    times = h200.limits(13.8, "bf16", 1)
    assert times["instructions"] == pytest.approx(times["bytes"], rel=0.02)
    assert {gpu.target for gpu in gpus.GPUS} == set(gpus.CORES) == set(machine_code.TARGETS)


def test_warps_that_a_core_holds():
    """By hand from CUDA's occupancy rules: 65536 registers by 256 a warp, 64 warps, 228 KB less 1 KB a program."""
    sm = gpus.CORES["sm_90"]
    assert sm.resident_warps(32, 4, 0) == 64
    assert sm.resident_warps(40, 4, 0) == 48  # 51 warps' registers are 12 programs
    assert sm.resident_warps(41, 8, 0) == 40  # 48 a thread: 42 warps
    assert sm.resident_warps(64, 32, 0) == 32  # one program of 1024 threads
    assert sm.resident_warps(32, 4, 100 * 1024) == 8  # two programs' shared memory
    assert sm.resident_warps(128, 1, 0) == 16  # by registers, not the 32 programs
    assert gpus.CORES["gfx942"].resident_warps(128, 4, 0) == 16  # four wavefronts a SIMD


def test_loads_are_told_from_other_instructions():
    nvidia = {"LDG.E.128": 16, "LDG.E.EF.128": 16, "LDG.E.64.CONSTANT": 8, "LDG.E": 4, "LDG.E.U16": 2, "LDG.E.U8": 1,
              "LDGSTS.E.BYPASS.128": 16, "LDS.128": 0, "STG.E.128": 0, "IMAD": 0}  # fmt: skip
    assert {name: machine_code.nvidia_load(name) for name in nvidia} == nvidia
    amd = {"global_load_dwordx4": 16, "buffer_load_dwordx2": 8, "global_load_dword": 4, "global_load_ushort": 2,
           "global_load_ubyte": 1, "global_store_dwordx4": 0, "ds_read_b128": 0}  # fmt: skip
    assert {name: machine_code.amd_load(name) for name in amd} == amd


def test_quantiles_and_fits():
    assert harness.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert harness.quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    exponent, r2 = scaling.fit([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0])
    assert exponent == pytest.approx(2.0) and r2 == pytest.approx(1.0)


def test_the_largest_that_fits():
    def measure(rows: int) -> float:
        return 5.0 + 0.1 * rows

    best, peaks = bench_memory.largest(measure, 100.0, 120, 6000, 3)
    assert peaks[best] <= 100.0 < measure(best + 2 * bench_memory.STEP)
    best, peaks = bench_memory.largest(measure, 10.0, 120, 6000, 3)
    assert best == 30 and all(rows > 0 for rows in peaks)
    assert bench_memory.largest(lambda rows: 500.0, 10.0, 120, 6000, 3)[0] is None
    assert bench_memory.largest(lambda rows: 5.0, 10.0, 120, 600, 3)[0] == 600


def test_the_hot_loop():
    """Of three loops the innermost that loads; of its if, the side that is fallen into; up to the first way back."""
    text = """
        outer: MOV
        zeros: STG
               BRA? zeros
        hot:   LDG.E.128
               BRA? else
               FFMA
               BRA join
        else:  LDG.E.U16
               LDG.E.U16
        join:  STG
               BRA? hot
               BRA? hot
               BRA? outer
               EXIT
    """
    code, labels = [], {}
    for line in text.strip().splitlines():
        label, _, rest = line.strip().rpartition(":")
        if label:
            labels[label] = len(code)
        name, _, operand = rest.strip().partition(" ")
        code.append((name.rstrip("?"), (machine_code.CONDITIONAL if name.endswith("?") else "") + operand))

    def hot(code, labels):
        return machine_code.hot_loops(machine_code.nvidia_trips(code, labels), machine_code.NVIDIA, False)

    assert hot(code, labels) == [["LDG.E.128", "BRA", "FFMA", "BRA", "STG", "BRA"]]
    quiet = [(name.replace("LDG", "LDS"), rest) for name, rest in code]
    assert len(hot(quiet, labels)[0]) == 6
    assert hot(code[:2], {}) == []


def test_a_kernel_that_streams_has_a_hot_loop_for_each_thing_it_does():
    statistics, masked_end = ["LDG.E.128", "MUFU.EX2", "BRA"], ["LDG.E.128", "ISETP", "MUFU.EX2", "BRA"]
    gradient, end_of_row = ["LDG.E.128", "LDG.E.128", "MUFU.EX2", "STG.E.128", "BRA"], ["LDG.E", "MUFU.EX2", "STG.E"]
    zeros, largest = ["STG.E.128", "BRA"], ["LDG.E.128", "FMNMX", "BRA"]
    found = machine_code.hot_loops(
        [masked_end, statistics, zeros, end_of_row, gradient, largest], machine_code.NVIDIA, True
    )
    assert sorted(found) == sorted([statistics, gradient, largest])


def test_loops_of_amds_code_are_those_that_llvm_notes():
    """Blocks of a loop may lie anywhere; a header's note may come a line later; an outer loop is none."""
    text = """
    .LBB0_0:
    \ts_load_dwordx2 s[0:1]
    .LBB0_1:                                ; %outer
                                            ; =>This Loop Header: Depth=1
    \tv_mov_b32 v0
    .LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
                                            ; =>  This Inner Loop Header: Depth=2
    \tglobal_load_dwordx4 v[0:3]
    \ts_cbranch_execz .LBB0_4
    ; %bb.3:                                ;   in Loop: Header=BB0_2 Depth=2
    \tscratch_load_dword v4
    ; %bb.5:                                ;   in Loop: Header=BB0_1 Depth=1
    \ts_cbranch_scc1 .LBB0_1
    .LBB0_6:
    \ts_endpgm
    .LBB0_4:                                ;   in Loop: Header=BB0_2 Depth=2
    \ts_cbranch_scc1 .LBB0_2
    """
    names, trips = machine_code.amd_trips(textwrap.dedent(text))
    assert len(names) == 8
    assert trips == [["global_load_dwordx4", "s_cbranch_execz", "scratch_load_dword", "s_cbranch_scc1"]]


@pytest.mark.parametrize(
    "problem", [Problem("logits", 40, 300), Problem("linear", 40, 300, 16, active_fraction=0.2)], ids=str
)
def test_providers_compute_the_same_loss(problem):
    """Whoever runs here and claims DAPO gives eager's loss and gradients."""
    device = torch.device("cpu")
    batch = providers.inputs(problem, device)
    names = [name for name in ("logits", "hidden", "weight") if name in batch]

    def run(provider):
        inputs = providers.leaves(batch)
        watched = {name: inputs[name] for name in names}
        if "logits" in watched:
            watched = {"logits": batch["logits"].clone().requires_grad_()}
            inputs["logits"] = watched["logits"].view_as(watched["logits"])
        loss = provider.forward(inputs)
        return loss.detach(), torch.autograd.grad(loss, list(watched.values()))

    loss, gradients = run(providers.named(f"{problem.operation}:{providers.BASELINE}"))
    compared = 0
    for provider in providers.table(problem):
        compiles = provider.name in ("torch.compile", "Liger chunked GRPO")
        if provider.missing(device) or compiles or not provider.dapo:
            continue
        found, others = run(provider)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
        for mine, right in zip(others, gradients, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)
        compared += 1
    assert compared >= 3


def test_the_products_alone_are_the_heads():
    """logits, dHidden and dWeight of the rows with a gradient; the other rows' dHidden is 0."""
    problem = Problem("linear", 40, 30, 16, active_fraction=0.2)
    provider = providers.named("linear:three GEMMs alone")
    batch = providers.leaves(provider.prepare(providers.inputs(problem, torch.device("cpu"))))
    hidden, weight = batch["hidden"], batch["weight"]
    found = torch.autograd.grad(provider.forward(batch), [hidden, weight])
    flat = hidden.detach().flatten(0, 1)[:8]
    logits = flat @ weight.detach().t()
    torch.testing.assert_close(found[0].flatten(0, 1)[:8], logits @ weight.detach())
    torch.testing.assert_close(found[1], logits.t() @ flat)
    assert found[0].flatten(0, 1)[8:].count_nonzero() == 0


def test_no_problem_is_begun_after_the_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "ceilings", lambda *rest: {})
    args = Namespace(device=torch.device("cpu"), quick=True, limit=-1.0)
    _compare.compare([Problem("logits", 40, 300)], args, 1, tmp_path / "logits.jsonl")
    assert "out of time: logits 40 x 300" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_host_time_is_of_the_step_alone():
    calls = []
    times = bench_host.host_times(lambda: time.sleep(0.05), lambda batch: calls.append(batch), torch.device("cpu"), 3)
    assert len(calls) == len(times) == 3 and max(times) < 25.0


def test_triton_launches_are_counted():
    from triton.knobs import runtime

    class Launch:
        def get(self):
            return {"name": "some_kernel"}

    with bench_host.triton_launches() as counted:
        runtime.launch_enter_hook(Launch())
        runtime.launch_enter_hook(Launch())
    runtime.launch_enter_hook(Launch())
    assert counted == {"some_kernel": 2}


def test_operators_of_a_step_are_counted():
    x = torch.ones(4)
    found = bench_host.launches(lambda: x.add(1).mul(2), torch.device("cpu"))
    assert found["operators"] == 2 and found["device_activities"] is None


def test_trls_kernels_come_from_the_installed_files(monkeypatch, tmp_path):
    """By path, with the relative imports they make, and nothing of trl itself is run."""
    (tmp_path / "trl" / "kernels").mkdir(parents=True)
    (tmp_path / "trl" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "trl" / "kernels" / "some.py").write_text(
        "from transformers.utils import is_triton_available\n"
        "def enter():\n    from ..trainer.utils import maybe_gather_lm_head_ctx\n"
        "    return maybe_gather_lm_head_ctx(None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name == "trl" or name.startswith("trl.")]:
        monkeypatch.delitem(sys.modules, name)
    module = trl_kernels.load("some")
    assert module.is_triton_available() and module.__file__ == str(tmp_path / "trl" / "kernels" / "some.py")
    with module.enter():
        assert "trl" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match=r"trl\.kernels\.none"):
        trl_kernels.load("none")


def test_no_circle_of_imports():
    """Also none that a function hides by importing late."""
    imports = {}
    for path in sorted((ROOT / "bench").glob("*.py")):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bench":
                found |= {node.module.split(".")[1]} if "." in node.module else {a.name for a in node.names}
        imports[path.stem] = found
    assert "machine_code_peers" in imports["machine_code"]
    graphlib.TopologicalSorter(imports).prepare()  # CycleError names the modules


def test_providers_know_what_they_lack():
    cpu = torch.device("cpu")
    assert providers.named("logits:TRL logits kernel").missing(cpu)
    assert harness.Provider("x", print, ("no-such-package",)).missing(cpu) == "no-such-package is not installed"
    assert providers.named("linear:ours, one pass").missing(cpu) is None


def test_stages_of_a_profile():
    problem = Problem("linear", 100, 32000, 64)
    assert profile_step.stage("aten::addmm", [[100, 64], [64, 32000]], problem) == "matrix products"
    assert profile_step.stage("aten::exp_", [[50, 32000]], problem) == "logits"
    assert profile_step.stage("aten::where", [[100], [100]], problem) == "tokens (N numbers)"
    assert profile_step.stage("aten::index_select", [[100, 64]], problem) == "hidden states and weight"
    assert profile_step.stage("aten::copy_", [[100, 32000]], problem) == "copies and fills"
