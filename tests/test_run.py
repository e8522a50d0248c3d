import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from grid.config import InputError, TrialConfig
from grid.metrics import EpochReport
from grid.parts.registry import GRIDS
from grid.plan.asha import NO_STOPPING, StoppingRule
from grid.plan.request import check_address, check_storage
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from grid.run import _parser, main, read_request


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "x"], "unknown grid 'x'; choose from cnn, full, mlp, record, smoke, techniques"),
        (["--only", "x=1"], "unknown factor 'x'; choose from activation, augmentation, batch_norm"),
        (["--only", "activation=rely"], "unknown activation 'rely'; choose from elu, gelu"),
        (["--only", "activation"], "--only takes NAME=VALUE[,VALUE], got 'activation'; names: model, lr_schedule"),
        (["--only", "activation="], "unknown activation ''"),
        (["--set", "momentum"], "--set takes NAME=VALUE[,VALUE], got 'momentum'; names: batch_size, "),
        (["--set", "momentun=0.5"], "unknown setting 'momentun'; choose from augmentation_strength, batch_size, "),
        (["--set", "momentum=1"], "momentum must be 0 or more and below 1, got 1.0"),
        (["--set", "momentum=high"], "momentum must be a number, got 'high'"),
        (["--set", "batch_size=64.5"], "batch_size must be a whole number, got '64.5'"),
        (["--set", "channels=32x64"], "channels must be whole numbers above 0 joined by '-', got '32x64'"),
        (["--set", f"hidden_sizes={'9' * 5000}"], "hidden_sizes must be whole numbers above 0 joined by '-', got '999"),
        (["--set", "optimizer=adam"], "optimizer is a factor: give --only optimizer=adam"),
        (["--set", "epochs=3"], "epochs can't be set: --epochs takes the budget, the same for all trials"),
        (
            ["--vary", "batch_size"],
            "--vary takes NAME=VALUE[,VALUE], got 'batch_size'; names: batch_size, ",
        ),
        (["--vary", "batch_size=64"], "--vary takes each setting once, with two values or more; got batch_size=64"),
        (["--vary", "momentum=0.5,.50"], "--vary takes each setting once, with two values or more; got momentum="),
        (["--vary", "batch_size=64,1"], "batch_size must be 2 or more, got 1"),
        (["--vary", "optimizer=adam,sgd"], "optimizer is a factor: give --only optimizer=adam,sgd"),
        (["--vary", "seed=1,2"], "seed can't be set: --seeds gives the number of replicates"),
        (["--vary", "beta=1,2"], "unknown setting 'beta'; choose from augmentation_strength, batch_size, beta1"),
        (["--set", "beta1=0.8", "--vary", "beta1=0.8,0.9"], "--set and --vary both give beta1; leave one of them out"),
        (["--stop-within", "momentum"], "--stop-within takes factors joined by commas, got 'momentum'; choose from"),
        (["--set", "momentum=0.5", "--set", "momentum=0.6"], "--set gives momentum twice, 0.5 and 0.6; give it once"),
        (["--only", "model=mlp", "--only", "model=cnn"], "--only leaves no cell: no model is left"),
        (["--only", "optimizer=adamw", "--only", "regularization=l2"], "--only leaves no cell: all are excluded"),
        (["--data", "cifar"], "unknown data set 'cifar'; choose from emnist-balanced"),
        (
            ["--per-class", "0"],
            "--per-class must be 1 to 2000, what validation leaves of the smallest class, or all; got 0",
        ),
        (["--per-class", "-5"], "--per-class must be 1 to 2000"),
        (["--per-class", "2001"], "--per-class must be 1 to 2000"),
        (["--data", "emnist-bymerge", "--per-class", "0"], "--per-class must be at least 1, or all; got 0"),
        (["--seeds", "99999999999999999999"], "--seeds must be 1 to 1,000, got 99999999999999999999"),
        (["--grid", "smoke", "--concurrency", "30000"], "30000 trials at once need"),
        (["--data-dir", "x" * 300], f"--data-dir can't be '{'x' * 60}': File name too long"),
        (["--storage", "x" * 300], f"--storage can't be '{'x' * 60}': File name too long"),
        (["--storage", "gopher://x"], "unknown storage 'gopher://x'"),
        (["--store", "http://[x"], "can't open the store http://[x: "),
        (["--store", "sqlite:///" + "x" * 300], "can't open the store"),
        (["--store", "foo://me:secret@x"], "can't open the store 'foo://***@x'"),
        (["--experiment", "two\nlines"], "--experiment must be 1 to 200 printable characters"),
        (["--grid", "smoke", "--per-class", "99999"], "--per-class must be 1 to 250, what validation leaves"),
        (["--epochs", "0"], "--epochs must be 1 to 100,000, got 0"),
        (["--seeds", "0"], "--seeds must be 1 to 1,000, got 0"),
        (["--seeds", "two"], "argument --seeds: invalid int value: 'two'; see --help"),
        (["--controls", "1.5"], "--controls must be a share between 0 and 1, got 1.5"),
        (["--more-controls", "0"], "--more-controls must be at least 1, got 0"),
        (["--dry-run", "--more-controls", "3"], "--dry-run starts nothing and --more-controls draws trials to start;"),
        (["--controls", "nan"], "--controls must be a share between 0 and 1, got nan"),
        (["--lr-scales", "1,x"], "--lr-scales takes numbers joined by commas, got '1,x'"),
        (["--lr-scales", "1,0"], "--lr-scales must be finite and above 0, got 1.0,0.0"),
        (["--lr-scales", "1,1"], "--lr-scales must differ, got 1.0,1.0"),
        (["--grace", "0"], "--grace must be 1 to 100,000, got 0"),
        (["--grace", "one"], "argument --grace: invalid int value: 'one'; see --help"),
        (["--stop-factor", "0"], "--stop-factor must be 1 to 100,000, got 0"),
        (["--stop-factor", "1.5"], "argument --stop-factor: invalid int value: '1.5'; see --help"),
        (["--stop-within", "x"], "--stop-within takes factors joined by commas, got 'x'; choose from model, lr_sched"),
        (["--stop-within", "model, dropout"], "--stop-within takes factors joined by commas, got ' dropout'"),
        (["--no-stopping", "yes"], "unrecognized arguments: yes; see --help"),
        (["--share", "0.1"], "--share is of the epochs of --against; pass --against NAME as well"),
        (["--concurrency", "0"], "--concurrency must be 1 to 100,000, got 0"),
        (["--experiment", " "], "--experiment must be 1 to 200 printable characters"),
        (["--store", "foo://x"], "can't open the store 'foo://x'"),
        (["--store", "sqlite:////nowhere/x.db"], "can't open the store sqlite:////nowhere/x.db: there is no folder"),
        (["--storage", "/proc/x"], "can't make the storage folder /proc/x: can't write to the folder /proc ("),
        (["--address", "127.0.0.1:1"], "no Ray runs at '127.0.0.1:1'"),
        (["--address", "head"], "--address must be HOST:PORT, auto or local, got 'head'"),
        (["--nonsense"], "unrecognized arguments: --nonsense; see --help"),
    ],
)
def test_wrong_input_is_one_line_exit_code_2_and_nothing_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], glyphs_dir: Path
) -> None:
    try:
        code = main(["--data-dir", str(glyphs_dir), *arguments])
    except SystemExit as ended:  # argparse's own problems
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith(f"grid.run: {message}")
    assert (err.count("\n"), out) == (1, "")
    assert list(tmp_path.iterdir()) == []


def test_data_that_are_nowhere_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.EMNIST.url", "http://127.0.0.1:1/gzip.zip")
    assert main(["--data", "emnist-balanced"]) == 2
    assert "no emnist-balanced-train-*-ubyte in" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_damaged_data_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "data" / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for kind in ("images-idx3", "labels-idx1"):
        (raw / f"emnist-balanced-train-{kind}-ubyte").write_bytes(b"\0\0\x08\x03 no")
    assert main([]) == 2
    err = capsys.readouterr().err
    assert "emnist-balanced-train-images-idx3-ubyte" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--only", "activation=rely"], 2)])
def test_help_and_wrong_arguments_load_neither_torch_nor_ray(arguments: list[str], code: int) -> None:
    script = (
        "import sys, grid.run\n"
        "try: code = grid.run.main(sys.argv[1:])\n"
        "except SystemExit as ended: code = ended.code\n"
        "assert not {'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    found = subprocess.run([sys.executable, "-c", script, *arguments], check=False, capture_output=True)
    assert found.returncode == code


@pytest.mark.parametrize("name", GRIDS)
def test_a_request_takes_from_the_grid_what_the_user_leaves_open(name: str) -> None:
    request = read_request(_parser().parse_args(["--grid", name]))
    grid = GRIDS[name]
    assert (request.levels, request.data, request.per_class) == (grid.levels, grid.data, grid.per_class)
    assert (request.epochs, request.experiment) == (grid.epochs, f"{name}-{grid.data}")


def test_a_grid_has_settings_and_a_patience_of_its_own_and_the_user_overrides_both() -> None:
    plain = read_request(_parser().parse_args(["--grid", "record"]))
    assert (plain.settings, plain.rule.grace) == (GRIDS["record"].settings, GRIDS["record"].grace)
    usual = [f"{name}={value}" for name, value in plain.settings.items()]
    assert read_request(_parser().parse_args(["--grid", "record", "--set", usual[0]])).experiment == plain.experiment
    other = ["--grid", "record", "--set", "channels=32-64-128", "--set", "batch_size=64", "--grace", "1"]
    request = read_request(_parser().parse_args(other))
    assert (request.settings, request.rule.grace) == ({"batch_size": "64"}, 1)
    assert request.experiment == "record-emnist-balanced-batch_size-64-channels-32-64-128"
    varied = read_request(_parser().parse_args(["--grid", "record", "--vary", "channels=16-32,32-64"]))
    assert (varied.settings.get("channels"), varied.levels["channels"]) == (None, ("16-32", "32-64"))
    with pytest.raises(InputError, match="--set and --vary both give momentum"):
        read_request(_parser().parse_args(["--set", "momentum=0.9", "--vary", "momentum=0.8,0.9"]))


def test_what_the_user_says_beats_the_grid() -> None:
    arguments = [
        "--grid",
        "smoke",
        "--data",
        "emnist-digits",
        "--per-class",
        "7",
        "--epochs",
        "2",
        "--experiment",
        "mine",
    ]
    request = read_request(_parser().parse_args(arguments))
    assert (request.data, request.per_class, request.epochs, request.experiment) == ("emnist-digits", 7, 2, "mine")


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ([], StoppingRule(factor=3, grace=None, within=("model",))),
        (["--grace", "3", "--stop-factor", "2"], StoppingRule(factor=2, grace=3, within=("model",))),
        (["--stop-within", "model,lr_schedule"], StoppingRule(within=("model", "lr_schedule"))),
        (["--stop-within", ""], StoppingRule(within=())),
        (["--no-stopping", "--stop-factor", "2"], NO_STOPPING),
    ],
)
def test_the_stopping_rule_is_the_users(arguments: list[str], rule: StoppingRule) -> None:
    assert read_request(_parser().parse_args(["--grid", "smoke", *arguments])).rule == rule


def test_a_grid_without_stopping_is_another_experiment_by_default() -> None:
    request = read_request(_parser().parse_args(["--grid", "smoke", "--no-stopping"]))
    assert request.experiment == "smoke-glyphs-no-stopping"


def test_another_budget_is_another_experiment_by_default() -> None:
    request = read_request(_parser().parse_args(["--grid", "smoke", "--per-class", "20", "--epochs", "3"]))
    assert request.experiment == "smoke-glyphs-20-per-class-3-epochs"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(InputError, match="unknown grid"):
        main(["--grid", "x", "--debug"])


def test_a_storage_uri_is_left_as_it_is() -> None:
    assert check_storage("s3://bucket/folder") == "s3://bucket/folder"


def test_a_storage_folder_is_made_absolute_but_not_made(tmp_path: Path) -> None:
    assert check_storage("new/storage") == str(tmp_path / "new/storage")
    assert not (tmp_path / "new").exists()


def answer_once(server: socket.socket, answer: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(answer)


def test_something_else_than_ray_at_the_address_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer_once, args=(server, b"HTTP/1.1 400 Bad Request\r\n"))
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=f"^no Ray runs at '{address}' \\(something else answers there"):
            check_address(address)
        thread.join()


def test_the_cluster_of_this_machine_is_left_to_ray() -> None:
    assert check_address("auto") == "auto"


def end(store: Store, folder: Path, *accuracies: float) -> None:
    """Record two trials; without accuracies both diverge."""
    recorder = Recorder(store, Spool(folder / "spool.jsonl"))
    recorder.begin({}, {})
    for activation in ("relu", "gelu"):
        config = TrialConfig(activation=activation, learning_rate=0.1, epochs=1)
        recorder.started(config, control=False)
        for accuracy in accuracies:
            recorder.epoch_ended(config, EpochReport(epoch=1, val_accuracy=accuracy), is_rung=False)
        status = "completed" if accuracies else "diverged"
        recorder.ended(config, status, epochs_run=1, best_val_accuracy=max(accuracies, default=None))
    assert recorder.close(finished=True)


def run_ended(monkeypatch: pytest.MonkeyPatch, store: Store, exit_code: int, *arguments: str) -> int:
    """Run the command with a driver that has nothing left to do."""
    driver = SimpleNamespace(run=lambda request, ends=None: exit_code)
    for name in ("launch", "dry_run"):
        monkeypatch.setitem(sys.modules, f"grid.driver.{name}", driver)
    return main(["--grid", "smoke", "--store", store.uri, "--experiment", store.experiment, *arguments])


@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_run_that_has_ended_writes_the_page_and_prints_its_address_last(
    exit_code: int, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end(store, tmp_path, 0.5)
    assert run_ended(monkeypatch, store, exit_code) == exit_code
    assert capsys.readouterr() == (f"report     file://{tmp_path}/report.html\n", "")
    assert "50.00% of the validation images" in (tmp_path / "report.html").read_text()


def test_the_page_can_be_elsewhere(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end(store, tmp_path, 0.5)
    assert run_ended(monkeypatch, store, 0, "--report", "mine.html") == 0
    assert {path.name for path in tmp_path.glob("*.html")} == {"mine.html"}


@pytest.mark.parametrize(
    ("exit_code", "arguments"), [(130, []), (2, []), (0, ["--dry-run"]), (0, ["--no-report"])], ids=str
)
def test_there_is_no_page_unless_a_run_has_ended(
    exit_code: int,
    arguments: list[str],
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    end(store, tmp_path, 0.5)
    assert run_ended(monkeypatch, store, exit_code, *arguments) == exit_code
    assert not list(tmp_path.glob("*.html"))
    assert capsys.readouterr().out == ""


def test_there_is_no_page_when_nothing_has_an_accuracy(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end(store, tmp_path)
    assert run_ended(monkeypatch, store, 0) == 0
    assert not list(tmp_path.glob("*.html"))
    assert capsys.readouterr() == ("", "")


def test_a_page_that_cannot_be_written_is_one_line_and_the_exit_code_stands(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end(store, tmp_path, 0.5)
    assert run_ended(monkeypatch, store, 0, "--report", "no/folder.html") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("grid.run: no report: can't write no/folder.html: No such file or directory")
    assert line.endswith("; write it with:  python -m analysis.report --experiment 'some grid'")


def test_a_fault_in_the_analysis_does_not_change_how_a_run_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_report(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault\nwith a second line")

    monkeypatch.setattr("analysis.report.write_report", write_report)
    assert run_ended(monkeypatch, store, 1) == 1
    assert capsys.readouterr().err.startswith("grid.run: no report: a fault; write it with:")
    assert run_ended(monkeypatch, store, 1, "--debug") == 1
    assert "ZeroDivisionError: a fault" in capsys.readouterr().err


def test_all_images_can_be_asked_for_where_the_grid_takes_some() -> None:
    assert read_request(_parser().parse_args(["--grid", "smoke"])).per_class == GRIDS["smoke"].per_class == 100
    request = read_request(_parser().parse_args(["--grid", "smoke", "--per-class", "all"]))
    assert request.per_class is None
    assert request.experiment == "smoke-glyphs-all-per-class"
