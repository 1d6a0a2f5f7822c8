"""What holds for every test: one thread, no network, an own cache, shapes checked in `modicum.ops`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_SHARED = "MODICUM_SHARED"

# before torch is imported, and inherited by workers and subprocesses; tiny tensors are ten times faster so
os.environ.update(
    dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("MODICUM_DEBUG", None)


def pytest_configure(config: pytest.Config) -> None:
    # the first process makes the folder, its workers inherit it
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config._modicum_cache = os.environ["MODICUM_CACHE"] = tempfile.mkdtemp(prefix="modicum-test-cache-")
        os.environ["HF_DATASETS_CACHE"] = str(Path(os.environ["MODICUM_CACHE"]) / "datasets")
        os.environ["TRACKIO_DIR"] = str(Path(os.environ["MODICUM_CACHE"]) / "trackio")
    if "modicum.ops" not in sys.modules:
        from jaxtyping import install_import_hook

        config._modicum_types = install_import_hook("modicum.ops", "beartype.beartype")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(getattr(config, "_modicum_cache", ""), ignore_errors=True)


def shared_folder() -> Path:
    """The folder beside the repository with data sets and models, which need not exist."""
    return Path(os.environ.get(_SHARED) or ROOT.parent / "shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    data = shared_folder() / "data"
    if not data.is_dir():
        absent = pytest.mark.skip(
            reason=f"no data sets beside the repository; ${_SHARED} may name their folder"
        )
        for item in items:
            if item.get_closest_marker("shared_data"):
                item.add_marker(absent)


@pytest.fixture
def shared_data() -> Path:
    """The folder of the data sets beside the repository; mark the test `shared_data` too."""
    return shared_folder() / "data"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
