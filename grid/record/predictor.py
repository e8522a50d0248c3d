"""A trained net as MLflow serves it: images in, names of classes out.

This file is the model itself ("models from code"): MLflow runs it to get the reader, which builds the net from the code
shipped with it, and loads tensors and JSON. Nothing is pickled; a parts file that the net was trained with is run.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # a lock file in the working directory is not ours

import mlflow.pyfunc
import numpy as np
import torch
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature, set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from numpy.typing import NDArray
from torch import Tensor

import grid
import nets
from grid.config import InputError, TrialConfig
from grid.parts.files import PartsFile, imported_packages, loaded, using
from grid.train.trial import DeviceData, actions_of, assemble_net

MODEL_NAME = "character_reader"
BATCH_SIZE = 1000
"""Images classified at once; bounds the memory of a large request."""
PACKAGES = ("jaxtyping", "mlflow", "numpy", "torch")
"""Everything that a reader imports, through `nets` and the part of `grid` that it needs."""


class ImageClassifier(PythonModel):
    """Classifies images with a trained net, on the CPU and in float32, whatever it was trained with."""

    def load_context(self, context: PythonModelContext) -> None:
        """Build the net.

        Args:
            context: Holds the paths of `model.json` and of `weights.pt`.
        """
        settings = json.loads(Path(context.artifacts["model"]).read_text())
        config = TrialConfig.from_params(settings["config"])
        self._classes = np.array(settings["classes"])
        self._shape: tuple[int, int, int] = tuple(settings["image_shape"])
        self._mean: float = settings["mean"]
        self._std: float = settings["std"]
        shape, classes = self._shape, len(self._classes)
        with using([PartsFile(**file) for file in settings["parts"]]):
            self._actions = actions_of(replace(config, device="cpu"))
            self._net = assemble_net(config, image_shape=shape, classes=classes, dropout=torch.Generator())
        self._net.load_state_dict(torch.load(context.artifacts["weights"], map_location="cpu", weights_only=True))
        self._net.eval()

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,  # MLflow's annotation
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        """Classify images.

        Args:
            context: Unused.
            model_input: Images as those that it was trained on, such as upright and white (255) on black (0): uint8
                `[image, row, column]` or, of several channels, `[image, channel, row, column]`. One image may come
                without the first dimension.
            params: Unused.

        Returns:
            The name of a class per image.

        Raises:
            InputError: The images are of another shape or type.
        """
        images = torch.tensor(self._checked(model_input))
        with torch.inference_mode():
            batches = [self._read(batch) for batch in images.split(BATCH_SIZE)]
        return [str(name) for name in self._classes[torch.cat(batches).numpy()]]

    def _read(self, images: Tensor) -> Tensor:
        scaled = images.float().sub_(self._mean).div_(self._std)
        return self._actions.predict(self._net, scaled).argmax(dim=1)

    def _checked(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if images.dtype != np.uint8:
            raise InputError(f"pixels must be uint8, 0 (paper) to 255 (ink), got {images.dtype}; scale and round them")
        shape = _without_channel(self._shape)
        if images.ndim not in (len(shape), len(shape) + 1) or images.shape[-len(shape) :] != shape:
            sizes = ", ".join(map(str, shape))
            raise InputError(f"images must be of shape (n, {sizes}) or ({sizes}), got {images.shape}")
        return images.reshape(-1, *self._shape)


def _without_channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a grey image without its one channel, any other as it is."""
    return shape[1:] if shape[0] == 1 else shape


def log_predictor(
    client: MlflowClient,
    run_id: str,
    config: TrialConfig,
    weights: dict[str, Tensor],
    data: DeviceData,
    classes: Sequence[str],
    example: NDArray[np.uint8],
) -> str:
    """Log a trained net to a run, as its output; no tracking URI and no active run is set.

    Args:
        client: Of the store that the run is in.
        run_id: Of the run that trained or tested the net.
        config: What was trained.
        weights: `grid.train.evaluation.inference_state`.
        data: What it was trained with.
        classes: Their names, by label.
        example: A few images for whoever wants to try, uint8 `[image, row, column]`.

    Returns:
        Id of the logged model, which `models:/<id>` loads and `register` takes.
    """
    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, MODEL_NAME, source_run_id=run_id, params=config.to_params(), model_type="classifier"
    )
    card = Model(
        artifact_path=logged.artifact_location, run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id
    )
    try:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            save_predictor(folder, config, weights, data, classes, example, card)
            client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=config.epochs)])
    return str(logged.model_id)


def forget_models(client: MlflowClient, run_id: str) -> None:
    """Delete the models of a run, such as a command that died before it was done has left."""
    experiment_id = client.get_run(run_id).info.experiment_id
    for left in client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'"):
        client.delete_logged_model(left.model_id)


def register(client: MlflowClient, model_id: str, name: str) -> int:
    """Make a logged model a version of a registered model, which is made if missing; the newest, unless it is one.

    Args:
        client: Of the store that the model is in.
        model_id: As `log_predictor` returned it.
        name: Of the registered model; `models:/NAME/VERSION` loads it.

    Returns:
        The version, from 1.
    """
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    logged = client.get_logged_model(model_id)
    versions = json.loads(logged.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    for known in versions:
        if known["name"] == name:
            return int(known["version"])
    # Not models:/<id>, which a database store would look up by the global tracking URI instead of its own.
    made = client.create_model_version(name, logged.artifact_location, run_id=logged.source_run_id, model_id=model_id)
    versions.append({"name": name, "version": made.version})
    client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(versions)})  # the UI's link
    return int(made.version)


def save_predictor(
    folder: Path,
    config: TrialConfig,
    weights: dict[str, Tensor],
    data: DeviceData,
    classes: Sequence[str],
    example: NDArray[np.uint8],
    card: Model | None = None,
) -> None:
    """Write a trained net as an MLflow model, which `mlflow.pyfunc.load_model` loads.

    Args:
        folder: Where to; it does not exist.
        config: What was trained.
        weights: `grid.train.evaluation.inference_state`.
        data: What it was trained with.
        classes: Their names, by label.
        example: A few images for whoever wants to try, uint8, as for `ImageClassifier.predict`.
        card: What MLflow is to know of the model, besides what is added here.
    """
    settings = {
        "config": config.to_params(),
        "classes": list(classes),
        "image_shape": list(data.image_shape),
        "mean": data.mean,
        "std": data.std,
        "parts": [asdict(file) for file in loaded()],
    }
    with tempfile.TemporaryDirectory() as parent:
        weights_file, settings_file = Path(parent) / "weights.pt", Path(parent) / "model.json"
        torch.save(weights, weights_file)
        settings_file.write_text(json.dumps(settings, indent=1))
        mlflow.pyfunc.save_model(
            folder,
            python_model=__file__,
            artifacts={"weights": str(weights_file), "model": str(settings_file)},
            code_paths=[str(Path(str(package.__file__)).parent) for package in (grid, nets)],
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *_without_channel(data.image_shape)))]),
                outputs=Schema([ColSpec("string")]),
            ),
            input_example=example,
            pip_requirements=[
                f"{name}=={version(name).split('+')[0]}" for name in sorted({*PACKAGES, *imported_packages(loaded())})
            ],
            mlflow_model=card,
        )


set_model(ImageClassifier())
