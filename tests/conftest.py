"""Shape checks for everything the tests call, and one thread, as a trial has on a CPU."""

import shutil
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook(["nets", "grid.trial"], "beartype.beartype")

from grid.glyphs import ensure  # noqa: E402  (after the hook)
from grid.store import Store  # noqa: E402


@pytest.fixture(scope="session")
def glyphs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with glyphs in it, rendered once."""
    folder = tmp_path_factory.mktemp("data")
    ensure(folder)
    return folder


@pytest.fixture(scope="session")
def _migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    Store(f"sqlite:///{path}", "unused").create()
    return path


@pytest.fixture
def store_uri(_migrated_database: Path, tmp_path: Path) -> str:
    """A new sqlite store of one's own; copied, because MLflow takes seconds to make one."""
    shutil.copy(_migrated_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def store(store_uri: str) -> Store:
    """An experiment in a new store."""
    store = Store(store_uri, "some grid")
    store.create()
    return store
