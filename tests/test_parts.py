"""Parts of a user's file: what is added, what is refused, and what it does to keys, cells and the identity of code."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from grid.config import (
    FACTORS,
    SETTINGS,
    InputError,
    TrialConfig,
    cell_name,
    changed_settings,
    know_alike,
    varied,
)
from grid.metrics import TEST_METRICS
from grid.parts import LEVELS
from grid.parts.adding import RESERVED
from grid.parts.files import PartsFile, imported_packages, load, load_files, loaded, using
from grid.parts.registry import EXCLUSIONS, GRIDS, check_known
from grid.plan.space import cross, restrict, vary
from grid.plan.trials import check_comparable
from grid.run import main
from grid.train.code_version import NumericCode
from tests.conftest import forget_parts

SMOOTHING = """
from grid import parts

@parts.on_loss("smoothing", ("off", "0.05", "0.1"))
def smooth(loss, logits, labels, use):
    share = float(use.level)
    return (1 - share) * loss - share * logits.log_softmax(dim=1).mean()
"""
TEMPERATURE = """
from grid import parts

parts.setting("temperature", 1.0, rule=("above 0", lambda value: value > 0))
parts.setting("clip", 5.0, matters_with=("optimizer", ("sgd",)))
"""
CUBED = """
from grid import parts
from torch import nn

@parts.activation("cubed", shape="rising")
class Cubed(nn.Module):
    def forward(self, inputs):
        return inputs**3
"""
ROOT = Path(__file__).parents[1]
PLAIN = TrialConfig(learning_rate=0.1, epochs=3)


def use(text: str, name: str = "own.py") -> None:
    load([PartsFile(name, f"from grid import parts\n{text}")])


def with_level(**levels: str) -> TrialConfig:
    return TrialConfig.from_params({"learning_rate": "0.1", "epochs": "3", **levels})


def test_a_file_adds_a_level_and_takes_it_away_when_it_changes() -> None:
    use(CUBED)
    assert LEVELS["activation"][-1] == "cubed"
    use(CUBED.replace("cubed", "fourth"))
    assert LEVELS["activation"][-1] == "fourth"
    assert "cubed" not in LEVELS["activation"]


def test_the_same_file_is_run_once() -> None:
    use(f"{CUBED}\nprint('run')")
    use(f"{CUBED}\nprint('run')")  # would be refused: there is a 'cubed' already
    assert [file.name for file in loaded()] == ["own.py"]


def test_the_factor_of_a_file_is_crossed_with_all_its_levels_unless_it_is_restricted() -> None:
    use(SMOOTHING)
    levels = restrict(GRIDS["smoke"].levels, [])
    assert levels["smoothing"] == ("off", "0.05", "0.1")
    assert len(cross(levels)[0]) == 3 * len(cross(GRIDS["smoke"].levels)[0])
    assert restrict(GRIDS["smoke"].levels, [("smoothing", ("0.1",))])["smoothing"] == ("0.1",)
    with pytest.raises(InputError, match=r"^unknown smoothing '0.2'; choose from 0.05, 0.1, off$"):
        restrict(GRIDS["smoke"].levels, [("smoothing", ("0.2",))])


def test_the_first_level_and_a_default_change_no_key() -> None:
    before = PLAIN.trial_key, PLAIN.cell_key
    use(SMOOTHING + TEMPERATURE)
    first = with_level(smoothing="off", temperature="1.0")
    assert (first.trial_key, first.cell_key) == before
    others = [with_level(smoothing=level) for level in ("0.05", "0.1")] + [with_level(temperature="2.0")]
    assert len({config.trial_key for config in [PLAIN, *others]}) == 4
    assert len({config.cell_key for config in [PLAIN, *others]}) == 4


def test_a_run_says_all_that_is_needed_to_read_it_without_the_file() -> None:
    use(SMOOTHING + TEMPERATURE)
    config = with_level(smoothing="0.1", clip="2.0", optimizer="sgd")
    params = config.to_params()
    assert params["own"] == "clip=5.0 with optimizer=sgd; smoothing=off"
    forget_parts()
    assert "smoothing" not in SETTINGS
    again = TrialConfig.from_params(params)
    assert again == config
    assert (again.trial_key, again.cell_key, again.name) == (config.trial_key, config.cell_key, config.name)
    assert cell_name(again.cell) == "mlp constant relu sgd clip=2.0 smoothing=0.1"
    assert varied([again, PLAIN]) == (*FACTORS, "clip", "smoothing")


def test_a_trial_of_an_unknown_file_is_refused_and_not_trained_without_it() -> None:
    use(SMOOTHING)
    params = [with_level(smoothing="0.1").to_params(), with_level(smoothing="off").to_params()]
    forget_parts()
    acting, idle = map(TrialConfig.from_params, params)
    check_known(idle)
    with pytest.raises(InputError, match=r"^smoothing=0.1 is of a parts file; give that file with --parts FILE.py$"):
        check_known(acting)
    with pytest.raises(InputError, match="unknown activation 'cubed'"):
        check_known(replace(PLAIN, activation="cubed"))


def test_a_setting_of_a_file_is_held_varied_and_kept_in_its_range() -> None:
    use(TEMPERATURE)
    assert changed_settings({"temperature": "2"}) == {"temperature": "2.0"}
    assert changed_settings({"temperature": "1"}) == {}
    assert vary([("temperature", ("1", "0.5"))]) == {"temperature": ("1.0", "0.5")}
    with pytest.raises(InputError, match="temperature must be above 0, got 0.0"):
        changed_settings({"temperature": "0"})
    with pytest.raises(InputError, match="temperature must be a number, got 'hot'"):
        changed_settings({"temperature": "hot"})
    assert with_level(temperature="2").setting("temperature") == 2.0
    assert PLAIN.setting("temperature") == 1.0


def test_cells_that_differ_only_where_a_setting_does_not_matter_are_one() -> None:
    use(TEMPERATURE)
    levels = restrict(GRIDS["mlp"].levels, [("optimizer", ("sgd", "adam"))])
    cells, excluded = cross({**levels, **vary([("clip", ("1.0", "5.0", "9.0"))])})
    half = len(cross(levels)[0]) // 2
    assert len(cells) == half * 3 + half
    assert excluded == {"clip matters only with optimizer=sgd": 2 * half}


def test_a_grid_and_an_exclusion_of_a_file() -> None:
    use(
        'parts.grid("two", "Which of two?", {"optimizer": ["sgd", "adam"], "dropout": ["off", "on"]}, epochs=3)\n'
        '@parts.exclude("no dropout with sgd")\n'
        "def excluded(cell):\n"
        '    return cell["optimizer"] == "sgd" and cell["dropout"] == "on"\n'
    )
    cells, excluded = cross(restrict(GRIDS["two"].levels, []))
    assert excluded == {"no dropout with sgd": 1}
    assert len(cells) == 3
    assert {(cell["model"], cell["regularization"]) for cell in cells} == {("mlp", "none")}
    assert "no dropout with sgd" in EXCLUSIONS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('parts.net("mlp")(print)', "own.py line 2: model 'mlp' exists already (built in); choose another name"),
        ('parts.on_loss("activation", ("a", "b"))(print)', "factor or setting 'activation' exists already"),
        ('parts.on_loss("momentum", ("a", "b"))(print)', "every trial has a field 'momentum'; choose another name"),
        ('parts.setting("seed", 1)', "every trial has a field 'seed'; choose another name"),
        ('parts.on_loss("new", ("a",))(print)', "factor 'new' needs two levels or more that differ, got a"),
        ('parts.on_loss("new", ("a", "a"))(print)', "needs two levels or more that differ, got a, a"),
        ('parts.on_loss("a b", ("a", "b"))(print)', "a factor is named by letters, digits and underscores, got 'a b'"),
        ('parts.on_loss("new", ("a", "b c"))(print)', "a name of a level has up to 40 letters, digits and any of _.+-"),
        ('parts.net("a,b")(print)', "a name of a model has up to 40 letters, digits and any of _.+-; got 'a,b'"),
        ('parts.optimizer("o", learning_rate=0)(print)', "optimizer 'o' needs learning_rate=..., finite and above 0"),
        ('parts.optimizer("o")(print)', "optimizer 'o' needs learning_rate=..., finite and above 0, got 0.0"),
        ('parts.optimizer("o", learning_rate=1, options={})(print)', "optimizer 'o': options takes a function of the"),
        (
            "@parts.exclude\ndef f(cell): return True",
            '@parts.exclude takes a text first, such as @parts.exclude("TEXT")',
        ),
        ("@parts.activation\nclass A: pass", '@parts.activation takes a text first, such as @parts.activation("TEXT")'),
        ('parts.setting("new", 1, rule=bool)', "setting 'new': rule takes words and a function, such as rule=("),
        ('parts.setting("n", 1, matters_with=("optimizer", ("o",)))', "unknown optimizer 'o'; choose from adagrad"),
        ('parts.grid("g", "?", {"optimizer": ["sgdd"]})', "unknown optimizer 'sgdd'; choose from adagrad, adam"),
        ('parts.grid("full", "?", {})', "grid 'full' exists already"),
        ("def f(:", "own.py line 2: invalid syntax; a parts file is Python"),
        ("1 / 0", "own.py line 2: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "own.py line 2: SystemExit: 3"),
        ("import nothing_of_that_name", "own.py line 2: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ('parts.activation("x", shape="rising")', "own.py adds no parts; decorate them, such as @parts.net(NAME)"),
        ('parts.on_loss("status", ("a", "b"))(print)', "'status' is a column of the tables of results; choose another"),
        (
            'parts.setting("rank", 1)',
            "'rank' is a column of the tables of results; choose another name for the setting",
        ),
        (
            'parts.on_loss("new", (0, 0.1))(print)',
            "a name of a level is a text, such as '0' in quotes; got 0",
        ),
        ('parts.setting("new", "")', "the default of setting 'new' must be a number, True, False or a word, got ''"),
        ('parts.setting("new", "8 16")', "must be a number, True, False or a word, got '8 16'"),
        ('parts.setting("new", None)', "must be a number, True, False or a word, got None"),
        ('parts.setting("new", 0, rule=("above 0", bool))', "the default of setting 'new' must be above 0, got 0"),
        ('parts.setting("new", 1, matters_with=("optimizer", "sgd"))', "takes a factor and a tuple of its levels"),
        ('parts.setting("new", 1, matters_with=("optimizer", ("sdg",)))', ", or add it above this line"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_place_and_adds_nothing(text: str, message: str) -> None:
    before = dict(LEVELS), dict(SETTINGS), dict(GRIDS)
    with pytest.raises(InputError) as caught:
        use(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("own.py")
    assert (dict(LEVELS), dict(SETTINGS), dict(GRIDS)) == before
    assert loaded() == ()


def test_a_name_of_another_file_is_taken() -> None:
    use(CUBED, "first.py")
    with pytest.raises(InputError, match=r"^second.py line \d+: activation 'cubed' exists already \(first.py\)"):
        use(CUBED, "second.py")


def write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "Is a directory"),
        (write(b"\xff\xfe"), "not a text in UTF-8"),
        (write(b"#" * 1_000_001), "is empty or larger than 1,000,000 bytes"),
        (write(b""), "is empty or larger than 1,000,000 bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(make: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    make(tmp_path / "own.py")
    with pytest.raises(InputError, match=reason):
        load_files([tmp_path / "own.py"])


def test_a_file_beside_is_named_from_wherever_the_command_runs(tmp_path: Path) -> None:
    (tmp_path / "beside_parts.py").write_text("VALUE = 1\n")
    with pytest.raises(InputError, match=r"imports beside_parts.py, which no other machine has; put both in one file"):
        load_files([written(tmp_path, f"import beside_parts\n{CUBED}")])


@pytest.mark.parametrize("source", ["beside_parts.py", "beside_package/__init__.py"])
def test_a_file_that_needs_another_one_beside_it_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / source).parent.mkdir(exist_ok=True)
    (tmp_path / source).write_text("VALUE = 1\n")
    (tmp_path / "own.py").write_text(f"import {source.partition('/')[0].removesuffix('.py')}\n{CUBED}")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=rf"imports {Path(source).name}, which no other machine has; put both in one"):
        load_files([tmp_path / "own.py"])
    assert "cubed" not in LEVELS["activation"]


def test_the_command_itself_is_no_file_beside_a_parts_file(tmp_path: Path) -> None:
    """Run from the project's folder, where torch makes the running module known under a second name."""
    file = written(tmp_path, f"import torch.multiprocessing\n{CUBED}")
    command = [sys.executable, "-m", "grid.run", "--parts", str(file), "--only", "activation=nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "unknown activation 'nothing'; choose from cubed, " in done.stderr


def written(folder: Path, text: str, name: str = "own.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    files = [written(tmp_path / "a", CUBED), written(tmp_path / "b", SMOOTHING)]
    with pytest.raises(InputError, match=r"^two files of --parts are called own.py; rename one$"):
        load_files(files)


def test_a_command_knows_the_files_that_it_was_given_and_no_others(tmp_path: Path) -> None:
    load_files([written(tmp_path, CUBED)])
    load_files([written(tmp_path, SMOOTHING, "second.py")])
    assert "cubed" not in LEVELS["activation"]
    assert "smoothing" in LEVELS
    load_files([])
    assert "smoothing" not in LEVELS


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    load_files([written(tmp_path, f"\ufeff{CUBED}")])
    assert "cubed" in LEVELS["activation"]


def test_a_factor_is_extended_by_its_own_file_alone() -> None:
    use(SMOOTHING, "first.py")
    with pytest.raises(InputError, match="factor or setting 'smoothing' exists already"):
        use('parts.on_images("smoothing", ("off", "0.05", "0.1"))(print)', "second.py")


def test_within_a_block_other_files_are_known_and_afterwards_those_from_before() -> None:
    use(CUBED)
    with using([PartsFile("own.py", SMOOTHING)]):
        assert "cubed" not in LEVELS["activation"]
        assert "smoothing" in LEVELS
    assert "cubed" in LEVELS["activation"]
    assert "smoothing" not in LEVELS
    assert [file.text for file in loaded()] == [f"from grid import parts\n{CUBED}"]


def test_a_held_factor_of_a_file_is_asked_for_by_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = written(tmp_path, SMOOTHING)
    assert main(["--grid", "smoke", "--parts", str(file), "--set", "smoothing=0.1"]) == 2
    assert "smoothing is a factor: give --only smoothing=0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "message"),
    [("return cell['optimiser'] == 'sgd'", "exclusion 'mine': KeyError: 'optimiser'"), ("return False", "")],
)
def test_an_exclusion_that_fails_is_one_line(body: str, message: str) -> None:
    use(f"@parts.exclude('mine')\ndef mine(cell):\n    {body}\n")
    if message:
        with pytest.raises(InputError, match=message):
            cross(GRIDS["smoke"].levels)
    else:
        assert cross(GRIDS["smoke"].levels)[1] == {}


def test_a_reason_is_given_once() -> None:
    with pytest.raises(InputError, match="there is an exclusion 'mine' already; give another reason"):
        use("for _ in range(2):\n    parts.exclude('mine')(lambda cell: False)\n")


def test_no_column_of_a_table_can_be_the_name_of_a_factor() -> None:
    from analysis.estimates.cells import COLUMNS as RANKED  # noqa: PLC0415
    from analysis.estimates.cells import PLACE_COLUMNS  # noqa: PLC0415
    from analysis.trial_table import COLUMNS  # noqa: PLC0415

    fields = {field.name for field in dataclasses.fields(TrialConfig)}
    assert {*COLUMNS, *RANKED, *PLACE_COLUMNS, *TEST_METRICS, "factor", "level", "label"} <= {*RESERVED, *fields}


def comparable(planned: TrialConfig, *recorded: TrialConfig) -> None:
    check_comparable([planned], recorded, "mine")


def test_factors_may_be_added_one_after_the_other_and_settings_may_not_change() -> None:
    use(SMOOTHING)
    first = with_level(smoothing="off")
    use('parts.on_net("frozen", ("no", "yes"))(lambda net, use: net)', "second.py")
    use(TEMPERATURE, "third.py")
    comparable(with_level(smoothing="0.1", frozen="yes", temperature="1.0"), PLAIN, first)
    comparable(with_level(smoothing="off", frozen="no"), first)
    with pytest.raises(InputError, match=r"trained with other settings: temperature \(2.0, now 1.0\)"):
        comparable(PLAIN, with_level(temperature="2.0"))
    with pytest.raises(InputError, match=r"trained with other settings: temperature \(1.0, now 2.0\)"):
        comparable(with_level(temperature="2.0"), PLAIN, first)


def test_the_defaults_of_one_experiment_are_not_those_of_another() -> None:
    """Both are read in one process, as a notebook does."""
    base = PLAIN.to_params()
    one = know_alike([TrialConfig.from_params({**base, "own": "x=off", "x": "on"})])
    other = know_alike([TrialConfig.from_params({**base, "own": "x=0", "x": "1"}), PLAIN])
    assert one[0].text("x") == "on"
    assert [config.text("x") for config in other] == ["1", "0"]
    assert other[1].trial_key == PLAIN.trial_key


def test_a_setting_is_read_in_its_type() -> None:
    use(TEMPERATURE)
    assert PLAIN.setting("momentum") == 0.9
    assert PLAIN.setting("clip") == 5.0
    with pytest.raises(InputError, match="unknown setting 'clap'; choose from"):
        PLAIN.setting("clap")


def test_what_a_file_imports_is_found() -> None:
    file = PartsFile(
        "own.py", "import torchvision.transforms\nfrom numpy import random\nimport os, grid\nimport nothing_like_it"
    )
    assert imported_packages([file]) == {"torchvision", "numpy"}


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (lambda text: text, []),
        (lambda text: f"# a comment\n{text}", []),
        (lambda text: text.replace("inputs**3", "inputs**5"), ["activation cubed"]),
        (lambda text: text.replace("cubed", "other"), []),
    ],
)
def test_any_change_of_what_a_file_does_is_another_code(edit: Callable[[str], str], changed: list[str]) -> None:
    use(CUBED)
    before = NumericCode.here()
    use(edit(CUBED), "renamed.py" if edit(CUBED) == CUBED.replace("cubed", "other") else "own.py")
    assert NumericCode.here().changed_parts([before]) == changed


def test_another_file_may_be_added_to_what_has_trained() -> None:
    bare = NumericCode.here()
    use(CUBED)
    first = NumericCode.here()
    use(SMOOTHING, "second.py")
    both = NumericCode.here()
    assert both.changed_parts([bare, first]) == []
    assert both.matches(bare)
    assert set(both.parts) == {"activation cubed", "factor smoothing"}
