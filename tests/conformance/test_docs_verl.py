"""The pages with blocks for verl run; the command of docs/trainers/verl.md has verl's settings, its table our names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import docs_examples
import pytest
import torch

pytest.importorskip("verl")
import verl
from omegaconf import OmegaConf
from test_verl import batch, config, verl_loss
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

from a3po_kernels.integrations import verl as integration

pytestmark = pytest.mark.verl
PAGE = docs_examples.ROOT / "docs" / "trainers" / "verl.md"
SETTINGS = Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml"


def command() -> list[str]:
    """The words of the page's command, after its interpreter and module."""
    script = re.search(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)[1].replace("\\\n", " ")
    export, run = script.strip().splitlines()
    assert export == f"export VERL_USE_EXTERNAL_MODULES={integration.__name__}"
    words = shlex.split(run)
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    return words[3:]


def test_the_settings_of_the_command_are_verls():
    known = OmegaConf.load(SETTINGS)
    values = dict(word.split("=", 1) for word in command())
    assert len(values) > 25
    missing = object()
    added = {name for name in values if name.startswith("+")}
    assert added == {"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES"}
    assert OmegaConf.select(known, "ray_kwargs.ray_init.runtime_env", default=missing) is not missing
    absent = []
    for name in values.keys() - added:
        parent, _, leaf = name.rpartition(".")
        names = list(OmegaConf.select(known, parent, default=OmegaConf.create()))
        if leaf not in names:  # `in` of the settings themselves leaves mandatory ones out
            absent.append(name)
    assert not absent
    assert values["actor_rollout_ref.actor.policy_loss.loss_mode"] in POLICY_LOSS_REGISTRY


def test_the_page_lists_the_modes():
    text = re.search(r"- \*\*`loss_mode`\*\*:(.*?)\n- ", PAGE.read_text(), re.DOTALL)[1]
    ours = {name for name, loss in POLICY_LOSS_REGISTRY.items() if loss.__module__ == integration.__name__}
    assert set(re.findall(r"`(\w+)`", text)) == ours


def test_the_page_defines_what_is_logged():
    named = set(docs_examples.names_in_table(PAGE, "What is logged"))
    assert set(verl_loss(batch(3), "a3po", "token-mean", config())[2]) == named
    plain = set(verl_loss(batch(3), "grpo", "token-mean", config())[2])
    assert named - plain == {name for name in named if "select" in name or "beta" in name} and plain < named


def test_its_block_registers_an_objective():
    (block,) = docs_examples.blocks(PAGE)
    exec(block, {"__name__": "page"})
    try:
        data, actor = batch(3), config()
        strong, usual = (verl_loss(data, name, "token-mean", actor) for name in ("a3po_strong", "a3po"))
        assert strong[2]["actor/weight_beta"] == pytest.approx(3.0)
        assert not torch.allclose(strong[1], usual[1])
    finally:
        del POLICY_LOSS_REGISTRY["a3po_strong"]


def test_there_are_pages_with_verl():
    assert {PAGE.name, "extending.md"} <= {page.name for page in docs_examples.pages("verl")}


@pytest.mark.parametrize("page", docs_examples.pages("verl"), ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, tmp_path):
    result = docs_examples.run_blocks(page, tmp_path, "verl")
    assert result.returncode == 0, result.stderr
