"""The default budget of a chunk: from the card, and less where its memory is nearly used up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from a3po_kernels.core.tiles import default_chunk_bytes

GIB = 1 << 30
CUDA = torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """A card of some memory, of which some is free, held by the allocator or not."""

    def make(total, free, held=0, capturing=False):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: held)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    return make


def test_on_a_cpu():
    cpu = torch.device("cpu")
    assert default_chunk_bytes(cpu) == default_chunk_bytes(cpu, one_pass=True) == 64 << 20


def test_one_chunk_where_the_card_has_room(card):
    """8320 tokens of a 152k vocabulary in bf16 are one chunk on 141 GB and on 80 GB, 65536 tokens are several."""
    for total in (150_109_880_320, 84_900_000_000):
        card(total, total // 2)
        budget = default_chunk_bytes(CUDA, one_pass=True)
        assert budget == total // 32 > 8320 * 151936 * 2
        assert 4 * budget < 65536 * 151936 * 2
        assert default_chunk_bytes(CUDA) == min(total // 128, GIB)


def test_half_of_what_is_free_at_most(card):
    card(128 * GIB, 5 * GIB)
    assert default_chunk_bytes(CUDA, one_pass=True) == 2 * GIB
    card(128 * GIB, 1 * GIB, held=7 * GIB)  # what the allocator holds unused is free
    assert default_chunk_bytes(CUDA, one_pass=True) == 4 * GIB
    card(128 * GIB, 0)
    assert default_chunk_bytes(CUDA, one_pass=True) == 64 << 20
    card(128 * GIB, 0, capturing=True)  # a captured graph must not depend on the moment
    assert default_chunk_bytes(CUDA, one_pass=True) == 4 * GIB
