"""Everything a GPU can tell, in one call of under ten minutes; each stage is saved as soon as it is done.

    python -m bench.on_gpu [--quick] [--folder DIR] [--limit SECONDS] [--stages NAME ...]
    python -m bench.on_gpu --dry-run        # the same walk on a CPU, at tiny sizes
    python -m bench.on_gpu --quick --check  # fails below a floor of FLOORS, or where a check or a test failed

Writes on_gpu.json (stage -> status, seconds, result) and the rows of the benchmarks to bench/results/<device>/, as
other benchmarks do with --save, or to --folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from bench import harness, options
from bench._gpu_stages import STAGES, Context
from bench.harness import ROOT

# (benchmark, provider, active fraction) -> how many times as fast as eager it must be on the quick problems.
# About 70 % of what one H200 gave at commit fc37fd52ca (bench/results/nvidia-h200): 23.41 / 1.60 ms, 23.41 / 1.58 ms;
# 63.53 / 46.33 ms; and 59.64 / 22.01 ms.
FLOORS = {
    ("logits", "ours", 1.0): 10.0,
    ("logits", "ours, in place", 1.0): 10.0,
    ("linear", "ours, one pass", 1.0): 0.95,
    ("linear", "ours, one pass", 0.2): 1.9,
}


def below_floor(folder: Path) -> list[str]:
    """Providers whose time against eager is worse than their floor, by the rows in a folder."""
    found = []
    for (name, provider, share), floor in FLOORS.items():
        path = folder / f"{name}.jsonl"
        rows = harness.read(path) if path.exists() else []
        ratios = [row["ratio"] for row in rows if (row["provider"], row["mode"], row["active_fraction"]) ==
                  (provider, "both", share) and row["ratio"] is not None]  # fmt: skip
        whose = f"{name}, {provider}, {100 * share:.0f} % active"
        if not ratios:
            found.append(f"{whose}: not measured")
        elif 1 / ratios[0] < floor:
            found.append(f"{whose}: {1 / ratios[0]:.2f} times as fast as eager, the floor is {floor}")
    return found


def summary(done: dict[str, dict]) -> str:
    lines = [f"{'stage':14}{'status':10}{'seconds':>8}"]
    for name, stage in done.items():
        result = stage["result"]
        note = result.get("skipped") or result.get("error") or ", ".join(map(str, result.get("failures", [])))
        lines.append(f"{name:14}{stage['status']:10}{stage['seconds']:8.1f}  {str(note)[:100]}".rstrip())
    return "\n".join(lines)


def run(context: Context, names: list[str]) -> None:
    context.folder.mkdir(parents=True, exist_ok=True)
    for name in (bar := tqdm(names)):
        bar.set_description(name)
        begin = time.monotonic()
        if context.left() <= 0:
            status, result = "no time", {}
        else:
            try:
                result = STAGES[name](context)
                status = "skipped" if "skipped" in result else "failed" if result.get("passed") is False else "passed"
            except subprocess.TimeoutExpired as error:
                said = error.stdout or b""
                text = said if isinstance(said, str) else said.decode(errors="replace")
                status, result = "failed", {"error": "out of its time", "output": text[-4000:]}
            except Exception as error:  # the other stages are still worth their time
                status, result = "failed", {"error": f"{type(error).__name__}: {error}"[:2000]}
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        context.done[name] = {"status": status, "seconds": time.monotonic() - begin, "result": result}
        (context.folder / "on_gpu.json").write_text(json.dumps(context.done, indent=1) + "\n")


def make_parser() -> argparse.ArgumentParser:
    parser = options.arguments(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--check", action="store_true", help="exit 1 below a floor or where a stage failed")
    parser.set_defaults(limit=570, save=True)  # the record of a machine that is rarely at hand
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=", ".join(STAGES)
    )
    return parser


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    if args.dry_run:
        args.device = torch.device("cpu")
    elif args.device.type != "cuda":
        parser.error("needs a CUDA GPU; --dry-run walks the stages without one")
    if args.dry_run and args.folder is None:
        args.folder = ROOT / "build" / "on_gpu"  # its times mean nothing
    options.settle(args)
    context = Context(args, args.device, args.folder.resolve(), time.monotonic() + args.limit, {})
    names = args.stages if "environment" in args.stages else ["environment", *args.stages]
    run(context, names)
    for name in ("host", "logits", "linear", "selection", "trainer"):
        if name in context.done:
            print(context.done[name]["result"].get("table", ""))
    print(summary(context.done))
    if not args.check:
        return 0
    problems = [name for name, stage in context.done.items() if stage["status"] not in ("passed", "skipped")]
    problems += below_floor(context.folder)
    print("\n".join(f"FAILED: {problem}" for problem in problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
