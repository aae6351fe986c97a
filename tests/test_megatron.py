"""integrations.megatron: GPTModel's output processor, tied and not, with and without sequence parallelism."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass, fields
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from a3po_kernels import a3po, dapo, gspo, logprob_policy_loss
from a3po_kernels.integrations.megatron import HeadContext, HeadOutput, output_processor
from tests.megatron_stand_in import KEYWORDS, Model
from tests.ranks import on_ranks

V, H, B, S = 40, 6, 3, 8
OBJECTIVES = {"a3po": a3po, "dapo": dapo, "gspo": gspo}


@dataclass(frozen=True)
class Case:
    """objective: "": log-probs and entropy. size: of the vocabulary, without padding."""

    tied: bool
    sequence_parallel: bool
    objective: str = ""
    packed: bool = False
    masked: bool = False
    bias: bool = False
    scale: float = 1.0
    size: int = V
    reduced_elsewhere: bool = False


CASES = [Case(*x) for x in itertools.product([False, True], [False, True], ["", "a3po"])]
CASES += [Case(False, split, name, packed=True) for split in (False, True) for name in ("", "gspo")]
CASES += [Case(True, split, "dapo", masked=True) for split in (False, True)]
CASES += [Case(False, True, masked=True), Case(False, False, bias=True, scale=0.6), Case(False, True, size=33)]
CASES += [Case(False, False, reduced_elsewhere=True)]


def problem(case: Case) -> dict:
    """The same whole one on every rank."""
    g = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = (1, B * S) if case.packed else (B, S)
    whole = {"embedding": normal(V, H), "body": normal(H, H)}
    if not case.tied:
        whole["head"] = normal(V, H)
    if case.bias:
        whole["bias"] = normal(V)
    return {
        "whole": whole, "ids": torch.randint(0, 33, rows, generator=g),
        "labels": torch.randint(0, 33, rows, generator=g), "temperature": 0.5 + torch.rand(rows, generator=g).double(),
        "factors": normal(2, *rows), "advantages": torch.tensor([1.0, -0.5, 0.7]).double(),
        "old": normal(*rows) - 3.0, "mask": torch.rand(rows, generator=g) > 0.3,
        "cu_seqlens": torch.tensor([0, 5, 5 + S, B * S]),
    }  # fmt: skip


def keywords(case: Case, p: dict) -> dict:
    """Of the policy loss, as the package takes them: [N] where packed."""
    flat = (lambda x: x[0]) if case.packed else (lambda x: x)
    found = {"old_logprobs": flat(p["old"])}
    return found | ({"cu_seqlens": p["cu_seqlens"]} if case.packed else {})


def run_split(case: Case) -> dict:
    """On a rank: through the processor."""
    p = problem(case)
    model = Model(p["whole"], case.tied, case.sequence_parallel, case.scale)
    model.output_layer.disable_grad_reduce = case.reduced_elsewhere
    options = {"temperature": p["temperature"][0] if case.objective and case.packed else p["temperature"]}
    if case.size != V:
        options["vocab_size"] = case.size
    if case.objective:
        context = HeadContext(OBJECTIVES[case.objective](), p["advantages"], **options, **keywords(case, p))
    else:
        context = HeadContext(**options)
    out = model(
        p["ids"], p["labels"], output_processor=output_processor, output_processor_context=context,
        loss_mask=p["mask"].double() if case.masked else None,
        packed_seq_params=SimpleNamespace(cu_seqlens_q=p["cu_seqlens"]) if case.packed else None,
    )  # fmt: skip
    loss = out.policy.loss if out.policy else (out.logprobs * p["factors"][0] + out.entropy * p["factors"][1]).sum()
    loss.backward()
    return {
        "loss": loss.detach(), "logprobs": out.logprobs.detach(), "entropy": out.entropy.detach(), **model.gradients()
    }


def run_whole(case: Case) -> dict:
    """The formula on one process: logits, a softmax, and the loss from log-probs."""
    p = problem(case)
    leaves = {name: x.clone().requires_grad_() for name, x in p["whole"].items()}
    hidden = torch.tanh(leaves["embedding"][p["ids"]] @ leaves["body"])
    logits = hidden @ leaves["embedding" if case.tied else "head"].t()
    if case.bias:
        logits = logits + leaves["bias"]
    logits = (case.scale * logits / p["temperature"].unsqueeze(-1))[..., : case.size]
    distribution = torch.log_softmax(logits, -1)
    logprobs = distribution.gather(-1, p["labels"].unsqueeze(-1)).squeeze(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    if case.masked:
        logprobs, entropy = logprobs * p["mask"], entropy * p["mask"]
    if case.objective:
        if case.packed:
            logprobs, entropy = logprobs[0], entropy[0]
        loss = logprob_policy_loss(
            logprobs, p["advantages"], objective=OBJECTIVES[case.objective](), entropy=entropy,
            mask=p["mask"] if case.masked else None, **keywords(case, p),
        ).loss  # fmt: skip
    else:
        loss = (logprobs * p["factors"][0] + entropy * p["factors"][1]).sum()
    loss.backward()
    found = {name: x.grad for name, x in leaves.items()}
    return {"loss": loss.detach(), "logprobs": logprobs.detach(), "entropy": entropy.detach(), **found}


def run_all() -> tuple[list[dict], list[str], list[str]]:
    return [run_split(case) for case in CASES], _hooks(), _refusals()


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request, tmp_path_factory):
    if request.param == 2:
        return on_ranks(2, run_all)
    store = tmp_path_factory.mktemp("store") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        return [run_all()]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("number", range(len(CASES)), ids=str)
def test_it_is_the_formula_on_one_process(ranks, number):
    each, expected = [rank[0][number] for rank in ranks], run_whole(CASES[number])
    assert each[0].keys() == expected.keys()
    for name, value in expected.items():
        parts = [rank[name] for rank in each]
        if name in ("embedding", "head", "bias"):
            parts = [torch.cat(parts)]
        for part in parts:
            torch.testing.assert_close(part, value, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
        assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between the ranks"


# -- what it takes ----------------------------------------------------------------------------------------------------


def test_it_takes_what_megatron_calls_it_with():
    parameters = inspect.signature(output_processor).parameters
    assert list(parameters) == KEYWORDS
    assert all(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters.values())


def test_the_output_is_no_tuple():
    """Float16Module rebuilds a tuple as a plain one, without names."""
    assert not issubclass(HeadOutput, tuple)
    assert [field.name for field in fields(HeadOutput)] == ["logprobs", "entropy", "policy"]


def _hooks() -> list[str]:
    """On a rank: what ran, in order."""
    p = problem(CASES[0])
    model, ran = Model(p["whole"], False, False), []

    def plain(module, *unused):  # as Megatron's DistributedDataParallel registers it
        assert module is model.output_layer
        with torch.no_grad():
            module.weight.copy_(p["whole"]["head"].chunk(dist.get_world_size())[dist.get_rank()])
        ran.append("plain")

    model.output_layer.register_forward_pre_hook(plain)
    model.output_layer.register_forward_pre_hook(lambda *_: ran.append("with keywords"), with_kwargs=True)
    with torch.no_grad():
        model.output_layer.weight.zero_()  # what has not been gathered yet
    out = model(p["ids"], p["labels"], output_processor=output_processor)
    logits = torch.tanh(p["whole"]["embedding"][p["ids"]] @ p["whole"]["body"]) @ p["whole"]["head"].t()
    expected = torch.log_softmax(logits, -1).gather(-1, p["labels"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out.logprobs, expected, rtol=1e-11, atol=1e-11)
    return ran


def _refusals() -> list[str]:
    """On a rank: the messages."""
    p = problem(CASES[0])
    objective, advantages = dapo(), p["advantages"]
    policy = {"output_processor_context": HeadContext(objective, advantages)}

    def packed(**options):
        return {"output_processor_context": HeadContext(objective, advantages, **options)}

    def layer(**changed):
        def change(model):
            for name, value in changed.items():
                setattr(model.output_layer, name, value)

        return change

    def forward_hook(model):
        model.output_layer.register_forward_hook(lambda *_: None)

    def changing_hook(model):
        model.output_layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,))

    def config(**changed):
        return lambda model: vars(model.config).update(changed)

    def nothing(model):
        pass

    cases = [
        ({"labels": None}, nothing), ({"inference_context": object()}, nothing),
        ({"runtime_gather_output": True}, nothing), ({}, config(defer_embedding_wgrad_compute=True)),
        ({"output_processor_context": {"temperature": 1.0}}, nothing), ({"loss_mask": torch.ones(B, 1)}, nothing),
        ({"loss_mask": p["mask"], "output_processor_context": HeadContext(objective, advantages, mask=p["mask"])},
         nothing),
        ({"packed_seq_params": object(), **policy}, nothing),
        (policy, config(context_parallel_size=2)), (packed(cp_group=dist.group.WORLD), config(context_parallel_size=3)),
        (packed(cu_seqlens=p["cu_seqlens"]), nothing), ({"output_layer": torch.nn.Linear(2, 2)}, nothing),
        ({}, layer(weight=None)), ({}, layer(gtp_remat_size=2)), ({}, forward_hook), ({}, changing_hook),
        ({"scale_logits": lambda x: x + 1}, nothing),
    ]  # fmt: skip
    found = []
    for given, change in cases:
        model = Model(p["whole"], False, False)
        change(model)
        given = {"labels": p["labels"], "output_processor": output_processor, **given}
        try:
            model(p["ids"], **given)
            found.append("nothing")
        except (ValueError, TypeError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


REFUSALS = [
    "ValueError: labels must be", "ValueError: inference_context must be None",
    "ValueError: runtime_gather_output must not", "ValueError: defer_embedding_wgrad_compute waits",
    "TypeError: output_processor_context must be a HeadContext or None; got dict",
    "ValueError: loss_mask must have shape [3, 8], as labels; got [3, 1]",
    "ValueError: loss_mask and the context's mask both",
    "ValueError: a policy loss of packed rollouts (packed_seq_params) needs cu_seqlens",
    "ValueError: a policy loss under context parallelism (2 ranks) needs cp_group in the context",
    "ValueError: cp_group must hold the 3 context-parallel ranks; got a group of ",
    "ValueError: cu_seqlens cuts one packed row: labels must have shape [1, S]; got [3, 8]",
    "TypeError: output_layer must be a ColumnParallelLinear of Megatron-Core; got Linear",
    "ValueError: the output layer's weight must be this rank's", "ValueError: the output layer's weight must be this",
    "ValueError: OutputLayer has hooks around its forward", "ValueError: a hook before OutputLayer's forward changes",
    "ValueError: scale_logits must be a multiplication",
]  # fmt: skip


def test_the_hooks_before_the_layer_run(ranks):
    assert [rank[1] for rank in ranks] == [["plain", "with keywords"]] * len(ranks)


def test_what_it_cannot_do_is_refused(ranks):
    for _, _, refused in ranks:
        assert len(refused) == len(REFUSALS)
        for got, expected in zip(refused, REFUSALS, strict=True):
            assert got.startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((dapo(),), {}, "objective and advantages, or neither"),
        ((), {"old_logprobs": 1}, "unexpected option 'old_logprobs' of linear_token_logprobs"),
        ((dapo(), torch.ones(2)), {"tp_group": None}, "unexpected option 'tp_group' of linear_policy_loss"),
        ((dapo(), torch.ones(2)), {"temprature": 1.0}, r"'temprature'.* takes .*temperature"),
    ],
)
def test_the_context_names_what_it_does_not_take(arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        HeadContext(*arguments, **options)
