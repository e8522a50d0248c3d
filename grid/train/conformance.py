"""What a part must do so that its trials can be trusted, tried on small trainings; `grid.check` prints the findings."""

import io
import random
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from grid.config import SETTINGS, InputError, TrialConfig
from grid.parts.registry import ACTIVATIONS, LEVELS, OPTIMIZERS
from grid.train.techniques.optimizers import base_learning_rate
from grid.train.trial import DeviceData, Trial
from grid.wording import first_line

IMAGES, VAL_IMAGES, EPOCHS = 128, 32, 2
SMALL = {"hidden_sizes": "24-16", "channels": "4-6", "dense_size": "12", "batch_size": "32", "epochs": str(EPOCHS)}
POINTS = torch.linspace(-10, 10, 4001, dtype=torch.float64)
GENTLE = 0.1
"""Factor on base learning rates: what is tried is the code, not the rate."""
FLAT = 1e-12
"""Differences of a monotonic function that are rounding errors."""
TECHNIQUES = {"activation": "tanh", "batch_norm": "on", "dropout": "on"}
"""What a net is expected to use, with a level that is not the default."""


@dataclass(frozen=True)
class Finding:
    """What was found wrong with a part, or is worth knowing."""

    part: str
    """Kind and name."""
    text: str
    is_fault: bool = True


def examine(part: str, image_shape: tuple[int, int, int], classes: int) -> Iterator[Finding]:
    """Yield what is wrong with one part.

    Args:
        part: Its kind and name, as in `grid.parts.registry.ORIGINS`.
        image_shape: Channels, height and width of the images to try it on.
        classes: Number of classes.
    """
    kind, _, name = part.partition(" ")
    data = random_images(image_shape, classes)
    if kind == "activation":
        yield from (Finding(part, problem) for problem in _activation_problems(name))
    for config in _configurations(kind, name):
        for problem in _problems(config, data):
            yield Finding(part, f"{problem} (model {config.model})")
            return  # the others follow from the first
    if kind == "factor":
        yield from (Finding(part, problem) for problem in _idle_levels(name, data))
    if kind == "model":
        yield from (Finding(part, remark, is_fault=False) for remark in _unused_techniques(name, data))


def random_images(image_shape: tuple[int, int, int], classes: int) -> DeviceData:
    """Return random images whose mean depends on their class a little, so that there is something to learn."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES + VAL_IMAGES) % classes
    images = torch.randint(0, 156, (len(labels), *image_shape), generator=draws)
    pixels = (images + labels.view(-1, 1, 1, 1) % 100).to(torch.uint8)
    return DeviceData(pixels[:IMAGES], labels[:IMAGES], pixels[IMAGES:], labels[IMAGES:], classes, mean=128.0, std=50.0)


def _configurations(kind: str, name: str) -> list[TrialConfig]:
    if kind == "model":
        return [_config(model=name, **{factor: level}) for factor, level in [("dropout", "off"), *TECHNIQUES.items()]]
    if kind == "activation":  # with a norm, as many that grow need one
        return [_config(model=model, activation=name, batch_norm="on") for model in ("mlp", "cnn")]
    if kind in ("lr_schedule", "optimizer", "regularization"):
        return [_config(model=model, **{kind: name}) for model in ("mlp", "cnn")]
    if kind == "factor":
        pairs = [(level, model) for level in LEVELS[name][1:] for model in ("mlp", "cnn")]
        return [_config(model=model, regularization="elastic", **{name: level}) for level, model in pairs]
    return [_config(**{name: SETTINGS[name]})] if kind == "setting" else []


def _config(**levels: str) -> TrialConfig:
    params = {"optimizer": "sgd", "learning_rate": "1", **SMALL, **levels}
    rate = base_learning_rate(params) if params["optimizer"] in OPTIMIZERS else 0.01
    return TrialConfig.from_params({**params, "learning_rate": repr(GENTLE * rate)})


def _problems(config: TrialConfig, data: DeviceData) -> Iterator[str]:
    """Yield what is wrong with the training of a configuration, the first cause first."""
    try:
        yield from _static_problems(Trial(config, data), data)
        first, again = (_train(config, data, seed=1) for _ in range(2))
        if not _all_finite(first):
            yield "the loss is not finite after two epochs; lower the learning rate, or look for a division by zero"
        if first != again:
            yield "two trainings of one trial differ; draw from the generators that are given, from nothing else"
        if first != _train(config, data, seed=2):
            yield "draws from global random state (torch, numpy or random); draw from the generators that are given"
        if first != _train(config, data, seed=1, resumed=True):
            yield (
                "a training that was saved after an epoch and resumed goes on differently; "
                "keep state in parameters, buffers or the optimizer, not in Python objects"
            )
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever the user's code raises)
        yield _describe(error)


def _static_problems(trial: Trial, data: DeviceData) -> Iterator[str]:
    for count in (1, 3):
        with trial.evaluating():
            logits = trial.logits(data.val_images[:count])
        if logits.shape != (count, data.classes):
            yield f"returns {tuple(logits.shape)} for {count} images of {data.classes} classes; return one row each"
            return
    if shared := _shared(trial.net):
        yield f"layers {' and '.join(shared)} share one module with weights; build a module for each"


def _shared(net: nn.Module) -> list[str]:
    """Return the names of the first module with parameters of its own that a net has at several places."""
    places: dict[int, list[str]] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        if any(True for _ in module.parameters(recurse=False)):
            places.setdefault(id(module), []).append(name)
    return next((names for names in places.values() if len(names) > 1), [])


Outcome = tuple[tuple[str, bytes], ...]
"""Losses and weights, comparable bit by bit."""


def _train(config: TrialConfig, data: DeviceData, *, seed: int, resumed: bool = False) -> Outcome:
    """Train a configuration with some global random state, in one go or saved and resumed after the first epoch."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    trial = Trial(config, data)
    losses = [_loss(trial)]
    if resumed:
        saved = io.BytesIO()
        torch.save(trial.state_dict(), saved)
        saved.seek(0)
        trial = Trial(config, data)
        trial.load_state_dict(torch.load(saved, weights_only=True))
    losses.append(_loss(trial))
    weights = [(name, _bits(value)) for name, value in trial.net.state_dict().items()]
    return (("losses", np.array(losses).tobytes()), *weights)


def _loss(trial: Trial) -> float:
    return trial.run_epoch().val_loss


def _bits(value: object) -> bytes:
    return value.detach().cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()


def _all_finite(outcome: Outcome) -> bool:
    return bool(np.isfinite(np.frombuffer(outcome[0][1])).all())


def _idle_levels(name: str, data: DeviceData) -> Iterator[str]:
    """Yield the levels of a factor with which a training ends as with the first one."""
    for model in ("mlp", "cnn"):
        outcomes = {
            level: _train(replace(_config(model=model, **{name: level}), shared_seed=True), data, seed=1)
            for level in LEVELS[name]
        }
        first, *others = LEVELS[name]
        for level in others:
            if outcomes[level] == outcomes[first]:
                yield f"level {level} changes nothing in the {model}; only the first level, {first}, may do nothing"
                return


def _unused_techniques(name: str, data: DeviceData) -> Iterator[str]:
    plain = _train(replace(_config(model=name), shared_seed=True), data, seed=1)
    for factor, level in TECHNIQUES.items():
        if _train(replace(_config(model=name, **{factor: level}), shared_seed=True), data, seed=1) == plain:
            held = LEVELS[factor][0]
            yield f"{factor} changes nothing: use spec.techniques, or hold it by --only {factor}={held}"


def _activation_problems(name: str) -> Iterator[str]:
    spec = ACTIVATIONS[name]
    try:
        if spec.build() is spec.build():
            yield "all layers share one module; decorate the class, or a function that builds a new one at each call"
            return
        activation = spec.build().double()
        with torch.no_grad():
            slopes = activation(POINTS).diff()
    except Exception as error:  # noqa: BLE001  (whatever the user's code raises)
        yield _describe(error)
        return
    learns = any(True for _ in activation.parameters())
    falls = (slopes < -FLAT).nonzero()
    rises = (slopes > FLAT).nonzero()
    if spec.shape == "rising" and (len(falls) or learns):
        why = f"it falls at {POINTS[falls[0]].item():.2g}" if len(falls) else "it has parameters, so that it may fall"
        yield f"shape='rising' is wrong, as {why}; leave shape out"
    if spec.shape == "falling_then_rising" and len(falls) and len(rises) and falls[-1] > rises[0]:
        yield "shape='falling_then_rising' is wrong, as it falls again after it has risen; leave shape out"


def _describe(error: Exception) -> str:
    """Return an error of a user's code, and the line of it."""
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/" not in frame.filename and frame.filename.endswith(".py")]
    where = f"line {own[-1].lineno}: " if own else ""
    return f"{where}{type(error).__name__}: {first_line(error)}"
