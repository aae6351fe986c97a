"""Every Python block of the README and of docs/ runs; those that need TRL or verl run in conformance/."""

from __future__ import annotations

import contextlib
import io
import re

import docs_examples
import pytest
import torch
import torch.distributed as dist
from batches import INTERPRETED

import a3po_kernels
from tests.ranks import on_ranks

pytestmark = pytest.mark.skipif(INTERPRETED, reason="natively")
README = docs_examples.ROOT / "README.md"


@pytest.mark.parametrize("page", docs_examples.pages("core"), ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, tmp_path):
    result = docs_examples.run_blocks(page, tmp_path, "core")
    assert result.returncode == 0, result.stderr
    if page == README:
        # Off-policy: on-policy a loss of normalised advantages is 0 whatever the model does.
        assert abs(float(re.search(r"-?\d+\.\d+", result.stdout)[0])) > 1e-3, result.stdout


def parallel_page() -> list[list[float]]:
    """The numbers that docs/parallel.md prints on this rank, by line; its first block, of the group, is left out."""
    names = {"__name__": "page", "torch": torch, "dist": dist, "ranks": dist.get_world_size(), "rank": dist.get_rank()}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in docs_examples.blocks(docs_examples.ROOT / "docs" / "parallel.md")[1:]:
            exec(block.replace("dist.destroy_process_group()", ""), names)
    return [[float(word) for word in line.split()] for line in printed.getvalue().splitlines()]


def test_more_than_one_gpu_is_the_same_on_two_ranks():
    """Loss and dHidden of a split head, and the loss of spread rollouts, are one rank's; counts are of both ranks."""
    ((head, data, (context,)),) = on_ranks(1, parallel_page)
    for split, both, (spread,) in on_ranks(2, parallel_page):
        assert split == pytest.approx(head, rel=1e-5) and head[1] > 0
        assert both == pytest.approx([data[0], 2 * data[1]], rel=1e-5)
        assert spread == pytest.approx(context, rel=1e-5) and abs(context) > 1e-3


def test_no_block_is_left_out():
    """Each page with blocks is run here, in conformance or on stand-ins, and no fence is overlooked."""
    run = {page for where in ("core", "trl", "verl", "stand-ins") for page in docs_examples.pages(where)}
    assert README in docs_examples.pages("core")
    for page in docs_examples.PAGES:
        fences = len(re.findall(r"^\s*```\s*(?:python|py|pycon)\b", page.read_text(), re.MULTILINE))
        assert len(docs_examples.blocks(page)) == fences, page
        assert (page in run) == bool(fences), page


def test_a_block_that_fails_is_noticed_with_its_line(tmp_path):
    page = tmp_path / "page.md"
    first, second = "value = 1\n", "assert value == 1\nassert value == 2\n"
    page.write_text(f"# A page\n\n```python\n{first}```\n\ntext\n\n```python\n{second}```\n")
    result = docs_examples.run_blocks(page, tmp_path, "core")
    assert result.returncode == 1 and 'page.md", line 11' in result.stderr


def test_the_readme_is_short():
    """What a reader takes in within a minute; the rest is in docs/."""
    assert len(README.read_text().splitlines()) <= 150


def test_links_lead_somewhere():
    """Every relative link and image of the README and of docs/ is a file, and its anchor a heading of it."""
    for page in docs_examples.PAGES:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?:|\.\./\.\./actions", target):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page.name}: {target}"


def test_the_reference_has_every_public_name():
    """Where it is defined: in the members that the page lists of its module, or in a module of which it lists all."""
    text = (docs_examples.ROOT / "docs" / "reference.md").read_text()
    entries = re.findall(r"^::: (\S+)\n(?:    options:\n      members: \[([^\]]+)\])?", text, re.MULTILINE)
    listed = {module: members.split(", ") if members else None for module, members in entries}
    assert len(listed) == len(entries)
    for name in a3po_kernels.__all__:
        value = getattr(a3po_kernels, name)
        if name == "presets":  # a dictionary of the functions that are listed
            continue
        assert value.__module__ in listed, f"{name} of {value.__module__}"
        members = listed[value.__module__]
        assert members is None or name in members, name
    for module, members in listed.items():
        path = docs_examples.ROOT / (module.replace(".", "/") + ".py")
        for name in members or ():
            assert re.search(rf"^(?:def|class) {name}\b", path.read_text(), re.MULTILINE), f"{module}.{name}"
