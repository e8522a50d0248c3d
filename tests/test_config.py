import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.config import (
    DEFAULTS,
    FACTORS,
    GIVEN_OTHERWISE,
    OWN,
    SETTINGS,
    InputError,
    Own,
    TrialConfig,
    cell_name,
    changed_settings,
    parse_sizes,
)
from grid.parts import LEVELS
from grid.parts.registry import check_level

levels = st.fixed_dictionaries({factor: st.sampled_from(names) for factor, names in LEVELS.items()})
configs = st.builds(
    lambda cell, seed, scale, rate, epochs: TrialConfig.from_params(
        {**cell, "seed": str(seed), "lr_scale": repr(scale), "learning_rate": repr(rate), "epochs": str(epochs)}
    ),
    levels,
    st.integers(0, 10**9),
    st.floats(1e-6, 1e6),
    st.floats(1e-12, 1e3),
    st.integers(1, 10**6),
)

plain = TrialConfig(learning_rate=1e-3, epochs=3)


@given(configs)
def test_params_and_back_is_the_same_trial(config: TrialConfig) -> None:
    assert TrialConfig.from_params(config.to_params()) == config


@given(configs)
def test_params_are_strings_that_mlflow_takes(config: TrialConfig) -> None:
    assert all(isinstance(value, str) and len(value) < 500 for value in config.to_params().values())


@pytest.mark.parametrize("name", [field.name for field in fields(TrialConfig)])
def test_every_field_changes_the_trial_key(name: str) -> None:
    other = {
        "model": "cnn",
        "lr_schedule": "step",
        "activation": "elu",
        "optimizer": "sgd",
        "regularization": "l1",
        "precision": "bfloat16",
        "memory_format": "channels_last",
        "device": "cuda",
        "hidden_sizes": "8",
        "channels": "8",
        "initialization": "he",
        "own": (Own("smoothing", "0.1", "off"),),
    }
    value = getattr(plain, name)
    changed = other.get(name, not value if isinstance(value, bool) else f"{value}x" if value == "" else None)
    if changed is None:
        changed = value + 1 if isinstance(value, int) else value / 2
    assert replace(plain, **{name: changed}).trial_key != plain.trial_key


@pytest.mark.parametrize(
    ("config", "trial_key", "cell_key"),
    [
        (plain, "b8c5625b3c12f4e2", "8fdb9b0534c4ff33"),
        (
            TrialConfig(
                model="cnn",
                lr_schedule="one_cycle",
                activation="gelu",
                optimizer="adamw",
                batch_norm=True,
                regularization="l1",
                dropout=True,
                seed=3,
                lr_scale=0.5,
                learning_rate=0.002,
                epochs=27,
                device="cuda",
                precision="bfloat16",
                memory_format="channels_last",
                fused=True,
                data="emnist-balanced",
                data_fingerprint="0123456789abcdef",
            ),
            "d589157388a9bbb8",
            "e5069cf944f7ff82",
        ),
    ],
)
def test_keys_are_those_of_the_first_stores_with_this_version_of_the_numbers(
    config: TrialConfig, trial_key: str, cell_key: str
) -> None:
    assert (config.trial_key, config.cell_key) == (trial_key, cell_key)


def test_runs_from_before_a_setting_existed_are_those_with_its_default() -> None:
    old = {name: value for name, value in plain.to_params().items() if name not in DEFAULTS}
    assert set(DEFAULTS) == {
        *("momentum", "beta1", "beta2", "rmsprop_decay", "weight_decay"),
        *("final_share", "warmup_share", "plateau_factor", "plateau_patience"),
    }
    assert TrialConfig.from_params(old) == plain


def test_only_settings_that_differ_from_their_defaults_count() -> None:
    assert changed_settings({"momentum": "0.90", "batch_size": "0256"}) == {"batch_size": "256"}


def test_every_field_is_a_factor_or_a_setting_or_decided_otherwise() -> None:
    assert {*FACTORS, *SETTINGS, *GIVEN_OTHERWISE} - OWN.keys() == {field.name for field in fields(TrialConfig)}
    for name in GIVEN_OTHERWISE:
        with pytest.raises(InputError, match=f"^{name} can't be set: "):
            changed_settings({name: getattr(plain, name)})


def test_the_cell_key_is_shared_by_replicates_and_nuisance_levels() -> None:
    assert replace(plain, seed=7, lr_scale=0.5, learning_rate=2.0).cell_key == plain.cell_key
    assert replace(plain, batch_norm=True).cell_key != plain.cell_key


def test_switches_are_spelled_on_and_off() -> None:
    params = replace(plain, batch_norm=True).to_params()
    assert (params["batch_norm"], params["dropout"]) == ("on", "off")


def test_a_cell_is_named_by_its_levels() -> None:
    assert cell_name(replace(plain, dropout=True, regularization="l2").cell) == "mlp constant relu adam l2 dropout"
    small = {"hidden_sizes": "16", "channels": "8-16-32"}  # an MLP has no channels
    assert cell_name({**plain.cell, **small}) == "mlp constant relu adam hidden_sizes=16"


def test_a_name_tells_seed_and_learning_rate_scale() -> None:
    assert replace(plain, seed=2, lr_scale=0.5).name.endswith("seed=2 lr x0.5")


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(
        InputError, match=r"epochs must be 1 or more, got 0; .*precision must be float32 or bfloat16 or tf32"
    ):
        replace(plain, precision="float8", epochs=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("lr_scale", 0.0),
        ("lr_scale", float("inf")),
        ("learning_rate", float("nan")),
        ("epochs", 0),
        ("batch_size", 1),
        ("dropout_rate", 0.0),
        ("dropout_rate", 1.0),
        ("l1_strength", -1.0),
        ("l2_strength", -1.0),
        ("hidden_sizes", "512-"),
        ("channels", "0"),
        ("dense_size", 0),
        ("device", "tpu"),
        ("precision", "float8"),
        ("memory_format", "rows"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(name: str, value: float | str) -> None:
    with pytest.raises(InputError, match=f"^{name} must be "):
        replace(plain, **{name: value})


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [("epochs", "many", "a whole number"), ("lr_scale", "big", "a number"), ("dropout", "true", "on or off")],
)
def test_a_parameter_of_another_type_is_refused(name: str, text: str, wanted: str) -> None:
    with pytest.raises(InputError, match=f"^{name} must be {wanted}, got '{text}'$"):
        TrialConfig.from_params({**plain.to_params(), name: text})


def test_parameters_without_a_learning_rate_are_refused() -> None:
    with pytest.raises(InputError, match="^a trial needs learning_rate and epochs$"):
        TrialConfig.from_params({"model": "mlp"})


def test_parameters_that_are_no_field_are_passed_over() -> None:
    assert TrialConfig.from_params({**plain.to_params(), "colour": "red"}) == plain


def test_an_unknown_factor_is_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match=re.escape(f"unknown factor 'x'; choose from {', '.join(sorted(LEVELS))}")):
        check_level("x", "y")


def test_sizes_are_parsed() -> None:
    assert parse_sizes("512-256") == (512, 256)


def test_the_configuration_needs_the_standard_library_alone() -> None:
    code = "import sys, grid.config; sys.exit(bool({'torch', 'ray', 'mlflow', 'numpy', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
