import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.config import InputError
from grid.data.catalogue import NAMES
from grid.data.dataset import Dataset
from grid.data.glyphs import CLASSES
from grid.data.load import load, load_test, split_indices
from grid.parts.registry import DATASETS
from tests.small_emnist import (
    BALANCED,
    TEST_PER_CLASS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    TRAIN_PER_CLASS,
    made_files,
    write_files,
)


def stored_images(name: str = TRAIN_IMAGES) -> np.ndarray:
    return np.frombuffer(BALANCED[name], np.uint8, offset=16).reshape(-1, 28, 28)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_files(tmp_path, BALANCED)


@pytest.fixture
def raw(data_dir: Path) -> Path:
    return data_dir / "EMNIST" / "raw"


def test_shapes_and_types_are_as_documented(data_dir: Path) -> None:
    data = load("emnist-balanced", data_dir)
    assert data.train_images.shape == (47 * 10, 28, 28)
    assert data.val_images.shape == (47 * 2, 28, 28)
    assert data.train_images.dtype == data.val_images.dtype == np.uint8
    assert data.train_labels.dtype == data.val_labels.dtype == np.int64
    assert data.classes == CLASSES


def test_images_are_upright_and_keep_their_labels(data_dir: Path) -> None:
    data = load("emnist-balanced", data_dir)
    train, val = split_indices(np.tile(np.arange(47), TRAIN_PER_CLASS), 47)
    upright = stored_images().transpose(0, 2, 1)
    np.testing.assert_array_equal(data.train_images, upright[train])
    np.testing.assert_array_equal(data.val_images, upright[val])
    np.testing.assert_array_equal(data.train_labels, train % 47)


def test_test_set_is_the_whole_test_file(data_dir: Path) -> None:
    images, labels = load_test("emnist-balanced", data_dir)
    expected = stored_images("emnist-balanced-test-images-idx3-ubyte").transpose(0, 2, 1)
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(labels, np.tile(np.arange(47), TEST_PER_CLASS))


def test_letters_count_from_zero_without_the_empty_class(tmp_path: Path) -> None:
    data = load("emnist-letters", write_files(tmp_path, made_files("letters", 26, first_label=1)))
    assert data.classes == tuple("abcdefghijklmnopqrstuvwxyz")
    assert set(data.train_labels) == set(data.val_labels) == set(range(26))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("emnist")])
def test_every_emnist_loads_with_its_published_classes(name: str, tmp_path: Path) -> None:
    spec = DATASETS[name].sizes
    first_label = 1 if name == "emnist-letters" else 0
    data = load(name, write_files(tmp_path, made_files(name.removeprefix("emnist-"), spec.class_count, first_label)))
    assert len(data.classes) == spec.class_count
    assert len(data.val_labels) == 2 * spec.class_count


def test_files_are_read_without_write_permission(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    before = sorted(data_dir.rglob("*"))
    load("emnist-balanced", data_dir)
    assert sorted(data_dir.rglob("*")) == before


def test_a_data_set_survives_pickling(data_dir: Path) -> None:
    data = load("emnist-balanced", data_dir)
    unpickled = pickle.loads(pickle.dumps(data))
    assert isinstance(unpickled, Dataset)
    np.testing.assert_array_equal(unpickled.train_images, data.train_images)


def test_glyphs_have_their_published_sizes(tmp_path: Path) -> None:
    spec = DATASETS["glyphs"].sizes
    data = load("glyphs", tmp_path)
    assert len(data.train_labels) + len(data.val_labels) == spec.train_size
    assert (len(data.train_labels), len(data.val_labels)) == spec.split_sizes()
    assert len(load_test("glyphs", tmp_path)[1]) == spec.test_size
    assert data.classes == CLASSES
    assert ink_above(data, "T") > ink_above(data, "L")


def ink_above(data: Dataset, label: str) -> float:
    """Return the share of a class's ink that lies in the upper half."""
    ink = data.train_images[data.train_labels == data.classes.index(label)].mean(axis=0)
    return float(ink[:14].sum() / ink.sum())


def test_fingerprint_is_the_same_for_the_same_data(data_dir: Path) -> None:
    prints = {load("emnist-balanced", data_dir).fingerprint for _ in range(2)}
    assert len(prints) == 1
    assert len(prints.pop()) == 16


def test_fingerprint_changes_with_seed_and_subset(data_dir: Path) -> None:
    settings = [{}, {"split_seed": 1}, {"per_class": 3}, {"per_class": 4}, {"per_class": 3, "split_seed": 1}]
    assert len({load("emnist-balanced", data_dir, **setting).fingerprint for setting in settings}) == len(settings)


@pytest.mark.parametrize("file", [TRAIN_IMAGES, TRAIN_LABELS])
def test_fingerprint_changes_with_one_byte(file: str, data_dir: Path, raw: Path) -> None:
    before = load("emnist-balanced", data_dir).fingerprint
    content = bytearray(BALANCED[file])
    content[-2] ^= 1
    (raw / file).write_bytes(content)
    assert load("emnist-balanced", data_dir).fingerprint != before


def test_fingerprint_changes_with_the_name(data_dir: Path, raw: Path) -> None:
    before = load("emnist-balanced", data_dir).fingerprint
    for part in ("images-idx3", "labels-idx1"):
        (raw / f"emnist-balanced-train-{part}-ubyte").rename(raw / f"emnist-bymerge-train-{part}-ubyte")
    assert load("emnist-bymerge", data_dir).fingerprint != before


unbalanced_labels = st.lists(st.integers(6, 30), min_size=1, max_size=5).flatmap(
    lambda sizes: st.permutations(np.repeat(range(len(sizes)), sizes).tolist()).map(np.array)
)
seeds = st.integers(0, 2**32)


@given(unbalanced_labels, seeds)
def test_train_and_validation_are_disjoint_and_complete(labels: np.ndarray, seed: int) -> None:
    train, val = split_indices(labels, labels.max() + 1, split_seed=seed)
    assert sorted([*train, *val]) == list(range(len(labels)))


@given(unbalanced_labels, seeds)
def test_validation_is_a_sixth_of_the_smallest_class_from_every_class(labels: np.ndarray, seed: int) -> None:
    _, val = split_indices(labels, labels.max() + 1, split_seed=seed)
    assert set(np.bincount(labels[val])) == {np.bincount(labels).min() // 6}


@given(unbalanced_labels, seeds)
def test_a_subset_is_balanced_and_contained_in_a_larger_one(labels: np.ndarray, seed: int) -> None:
    split = partial(split_indices, labels, labels.max() + 1, split_seed=seed)
    small, large, everything = split(per_class=2)[0], split(per_class=5)[0], split()[0]
    assert set(np.bincount(labels[small])) == {2}
    assert set(np.bincount(labels[large])) == {5}
    assert set(small) < set(large) <= set(everything)


@given(unbalanced_labels, seeds, st.integers(1, 5))
def test_validation_is_the_same_for_every_subset(labels: np.ndarray, seed: int, per_class: int) -> None:
    split = partial(split_indices, labels, labels.max() + 1, split_seed=seed)
    np.testing.assert_array_equal(split(per_class=per_class)[1], split()[1])


@pytest.mark.parametrize("stratified", [False, True])
@given(labels=unbalanced_labels, seed=seeds)
def test_a_refit_trains_on_five_of_six_validation_images_as_well(
    labels: np.ndarray, seed: int, stratified: bool
) -> None:
    classes = int(labels.max()) + 1
    train, val = split_indices(labels, classes, split_seed=seed, stratified=stratified)
    more, left = split_indices(labels, classes, split_seed=seed, stratified=stratified, refit=True)
    assert set(more) >= set(train)
    assert set(left) <= set(val)
    assert sorted([*more, *left]) == sorted([*train, *val])
    sizes, kept = (np.bincount(labels[places], minlength=classes) for places in (val, left))
    assert (kept == np.maximum(1, sizes // 6)).all()


def test_a_refit_of_a_subset_trains_on_that_subset_as_well() -> None:
    labels = np.repeat(np.arange(3), 60)
    train, val = split_indices(labels, 3, per_class=4)
    more, left = split_indices(labels, 3, per_class=4, refit=True)
    assert set(more) == set(train) | (set(val) - set(left))
    assert (len(train), len(val), len(more), len(left)) == (12, 30, 39, 3)


def test_another_seed_is_another_validation() -> None:
    labels = np.arange(600) % 10
    splits = [split_indices(labels, 10, split_seed=seed)[1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(splits[0], splits[1])
    assert set(splits[0]) != set(splits[2])


def test_balanced_gets_as_much_validation_as_it_has_test_images() -> None:
    _, val = split_indices(np.arange(112_800) % 47, 47)
    assert len(val) == DATASETS["emnist-balanced"].sizes.test_size == 18_800


def test_a_class_too_small_to_split_is_refused() -> None:
    with pytest.raises(InputError, match="each class needs 6 train images or more; the smallest has 5"):
        split_indices(np.arange(10) % 2, 2)


@pytest.mark.parametrize("loader", [load, load_test])
def test_an_unknown_name_is_refused_by_every_loader(loader: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown data set 'emnist'"):
        loader("emnist", tmp_path)


@pytest.mark.parametrize("per_class", [0, -1])
def test_a_subset_below_one_is_refused_before_anything_is_touched(per_class: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^--per-class must be at least 1, or all; got {per_class}$"):
        load("emnist-balanced", tmp_path, per_class=per_class)
    assert list(tmp_path.iterdir()) == []


def test_a_subset_that_is_too_large_is_refused_with_the_range(data_dir: Path) -> None:
    assert len(load("emnist-balanced", data_dir, per_class=10).train_labels) == 470
    with pytest.raises(
        InputError, match="must be 1 to 10, what validation leaves of the smallest class, or all; got 11"
    ):
        load("emnist-balanced", data_dir, per_class=11)


def test_a_negative_split_seed_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the split seed must be at least 0, not -1"):
        load("emnist-balanced", tmp_path, split_seed=-1)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_test_file_does_not_disturb_training(data_dir: Path, raw: Path) -> None:
    (raw / "emnist-balanced-test-labels-idx1-ubyte").write_bytes(b"")
    load("emnist-balanced", data_dir)
    with pytest.raises(InputError, match="test-labels-idx1-ubyte: truncated"):
        load_test("emnist-balanced", data_dir)


@pytest.mark.parametrize("name", ["emnist-balanced", "glyphs"])
def test_a_folder_that_cannot_be_made_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="^cannot .*file.*Not a directory.*choose another|file: a file where a folder"):
        load(name, tmp_path / "file")


@pytest.fixture(scope="module")
def real() -> Dataset:
    folder = os.environ.get("EMNIST_DIR")
    if not folder:
        pytest.skip("set EMNIST_DIR to a folder with EMNIST/raw/emnist-bymerge-*-ubyte")
    return load("emnist-bymerge", Path(folder))


def test_real_letters_stand_upright(real: Dataset) -> None:
    assert ink_above(real, "T") > 0.5 > ink_above(real, "L")


def test_validation_of_real_images_is_balanced(real: Dataset) -> None:
    class_sizes = np.bincount(real.train_labels) + np.bincount(real.val_labels)
    assert set(np.bincount(real.val_labels)) == {class_sizes.min() // 6}
