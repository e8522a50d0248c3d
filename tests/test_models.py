import pytest
import torch
from torch import nn

from grid.config import InputError, TrialConfig
from grid.parts.registry import MODELS
from grid.train.trial import assemble_net
from nets.dropout import SeededDropout

SMALL = {"learning_rate": 0.1, "epochs": 1, "hidden_sizes": "24-16", "channels": "4-6", "dense_size": 16}


def net(model: str, **changes: object) -> nn.Module:
    config = TrialConfig(**{"model": model, **SMALL, **changes})
    return assemble_net(config, image_shape=(1, 12, 12), classes=5, dropout=torch.Generator().manual_seed(0))


def images() -> torch.Tensor:
    return torch.randn(7, 1, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model", MODELS)
def test_a_net_yields_one_logit_per_class(model):
    assert net(model, batch_norm=True, dropout=True)(images()).shape == (7, 5)


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 9, 20), (4, 20, 9)])
@pytest.mark.parametrize("model", MODELS)
def test_images_may_have_any_number_of_channels_and_any_shape(model, shape):
    config = TrialConfig(model=model, **SMALL)
    built = assemble_net(config, image_shape=shape, classes=5, dropout=torch.Generator())
    assert built(torch.zeros(7, *shape)).shape == (7, 5)


@pytest.mark.parametrize("model", MODELS)
def test_the_seed_alone_decides_the_weights(model):
    torch.manual_seed(1)
    first = net(model).state_dict()
    torch.manual_seed(2)
    again, other = net(model).state_dict(), net(model, seed=1).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("model", MODELS)
def test_building_a_net_leaves_the_global_generator_alone(model):
    state = torch.get_rng_state()
    net(model, batch_norm=True, dropout=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_techniques_are_built_in_only_where_they_are_on(model):
    for on in (False, True):
        kinds = {type(module) for module in net(model, activation="tanh", batch_norm=on, dropout=on).modules()}
        assert nn.Tanh in kinds
        assert bool(kinds & {nn.BatchNorm1d, nn.BatchNorm2d}) == (SeededDropout in kinds) == on


def test_layers_of_torch_are_drawn_by_the_seed_too(monkeypatch):
    monkeypatch.setitem(MODELS, "mlp", lambda config, spec: nn.Linear(spec.image_shape[-1], spec.classes))
    weights = [net("mlp", seed=seed).weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("factor", ["activation", "model"])
def test_an_unknown_level_is_an_error_and_no_other_net(factor):
    with pytest.raises(InputError, match=f"unknown {factor} 'ghost'; choose from .*--parts"):
        net(**{"model": "mlp", factor: "ghost"})
