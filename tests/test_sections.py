from dataclasses import replace

import pytest

from analysis.audit import WORDING
from analysis.estimates.final_effects import FinalEffects
from analysis.estimates.rung_effects import RungEffects
from analysis.formatting import percent
from analysis.page import sections
from analysis.page.sections import Section
from analysis.store import read_experiment
from analysis.verdict import Unavailable, Verdict, analyse
from grid.record.store import Store

TITLES = (
    *("Leaderboard", "Effects at the end", "Interactions", "Who learns fast", "Learning curves"),
    *("Divergence", "Cost", "Early stopping", "Finalists", "Samples"),
)


@pytest.fixture(scope="module")
def verdict(finished_store: Store) -> Verdict:
    return analyse(read_experiment(finished_store.uri, "finished"))


@pytest.fixture(scope="module")
def page(verdict: Verdict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Section]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return {section.title: section for section in sections.sections(verdict)}


def test_every_section_is_present_in_order_with_its_own_anchor(page: dict[str, Section]) -> None:
    assert tuple(page) == TITLES
    assert len({section.anchor for section in page.values()}) == len(TITLES)
    assert page["Effects at the end"].anchor == "effects-at-the-end"


def test_the_leaders_are_those_of_the_ranking(page: dict[str, Section], verdict: Verdict) -> None:
    rows = page["Leaderboard"].tables[0].rows
    shown = [value.rstrip("*") for value in rows["val acc"]]
    assert shown == [percent(value) for value in verdict.cells["val_accuracy"][:20]]
    assert rows.loc[0, ["rank", "cell", "tie", "epochs"]].tolist() == [
        *(1, "cnn constant gelu adam batch_norm", "yes", "9 of 9"),
    ]


def test_each_model_has_its_leaders(page: dict[str, Section]) -> None:
    _, cnn, mlp = page["Leaderboard"].tables
    assert (cnn.caption, mlp.caption) == ("Best cnn cells", "Best mlp cells")
    assert all(cell.startswith("mlp") for cell in mlp.rows["cell"])


def test_columns_without_a_value_are_left_out(verdict: Verdict) -> None:
    missing = ("low", "seed_half", "image_half", "controls_end", "test_accuracy_as_validated")
    plain = verdict.cells.assign(**dict.fromkeys(missing, float("nan")), controls=0, diverged=0)
    section = sections.leaderboard(replace(verdict, cells=plain))
    assert list(section.tables[0].rows) == ["rank", "cell", "val acc", "seeds", "epochs"]
    assert not any("tie" in text for text in section.text)


def test_scaled_learning_rates_are_shown(verdict: Verdict) -> None:
    rows = sections.leaderboard(replace(verdict, cells=verdict.cells.assign(lr_scale=0.1))).tables[0].rows
    assert set(rows["lr"]) == {"x0.1"}


def test_notes_of_the_store_precede_the_ranking(verdict: Verdict) -> None:
    noted = replace(verdict, experiment=replace(verdict.experiment, notes=("1 run left out: deleted",)))
    assert sections.leaderboard(noted).text[-1] == "1 run left out: deleted."


def test_the_effects_at_the_end_have_a_row_per_level_and_per_difference(
    page: dict[str, Section], verdict: Verdict
) -> None:
    section = page["Effects at the end"]
    assert isinstance(verdict.effects, FinalEffects)
    assert len(section.figures[0].table) == len(verdict.effects.levels)
    earned, differences = section.tables
    assert list(earned.rows) == ["factor", "level", "alone", "on average", "added last"]
    assert len(earned.rows) == len(verdict.effects.earned.table)
    assert "together they earn" in earned.remark.lower()
    assert len(differences.rows) == len(verdict.effects.differences) == 6
    assert list(differences.rows)[:4] == ["factor", "level", "over", "points"]
    assert list(differences.rows["points"]) == [
        f"{100 * difference:+.2f}" for difference in verdict.effects.differences["difference"]
    ]
    assert f"corrected by {verdict.effects.probed} unstopped controls" in section.text[0]


def test_the_first_rung_has_a_row_per_level_and_a_line_per_term(page: dict[str, Section], verdict: Verdict) -> None:
    levels, variance = page["Who learns fast"].figures
    assert isinstance(verdict.first, RungEffects)
    assert len(levels.table) == len(verdict.first.levels)
    assert list(variance.table["term"]) == list(verdict.first.variance["term"])
    assert page["Who learns fast"].text[0].startswith("Accuracies after epoch 1, before any trial was stopped.")


def test_the_picture_of_the_headline_has_a_line_per_factor(verdict: Verdict) -> None:
    figure = sections.headline_figure(verdict)
    assert figure is not None
    assert sorted(figure.table["factor"]) == ["activation", "batch_norm", "model", "optimizer"]
    assert figure.table["sure"][0] == "yes"


def test_pairs_that_stand_out_are_drawn_and_named(verdict: Verdict) -> None:
    effects = verdict.effects
    assert isinstance(effects, FinalEffects)
    pairs = effects.interactions.assign(stands_out=effects.interactions["factor"] == "model")
    section = sections.interactions(replace(verdict, effects=replace(effects, interactions=pairs)))
    assert section is not None
    assert len(section.figures) == 3
    assert all(figure.caption.startswith("model x ") for figure in section.figures)
    assert next(iter(section.figures[0].table)) == "model"


def test_that_no_pair_stands_out_is_a_result(verdict: Verdict) -> None:
    effects = verdict.effects
    assert isinstance(effects, FinalEffects)
    plain = replace(effects, interactions=effects.interactions.assign(stands_out=False))
    section = sections.interactions(replace(verdict, effects=plain))
    assert section == Section("Interactions", ["No pair of levels stands out beyond the sum of its two effects."])


def test_sections_without_anything_to_say_are_left_out(verdict: Verdict) -> None:
    reason = Unavailable("every factor has an accuracy at one level only")
    orphan = replace(verdict.experiment, parent_id="")
    single = replace(verdict, experiment=orphan, cells=verdict.cells[:1], effects=reason, first=reason)
    empty = (sections.effects, sections.interactions, sections.first_rung, sections.samples, sections.headline_figure)
    assert [part(single) for part in empty] == [None] * 5


def test_effects_that_are_unknown_are_explained(verdict: Verdict) -> None:
    section = sections.effects(replace(verdict, effects=Unavailable("effects at the end are unknown: no controls")))
    assert section == Section("Effects at the end", ["Effects at the end are unknown: no controls."])


def test_each_model_has_its_curves_and_all_have_a_funnel(page: dict[str, Section]) -> None:
    captions = [figure.caption for figure in page["Learning curves"].figures]
    assert [caption.split(":")[0] for caption in captions] == [
        *("Learning curves, cnn", "Learning curves, mlp", "How far trials got")
    ]


def test_diverged_trials_are_counted_by_level(page: dict[str, Section]) -> None:
    section = page["Divergence"]
    assert section.text[0].startswith("4 of 48 trials diverged")
    rows = section.tables[0].rows.set_index("level")
    assert rows.loc["asgd", ["trials", "diverged", "rate"]].tolist() == ["16", "4", "25.00%"]
    assert "adam" not in rows.index


def test_a_grid_without_divergence_says_so(verdict: Verdict) -> None:
    trials = verdict.experiment.trials.assign(status="completed")
    section = sections.divergence(replace(verdict, experiment=replace(verdict.experiment, trials=trials)))
    assert section == Section("Divergence", ["0 of 48 trials diverged (their loss was not finite)."])


def test_the_cost_has_a_row_per_model(page: dict[str, Section]) -> None:
    assert list(page["Cost"].tables[0].rows["model"]) == ["cnn", "mlp"]


def test_the_tables_of_stopping_have_captions_remarks_and_plain_headers(page: dict[str, Section]) -> None:
    tables = {table.caption: table for table in page["Early stopping"].tables}
    assert len(tables) == len(WORDING)
    assert all(table.remark.endswith(".") for table in tables.values())
    assert not [header for table in tables.values() for header in table.rows if "_" in header]
    assert "Would a simpler rule do: train all to epoch 1, then the best K to the end?" in tables


def test_the_tables_of_stopping_have_the_figures_of_the_audit(page: dict[str, Section], verdict: Verdict) -> None:
    _, correlations, false_stops, _, _, baseline = (table.rows for table in page["Early stopping"].tables)
    assert list(correlations["95% from"]) == [f"{low:.2f}" for low in verdict.audit.correlations["low"]]
    assert list(false_stops["to"]) == [f"{high:.2%}" for high in verdict.audit.false_stops["high"]]
    first = verdict.audit.baseline.iloc[0]
    assert baseline["best survivors kept"][0] == f"{first['top_kept']} of {first['top']}"


def test_tables_of_stopping_without_a_row_are_left_out(verdict: Verdict) -> None:
    audit = replace(verdict.audit, correlations=verdict.audit.correlations[:0], baseline=verdict.audit.baseline[:0])
    assert len(sections.stopping(replace(verdict, audit=audit)).tables) == len(WORDING) - 2


def test_finalists_come_with_the_mistakes_of_their_best_net(page: dict[str, Section]) -> None:
    accuracies, pairs, mistakes = page["Finalists"].figures
    assert list(accuracies.table["seeds"]) == [3] * 8
    assert pairs.caption.startswith("Which classes are confused: cnn constant gelu adam batch_norm, seed 100")
    assert list(pairs.table)[:2] == ["true", "read as"]
    assert mistakes.table["character"].tolist()[0] == "0"


def test_characters_that_look_like_numbers_stay_characters(page: dict[str, Section]) -> None:
    assert list(page["Finalists"].figures[1].table["read as"][:3]) == ["1", "2", "3"]


def test_pictures_are_embedded(page: dict[str, Section]) -> None:
    (sheet,) = page["Samples"].figures
    assert sheet.picture.startswith('<img alt="sample images" src="data:image/png;base64,iVBOR')


def test_untested_finalists_have_no_mistakes(verdict: Verdict) -> None:
    untested = verdict.experiment.finalists.assign(test_accuracy=float("nan"))
    changed = replace(verdict, experiment=replace(verdict.experiment, finalists=untested))
    assert len(sections.finalists(changed).figures) == 1


def test_the_command_that_confirms_can_be_pasted(verdict: Verdict) -> None:
    named = replace(verdict.experiment, name="it's <mine>")
    unconfirmed = replace(verdict, experiment=named, cells=verdict.cells[verdict.cells["tier"] != "finalist"])
    (text,) = sections.finalists(unconfirmed).text
    assert "--experiment &#39;it&#39;&#34;&#39;&#34;&#39;s &lt;mine&gt;&#39;</code>" in text
