"""The Python blocks of the pages in docs/ that need transformers or TRL, and TRL's page as a whole."""

from __future__ import annotations

import inspect
import re
import shlex
import sys

import docs_examples
import pytest

pytest.importorskip("trl")
import tiny
from trl import GRPOTrainer

from a3po_kernels.integrations.trl import A3POTrainer

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]
TRL = docs_examples.ROOT / "docs" / "trainers" / "trl.md"
# What is not the page's, and what a machine without a GPU and without a tracker must be told.
HERE = """--num_generations 4 --per_device_train_batch_size 8 --per_device_eval_batch_size 4 --max_completion_length 6
    --max_steps 2 --logging_steps 1 --eval_strategy steps --eval_steps 2 --beta 0.1 --entropy_coef 0.01
    --use_cpu true --bf16 false --report_to none"""


def test_there_are_such_pages():
    assert {"trl.md", "transformers.md"} <= {page.name for page in docs_examples.pages("trl")}


@pytest.mark.parametrize("page", docs_examples.pages("trl"), ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, tmp_path):
    result = docs_examples.run_blocks(page, tmp_path, "trl")
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The names that the page's script logs, started with the page's own flags, but for those of HERE."""
    folder = tmp_path_factory.mktemp("page")
    tiny.build("moe").save_pretrained(folder / "model")
    tokens = tiny.tokenizer()
    tokens.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokens.save_pretrained(folder / "model")
    launch = re.search(r"```bash\npython train\.py (.*?)\n```", TRL.read_text(), re.DOTALL)[1].replace("\\\n", " ")
    flags = [*shlex.split(launch), *shlex.split(HERE), "--model", str(folder / "model")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *flags])
        names = {"__name__": "__main__"}
        exec(docs_examples.blocks(TRL)[0], names)
    assert type(names["trainer"]) is A3POTrainer and names["trainer"].state.global_step == 2
    assert names["args"].build_objective().kl_coef == 0.1 and (folder / "out" / "config.json").exists()
    return {name for row in names["trainer"].state.log_history for name in row}


LISTED = set(docs_examples.names_in_table(TRL, "What is logged"))


def test_trls_page_defines_what_its_script_logs(logged):
    """Also in evaluation, whose names have a prefix; what the Trainer reports of a whole run is its own."""
    names = {name.removeprefix("eval_") for name in logged}
    of_the_run = {name for name in names if name.startswith("train_") or name.endswith("_per_second")}
    # total_flos, and seconds of an evaluation.
    of_the_run |= {"total_flos", "runtime", "step"}
    named = {name.replace("right", "<function>") for name in names - of_the_run}
    assert "eval_reward" in logged and "aux_loss" in named
    assert not named - LISTED


def test_each_name_of_trls_page_is_logged(logged):
    """By the script, or by a line of the trainers for what the script does not have: CISPO, vLLM and tools."""
    sources = inspect.getsource(GRPOTrainer) + inspect.getsource(A3POTrainer)
    rest = {name.replace("<function>", "right") for name in LISTED} - logged
    assert all(name.startswith(("cispo_", "sampling/", "tools/")) for name in rest), rest
    assert not [name for name in rest if f'["{name}"]' not in sources]
