"""Data sets that are no EMNIST of NIST's: Kaggle's CSV, MNIST and its like, .npz files, folders, functions."""

import gzip
import os
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grid.config import InputError, TrialConfig
from grid.data.catalogue import locate
from grid.data.dataset import Dataset
from grid.data.load import is_on_disk, load, load_test, split_indices
from grid.driver.pictures import mistake_sheet, sample_sheet
from grid.parts.files import PartsFile
from grid.parts.files import load as load_parts
from grid.train.evaluation import evaluate
from grid.train.trial import DeviceData, Trial
from tests.small_emnist import BALANCED, write_files

FASHION = Path(os.environ.get("FASHION_MNIST_DIR", "/usr/share/datasets/fashion-mnist"))
COUNT = 40


def small_images(count: int = COUNT, shape: tuple[int, ...] = (6, 5), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def small_labels(count: int = COUNT, classes: int = 4) -> np.ndarray:
    return np.arange(count) % classes


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    known = {
        "train_images": small_images(),
        "train_labels": small_labels(),
        "test_images": small_images(8, seed=1),
        "test_labels": small_labels(8),
    }
    return known | changes


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


# Kaggle's CSV


def as_csv(folder: Path, part: str = "train") -> Path:
    """Write the small EMNIST of the tests as Kaggle does."""
    images = np.frombuffer(BALANCED[f"emnist-balanced-{part}-images-idx3-ubyte"], np.uint8, offset=16)
    labels = np.frombuffer(BALANCED[f"emnist-balanced-{part}-labels-idx1-ubyte"], np.uint8, offset=8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"emnist-balanced-{part}.csv"
    np.savetxt(path, np.column_stack([labels, images.reshape(-1, 784)]), fmt="%d", delimiter=",")
    return path


@pytest.mark.parametrize("below", [".", "archive", "emnist/csv"])
def test_kaggles_csv_yields_the_same_data_as_nists_files(below: str, tmp_path: Path) -> None:
    for part in ("train", "test"):
        as_csv(tmp_path / "csv" / below, part)
    ours = write_files(tmp_path / "idx", BALANCED)
    assert is_on_disk("emnist-balanced", tmp_path / "csv")
    assert load("emnist-balanced", tmp_path / "csv").fingerprint == load("emnist-balanced", ours).fingerprint
    for one, other in zip(
        load_test("emnist-balanced", tmp_path / "csv"), load_test("emnist-balanced", ours), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def lines(edit: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    return lambda path: path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n") and None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lines(lambda rows: ["label," + "p," * 783 + "p", *rows]), "line 1: text that begins with 'label,p,p"),
        (lines(lambda rows: [row + ",0" for row in rows]), "line 1: 786 columns, where a label and 784 pixels"),
        (lines(lambda rows: [rows[0], rows[1] + ",0", *rows[2:]]), "line 2 has 786 columns, not 785"),
        (lines(lambda rows: [rows[0], rows[1].replace(",", ",x", 1), *rows[2:]]), "line 2, column 2: 'x"),
        (lines(lambda rows: [rows[0], "1," + "300," * 783 + "0", *rows[2:]]), "line 2, column 2: '300' is not a whole"),
        (lines(lambda rows: ["<!DOCTYPE html>"]), "line 1: text that begins with '<!DOCTYPE html>'"),
        (lines(lambda rows: ["47," + rows[0].partition(",")[2], *rows[1:]]), "label 47 is outside 0..46"),
        (lambda path: path.write_bytes(b"") and None, "line 1: empty"),
    ],
)
def test_a_wrong_csv_is_refused_with_the_file_and_the_line(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = as_csv(tmp_path)
    spoil(path)
    with pytest.raises(InputError) as caught:
        load("emnist-balanced", tmp_path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_that_a_csv_lacks_is_named(tmp_path: Path) -> None:
    path = as_csv(tmp_path)
    lines(lambda rows: [row for row in rows if not row.startswith("10,")])(path)
    with pytest.raises(InputError, match=r"emnist-balanced-train.csv: too few images of 'A' \(label 10\): 0"):
        load("emnist-balanced", tmp_path)


# MNIST and its like


def write_mnist(folder: Path, *, packed: bool = False, dotted: bool = False) -> None:
    folder.mkdir(parents=True)
    for part, count in (("train", 80), ("t10k", 20)):
        for kind, values in (("images-idx3", small_images(count, (28, 28))), ("labels-idx1", small_labels(count, 10))):
            name = f"{part}-{kind}-ubyte".replace("-idx", ".idx" if dotted else "-idx")
            content = idx(values)
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("kmnist", "KMNIST/raw"), ("kmnist", "kmnist"),
     ("fashion-mnist", "../fashion-mnist")],
)  # fmt: skip
def test_data_sets_like_mnist_are_read_where_torchvision_or_their_publishers_put_them(
    name: str, folder: str, packed: bool, tmp_path: Path
) -> None:
    write_mnist(tmp_path / "data" / folder, packed=packed, dotted=packed)
    data_dir = tmp_path / "data" if ".." not in folder else tmp_path / "fashion-mnist"
    assert is_on_disk(name, data_dir)
    data = load(name, data_dir)
    assert (len(data.train_images), len(data.val_images), len(data.classes)) == (70, 10, 10)
    images, labels = load_test(name, data_dir)
    np.testing.assert_array_equal(images, small_images(20, (28, 28)))  # upright as they are stored
    np.testing.assert_array_equal(labels, small_labels(20, 10))


@pytest.mark.parametrize("folder", ["MNIST/raw", "mnist", "."])
def test_one_data_set_is_not_taken_for_another(folder: str, tmp_path: Path) -> None:
    """Their files have the same names."""
    write_mnist(tmp_path / "images" / folder)
    assert not is_on_disk("fashion-mnist", tmp_path / "images")


def test_classes_have_the_names_that_people_use(tmp_path: Path) -> None:
    for name in ("mnist", "fashion-mnist"):
        write_mnist(tmp_path / name)
    assert load("mnist", tmp_path).classes == tuple("0123456789")
    assert load("fashion-mnist", tmp_path).classes[-1] == "Ankle boot"


def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried https://example.org, got: refused")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", refuse)
    with pytest.raises(InputError, match=r"^no kmnist in .*, and it can't be downloaded \(Error .*gz:\); put train-"):
        load("kmnist", tmp_path)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_all_of_fashion_mnist_is_read() -> None:
    data = load("fashion-mnist", FASHION)
    assert (len(data.train_images), len(data.val_images)) == (50_000, 10_000)
    assert np.bincount(data.val_labels).tolist() == [1000] * 10
    assert len(load_test("fashion-mnist", FASHION)[0]) == 10_000


# .npz


def test_arrays_are_read_under_either_of_two_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", **arrays(), classes=["a", "b", "c", "d"])
    renamed = {f"{'x' if 'images' in name else 'y'}_{name[:5].strip('_')}": each for name, each in arrays().items()}
    np.savez(tmp_path / "keras.npz", **renamed)
    plain, keras = load("plain.npz", tmp_path), load("keras.npz", tmp_path)
    np.testing.assert_array_equal(plain.train_images, keras.train_images)
    assert plain.classes == ("a", "b", "c", "d")
    assert keras.classes == ("0", "1", "2", "3")
    assert plain.image_shape == (1, 6, 5)
    np.testing.assert_array_equal(load_test("plain.npz", tmp_path)[0], arrays()["test_images"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": small_images() / 255.0}, "images are float64 of shape (40, 6, 5); make them uint8 [image,"),
        ({"train_images": small_images(shape=(30,))}, "images are uint8 of shape (40, 30)"),
        ({"train_images": small_images(shape=(32, 20, 3))}, "move the channels to the second axis: images.transpose"),
        ({"train_labels": small_labels(39)}, "labels are of shape (39,) for 40 images; give one per image"),
        ({"train_labels": small_labels() + 1}, "labels run from 1 to 4; number the classes from 0, as labels - 1 does"),
        ({"train_labels": small_labels() - 1}, "labels run from -1 to 2 for 4 classes"),
        ({"train_labels": small_labels() + 0.5}, "labels are float64, not whole numbers"),
        ({"train_labels": np.zeros(40, dtype=int), "classes": np.array(["a"])}, "1 classes; 2 to 1,000 are possible"),
        ({"train_labels": np.array([0, 1, 2, *[3] * 37])}, "too few images of 'a' (label 0): 1, 'b' (label 1): 1"),
        ({"classes": np.array(["a", "b", "b", "d"])}, "two classes have the same name; name each differently"),
        ({"classes": np.array(["a", "b", "c", "d", "e"])}, "too few images of 'e' (label 4): 0"),
        ({"train_images": small_images(0), "train_labels": small_labels(0)}, "no images"),
    ],
)
def test_wrong_arrays_are_refused_with_what_is_wanted(
    changes: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "own.npz", **arrays(classes=np.array(list("abcd"))) | changes)
    with pytest.raises(InputError) as caught:
        load("own.npz", tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "own.npz") in str(caught.value)


def as_npy() -> bytes:
    """Return a single array as numpy.save writes it."""
    file = BytesIO()
    np.save(file, small_images())
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"PK nothing"), "text that begins with 'PK nothing', not an .npz file"),
        (lambda path: path.write_bytes(b""), "empty, not an .npz file; save one with numpy.savez"),
        (lambda path: path.write_text("<html>"), "text that begins with '<html>', not an .npz file"),
        (lambda path: path.write_bytes(as_npy()), "begins with the bytes 934e554d, not an .npz file"),
        (
            lambda path: np.savez(path, pictures=small_images()),
            "has pictures; save train_images and train_labels or x_",
        ),
        (lambda path: np.savez(path, **arrays(train_labels=np.array([{}] * 40))), "not an .npz file of numbers"),
    ],
)
def test_a_file_without_arrays_is_refused(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "own.npz")
    with pytest.raises(InputError, match=rf"^\S*: {message}"):
        load("own.npz", tmp_path)


def test_a_test_set_that_does_not_go_with_train_is_refused(tmp_path: Path) -> None:
    other = {"test_images": small_images(8, (3, 6, 5)), "test_labels": small_labels(8)}
    np.savez(tmp_path / "shapes.npz", **arrays(**other))
    with pytest.raises(InputError, match=r"the test images of 'shapes.npz' are of shape \(3, 6, 5\), the train images"):
        load_test("shapes.npz", tmp_path, load("shapes.npz", tmp_path))
    np.savez(tmp_path / "labels.npz", **arrays(test_labels=small_labels(8) + 1))
    with pytest.raises(InputError, match="labels run from 1 to 4 for 4 classes"):
        load_test("labels.npz", tmp_path, load("labels.npz", tmp_path))
    np.savez(tmp_path / "fewer.npz", **arrays(test_labels=np.zeros(8, dtype=int)))
    assert load_test("fewer.npz", tmp_path, load("fewer.npz", tmp_path))[1].tolist() == [0] * 8


# a folder of images


def write_pictures(folder: Path, *, mode: str = "RGB", size: tuple[int, int] = (7, 9)) -> Path:
    """Write pictures of cats and dogs: 12 of a kind to train on, 2 to test."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 2)):
        for kind in ("cats", "dogs"):
            (folder / part / kind).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / part / kind / f"{number:03}.png")
    return folder


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("RGBA", 3), ("P", 3)])
def test_a_folder_of_pictures_is_read_in_colour_or_grey(mode: str, channels: int, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pets", mode=mode)
    data = load("pets", tmp_path)
    assert data.classes == ("cats", "dogs")
    assert data.image_shape == (channels, 9, 7)
    assert (len(data.train_images), len(data.val_images)) == (20, 4)
    assert len(load_test("pets", tmp_path)[1]) == 4
    assert data.fingerprint == load("pets", tmp_path).fingerprint


def test_pixels_keep_their_place(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pets") / "test" / "cats"
    with Image.open(folder / "000.png") as first:
        np.testing.assert_array_equal(load_test("pets", tmp_path)[0][0], np.asarray(first).transpose(2, 0, 1))


def test_grey_pictures_of_16_bits_and_transparent_ones_are_refused(tmp_path: Path) -> None:
    """Pillow would make nearly all of them black or white."""
    folder = write_pictures(tmp_path / "pets", mode="L")
    Image.fromarray(np.full((9, 7), 40_000, np.uint16)).save(folder / "train" / "cats" / "000.png")
    with pytest.raises(InputError, match=r"000.png: of mode I;16; save it in grey or colour, 8 bits for each"):
        load("pets", tmp_path)
    Image.new("RGBA", (7, 9), (0, 0, 0, 0)).save(folder / "train" / "cats" / "000.png")
    with pytest.raises(InputError, match=r"000.png: transparent; save it in grey or colour"):
        load("pets", tmp_path)


def test_a_folder_with_the_name_of_a_data_set_is_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "mnist")
    with pytest.raises(InputError, match="has the name of the data set mnist; rename the file or folder"):
        locate(str(tmp_path / "mnist"), tmp_path)


def spoil_pictures(name: str) -> Callable[[Path], None]:
    def odd(folder: Path) -> None:
        Image.new("RGB", (8, 9)).save(folder / "train" / "dogs" / "999.png")

    def broken(folder: Path) -> None:
        (folder / "train" / "dogs" / "999.png").write_text("<html>")

    def extra(folder: Path) -> None:
        (folder / "test" / "birds").mkdir()

    def few(folder: Path) -> None:
        for file in sorted((folder / "train" / "dogs").iterdir())[3:]:
            file.unlink()

    def empty(folder: Path) -> None:
        for file in folder.rglob("*.png"):
            file.unlink()

    return {"odd": odd, "broken": broken, "extra": extra, "few": few, "empty": empty}[name]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("odd", r"999.png: 8x9 pixels, and .*cats/000.png has 7x9; bring all images to one size"),
        ("broken", r"dogs/999.png: no image that can be read; delete it, or save it again"),
        ("few", r"pets/train: too few images of 'dogs' \(label 1\): 3; each class needs 6 train images or more"),
        ("empty", r"pets/train: no images in the folders of the classes; put some there \(.jpg, "),
    ],
)
def test_wrong_pictures_are_refused(how: str, message: str, tmp_path: Path) -> None:
    spoil_pictures(how)(write_pictures(tmp_path / "pets"))
    with pytest.raises(InputError, match=message):
        load("pets", tmp_path)


def test_a_class_that_only_the_test_has_is_refused(tmp_path: Path) -> None:
    spoil_pictures("extra")(write_pictures(tmp_path / "pets"))
    for read in (load, load_test):  # before anything is trained
        with pytest.raises(InputError, match=r"pets/test: class 'birds' is not in .*train; add or remove it"):
            read("pets", tmp_path)


def test_a_folder_without_its_two_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pets" / "cats").mkdir(parents=True)
    with pytest.raises(InputError, match=r"pets has no folder train; put the images into train/CLASS and test/CLASS"):
        load("pets", tmp_path)


# a function of a parts file

FUNCTION = """
import numpy as np
from grid import parts

@parts.data("stripes")
def stripes(folder):
    labels = np.arange(40) % 2
    images = np.zeros((40, 3, 4, 5), dtype=np.uint8) + (100 * labels[:, None, None, None]).astype(np.uint8)
    return images, labels, images[:4], labels[:4]{names}
"""


@pytest.mark.parametrize(("names", "classes"), [("", ("0", "1")), (', ("thin", "wide")', ("thin", "wide"))])
def test_a_function_of_a_parts_file_is_a_data_set(names: str, classes: tuple[str, ...], tmp_path: Path) -> None:
    load_parts([PartsFile("own.py", FUNCTION.format(names=names))])
    data = load("stripes", tmp_path)
    assert isinstance(data, Dataset)
    assert (data.classes, data.image_shape) == (classes, (3, 4, 5))
    assert load_test("stripes", tmp_path)[1].tolist() == [0, 1, 0, 1]
    assert is_on_disk("stripes", tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1, 2", "data set 'own' must return train images, train labels, test images, test labels and"),
        ("return None", "data set 'own' can't be loaded: TypeError"),
        ("open(folder / 'missing')", "data set 'own' can't be loaded: FileNotFoundError"),
        ("return [[1]], [1], [[1]], [1]", r"data set 'own' \(train\): images are int64 of shape \(1, 1\)"),
    ],
)
def test_a_function_that_returns_nonsense_is_refused(body: str, message: str, tmp_path: Path) -> None:
    text = f"from grid import parts\n@parts.data('own')\ndef own(folder):\n    {body}\n"
    load_parts([PartsFile("own.py", text)])
    with pytest.raises(InputError, match=message):
        load("own", tmp_path)


# the split


def test_a_stratified_split_holds_a_sixth_of_every_class() -> None:
    labels = np.repeat(np.arange(3), (600, 60, 12))
    train, val = split_indices(labels, 3, stratified=True)
    assert np.bincount(labels[val]).tolist() == [100, 10, 2]
    assert sorted([*train, *val]) == list(range(672))
    equal = split_indices(labels, 3)[1]
    assert np.bincount(labels[equal]).tolist() == [2, 2, 2]


def test_both_rules_are_one_where_classes_are_balanced() -> None:
    labels = np.tile(np.arange(5), 30)
    for one, other in zip(split_indices(labels, 5), split_indices(labels, 5, stratified=True), strict=True):
        np.testing.assert_array_equal(one, other)


def test_validation_is_the_same_for_every_size_of_a_stratified_train() -> None:
    labels = np.repeat(np.arange(3), (600, 60, 12))
    small, large = (split_indices(labels, 3, per_class=count, stratified=True) for count in (5, 10))
    np.testing.assert_array_equal(small[1], large[1])
    assert set(small[0]) < set(large[0])
    assert np.bincount(labels[large[0]]).tolist() == [10, 10, 10]


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_folder_in_colour_is_trained_on_validated_and_tested(model: str, tmp_path: Path) -> None:
    """From PNG files to the numbers and the pictures of a test."""
    data = load("pets", write_pictures(tmp_path / "pets", size=(16, 12)).parent)
    on_device = DeviceData.from_dataset(data)
    config = TrialConfig(model=model, learning_rate=1e-3, epochs=1, channels="4-6", dense_size=12, hidden_sizes="16")
    trial = Trial(config, on_device)
    report = trial.run_epoch()
    assert 0 <= report.val_accuracy <= 1
    images, labels = load_test("pets", tmp_path, data)
    result = evaluate(config, trial.state_dict(), on_device, images, labels)
    assert (result.images, result.confusion.shape) == (4, (2, 2))
    assert result.balanced_accuracy == pytest.approx(result.accuracy)
    assert sample_sheet(data.train_images, data.train_labels, data.classes)
    wrong = result.mistakes
    assert mistake_sheet(images[wrong.indices], wrong.true, wrong.predicted, wrong.confidence, data.classes)
