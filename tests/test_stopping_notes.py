from tests.audited_trials import GRID, audit, control, only, slow_start, trial


def test_a_note_says_what_to_do_for_a_level_that_is_held_back() -> None:
    rows = slow_start(1 / 60).to_dict("records")
    assert audit(*rows).notes[-1] == (
        "after epoch 1 only 2% of lr_schedule=one_cycle continued, but 50% of the others: the ranking says little "
        "about it; what it is worth at the end is what analysis.effects estimates; if it only starts slowly, "
        "--stop-within model,lr_schedule or --grace 3 gives it a chance"
    )


def test_a_note_says_until_when_constant_and_step_are_the_same() -> None:
    notes = audit(*GRID, trial(0.4, lr_schedule="step")).notes
    assert notes[-1] == (
        "lr_schedule=constant and step are the same procedure for the first 1/3 of the budget: what differs between "
        "them after epoch 1, 3 is chance"
    )
    assert not [note for note in audit(*GRID).notes if "same procedure" in note]
    longer = [row | {"epochs": 8} for row in (*GRID, trial(0.4, lr_schedule="step"))]
    assert audit(*longer).notes[-1].endswith("after epoch 1 is chance")


def test_a_note_counts_failed_controls_which_are_left_out() -> None:
    found = audit(*GRID, control(0.9, 0.9, status="failed"))
    assert only(found.false_stops)["controls"] == 2
    assert "left out: 1 of 3 controls, which failed or were stopped after all" in found.notes


def test_a_note_names_a_model_without_controls() -> None:
    found = audit(*GRID, trial(0.5, 0.6, 0.7, model="cnn"))
    assert "cnn: no control has completed or diverged, so the cost of stopping is unknown" in found.notes
    assert found.false_stops["model"].tolist() == ["mlp"]


def test_notes_say_that_each_replicate_and_scale_counts() -> None:
    notes = audit(*GRID, trial(0.5, 0.6, 0.7, seed=1, lr_scale=0.5)).notes
    assert "2 seeds: every trial counts, because each was stopped or not individually" in notes
    assert "2 learning-rate scales: every trial counts, because each was stopped or not individually" in notes
