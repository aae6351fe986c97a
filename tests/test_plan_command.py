"""python -m a3po_kernels.planning from end to end: what it prints is what Python gives, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from batches import INTERPRETED

from a3po_kernels import gspo, presets
from a3po_kernels.planning import HeadStep, Machine, estimate_memory, estimate_step, traffic_of_step
from a3po_kernels.planning.__main__ import main, read
from a3po_kernels.planning.cards import CARDS
from a3po_kernels.planning.model import assumed_model
from a3po_kernels.planning.plan import limit_of, make_plan

pytestmark = pytest.mark.skipif(INTERPRETED, reason="arithmetic, natively")
SMALL = HeadStep(
    10, 100, 6, torch.float32, presets["a3po"](), tp=2, dp=3, rollouts=5, max_chunk_bytes=1600, reduce_metrics=True
)
ARGUMENTS = ["--tokens", "10", "--vocab", "100", "--hidden", "6", "--tp", "2", "--dp", "3", "--dtype", "fp32",
             "--tflops", "705", "--max-chunk-bytes", "1600", "--rollouts", "5"]  # fmt: skip
ASKED = ["--tokens", "65536", "--gpu", "h100", "--objective", "a3po", "--active", "0.3", "--dp", "8", "--tp", "2"]
HEAD = ["--hidden", "4096", "--vocab", "151936", "--layers", "36"]
QWEN = {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 36,
        "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False}  # fmt: skip


def printed(capsys, *arguments: str) -> dict:
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_it_prints_what_python_gives(capsys):
    found = printed(capsys, *ARGUMENTS, "--link-gb-per-s", "7", "--no-overlap")
    machine = Machine(network_bandwidth=7e9, overlap=False)
    expected = estimate_step(SMALL, machine)
    assert found["machine"]["network_bandwidth"] == 7e9 and found["machine"]["node_latency"] == machine.node_latency
    for name in ("seconds", "operations", "wire_bytes", "efficiency", "memory"):
        assert found["estimate"][name] == pytest.approx(getattr(expected, name))
    assert found["memory_at_peak"] == {"moment": expected.memory.moment, "bytes": expected.memory.peak}
    assert [line["traffic"]["bytes"] for line in found["estimate"]["collectives"]] == [
        traffic.bytes for traffic in traffic_of_step(SMALL)
    ]
    assert found["rates"] == {"flops": "given", "copy": "measured", "limit": "products as given, data sheet"}
    main(ARGUMENTS)
    text = capsys.readouterr().out
    assert "6 GPUs: tp 2, cp 1, dp 3; one-pass, 10 rows in 3 chunks" in text
    assert "dHidden" in text and "Assumed, not measured: within a node 450 GB/s, 10 us" in text


def test_all_that_was_asked_for(capsys):
    """Bytes by part, the limit and the measured rates, the share of the step, route and chunk, and the others'."""
    main([*HEAD, *ASKED])
    text = capsys.readouterr().out
    step = HeadStep(65536, 151936, 4096, objective="a3po", active_fraction=0.3, tp=2, dp=8,
                    device_memory=CARDS["h100"].memory)  # fmt: skip
    plan = make_plan(step, CARDS["h100"], assumed_model(4096, 151936, 36))
    for name, size in plan.estimate.memory.items():
        assert name == "total" or any(line.split()[:2] == [name, f"{size / 1e6:.1f}"] for line in text.splitlines())
    assert f"at the peak ({plan.estimate.memory.moment})" in text
    assert "head: a3po, 151936 x 4096, bfloat16; 65536 tokens a replica, 524288 in all, 30 % with a gradient" in text
    assert plan.estimate.route == "one-pass" and "16 GPUs: tp 2, cp 1, dp 8; one-pass, 19661 rows in 3 chunks" in text
    assert "chunk: 6554 rows x 75968 columns of logits at a time, 3 times; max_chunk_bytes = 2684354560" in text
    # (2 + 4 f) N V/2 H at the data sheet's rate; at the H200's share of it.
    work = (2 * 65536 + 4 * 19661) * 75968 * 4096
    assert f"{1e3 * work / 989.4e12:.3f} ms: {work / 1e12:.3f} T" in text and "(data sheet)" in text
    assert f"{1e3 * work / 705e12:.3f} ms at 705 TFLOP/s (assumed)" in text
    assert "Assumed rates: as far below the data sheet as was measured on an NVIDIA H200" in text
    layers = 6 * 65536 * 36 * (12 * 4096**2 + 4096 * 4096)  # 4096 tokens a rollout: on average 2048 earlier ones
    seconds = layers / 2 / (0.4 * 989.4e12)
    share = plan.estimate.seconds / (plan.estimate.seconds + seconds)
    assert f"{100 * share:.1f} %: the model's forward and backward {1e3 * seconds:.3f} ms at 40 %" in text
    for one in plan.beside:
        (line,) = (line for line in text.splitlines() if line.startswith(one.name))
        over = "more than the card has" if one.memory > CARDS["h100"].memory else ""
        figures = f"{1e3 * one.seconds:.3f} {one.memory / 1e6:.1f} {over}"
        assert line.removeprefix(one.name).split() == figures.split()
        assert f"  {one.name}: {one.text}" in text
    assert [one.name for one in plan.beside] == ["eager PyTorch", "torch.compile", "TRL's chunked head"]
    # The measured card is said to be measured.
    main([*HEAD, "--tokens", "8192"])
    text = capsys.readouterr().out
    assert "705 TFLOP/s (measured)" in text and "4250 GB/s (measured)" in text and "Assumed rates" not in text


@pytest.mark.parametrize("folder", [False, True])
def test_a_model_by_its_config(tmp_path, capsys, folder):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN))
    found = printed(capsys, "--model", str(tmp_path if folder else path), *ASKED)
    by_sizes = printed(capsys, *HEAD, *ASKED)
    assert found["estimate"] == by_sizes["estimate"] and found["beside"] == by_sizes["beside"]
    assert found["model"]["dtype"] == "torch.bfloat16" and by_sizes["model"]["dtype"] is None
    layer = 2 * 4096 * 128 * (32 + 8) + 3 * 4096 * 12288
    assert found["model"]["parameters"] == 36 * layer
    assert found["share"]["operations"] == 65536 * 6 * (36 * layer + 36 * 2 * 4096 * 2048)
    main(["--model", str(path), *ASKED])
    assert "6.95 G parameters that a token meets, by config.json" in capsys.readouterr().out


def test_a_tied_head_a_config_in_fp32_and_no_layers(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**QWEN, "tie_word_embeddings": True, "torch_dtype": "float32"}))
    refused(capsys, ["--model", str(path), *ASKED], "give --tflops for a head in torch.float32, or --dtype")
    main(["--model", str(path), "--dtype", "bf16", *ASKED])
    assert f"(tied: the embedding's own gradient, {75968 * 4096 * 2 / 1e6:.1f} MB" in capsys.readouterr().out
    found = printed(capsys, "--model", str(path), "--tflops", "50", *ASKED)
    assert found["limit"]["flops"] == 50e12 and found["estimate"]["memory"]["logits_chunk"] > 0
    main([*HEAD[:4], *ASKED])
    text = capsys.readouterr().out
    assert "left out: neither --model nor --layers says what the model is" in text and "tied" not in text


def test_what_the_formulas_do_not_know(capsys):
    main([*HEAD, *ASKED, "--lora-rank", "8"])
    assert "beside it: left out, their formulas are of a head without an adapter" in capsys.readouterr().out
    found = printed(capsys, *HEAD, *ASKED, "--dtype", "fp64", "--tflops", "30")
    assert found["beside"] == [] and found["why_not_beside"] == "their formulas are of fp32 and 16-bit heads"


def test_no_row_with_a_gradient(capsys):
    main([*HEAD, "--tokens", "64", "--active", "0"])
    text = capsys.readouterr().out
    assert "chunk: no row has a gradient" in text and "recompute, 0 rows in 0 chunks" in text


def test_route_and_chunk_of_recomputation(capsys):
    found = printed(capsys, *HEAD, "--tokens", "8320", "--route", "recompute")
    # 1 GiB holds 64512 columns of 8320 rows: three tiles of a multiple of 64.
    assert found["chunk"] == {"rows": 8320, "columns": 50688, "count": 3, "max_chunk_bytes": 1 << 30}
    assert found["estimate"]["route"] == "recompute"
    expected = estimate_memory(8320, 4096, 151936, route="recompute", device="h200")
    assert found["estimate"]["memory"] == {**expected, "lora": 0, "collectives": 0}


CHANGED = {
    "--objective": ("gspo", "objective", gspo()), "--cp": ("2", "cp", 2),
    "--route": ("recompute", "route", "recompute"),
    "--active": ("0.5", "active_fraction", 0.5), "--active-fraction": ("0.5", "active_fraction", 0.5),
    "--statistics": ("active", "statistics", "active"), "--rows": ("12", "rows", 12), "--width": ("8", "width", 8),
    "--vocabulary": ("120", "vocabulary", 120), "--grad-hidden": ("partial", "grad_hidden", "partial"),
    "--lora-rank": ("4", "lora_rank", 4), "--hidden-layout": ("sequence_sharded", "hidden_layout", "sequence_sharded"),
    "--on-policy": (None, "on_policy", True), "--frozen-weight": (None, "frozen_weight", True),
    "--no-reduce-metrics": (None, "reduce_metrics", False), "--device-memory": ("99", "device_memory", 99),
    "--tflops": ("2", "flops", 2e12), "--copy-gb-per-s": ("3", "copy", 3e9),
    "--gpus-per-node": ("4", "gpus_per_node", 4), "--node-gb-per-s": ("5", "node_bandwidth", 5e9),
    "--node-us": ("6", "node_latency", 6e-6), "--link-gb-per-s": ("7", "network_bandwidth", 7e9),
    "--link-us": ("8", "network_latency", 8e-6), "--algorithm": ("ring", "algorithm", "ring"),
    "--no-overlap": (None, "overlap", False),
}  # fmt: skip


@pytest.mark.parametrize("option", CHANGED)
def test_every_option_arrives(option):
    """It changes its own field and no other."""
    value, name, expected = CHANGED[option]
    plain, asked = read(ARGUMENTS), read([*ARGUMENTS, option, *([] if value is None else [value])])
    holder, before = (asked.step, plain.step) if hasattr(asked.step, name) else (asked.machine, plain.machine)
    assert getattr(holder, name) == expected and holder == replace(before, **{name: expected})
    assert (asked.machine if holder is asked.step else asked.step) == (
        plain.machine if holder is asked.step else plain.step
    )


def test_the_plans_own_options_arrive(capsys):
    found = printed(capsys, *HEAD, *ASKED, "--mfu", "0.2", "--weight-gradient", "all_reduce")
    plain = printed(capsys, *HEAD, *ASKED)
    assert found["share"]["model_seconds"] == pytest.approx(2 * plain["share"]["model_seconds"])
    assert found["estimate"]["weight_gradient"]["traffic"]["kind"] == "all_reduce"
    assert found["share"]["operations"] < printed(capsys, *HEAD, *ASKED, "--layers", "72")["share"]["operations"]


@pytest.mark.parametrize("name", CARDS)
def test_every_card(capsys, name):
    found, card = printed(capsys, *HEAD, *ASKED, "--gpu", name), CARDS[name]
    assert found["gpu"]["name"] == card.name and found["limit"]["bandwidth"] == card.bandwidth
    assert found["machine"]["flops"] == card.rates.flops and found["machine"]["node_bandwidth"] == card.link
    assert found["rates"]["copy"] == ("measured" if name == "h200" else "assumed")
    assert found["chunk"]["max_chunk_bytes"] == card.memory // 32
    # No card is said to beat its data sheet.
    assert found["estimate"]["seconds"] > found["limit"]["seconds"]


@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("lora_rank", [0, 64, 4096])
@pytest.mark.parametrize("statistics", ["all", "active"])
def test_no_step_is_faster_than_the_limit(statistics, lora_rank, tp):
    """Few rows, which the weight's bytes bound; rows without a gradient, or none with one; adapters of any rank."""
    card = CARDS["h200"]
    for tokens in (64, 1024, 8192):
        for active in (0.0, 0.01, 0.3, 1.0):
            for frozen in (False, True):
                step = HeadStep(
                    tokens, 151936, 4096, torch.bfloat16, presets["a3po"](), tp=tp, lora_rank=lora_rank,
                    active_fraction=active, statistics=statistics, frozen_weight=frozen, device_memory=card.memory,
                )  # fmt: skip
                estimate, limit = estimate_step(step), limit_of(step, card)
                assert limit.operations <= estimate.operations, step
                assert 0 < limit.seconds <= estimate.seconds and 0 < estimate.efficiency, step


def refused(capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and message in said.err and not said.out, said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*HEAD, *ASKED, "--gpu", "H2000"], "--gpu must be one of a100, "),
        ([*HEAD, *ASKED, "--gpu", "H2000"], "got 'H2000'; did you mean 'h200'?"),
        ([*HEAD, *ASKED, "--objective", "a3p0"], "did you mean 'a3po'?"),
        ([*HEAD, *ASKED, "--mfu", "0"], "mfu must lie in (0, 1]; got 0.0"),
        ([*HEAD, *ASKED, "--active", "2"], "active_fraction must be finite and lie in [0.0, 1.0]; got 2.0"),
        ([*HEAD, *ASKED, "--tp", "200000"], "tp = 200000 ranks cannot share vocabulary = 151936"),
        ([*HEAD[:4], *ASKED, "--layers", "0"], "layers must be positive; got 0"),
        ([*HEAD[:2], *ASKED], "give --model, or --hidden and --vocab"),
        (ASKED, "give --model, or --hidden and --vocab"),
        ([*HEAD, *ASKED, "--model", "somewhere"], "--model says what --hidden, --vocab, --layers would"),
        (["--model", "nowhere", *ASKED], "model must be a config.json or a folder with one; got nowhere"),
        ([*HEAD, *ASKED, "--dtype", "fp32"], "the cards' rates are of bf16 and fp16; give --tflops"),
        ([*HEAD, *ASKED, "--route", "one-launch"], "invalid choice: 'one-launch'"),
        ([*HEAD, *ASKED, "--act", "1"], "unrecognized arguments: --act"),
        ([*HEAD, *ASKED, "--on-policy", "--route", "one-pass", "--objective", "lp_reg"], "holds a whole batch"),
        (HEAD, "the following arguments are required: --tokens"),
    ],
)  # fmt: skip
def test_what_is_refused(capsys, arguments, message):
    refused(capsys, arguments, message)


def test_it_runs_as_a_module_without_a_warning():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "a3po_kernels.planning", *ARGUMENTS]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "efficiency" in result.stdout, result.stderr
    wrong = subprocess.run([*command, "--tp", "1000"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "tp = 1000 ranks cannot share vocabulary = 100" in wrong.stderr
    assert "Traceback" not in wrong.stderr
