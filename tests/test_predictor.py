import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import torch
from mlflow.models import Model

from grid.config import InputError, TrialConfig
from grid.record import predictor
from grid.record.predictor import ImageClassifier, forget_models, log_predictor, register, save_predictor
from grid.train.evaluation import inference_state
from grid.train.trial import DeviceData, Trial

CLASSES = tuple("0123Abcd")
CONFIG = TrialConfig(
    model="cnn", channels="4-6", dense_size=16, optimizer="asgd", batch_norm=True, learning_rate=0.05, epochs=2
)
READ_IN_A_FRESH_PROCESS = """
import json, sys
import mlflow, numpy
uri, model, images = sys.argv[1:]
mlflow.set_tracking_uri(uri)
reader = mlflow.pyfunc.load_model(model)
characters = reader.predict(numpy.load(images))
import grid, nets
heavy = sorted({"matplotlib", "PIL", "ray", "torchvision"} & set(sys.modules))
print(json.dumps([characters, reader.input_example.shape, [grid.__file__, nets.__file__], heavy]))
"""


@pytest.fixture(scope="module")
def trial() -> Trial:
    """A small net trained with averaging, so that its last weights are not those that it reads with."""
    rng = np.random.default_rng(0)
    images = torch.tensor(rng.integers(0, 256, (128, 1, 28, 28), dtype=np.uint8))
    labels = torch.tensor(rng.integers(0, len(CLASSES), 128))
    trial = Trial(CONFIG, DeviceData(images, labels, images, labels, len(CLASSES), mean=127.0, std=70.0))
    trial.run_epoch()
    trial.run_epoch()
    return trial


@pytest.fixture(scope="module")
def images(trial) -> np.ndarray:
    return trial.data.val_images.squeeze(1).numpy()


@pytest.fixture(scope="module")
def expected(trial) -> list[str]:
    with trial.evaluating():
        return [CLASSES[label] for label in trial.logits(trial.data.val_images).argmax(dim=1)]


def belongings(trial: Trial, config: TrialConfig = CONFIG) -> tuple:
    """Return what a writer asks for, in its order."""
    weights = inference_state(CONFIG, trial.state_dict(), trial.data)
    return config, weights, trial.data, CLASSES, trial.data.val_images[:3].squeeze(1).numpy()


@pytest.fixture(scope="module")
def folder(trial, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_predictor(folder, *belongings(trial))
    return folder


def open_reader(folder: Path) -> ImageClassifier:
    reader, artifacts = ImageClassifier(), folder / "artifacts"
    paths = {"model": str(artifacts / "model.json"), "weights": str(artifacts / "weights.pt")}
    reader.load_context(SimpleNamespace(artifacts=paths))
    return reader


@pytest.fixture(scope="module")
def reader(folder) -> ImageClassifier:
    return open_reader(folder)


@pytest.fixture
def run_id(store) -> str:
    return str(store.client.create_run(store.experiment_id).info.run_id)


def read_elsewhere(store_uri: str, model: str, images: np.ndarray, folder: Path) -> list:
    """Return what a process without this checkout's path reads in images."""
    np.save(folder / "images.npy", images)
    command = [sys.executable, "-c", READ_IN_A_FRESH_PROCESS, store_uri, model, str(folder / "images.npy")]
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    answer = subprocess.run(command, cwd=folder, env=variables, check=True, capture_output=True, text=True, timeout=900)
    return json.loads(answer.stdout.splitlines()[-1])


def test_a_registered_model_is_read_by_its_own_code(store, run_id, trial, images, expected, tmp_path):
    model_id = log_predictor(store.client, run_id, *belongings(trial))
    assert register(store.client, model_id, "reader") == 1
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    characters, example, files, heavy = read_elsewhere(store.uri, "models:/reader/1", images, elsewhere)
    assert characters == expected
    assert len(set(characters)) > 1
    assert example == [3, 28, 28]
    assert all(f"{model_id}/artifacts/code" in file for file in files)
    assert heavy == []


def test_a_model_reads_with_the_averages_and_the_shifts_that_it_was_tested_with(trial, images, tmp_path):
    levels = {"weight_averaging": "ema", "test_time_shifts": "on", "augmentation": "elastic", "mixup": "on"}
    config = TrialConfig.from_params({**replace(CONFIG, optimizer="adam").to_params(), **levels})
    other = Trial(config, trial.data)
    other.run_epoch()
    weights = inference_state(config, other.state_dict(), other.data)
    save_predictor(tmp_path / "model", config, weights, other.data, CLASSES, images[:3])
    with other.evaluating():
        expected = [CLASSES[label] for label in other.logits(other.data.val_images).argmax(dim=1)]
        plain = [CLASSES[label] for label in other._logits(other._scaled(other.data.val_images)).argmax(dim=1)]
    assert expected != plain
    assert read_elsewhere("", str(tmp_path / "model"), images, tmp_path)[0] == expected


def test_a_logged_model_is_an_output_of_its_run(store, run_id, trial):
    model_id = log_predictor(store.client, run_id, *belongings(trial))
    assert [output.model_id for output in store.client.get_run(run_id).outputs.model_outputs] == [model_id]
    logged = store.client.get_logged_model(model_id)
    assert (logged.status, logged.source_run_id, logged.params) == ("READY", run_id, CONFIG.to_params())


def test_logging_leaves_no_trace_in_the_process(store, run_id, trial, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri(), dict(os.environ), sys.path.copy(), set(tmp_path.iterdir())
    register(store.client, log_predictor(store.client, run_id, *belongings(trial)), "reader")
    files = set(tmp_path.iterdir()) - {tmp_path / "mlartifacts"}
    assert (mlflow.get_tracking_uri(), dict(os.environ), sys.path, files) == before
    assert mlflow.active_run() is None


def test_a_model_that_did_not_arrive_is_marked_as_failed(store, run_id, trial, monkeypatch):
    def refuse(model_id: str, folder: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(store.client, "log_model_artifacts", refuse)
    with pytest.raises(OSError, match="no space left"):
        log_predictor(store.client, run_id, *belongings(trial))
    (logged,) = store.client.search_logged_models([store.experiment_id])
    assert logged.status == "FAILED"
    assert not store.client.get_run(run_id).outputs.model_outputs


def test_what_a_dead_command_left_is_forgotten(store, run_id, trial):
    other = store.client.create_run(store.experiment_id).info.run_id
    for each in (run_id, other):
        log_predictor(store.client, each, *belongings(trial))
    forget_models(store.client, run_id)
    (kept,) = store.client.search_logged_models([store.experiment_id])
    assert kept.source_run_id == other


def test_another_model_of_one_name_is_another_version(store, run_id, trial):
    ids = [log_predictor(store.client, run_id, *belongings(trial)) for _ in range(2)]
    assert [register(store.client, model_id, "reader") for model_id in ids] == [1, 2]
    for version, model_id in enumerate(ids, start=1):
        assert model_id in store.client.get_model_version("reader", str(version)).source
    assert json.loads(store.client.get_logged_model(ids[1]).tags["mlflow.modelVersions"]) == [
        {"name": "reader", "version": 2}
    ]


def test_a_model_is_tensors_json_and_code_but_no_pickle(folder):
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "predictor.py", "weights.pt", "model.json", "cnn.py", "trial.py"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pyc"))]


def test_a_model_asks_for_the_running_versions_of_what_it_imports(folder):
    wanted = dict(line.split("==") for line in (folder / "requirements.txt").read_text().splitlines())
    assert list(wanted) == ["jaxtyping", "mlflow", "numpy", "torch"]
    assert wanted["numpy"] == np.__version__
    assert wanted["torch"] == torch.__version__.split("+")[0]


def test_the_signature_is_images_in_and_characters_out(folder):
    signature = Model.load(str(folder)).signature
    assert [(spec.type, spec.shape) for spec in signature.inputs] == [(np.uint8, (-1, 28, 28))]
    assert signature.outputs.to_dict() == [{"type": "string", "required": True}]


def test_a_reader_reads_what_the_net_reads(reader, images, expected):
    assert reader.predict(None, images) == expected


def test_a_reader_reads_a_single_image_and_none(reader, images, expected):
    assert reader.predict(None, images[5]) == [expected[5]]
    assert reader.predict(None, images[:0]) == []


def test_a_large_request_is_read_in_parts(reader, images, expected, monkeypatch):
    monkeypatch.setattr(predictor, "BATCH_SIZE", 50)
    assert reader.predict(None, images) == expected


def test_a_net_that_was_trained_on_a_gpu_reads_on_a_cpu(trial, images, expected, tmp_path):
    config = replace(CONFIG, device="cuda", precision="bfloat16", memory_format="channels_last", fused=True)
    save_predictor(tmp_path / "model", *belongings(trial, config))
    assert open_reader(tmp_path / "model").predict(None, images) == expected


@pytest.mark.parametrize("shape", [(28,), (4, 27, 28), (4, 1, 28, 28), (784, 28)])
def test_images_of_another_shape_are_refused(reader, shape):
    with pytest.raises(InputError, match=r"^images must be of shape \(n, 28, 28\) or \(28, 28\), got \(.*\)$"):
        reader.predict(None, np.zeros(shape, np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_pixels_of_another_type_are_refused(reader, dtype):
    with pytest.raises(InputError, match=f"^pixels must be uint8, .*, got {dtype}; scale and round them$"):
        reader.predict(None, np.zeros((2, 28, 28), dtype))


def test_a_reader_of_images_in_colour_takes_their_channels(tmp_path):
    rng = np.random.default_rng(0)
    images = torch.tensor(rng.integers(0, 256, (64, 3, 10, 14), dtype=np.uint8))
    labels = torch.tensor(rng.integers(0, len(CLASSES), 64))
    config = replace(CONFIG, epochs=1)
    trial = Trial(config, DeviceData(images, labels, images, labels, len(CLASSES), mean=127.0, std=70.0))
    trial.run_epoch()
    weights = inference_state(config, trial.state_dict(), trial.data)
    save_predictor(tmp_path / "model", config, weights, trial.data, CLASSES, images[:2].numpy())
    reader = open_reader(tmp_path / "model")
    with trial.evaluating():
        expected = [CLASSES[label] for label in trial.logits(images).argmax(dim=1)]
    assert reader.predict(None, images.numpy()) == expected
    assert reader.predict(None, images[0].numpy()) == expected[:1]
    with pytest.raises(InputError, match=r"must be of shape \(n, 3, 10, 14\) or \(3, 10, 14\), got \(64, 10, 14\)"):
        reader.predict(None, images[:, 0].numpy())
