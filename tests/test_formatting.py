import pandas as pd
import pytest

from analysis.formatting import Format, chance, format_table, hundredths, number, percent, points, sentence


@pytest.mark.parametrize(
    ("style", "value", "text"),
    [
        (percent, 0.12345, "12.35%"),
        (percent, -0.00001, "0.00%"),
        (points, 0.0123, "+1.23"),
        (points, -1e-9, "+0.00"),
        (number, 1234.0, "1,234"),
        (number, 0.123456, "0.1235"),
        (chance, 0.0312, "0.0312"),
        (chance, 1e-90, "< 0.0001"),
        (hundredths, -0.7, "-0.70"),
    ],
)
def test_numbers_are_formatted_for_people(style: Format, value: float, text: str) -> None:
    assert style(value) == text


@pytest.mark.parametrize("style", [percent, points, number, chance, hundredths])
def test_unknown_numbers_are_left_empty(style: Format) -> None:
    assert style(float("nan")) == ""


@pytest.mark.parametrize(
    ("remark", "text"),
    [
        ("2 trials left out: deleted", "2 trials left out: deleted."),
        ("incomplete: 3 are missing", "Incomplete: 3 are missing."),
        ("cnn: no control has an end", "cnn: no control has an end."),
        ("it ends with a stop.", "It ends with a stop."),
    ],
)
def test_a_note_becomes_a_sentence(remark: str, text: str) -> None:
    assert sentence(remark) == text


def test_a_table_is_formatted_by_column() -> None:
    table = pd.DataFrame({"winner_kept": [True], "rate": [0.5], "epochs_run": [1200], "effect": [0.01], "low": [0.2]})
    assert format_table(table).to_dict("list") == {
        "winner kept": ["yes"],
        "rate": ["50.00%"],
        "epochs run": ["1,200"],
        "effect": ["+1.00"],
        "95% from": ["0.2"],
    }


def test_headers_and_formats_of_a_call_override_the_defaults() -> None:
    assert format_table(pd.DataFrame({"low": [0.2]}), {"low": "at least"}, low=percent).to_dict("list") == {
        "at least": ["20.00%"]
    }
