"""A grid in Optuna, written as its documentation recommends: GridSampler, SuccessiveHalvingPruner, MLflowCallback.

Trials run in processes that share a journal file, which "Easy Parallelization" (optuna.readthedocs.io) recommends for
one machine instead of SQLite. Threads (`n_jobs`) would run one trial at a time, because `track_in_mlflow` holds a lock
while an objective runs.
"""

import multiprocessing
import sys
from multiprocessing.synchronize import Event

import mlflow
import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from optuna_integration.mlflow import MLflowCallback

from benchmarks.peers.common import OPTIMIZERS, Task, build_net, load_data, read_task, run_epoch

JOURNAL = "journal.log"
STUDY = "grid"


def work(task: Task, ready: Event) -> None:
    """Run trials until none is left; the body of one process."""
    torch.set_num_threads(1)
    ready.wait()
    study = optuna.load_study(
        study_name=STUDY,
        storage=JournalStorage(JournalFileBackend(JOURNAL)),
        sampler=optuna.samplers.GridSampler(
            {"optimizer": task.optimizers, "activation": task.activations, "seed": task.seeds}
        ),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    )
    mlflc = MLflowCallback(tracking_uri=task.store, metric_name="accuracy")

    def objective(trial: optuna.Trial) -> float:
        torch.manual_seed(trial.suggest_categorical("seed", task.seeds))
        train, val, classes = load_data(task)
        activation = trial.suggest_categorical("activation", task.activations)
        net = build_net(task.model, activation, classes)
        optimizer = OPTIMIZERS[trial.suggest_categorical("optimizer", task.optimizers)](net.parameters())
        accuracy = 0.0
        for epoch in range(1, task.epochs + 1):
            metrics = run_epoch(net, optimizer, train, val)
            mlflow.log_metrics(metrics, step=epoch)
            accuracy = metrics["val_accuracy"]
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return accuracy

    # Running trials count as well: otherwise a process that runs out of cells would train those of another again.
    counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    count = len(task.optimizers) * len(task.activations) * len(task.seeds)
    study.optimize(mlflc.track_in_mlflow()(objective), callbacks=[mlflc, MaxTrialsCallback(count, counted)])


def main() -> int:
    """Create the study and run it in one process per slot."""
    task = read_task()
    storage = JournalStorage(JournalFileBackend(JOURNAL))
    study = optuna.create_study(study_name=STUDY, storage=storage, direction="maximize")
    ready = multiprocessing.Event()
    workers = [multiprocessing.Process(target=work, args=(task, ready), daemon=True) for _ in range(task.slots)]
    for worker in workers:
        worker.start()
    mlflow.set_tracking_uri(task.store)
    mlflow.create_experiment(STUDY)  # once, before the processes race to create the database
    ready.set()
    for worker in workers:
        worker.join()
    print("best:", study.best_params, study.best_value)
    return max(abs(worker.exitcode or 0) for worker in workers)


if __name__ == "__main__":
    sys.exit(main())
