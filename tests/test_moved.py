"""A sqlite store that was moved, copied or renamed, with what belongs to it or without: nothing of it is lost, nothing
of the original is touched."""

import fcntl
import json
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from conftest import play
from mlflow.tracking import MlflowClient
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from analysis.store import read_artifact, read_experiment
from grid.config import InputError, TrialConfig
from grid.plan.asha import Asha
from grid.record.__main__ import main as deliver
from grid.record.moved import find_move
from grid.record.recorder import Recorder
from grid.record.spool import open_spool
from grid.record.store import Store
from grid.store_uri import check_store_uri, slug
from grid.train.checkpoints import Checkpoints

NAME = "some grid"
ODD_NAME = "grids of été?"
MANIFEST = {"data": {"name": "glyphs", "val_images": 600}, "rungs": {"epochs": [1, 3], "factor": 3}}
CONFIGS = [TrialConfig(optimizer=optimizer, learning_rate=0.1, epochs=9) for optimizer in ("adam", "sgd", "asgd")]


@pytest.fixture
def original(request: pytest.FixtureRequest, tmp_path: Path, store_uri: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a store, artifacts, a checkpoint, and a report that has not been delivered.

    Its name is one that a URI escapes, unless a test gives another.
    """
    folder = tmp_path / getattr(request, "param", ODD_NAME)
    folder.mkdir()
    shutil.move(store_uri.removeprefix("sqlite:///"), folder / "mlflow.db")
    monkeypatch.chdir(folder)
    uri = check_store_uri(None)
    store = Store(uri, NAME)
    store.create()
    recorder = Recorder(store, open_spool(folder / "spool", uri, NAME))
    recorder.begin({"grid.json": json.dumps(MANIFEST).encode()}, {})
    for config in CONFIGS[:2]:
        play(recorder, config, Asha((1, 3)))
    recorder.started(CONFIGS[2], control=False)
    recorder.ended(CONFIGS[2], "failed", epochs_run=0, best_val_accuracy=None, error="Traceback ...\nKeyError: 1")
    assert recorder.close(finished=False)
    with closing(open_spool(folder / "spool", uri, NAME)) as spool:
        spool.append({"left": "over"})
    for name in (NAME, f"{NAME} confirm"):
        Checkpoints(str(folder / "storage"), slug(uri, name)).save("some-key", {"epoch": 3})
    monkeypatch.chdir(tmp_path)
    return folder


def content(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def move(original: Path, target: Path) -> Path:
    shutil.move(original, target)
    return target / "mlflow.db"


def move_twice(original: Path, target: Path) -> Path:
    drive(move(original, target.with_name("between")), target.with_name("between"))
    return move(target.with_name("between"), target)


def copy(original: Path, target: Path) -> Path:
    shutil.copytree(original, target)
    return target / "mlflow.db"


def copy_file(original: Path, target: Path) -> Path:
    """Copy the database alone."""
    target.mkdir()
    return shutil.copy(original / "mlflow.db", target / "other.db")


def move_file(original: Path, target: Path) -> Path:
    """Move the database alone."""
    target.mkdir()
    return Path(shutil.move(original / "mlflow.db", target / "mlflow.db"))


def copy_beside(original: Path, target: Path) -> Path:
    return shutil.copy(original / "mlflow.db", original / "backup.db")


def rename(original: Path, target: Path) -> Path:
    return (original / "mlflow.db").rename(original / "better.db")


def drive(database: Path, folder: Path) -> tuple[Store, list[dict[str, object]]]:
    """Do to a store what a driver does that starts in a folder; return the reports that wait for it."""
    _artifact_repos_cache.clear()  # MLflow's, of places by run; a command has a process of its own
    uri = check_store_uri(f"sqlite:///{database}")
    found = find_move(uri, NAME)
    assert found is not None
    found.take_reports(folder / "spool")
    with closing(open_spool(folder / "spool", uri, NAME)) as spool:
        waiting = [line for line in spool.pending()[0] if "left" in line]
        store = Store(uri, NAME)
        store.create()
        found.take_rest(str(folder / "storage"))
        assert find_move(uri, NAME) is None
    store.attach(store.parent_id, {"new.json": b"{}"})
    return store, waiting


MOVES = [move, move_twice, move_file, copy, copy_file, copy_beside, rename]


@pytest.mark.parametrize("how", MOVES)
def test_analysis_reads_a_store_where_it_is_now_and_writes_nothing(
    how: Callable[[Path, Path], Path], original: Path, tmp_path: Path
) -> None:
    database = how(original, tmp_path / "new")
    before = content(tmp_path)
    experiment = read_experiment(f"sqlite:///{database}", NAME)
    assert experiment.val_images == 600
    (failed,) = experiment.trials.query("status == 'failed'")["run_id"]
    traceback = read_artifact(experiment.uri, failed, "traceback.txt")
    assert traceback is not None
    assert traceback.endswith(b"KeyError: 1")
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("how", "original"),
    [*((how, ODD_NAME) for how in MOVES), (move, "grids"), (copy, "grids")],
    indirect=["original"],
)
def test_a_driver_takes_over_what_belongs_to_the_store_into_the_store_s_own_folder(
    how: Callable[[Path, Path], Path], original: Path, tmp_path: Path
) -> None:
    database = how(original, tmp_path / "new")
    store, waiting = drive(database, database.parent)
    assert store.manifest() == MANIFEST
    alone = how in (move_file, copy_file)
    assert waiting == ([] if alone else [{"left": "over"}])
    for name in (NAME, f"{NAME} confirm"):
        found = Checkpoints(str(database.parent / "storage"), slug(store.uri, name)).load("some-key", "cpu")
        assert found == (None if alone else {"epoch": 3})
    assert len(store.trials()) == 3
    client = MlflowClient(store.uri)
    own = f"{database.parent.as_uri()}/mlartifacts/{slug(store.uri, NAME)}"
    experiment = client.get_experiment_by_name(NAME)
    runs = client.search_runs([experiment.experiment_id])
    assert experiment.artifact_location == own
    assert [run.info.artifact_uri.startswith(f"{own}/") for run in runs] == [True] * 4
    assert {file.path for file in client.list_artifacts(store.parent_id)} == {"grid.json", "new.json"}
    assert original.exists() == (how not in (move, move_twice))


def test_delivering_reports_takes_over_the_checkpoints_in_the_storage_that_is_named(
    original: Path, tmp_path: Path
) -> None:
    storage, old = str(tmp_path / "elsewhere"), slug(check_store_uri(f"sqlite:///{original}/mlflow.db"), NAME)
    Checkpoints(storage, old).save("some-key", {"epoch": 3})
    uri = check_store_uri(f"sqlite:///{move(original, tmp_path / 'new')}")
    options = ["--store", uri, "--experiment", NAME, "--spool", str(tmp_path / "spool"), "--storage", storage]
    assert deliver(["--replay", *options]) == 0
    assert Checkpoints(storage, slug(uri, NAME)).load("some-key", "cpu") == {"epoch": 3}


@pytest.mark.parametrize("how", [copy, copy_file, copy_beside])
def test_a_copy_that_is_continued_leaves_the_original_as_it_is(
    how: Callable[[Path, Path], Path], original: Path, tmp_path: Path
) -> None:
    before = content(original)
    database = how(original, tmp_path / "new")
    drive(database, original)  # with the original's storage and spool, too
    after = content(original)
    assert {path: after.get(path) for path in before} == before


def test_a_store_that_a_link_leads_to_has_not_moved(original: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(original)
    assert find_move(check_store_uri(f"sqlite:///{tmp_path}/link/mlflow.db"), NAME) is None
    assert find_move(check_store_uri(f"sqlite:///{original}/mlflow.db"), NAME) is None


def test_a_new_store_a_server_and_an_experiment_of_somebody_else_have_not_moved(tmp_path: Path, store_uri: str) -> None:
    MlflowClient(store_uri).create_experiment("theirs", f"file://{tmp_path}/mlartifacts/theirs")
    assert find_move(f"sqlite:///{tmp_path}/none.db", NAME) is None
    assert find_move("http://127.0.0.1:5000", NAME) is None
    assert find_move(store_uri, NAME) is None
    assert find_move(store_uri, "theirs") is None


def test_a_moved_store_whose_reports_are_being_delivered_is_refused(original: Path, tmp_path: Path) -> None:
    old = slug(check_store_uri(f"sqlite:///{original}/mlflow.db"), NAME)
    database = move(original, tmp_path / "new")
    found = find_move(check_store_uri(f"sqlite:///{database}"), NAME)
    assert found is not None
    with (tmp_path / "new" / "spool" / f"{old}.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being run by another process from here"):
            found.take_reports(tmp_path / "new" / "spool")


@contextmanager
def disk_that_fills_up(size: int) -> Iterator[None]:
    """Refuse to write more than so many bytes to a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_reports_are_taken_over_whole_or_not_at_all(original: Path, tmp_path: Path) -> None:
    database = move(original, tmp_path / "new")
    spool = database.parent / "spool"
    uri = check_store_uri(f"sqlite:///{database}")
    found = find_move(uri, NAME)
    assert found is not None
    (reports,) = spool.glob("*.jsonl")
    with reports.open("ab") as file:
        file.writelines(b'{"line": %d}\n' % number for number in range(9_999))
    whole = reports.read_bytes()
    with disk_that_fills_up(len(whole) // 2), pytest.raises(InputError, match="the reports that wait for it can't be"):
        found.take_reports(spool)
    found.take_reports(spool)
    assert (spool / f"{slug(uri, NAME)}.jsonl").read_bytes() == whole
    assert not reports.exists()


def test_what_was_set_aside_before_a_move_is_in_nobody_s_way(original: Path, tmp_path: Path) -> None:
    old = check_store_uri(f"sqlite:///{original}/mlflow.db")
    with closing(open_spool(original / "spool", old, NAME)) as spool:
        _, aside = spool.set_aside()
        spool.append({"left": "over"})
    assert aside is not None
    set_aside = content(aside)
    database = move(original, tmp_path / "new")
    _, waiting = drive(database, database.parent)
    assert waiting == [{"left": "over"}]
    assert content(database.parent / "spool" / aside.name) == set_aside


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def test_a_database_that_was_moved_alone_to_another_disk_gets_its_artifacts(original: Path, other_disk: Path) -> None:
    database = move_file(original, other_disk / "new")
    before = content(original / "mlartifacts")
    store, _ = drive(database, database.parent)
    assert store.manifest() == MANIFEST
    artifacts = database.parent / "mlartifacts"
    assert {Path(path).name for path in content(artifacts)} == {Path(path).name for path in before} | {"new.json"}
    assert content(original / "mlartifacts") == {}


def test_artifacts_that_cannot_be_taken_over_are_said(original: Path, tmp_path: Path) -> None:
    database = copy(original, tmp_path / "new")
    shutil.rmtree(tmp_path / "new" / "mlartifacts")
    (tmp_path / "new" / "mlartifacts").touch()
    found = find_move(check_store_uri(f"sqlite:///{database}"), NAME)
    assert found is not None
    with pytest.raises(InputError, match=r"the store was copied from .*, and its artifacts can't be taken over: "):
        found.take_rest(str(tmp_path / "storage"))
