from pathlib import Path

import pandas as pd
import pytest

from benchmarks.base_rates import CROSSED, LADDER, _parser, around, best_table, cost_table, main, plan
from grid.config import TrialConfig
from grid.parts.registry import OPTIMIZERS


def sweep(accuracies: dict[tuple[str, str, float], float]) -> pd.DataFrame:
    """Return trainings of SGD from (model, batch norm, rate) -> accuracy; all else is equal."""
    shared = {name: chosen[0] for name, (_, chosen) in CROSSED.items()}
    results = {"seed": 0, "epochs": 3, "epoch_seconds": 1.0, "weights": 1000}
    return pd.DataFrame(
        [
            {**shared, **results, "optimizer": "sgd", "model": model, "batch_norm": norm, "learning_rate": rate}
            | {"val_accuracy": accuracy}
            for (model, norm, rate), accuracy in accuracies.items()
        ]
    )


TWO_OPTIMA = sweep(
    {
        ("mlp", "off", 0.01): 0.80,
        ("mlp", "off", 0.1): 0.76,
        ("mlp", "on", 0.01): 0.80,
        ("mlp", "on", 0.1): 0.82,
    }
)


def test_the_ladder_is_cut_around_the_base_rate():
    assert around(0.05, 1, 2) == [0.02, 0.05, 0.1, 0.2]
    assert around(0.06, 0, 0) == [0.05]
    assert around(LADDER[0], 3, 1) == LADDER[:2]


def test_a_plan_crosses_what_is_asked_for():
    options = _parser().parse_args(["--optimizers", "adam", "--seeds", "2", "--model", "mlp", "--below", "0"])
    planned = list(plan(options, {"data": "glyphs", "data_fingerprint": "abc", "epochs": "3"}))
    assert len(planned) == 2 * 2 * 2 * 3  # seeds, batch norm, activations, rates
    assert {params["model"] for params in planned} == {"mlp"}
    for params in planned:
        assert TrialConfig.from_params(params).learning_rate >= OPTIMIZERS["adam"].base_learning_rate / 2


def test_a_common_rate_costs_what_it_loses_to_the_rate_of_each_group():
    costs = cost_table(TWO_OPTIMA)
    assert costs["one rate for each optimizer"].startswith("1.00 ")  # 0 and 2 points at 0.01
    assert list(costs.index) == ["one rate for each optimizer", "... and batch norm"]  # all else has one level
    assert costs["... and batch norm"].startswith("0.00 ")


def test_the_best_table_names_the_rate_of_each_combination():
    first, second = best_table(TWO_OPTIMA, ["batch_norm"]).splitlines()[1:]
    assert first.split()[:4] == ["off", "sgd", "0.01", "80.00"]
    assert second.split()[:4] == ["on", "sgd", "0.1", "82.00"]


def test_a_sweep_goes_on_where_it_was_interrupted(
    glyphs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "rates.csv"
    small = ["--data-dir", str(glyphs_dir), "--per-class", "4", "--epochs", "1", "--model", "mlp", "--below", "0"]
    few = [*small, "--activation", "relu", "--batch-norm", "off", "--optimizers", "sgd", "--csv", str(csv)]
    assert main([*few, "--above", "0"]) == 0
    before = csv.read_text()
    assert main([*few, "--above", "1"]) == 0
    assert csv.read_text().startswith(before)
    assert len(csv.read_text().splitlines()) == 3
    capsys.readouterr()
    assert main([*few, "--above", "1", "--epochs", "2"]) == 2
    assert capsys.readouterr().err.endswith(f"{csv} has trainings with epochs 1, not 2; use another --csv\n")
    assert main(["--report", str(csv)]) == 0
    assert "one rate for each optimizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [([], "name the file that trainings are added to"), (["--report", "/no.csv"], "can't read /no.csv")],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.base_rates: {problem}")


@pytest.mark.parametrize(("text", "problem"), [("a,b\n1,2\n", "was not written by --csv"), ("", "No columns")])
def test_a_file_of_something_else_is_refused(
    text: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rates.csv").write_text(text)
    assert main(["--report", str(tmp_path / "rates.csv")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line
