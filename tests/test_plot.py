import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import plot

SVG = "{http://www.w3.org/2000/svg}"


def trial(run_id: str, status: str = "completed", model: str = "mlp", epochs_run: int = 9) -> dict[str, object]:
    rungs = {f"val_accuracy_at_{rung}": 0.1 * rung if epochs_run >= rung else np.nan for rung in (1, 3)}
    figures = {"epochs": 9, "epochs_run": epochs_run, "epoch_seconds": 2.0, **rungs}
    return {"run_id": run_id, "status": status, "model": model, **figures}


TRIALS = pd.DataFrame(
    [
        trial("a"),
        trial("b"),
        trial("c", "stopped", epochs_run=1),
        trial("d", "stopped", epochs_run=3),
        trial("e", model="cnn"),
        trial("f", "diverged", "cnn", epochs_run=2),
    ]
)
CURVES = pd.DataFrame(
    [("a", 1, 0.2), ("a", 2, 0.4), ("b", 1, 0.3), ("b", 2, 0.6), ("c", 1, 0.1), ("d", 1, 0.2), ("e", 1, 0.5)],
    columns=["run_id", "epoch", "val_accuracy"],
)
LEVELS = pd.DataFrame(
    [
        ("model", "mlp", 0.01, 0.0, 0.02),
        ("model", "cnn", -0.01, -0.02, 0.0),
        ("optimizer", "sgd", -0.05, -0.06, -0.04),
        ("optimizer", "adam", 0.05, 0.04, 0.06),
        ("optimizer", "asgd", np.nan, np.nan, np.nan),
    ],
    columns=["factor", "level", "effect", "low", "high"],
)
VARIANCE = pd.DataFrame(
    [("optimizer", 0.5), ("model x optimizer", 0.3), ("model", 0.1), ("model x dropout", 0.06), ("residual", 0.04)],
    columns=["term", "share"],
)
INTERACTIONS = pd.DataFrame(
    [
        ("model", m, "optimizer", o, sign * 0.02)
        for m, sign in (("mlp", 1), ("cnn", -1))
        for o in ("sgd", "adam", "asgd")
    ]
    + [("model", "mlp", "dropout", "on", 0.5)],
    columns=["factor", "level", "other_factor", "other_level", "effect"],
).assign(stands_out=True)
DIFFERENCES = pd.DataFrame(
    [
        ("model", "cnn", "mlp", 0.02, -0.01, 0.05, False),
        ("optimizer", "adam", "sgd", 0.06, 0.04, 0.08, True),
        ("optimizer", "adam", "rmsprop", 0.03, 0.01, 0.05, True),
        ("dropout", "off", "on", 0.01, 0.005, 0.015, True),
    ],
    columns=["factor", "level", "other_level", "difference", "low", "high", "sure"],
)
CELLS = pd.DataFrame(
    {
        "val_accuracy": [0.8, 0.7],
        "low": [0.79, np.nan],
        "high": [0.81, np.nan],
        "test_accuracy_as_validated": [0.78, 0.69],
    }
)
MAP = plot.interaction_map(INTERACTIONS, ("model", "optimizer"))
DRAWINGS: dict[str, Callable[[], str]] = {
    "curves": lambda: plot.draw_curves(plot.curve_sample(TRIALS), CURVES, "mlp"),
    "other curves": lambda: plot.draw_curves(plot.curve_sample(TRIALS), CURVES, "cnn"),
    "funnel": lambda: plot.draw_funnel(plot.funnel_table(TRIALS)),
    "differences": lambda: plot.draw_differences(plot.difference_rows(DIFFERENCES)),
    "main effects": lambda: plot.draw_main_effects(plot.effect_rows(LEVELS)),
    "variance": lambda: plot.draw_variance(plot.variance_bars(VARIANCE)),
    "interaction": lambda: plot.draw_interaction(MAP, ("model", "optimizer")),
    "finalists": lambda: plot.draw_finalists(CELLS, ["one", "two"]),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Axes]]:
    """Collect the axes of every figure that is drawn, before they become SVG."""
    axes: list[Axes] = []
    make = plot._svg

    def keep(figure: Figure, name: str) -> str:
        axes.extend(figure.axes)
        return make(figure, name)

    monkeypatch.setattr(plot, "_svg", keep)
    return axes


def labels_of(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def legend_of(axes: Axes) -> set[str]:
    return {text.get_text() for legend in axes.figure.legends for text in legend.get_texts()}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS.keys())
def test_every_figure_is_xml_with_a_size_and_a_title(draw: Callable[[], str]) -> None:
    root = ET.fromstring(draw())
    assert root.tag == f"{SVG}svg"
    assert float(root.attrib["width"].removesuffix("pt")) > 100
    assert root.find(f"{SVG}title").text


def test_ids_are_unique_among_the_figures_of_a_page_and_every_reference_resolves() -> None:
    page = "".join(draw() for draw in DRAWINGS.values())
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_the_same_table_yields_the_same_picture() -> None:
    assert DRAWINGS["curves"]() == DRAWINGS["curves"]()


def test_a_figure_needs_no_other_file() -> None:
    page = "".join(draw() for draw in DRAWINGS.values())
    assert not re.findall(r'href="(?!#|data:)', page)
    assert set(re.findall(r'([\w:]+)="https?://', page)) == {"xmlns", "xmlns:xlink"}


def test_diverged_trials_have_no_curve() -> None:
    assert set(plot.curve_sample(TRIALS)["run_id"]) == {"a", "b", "c", "d", "e"}


def test_of_many_curves_a_random_sample_is_drawn_and_their_number_is_kept() -> None:
    many = pd.DataFrame([trial(f"{number}", "stopped") for number in range(400)])
    sample = plot.curve_sample(many)
    assert len(sample) == plot.CURVES_PER_MODEL
    assert set(sample["available"]) == {400}
    assert set(sample["run_id"]) != set(many["run_id"][: plot.CURVES_PER_MODEL])


def test_the_table_of_curves_has_their_spread() -> None:
    table = plot.curve_table(plot.curve_sample(TRIALS), CURVES).set_index(["model", "status", "epoch"])
    assert table.loc[("mlp", "completed", 2)].tolist() == pytest.approx([2, 0.4, 0.5, 0.6])
    assert table.loc[("mlp", "stopped", 1), "trials"] == 2


def test_every_curve_is_a_line(drawn: list[Axes]) -> None:
    DRAWINGS["curves"]()
    lines = [line for line in drawn[0].lines if line.get_linestyle() == "-" and len(line.get_xdata())]
    assert sorted(tuple(line.get_ydata()) for line in lines) == [(10,), (20,), (20, 40), (30, 60)]
    assert legend_of(drawn[0]) == {"stopped (2)", "completed (2)"}


def test_the_funnel_counts_the_trials_that_reached_each_rung_and_the_budget() -> None:
    funnel = plot.funnel_table(TRIALS).set_index(["model", "epoch"])
    assert funnel.loc["mlp", "trials"].to_dict() == {0: 4, 1: 4, 3: 3, 9: 2}
    assert funnel.loc["cnn", "share"].to_dict() == {0: 1.0, 1: 1.0, 3: 0.5, 9: 0.5}


def test_the_funnel_has_a_bar_per_model_and_stage(drawn: list[Axes]) -> None:
    DRAWINGS["funnel"]()
    assert [bar.get_width() for bar in drawn[0].patches] == [2, 2, 1, 1, 4, 4, 3, 2]
    assert labels_of(drawn[0]) == ["started", "after epoch 1", "after epoch 3", "after epoch 9"]
    assert legend_of(drawn[0]) == {"mlp", "cnn"}


@pytest.mark.parametrize("models", [4, 15])
def test_any_number_of_models_is_drawn_and_can_be_distinguished(drawn: list[Axes], models: int) -> None:
    trials = [trial(f"{number}", model=f"model {number}") for number in range(models)]
    plot.draw_funnel(plot.funnel_table(pd.DataFrame(trials)))
    bars = [container.patches[0] for container in drawn[0].containers]
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == models
    assert legend_of(drawn[0]) == {f"model {number}" for number in range(models)}


def test_the_factor_with_the_widest_range_comes_first_with_its_best_level_first() -> None:
    assert plot.effect_rows(LEVELS)["level"].tolist() == ["adam", "sgd", "asgd", "mlp", "cnn"]


def test_every_level_is_named_and_those_with_an_effect_are_marked(drawn: list[Axes]) -> None:
    DRAWINGS["main effects"]()
    assert labels_of(drawn[0]) == ["optimizer", "adam", "sgd", "asgd", "model", "mlp", "cnn"]
    marks = [bar.lines[0].get_xdata()[0] for bar in drawn[0].containers]
    assert marks == pytest.approx([5, -5, np.nan, 1, -1], nan_ok=True)


def test_an_interval_reaches_from_low_to_high(drawn: list[Axes]) -> None:
    plot.draw_main_effects(LEVELS.assign(low=LEVELS["effect"] - 0.03, high=LEVELS["effect"] + 0.01))
    (segment,) = drawn[0].containers[0].lines[2][0].get_segments()
    assert segment[:, 0] == pytest.approx([-2, 2])


def test_terms_that_are_not_named_are_added_up() -> None:
    bars = plot.variance_bars(VARIANCE, count=2)
    assert list(bars["term"]) == ["optimizer", "model x optimizer", "2 other terms", "residual"]
    assert list(bars["share"]) == pytest.approx([0.5, 0.3, 0.16, 0.04])


def test_equal_accuracies_have_no_shares(drawn: list[Axes]) -> None:
    plot.draw_variance(plot.variance_bars(VARIANCE.assign(share=np.nan)))
    assert {text.get_text().strip() for text in drawn[0].texts} == {"0.0%"}


def test_factors_pairs_and_the_rest_differ_in_colour(drawn: list[Axes]) -> None:
    plot.draw_variance(plot.variance_bars(VARIANCE, count=2))
    assert len({bar.get_facecolor() for bar in drawn[0].patches}) == 3
    assert [text.get_text().strip() for text in drawn[0].texts] == ["50.0%", "30.0%", "16.0%", "4.0%"]


def test_the_strongest_interactions_are_the_pairs_that_stand_out_the_strongest_first() -> None:
    assert plot.strongest_interactions(INTERACTIONS, 1) == [("model", "dropout")]
    assert plot.strongest_interactions(INTERACTIONS) == [("model", "dropout"), ("model", "optimizer")]
    hidden = INTERACTIONS.assign(stands_out=INTERACTIONS["other_factor"] == "optimizer")
    assert plot.strongest_interactions(hidden) == [("model", "optimizer")]


def test_of_each_factor_the_largest_difference_is_drawn_the_sure_ones_first() -> None:
    rows = plot.difference_rows(DIFFERENCES)
    assert list(rows["factor"]) == ["optimizer", "dropout", "model"]
    assert rows["other_level"][0] == "sgd"


def test_a_difference_is_drawn_with_its_interval_and_names_both_levels(drawn: list[Axes]) -> None:
    DRAWINGS["differences"]()
    assert [text.get_text() for text in drawn[0].texts] == [
        *("optimizer: adam over sgd", "dropout: off over on", "model: cnn over mlp")
    ]
    assert [bar.lines[0].get_xdata()[0] for bar in drawn[0].containers] == pytest.approx([6, 1, 2])
    (segment,) = drawn[0].containers[0].lines[2][0].get_segments()
    assert segment[:, 0] == pytest.approx([4, 8])
    colours = [bar.lines[0].get_color() for bar in drawn[0].containers]
    assert colours == [plot.BLUE, plot.BLUE, plot.MUTED]
    assert legend_of(drawn[0]) == {"sure", "may be chance"}


def test_a_map_has_the_effects_of_its_pair_and_more_rows_than_columns() -> None:
    assert (MAP.index.name, MAP.columns.name) == ("optimizer", "model")
    assert list(MAP.index) == ["sgd", "adam", "asgd"]
    assert MAP.loc["adam"].to_dict() == {"mlp": 0.02, "cnn": -0.02}


def test_every_field_of_a_map_shows_its_effect(drawn: list[Axes]) -> None:
    DRAWINGS["interaction"]()
    assert [text.get_text() for text in drawn[0].texts] == ["+2.0", "-2.0"] * 3
    assert labels_of(drawn[0]) == ["sgd", "adam", "asgd"]
    assert (drawn[0].get_xlabel(), drawn[0].get_ylabel()) == ("model", "optimizer")


def test_maps_can_share_a_colour_scale(drawn: list[Axes]) -> None:
    plot.draw_interaction(MAP, ("model", "optimizer"), largest=0.5)
    assert drawn[0].images[0].get_clim() == (-65, 65)


def test_a_map_without_any_effect_can_be_drawn(drawn: list[Axes]) -> None:
    plot.draw_interaction(MAP * -0.0, ("model", "optimizer"))
    assert {text.get_text() for text in drawn[0].texts} == {"+0.0"}


def test_finalists_show_validation_and_test(drawn: list[Axes]) -> None:
    DRAWINGS["finalists"]()
    assert {text.get_text() for text in drawn[0].texts} == {"one", "two"}
    assert legend_of(drawn[0]) == {"validation", "test"}


def test_untested_finalists_have_no_mark_for_a_test(drawn: list[Axes]) -> None:
    plot.draw_finalists(CELLS.assign(test_accuracy_as_validated=np.nan), ["one", "two"])
    assert legend_of(drawn[0]) == {"validation"}


def test_the_cost_adds_up() -> None:
    costs = plot.cost_table(TRIALS).set_index("model")
    assert costs.loc["mlp", ["trials", "completed", "stopped", "diverged", "failed"]].tolist() == [4, 2, 2, 0, 0]
    assert costs.loc["mlp", "hours"] == pytest.approx(22 * 2 / 3600)
    assert costs["epochs_run"].sum() == TRIALS["epochs_run"].sum()
