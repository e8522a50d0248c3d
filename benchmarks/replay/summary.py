"""Sums up replays and prints the tables."""

from collections.abc import Iterable

import pandas as pd

from benchmarks.replay.estimators import root_mean_square

SLOW_STARTER = ("lr_schedule", "one_cycle")


def summarise(found: pd.DataFrame) -> pd.DataFrame:
    """Return how good each estimator is in each setting.

    Args:
        found: From `benchmarks.replay.__main__.run`.

    Returns:
        By `setting` and `estimator`, in points and shares: `bias` on the slow starter, `error` (root mean square) and
        `half` (of the interval's width) over main effects, `covered` of main effects, `worst` (coverage of the main
        effect that is covered least), `pairs` (coverage of pairs of levels), `draws` that yielded an estimate.
    """
    effects = found[found["estimator"] != ""]
    rows = []
    for (setting, estimator), table in effects.groupby(["setting", "estimator"], sort=False):
        main, pairs = table[table["other_factor"] == ""], table[table["other_factor"] != ""]
        slow = main[(main["factor"] == SLOW_STARTER[0]) & (main["level"] == SLOW_STARTER[1])]
        covered = main["covered"].astype(float)
        rows.append(
            {
                "setting": setting,
                "estimator": estimator,
                "bias": 100 * slow["error"].mean(),
                "error": 100 * root_mean_square(main["error"]),
                "half": 100 * main["half"].mean(),
                "covered": covered.mean(),
                "worst": covered.groupby([main["factor"], main["level"]]).mean().min(),
                "pairs": pairs["covered"].astype(float).mean(),
                "draws": table["draw"].nunique(),
            }
        )
    return pd.DataFrame(rows)


def format_estimators(found: pd.DataFrame) -> str:
    """Return the estimators side by side, by the share of controls."""
    summary = summarise(found)
    summary = summary[summary["setting"].str.endswith("%")]
    epochs = _means(found, "epochs")
    lines = ["Effects at the end, by the share of controls; effects in points"]
    lines.append(
        f"{'controls':<9}{'estimator':<15}{'slow start':>11}{'error':>6}{'half':>6}{'covered':>9}{'worst':>7}"
        f"{'pairs':>7}{'epochs':>8}"
    )
    for row in summary.to_dict("records"):
        pairs = "" if pd.isna(row["pairs"]) else f"{row['pairs']:.1%}"
        lines.append(
            f"{row['setting']:<9}{row['estimator']:<15}{row['bias']:>+11.2f}{row['error']:>6.2f}{row['half']:>6.2f}"
            f"{row['covered']:>9.1%}{row['worst']:>7.1%}{pairs:>7}{epochs[row['setting']]:>8.1%}"
        )
    return "\n".join(lines)


def format_rules(found: pd.DataFrame, labels: Iterable[str]) -> str:
    """Return the stopping rules side by side."""
    ours = summarise(found).query("estimator == 'ours'").set_index("setting")
    epochs, regret = _means(found, "epochs"), _means(found, "regret")
    kept, slow = _means(found, "best kept"), _means(found, "slow starters kept")
    lines = ["Stopping rules: who wins, and what matters (effects in points, ours)"]
    lines.append(
        f"{'compared within; rungs; continue':<39}{'regret':>7}{'best 20':>8}{'slow':>6}{'error':>6}{'half':>6}"
        f"{'epochs':>7}"
    )
    for label in labels:
        effects = ours.loc[label].to_dict()
        lines.append(
            f"{label:<39}{100 * regret[label]:>7.2f}{kept[label]:>8.1f}{slow[label]:>6.1f}{effects['error']:>6.2f}"
            f"{effects['half']:>6.2f}{epochs[label]:>7.1%}"
        )
    lines.append("regret: the best cell's end minus the winner's, in points; best 20: how many of")
    return "\n".join([*lines, "them were not stopped; slow: how many trials with one_cycle were not stopped"])


def format_draws(found: pd.DataFrame, labels: Iterable[str]) -> str:
    """Return the ways to draw controls side by side."""
    ours, epochs = summarise(found).query("estimator == 'ours'").set_index("setting"), _means(found, "epochs")
    lines = ["How controls are drawn (effects in points, ours)"]
    lines.append(f"{'':<30}{'error':>6}{'half':>6}{'covered':>9}{'worst':>7}{'pairs':>7}{'epochs':>8}")
    for label in labels:
        row = ours.loc[label].to_dict()
        lines.append(
            f"{label:<30}{row['error']:>6.2f}{row['half']:>6.2f}{row['covered']:>9.1%}{row['worst']:>7.1%}"
            f"{row['pairs']:>7.1%}{epochs[label]:>8.1%}"
        )
    return "\n".join(lines)


def format_importances(found: pd.DataFrame) -> str:
    """Return what each method calls important, and how well it orders the factors, as means over the draws."""
    asked = found[found["method"].notna()]
    means = asked.groupby(["question", "factor", "method"], sort=False)["value"].mean()
    methods = list(dict.fromkeys(asked["method"]))
    lines = ["How important is each factor at the end? Shares, as means over the draws"]
    lines.append(f"{'':<18}" + "".join(f"{method:>{_width(method)}}" for method in methods))
    for factor, shares in means["importance"].unstack("method").iterrows():
        lines.append(f"{factor:<18}" + "".join(f"{shares[method]:>{_width(method)}.1%}" for method in methods))
    for question, style in {"order": ".2f", "own order": ".2f", "first": ".0%"}.items():
        scores = means.xs((question, ""), level=("question", "factor")).reindex(methods)
        cells = ("" if pd.isna(scores[method]) else f"{scores[method]:{style}}" for method in methods)
        lines.append(
            f"{question:<18}" + "".join(f"{cell:>{_width(m)}}" for cell, m in zip(cells, methods, strict=True))
        )
    lines.append("order: rank correlation with the truth; own order: with what the method itself")
    lines.append("says if nothing is stopped; first: how often the most important factor is found")
    return "\n".join([*lines, "All but ours see completed trials only"])


def _width(heading: str) -> int:
    return max(8, len(heading) + 2)


def _means(found: pd.DataFrame, question: str) -> "pd.Series[float]":
    rows = found[found["question"] == question] if "question" in found else found[:0]
    return rows.groupby("setting")["value"].mean()
