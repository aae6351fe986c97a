"""Which backend and device a test runs on, and the versions it ran with."""

from __future__ import annotations

import fcntl
import os
import platform

import pytest
import torch
from batches import INTERPRETED


def pytest_report_header(config) -> str:
    import numpy
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    mode = "Triton interpreter" if INTERPRETED else "compiled"
    return (
        f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"numpy {numpy.__version__}, {torch.get_num_threads()} threads, {gpu}, {mode}"
    )


def pytest_generate_tests(metafunc) -> None:
    """`backend`: torch on the CPU; Triton in the interpreter's process, or on a GPU."""
    if "backend" not in metafunc.fixturenames:
        return
    if INTERPRETED:
        params = [pytest.param("triton", marks=pytest.mark.interpreter)]
    else:
        params = ["torch", pytest.param("triton", marks=pytest.mark.cuda)]
    metafunc.parametrize("backend", params)


def pytest_collection_modifyitems(items) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device(request) -> torch.device:
    """The GPU for a test of the compiled Triton backend, else the CPU."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    return torch.device("cuda" if backend == "triton" and not INTERPRETED else "cpu")


@pytest.fixture(scope="session", params=[2, 4])
def ranks(request, tmp_path_factory):
    """The results of all cases of rank_runner, by rank, of that many ranks: one spawn for a session and its workers."""
    from rank_runner import read_ranks, spawn_ranks

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"ranks{request.param}"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            spawn_ranks(request.param, folder)
            (folder / "done").touch()
    return read_ranks(request.param, folder)
