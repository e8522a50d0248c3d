"""Read a finished grid from MLflow into pandas: print a table, and draw how the best cells learnt.

python examples/store_in_pandas.py sqlite:///mlflow.db smoke-glyphs
"""

import sys

import matplotlib.pyplot as plt

from analysis.curves import read_curves
from analysis.store import read_experiment
from grid.config import FACTORS, cell_name
from grid.metrics import RUNG_METRIC, recorded_rungs

if __name__ == "__main__":
    uri, name = sys.argv[1:]
    experiment = read_experiment(uri, name)
    trials = experiment.trials  # a row per trial: its levels, seed, status and accuracies

    # The first rung is the only one at which no trial has been stopped yet, so that its means are comparable.
    first_rung = f"{RUNG_METRIC}{recorded_rungs(trials.columns)[0]}"
    means = trials.pivot_table(first_rung, index=["model", "activation"], columns="optimizer")
    print(means.round(3).to_string())
    print(trials.groupby(["model", "status"]).size().to_string())

    best = trials.nlargest(5, "final_val_accuracy").set_index("run_id")
    curves = read_curves(experiment, best.index)
    for run_id, curve in curves.groupby("run_id"):
        trial = best.loc[str(run_id)]
        cell = {factor: str(trial[factor]) for factor in FACTORS}
        plt.plot(curve["epoch"], curve["val_accuracy"], label=f"{cell_name(cell)} seed={trial['seed']}")
    plt.xlabel("epoch")
    plt.ylabel("validation accuracy")
    plt.legend()
    plt.savefig("curves.png")
    print("curves.png written")
