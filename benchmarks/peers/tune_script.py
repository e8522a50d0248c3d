"""A grid in Ray Tune, written as its documentation recommends: function trainable, grid_search, ASHA, MLflow callback.

After "Using PyTorch with Tune" and "Using MLflow with Tune" (docs.ray.io), without their checkpoints, which cost time.
"""

import sys
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.schedulers import ASHAScheduler

from benchmarks.peers.common import OPTIMIZERS, Task, build_net, load_data, read_task, run_epoch


def train_net(config: dict[str, Any], task: Task) -> None:
    """Train one trial until it ends or Tune stops it."""
    torch.manual_seed(config["seed"])
    train, val, classes = load_data(task)
    net = build_net(task.model, config["activation"], classes)
    optimizer = OPTIMIZERS[config["optimizer"]](net.parameters())
    for _ in range(task.epochs):
        tune.report(run_epoch(net, optimizer, train, val))


def main() -> int:
    """Run the grid and return the exit code: 1 if a trial failed."""
    task = read_task()
    ray.init(address="local", num_cpus=task.slots)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(train_net, task=task), {"cpu": 1}),
        param_space={
            "optimizer": tune.grid_search(list(task.optimizers)),
            "activation": tune.grid_search(list(task.activations)),
            "seed": tune.grid_search(list(task.seeds)),
        },
        tune_config=tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            scheduler=ASHAScheduler(
                time_attr="training_iteration", max_t=task.epochs, grace_period=1, reduction_factor=3
            ),
        ),
        run_config=tune.RunConfig(
            name="grid",
            storage_path=str(Path("ray_results").absolute()),
            callbacks=[MLflowLoggerCallback(tracking_uri=task.store, experiment_name="grid")],
        ),
    )
    results = tuner.fit()
    best = results.get_best_result()
    print("best:", best.config, best.metrics)
    return 1 if results.errors else 0


if __name__ == "__main__":
    sys.exit(main())
