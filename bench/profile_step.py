"""One step of a provider under torch.profiler: a table by stage and by operation, and a trace for a viewer.

    python -m bench.profile_step [--provider "linear:ours, one pass"] [--quick]
    python -m bench.profile_step --rows 8192 --vocab 151936 --hidden 2048 --dtype bf16 --active 0.5
    python -m bench.profile_step --list

Writes build/profile/<provider>.json (a Chrome trace: chrome://tracing, Perfetto). Times are each operation's own,
without those it calls; on a GPU the kernels' own.
"""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from bench import bench_linear, bench_logits, harness, options, providers, verdict
from bench.harness import ROOT, Problem

GEMM = re.compile(r"aten::(add|badd)?b?mm|gemm|cutlass|nvjet|xmma", re.IGNORECASE)
COPY = re.compile(r"mem(cpy|set)|aten::(copy_|fill_|zero_)|CatArray|elementwise.*copy", re.IGNORECASE)
VOCABULARY_KERNELS = re.compile(
    r"statistics|gradient|min_p|_forward_kernel|_backward_kernel|grpo_loss|softmax", re.IGNORECASE
)


def stage(name: str, shapes: list, problem: Problem) -> str:
    """Where an operation belongs: by its name, else by the largest of its inputs."""
    if GEMM.search(name):
        return "matrix products"
    if COPY.search(name):
        return "copies and fills"
    sizes = [torch.Size(shape) for shape in shapes if shape and all(isinstance(n, int) for n in shape)]
    if problem.hidden and any(size[-1] == problem.hidden for size in sizes):
        return "hidden states and weight"
    if VOCABULARY_KERNELS.search(name) or any(size.numel() > 16 * problem.rows for size in sizes):
        return "logits"
    return "tokens (N numbers)"


def measure(provider: harness.Provider, problem: Problem, device: torch.device):
    """The profiler of one step after one that is not recorded."""
    batch = provider.prepare(providers.inputs(problem, device))

    def step() -> None:
        provider.forward(providers.leaves(batch, copy=provider.inplace)).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as found:
        step()
    return found


def own_times(found, problem: Problem, device: torch.device) -> tuple[dict[str, float], dict[tuple[str, str], list]]:
    """Milliseconds by stage, and {(operation, stage): [milliseconds, calls]}."""
    stages: dict[str, float] = defaultdict(float)
    operations: dict[tuple[str, str], list] = defaultdict(lambda: [0.0, 0])
    for event in found.key_averages(group_by_input_shape=True):
        on_gpu = device.type == "cuda"
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue  # the host's part of a step that the GPU's kernels make up
        own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        where = stage(event.key, event.input_shapes or [], problem)
        stages[where] += own
        operations[event.key, where][0] += own
        operations[event.key, where][1] += event.count
    return dict(stages), dict(operations)


def main() -> None:
    parser = options.arguments(__doc__, rows=False)
    options.add_shape(parser, hidden=True)
    parser.add_argument("--provider", default="linear:ours, one pass", help="operation:name")
    parser.add_argument("--list", action="store_true", help="the providers' names")
    parser.add_argument("--top", type=int, default=12, help="operations to show")
    args = options.parse(parser)
    if args.list:
        print("\n".join(f"{operation}:{p.name}" for operation, table in
                        (("logits", providers.LOGITS), ("linear", providers.LINEAR)) for p in table))  # fmt: skip
        return
    try:
        provider = providers.named(args.provider)
    except (StopIteration, KeyError):
        parser.error(f"no provider {args.provider!r}; --list shows them")
    if reason := provider.missing(args.device):
        parser.error(f"{provider.name}: {reason}")
    logits = args.provider.startswith("logits")
    if logits and args.hidden is not None:
        parser.error("argument --hidden: the logits path has none")
    script = bench_logits if logits else bench_linear
    problem = options.chosen(parser, args, script.problems(args.device, args.quick)[:1])[0]
    if not provider.only(problem):
        parser.error(f"{provider.name} does not take {problem}")
    found = measure(provider, problem, args.device)
    stages, operations = own_times(found, problem, args.device)
    total = sum(stages.values())
    print(f"{args.provider}: one step, {problem}, {harness.device_name(args.device)}\n")
    print(f"{'stage':36}{'ms':>10}{'share':>8}")
    for name, value in sorted(stages.items(), key=lambda item: -item[1]):
        print(f"{name:36}{value:10.2f}{100 * value / total:7.1f}%")
    print(f"\n{'operation':60}{'ms':>10}{'calls':>7}  stage")
    for (name, where), (value, calls) in sorted(operations.items(), key=lambda item: -item[1][0])[: args.top]:
        print(f"{name[:58]:60}{value:10.2f}{calls:7d}  {where}")
    known = harness.ceilings(args.device, {problem.dtype}, quick=True)
    limit = harness.limit_ms(*harness.limit(problem, "both"), problem, known)
    print("\n" + verdict.of_stages(stages, limit))
    path = ROOT / "build" / "profile" / (re.sub(r"\W+", "-", args.provider) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(path))
    print(f"\ntrace: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
