import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import EMNIST

from grid.config import InputError
from grid.data.catalogue import DATASETS, NAMES, check_name, check_per_class
from grid.data.dataset import Dataset
from grid.data.glyphs import CLASSES
from grid.data.load import load, load_test, split_indices

CLASS_COUNT, TRAIN_PER_CLASS, TEST_PER_CLASS = 47, 12, 3


def idx_bytes(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def made_files(split: str, class_count: int, first_label: int = 0) -> dict[str, bytes]:
    """Return a small EMNIST of random images: file name -> content."""
    files = {}
    for part, per_class in (("train", TRAIN_PER_CLASS), ("test", TEST_PER_CLASS)):
        labels = np.tile(np.arange(class_count), per_class) + first_label
        images = np.random.default_rng(per_class).integers(256, size=(len(labels), 28, 28))
        files[f"emnist-{split}-{part}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"emnist-{split}-{part}-labels-idx1-ubyte"] = idx_bytes(labels)
    return files


def write_files(data_dir: Path, files: dict[str, bytes]) -> Path:
    raw = data_dir / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return data_dir


BALANCED = made_files("balanced", CLASS_COUNT)
TRAIN_IMAGES = "emnist-balanced-train-images-idx3-ubyte"
TRAIN_LABELS = "emnist-balanced-train-labels-idx1-ubyte"


def stored_images(name: str = TRAIN_IMAGES) -> np.ndarray:
    return np.frombuffer(BALANCED[name], np.uint8, offset=16).reshape(-1, 28, 28)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_files(tmp_path, BALANCED)


@pytest.fixture
def raw(data_dir: Path) -> Path:
    return data_dir / "EMNIST" / "raw"


@dataclass
class FakeNist:
    """A server of one archive, which can break off, forget about ranges, and remembers what was asked and sent."""

    archive: bytes
    break_after: int | None = None
    knows_ranges: bool = True
    ranges: list[str | None] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers["Range"]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.knows_ranges else 0
        self.ranges.append(asked)
        if start >= len(self.archive):
            request.send_error(416)
            return
        rest = self.archive[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(rest)))
        request.end_headers()
        self.sent_bytes.append(request.wfile.write(rest[: self.break_after]))


class Handler(BaseHTTPRequestHandler):
    def __init__(self, nist: FakeNist, *args: object) -> None:
        self.nist = nist
        super().__init__(*args)

    def do_GET(self) -> None:
        self.nist.answer(self)

    def log_message(self, *args: object) -> None:
        pass


def zipped(files: dict[str, bytes]) -> bytes:
    """Pack files as NIST does: each gzipped, in the folder `gzip` of one zip."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        for name, content in files.items():
            members.writestr(f"gzip/{name}.gz", gzip.compress(content))
    return archive.getvalue()


ARCHIVE = zipped(BALANCED)


@pytest.fixture
def nist(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNist]:
    nist = FakeNist(ARCHIVE)
    server = HTTPServer(("127.0.0.1", 0), partial(Handler, nist))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(EMNIST, "url", f"http://127.0.0.1:{server.server_port}/gzip.zip")
    monkeypatch.setattr(EMNIST, "md5", hashlib.md5(ARCHIVE).hexdigest())
    yield nist
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    monkeypatch.setattr(EMNIST, "url", f"http://127.0.0.1:{port}/gzip.zip")
    monkeypatch.setattr(EMNIST, "md5", hashlib.md5(ARCHIVE).hexdigest())


def test_shapes_and_types_are_those_promised(data_dir: Path) -> None:
    data = load("emnist-balanced", data_dir)
    assert data.train_images.shape == (47 * 10, 28, 28)
    assert data.val_images.shape == (47 * 2, 28, 28)
    assert data.train_images.dtype == data.val_images.dtype == np.uint8
    assert data.train_labels.dtype == data.val_labels.dtype == np.int64
    assert data.classes == CLASSES


def test_images_are_turned_upright_and_keep_their_labels(data_dir: Path) -> None:
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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "glyphs"])
def test_every_emnist_loads_with_its_published_classes(name: str, tmp_path: Path) -> None:
    published = DATASETS[name]
    first_label = 1 if name == "emnist-letters" else 0
    data = load(name, write_files(tmp_path, made_files(published.split, published.class_count, first_label)))
    assert len(data.classes) == published.class_count
    assert len(data.val_labels) == 2 * published.class_count


def test_files_are_read_without_being_allowed_to_write(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    before = sorted(data_dir.rglob("*"))
    load("emnist-balanced", data_dir)
    assert sorted(data_dir.rglob("*")) == before


def test_a_data_set_survives_shipping(data_dir: Path) -> None:
    data = load("emnist-balanced", data_dir)
    shipped = pickle.loads(pickle.dumps(data))
    assert isinstance(shipped, Dataset)
    np.testing.assert_array_equal(shipped.train_images, data.train_images)


def test_glyphs_have_the_sizes_of_the_table(tmp_path: Path) -> None:
    published = DATASETS["glyphs"]
    data = load("glyphs", tmp_path)
    assert len(data.train_labels) + len(data.val_labels) == published.train_size
    assert (len(data.train_labels), len(data.val_labels)) == published.split_sizes()
    assert len(load_test("glyphs", tmp_path)[1]) == published.test_size
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
def test_train_and_validation_share_nothing_and_leave_nothing(labels: np.ndarray, seed: int) -> None:
    train, val = split_indices(labels, labels.max() + 1, split_seed=seed)
    assert sorted([*train, *val]) == list(range(len(labels)))


@given(unbalanced_labels, seeds)
def test_validation_is_a_sixth_of_the_smallest_class_from_every_class(labels: np.ndarray, seed: int) -> None:
    _, val = split_indices(labels, labels.max() + 1, split_seed=seed)
    assert set(np.bincount(labels[val])) == {np.bincount(labels).min() // 6}


@given(unbalanced_labels, seeds)
def test_a_subset_is_balanced_and_contained_in_a_larger_one(labels: np.ndarray, seed: int) -> None:
    cut = partial(split_indices, labels, labels.max() + 1, split_seed=seed)
    small, large, everything = cut(per_class=2)[0], cut(per_class=5)[0], cut()[0]
    assert set(np.bincount(labels[small])) == {2}
    assert set(np.bincount(labels[large])) == {5}
    assert set(small) < set(large) <= set(everything)


@given(unbalanced_labels, seeds, st.integers(1, 5))
def test_validation_is_the_same_for_every_subset(labels: np.ndarray, seed: int, per_class: int) -> None:
    cut = partial(split_indices, labels, labels.max() + 1, split_seed=seed)
    np.testing.assert_array_equal(cut(per_class=per_class)[1], cut()[1])


def test_another_seed_is_another_validation() -> None:
    labels = np.arange(600) % 10
    cuts = [split_indices(labels, 10, split_seed=seed)[1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(cuts[0], cuts[1])
    assert set(cuts[0]) != set(cuts[2])


def test_balanced_gets_as_much_validation_as_it_has_test_images() -> None:
    _, val = split_indices(np.arange(112_800) % 47, 47)
    assert len(val) == DATASETS["emnist-balanced"].test_size == 18_800


@pytest.mark.parametrize("name", [name for name, published in DATASETS.items() if published.balanced])
@pytest.mark.parametrize("per_class", [None, 1, 100])
def test_forecast_sizes_are_those_of_the_cut(name: str, per_class: int | None) -> None:
    published = DATASETS[name]
    labels = np.arange(published.train_size) % published.class_count
    train, val = split_indices(labels, published.class_count, per_class=per_class)
    assert published.split_sizes(per_class) == (len(train), len(val))


def test_forecast_of_an_unbalanced_set_is_an_upper_bound() -> None:
    assert DATASETS["emnist-bymerge"].split_sizes() == (697_932, 0)
    assert DATASETS["emnist-bymerge"].split_sizes(100) == (4_700, 0)


def test_a_class_too_small_to_cut_is_refused() -> None:
    with pytest.raises(InputError, match="each class needs 6 train images or more; the smallest has 5"):
        split_indices(np.arange(10) % 2, 2)


def test_an_unknown_name_is_answered_with_the_choices() -> None:
    with pytest.raises(InputError, match=r"^unknown data set 'mnist'; choose from emnist-balanced, .*, glyphs$"):
        check_name("mnist")


def test_names_are_checked_without_importing_torch() -> None:
    heavy = "any(name in sys.modules for name in ('torch', 'torchvision', 'numpy'))"
    code = f"import sys, grid.data.catalogue; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("loader", [load, load_test])
def test_an_unknown_name_is_refused_by_every_loader(loader: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown data set 'emnist'"):
        loader("emnist", tmp_path)


@pytest.mark.parametrize("per_class", [0, -1])
def test_a_subset_below_one_is_refused_before_anything_is_touched(per_class: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^--per-class must be at least 1; got {per_class}$"):
        load("emnist-balanced", tmp_path, per_class=per_class)
    assert list(tmp_path.iterdir()) == []


def test_a_subset_above_what_is_left_is_refused_with_the_range(data_dir: Path) -> None:
    assert len(load("emnist-balanced", data_dir, per_class=10).train_labels) == 470
    with pytest.raises(InputError, match="must be 1 to 10, what validation leaves of the smallest class; got 11"):
        load("emnist-balanced", data_dir, per_class=11)


def test_all_images_per_class_are_always_allowed() -> None:
    check_per_class(None)
    check_per_class(None, largest=3)
    check_per_class(3, largest=3)


def test_a_negative_split_seed_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the split seed must be at least 0, not -1"):
        load("emnist-balanced", tmp_path, split_seed=-1)
    assert list(tmp_path.iterdir()) == []


IMAGES, LABELS = BALANCED[TRAIN_IMAGES], BALANCED[TRAIN_LABELS]
COUNT = CLASS_COUNT * TRAIN_PER_CLASS


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        (TRAIN_IMAGES, LABELS, "not an IDX file, it begins with 00000801 and not 00000803; delete it"),
        (TRAIN_LABELS, b"<html>", "not an IDX file, it begins with 3c68746d and not 00000801; delete it"),
        (TRAIN_IMAGES, b"", "truncated, 0 bytes are less than a header; delete it"),
        (TRAIN_IMAGES, IMAGES[:10], "truncated, 10 bytes are less than a header; delete it"),
        (TRAIN_IMAGES, IMAGES[:-1], "truncated, 442191 bytes where its header tells of 442192; delete it"),
        (TRAIN_LABELS, LABELS + b"\0", "too long, 573 bytes where its header tells of 572; delete it"),
        (TRAIN_LABELS, idx_bytes(np.zeros(COUNT - 1)), "563 labels for 564 images; delete both files"),
        (TRAIN_IMAGES, idx_bytes(np.zeros((COUNT, 28, 32))), "the images are 28x32, not 28x28; delete it"),
        (TRAIN_LABELS, idx_bytes(np.full(COUNT, 47)), r"label 47 is outside 0\.\.46; delete it"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault_and_the_mend(
    file: str, content: bytes, problem: str, data_dir: Path, raw: Path
) -> None:
    (raw / file).write_bytes(content)
    with pytest.raises(InputError, match=f"^{raw / file}: {problem} and run again$"):
        load("emnist-balanced", data_dir)
    assert {path.name for path in raw.iterdir()} == set(BALANCED)


@pytest.mark.parametrize("label", [0, 27])
def test_a_wrong_label_of_letters_is_named_as_it_is_in_the_file(label: int, tmp_path: Path) -> None:
    files = made_files("letters", 26, first_label=1)
    files["emnist-letters-train-labels-idx1-ubyte"] = idx_bytes(np.full(26 * TRAIN_PER_CLASS, label))
    with pytest.raises(InputError, match=rf"label {label} is outside 1\.\.26; delete it"):
        load("emnist-letters", write_files(tmp_path, files))


def test_a_damaged_test_file_does_not_disturb_training(data_dir: Path, raw: Path) -> None:
    (raw / "emnist-balanced-test-labels-idx1-ubyte").write_bytes(b"")
    load("emnist-balanced", data_dir)
    with pytest.raises(InputError, match="test-labels-idx1-ubyte: truncated"):
        load_test("emnist-balanced", data_dir)


def test_an_unreadable_file_is_named(data_dir: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=rf"{TRAIN_IMAGES}: cannot be read \(Permission denied\); make it readable"):
        load("emnist-balanced", data_dir)


def test_gzipped_files_are_unpacked_in_place(data_dir: Path, raw: Path, offline: None) -> None:
    before = load("emnist-balanced", data_dir).fingerprint
    for file in (TRAIN_IMAGES, TRAIN_LABELS):
        (raw / file).unlink()
        (raw / f"{file}.gz").write_bytes(gzip.compress(BALANCED[file]))
    assert load("emnist-balanced", data_dir).fingerprint == before
    assert (raw / TRAIN_IMAGES).read_bytes() == IMAGES


@pytest.mark.parametrize("damage", [lambda packed: packed[:-20], lambda packed: b"no gzip" + packed])
def test_a_damaged_gzip_is_named_and_leaves_nothing(damage: object, data_dir: Path, raw: Path, offline: None) -> None:
    (raw / TRAIN_IMAGES).unlink()
    (raw / f"{TRAIN_IMAGES}.gz").write_bytes(damage(gzip.compress(IMAGES)))
    with pytest.raises(InputError, match=rf"{TRAIN_IMAGES}\.gz: damaged \(.+\); delete it and run again$"):
        load("emnist-balanced", data_dir)
    assert {path.name for path in raw.iterdir()} == {*BALANCED, f"{TRAIN_IMAGES}.gz"} - {TRAIN_IMAGES}


def test_missing_files_are_downloaded_and_unpacked_once(tmp_path: Path, nist: FakeNist) -> None:
    data = load("emnist-balanced", tmp_path)
    load_test("emnist-balanced", tmp_path)
    assert len(data.train_labels) == 470
    assert nist.ranges == [None]
    assert {path.name for path in (tmp_path / "EMNIST" / "raw").iterdir()} == {*BALANCED, "gzip.zip"}


def test_downloaded_files_are_those_of_the_archive(tmp_path: Path, data_dir: Path, nist: FakeNist) -> None:
    fetched, present = load("emnist-balanced", tmp_path / "new"), load("emnist-balanced", data_dir)
    assert fetched.fingerprint == present.fingerprint


def test_an_archive_already_there_is_used_without_a_network(tmp_path: Path, offline: None) -> None:
    load("emnist-balanced", write_files(tmp_path, {"gzip.zip": ARCHIVE}))


def test_an_interrupted_download_goes_on_where_it_stopped(tmp_path: Path, nist: FakeNist) -> None:
    nist.break_after = half = len(ARCHIVE) // 2
    with pytest.raises(InputError, match=rf"the connection was lost after {half} of {len(ARCHIVE)} bytes"):
        load("emnist-balanced", tmp_path)
    assert [path.name for path in (tmp_path / "EMNIST" / "raw").iterdir()] == ["gzip.zip.part"]
    nist.break_after = None
    load("emnist-balanced", tmp_path)
    assert nist.ranges == [None, f"bytes={half}-"]
    assert nist.sent_bytes == [half, len(ARCHIVE) - half]


def test_a_server_without_ranges_sends_everything_again(tmp_path: Path, nist: FakeNist) -> None:
    nist.knows_ranges = False
    load("emnist-balanced", write_files(tmp_path, {"gzip.zip.part": ARCHIVE[:1000]}))
    assert nist.sent_bytes == [len(ARCHIVE)]


def test_a_complete_part_is_only_verified(tmp_path: Path, nist: FakeNist) -> None:
    load("emnist-balanced", write_files(tmp_path, {"gzip.zip.part": ARCHIVE}))
    assert nist.sent_bytes == []


def test_a_download_with_a_wrong_checksum_is_deleted(tmp_path: Path, nist: FakeNist) -> None:
    nist.archive = ARCHIVE[:-1] + b"?"
    with pytest.raises(InputError, match=r"gzip\.zip: wrong checksum, the damaged download was deleted; run again$"):
        load("emnist-balanced", tmp_path)
    assert list(tmp_path.iterdir()) == []
    nist.archive = ARCHIVE
    load("emnist-balanced", tmp_path)


def test_a_found_archive_with_a_wrong_checksum_is_named_and_kept(tmp_path: Path, nist: FakeNist) -> None:
    write_files(tmp_path, {"gzip.zip": ARCHIVE[:-1]})
    with pytest.raises(InputError, match=r"raw/gzip\.zip: wrong checksum, .*; delete it and run again$"):
        load("emnist-balanced", tmp_path)
    assert nist.ranges == []


def test_without_a_network_the_line_says_what_to_put_where(tmp_path: Path, offline: None) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    problem = rf"no emnist-balanced-train-\*-ubyte in {raw} and the download failed \(.*refused\)"
    with pytest.raises(InputError, match=rf"^{problem}; put them there or run again with a network"):
        load("emnist-balanced", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_server_is_passed_on(tmp_path: Path, nist: FakeNist) -> None:
    nist.archive = b""
    with pytest.raises(InputError, match=r"the download failed \(HTTP Error 416: .*\)"):
        load("emnist-balanced", tmp_path)


def test_progress_is_shown_on_a_terminal_only(
    tmp_path: Path, nist: FakeNist, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load("emnist-balanced", tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load("emnist-balanced", tmp_path / "shown")
    megabytes = f"{len(ARCHIVE) / 1e6:.1f}"
    assert capsys.readouterr().err.endswith(f"\rdownloading EMNIST: {megabytes} of {megabytes} MB\n")


@pytest.mark.parametrize("name", ["emnist-balanced", "glyphs"])
def test_a_folder_that_cannot_be_made_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^cannot .*file.*Not a directory.*choose another"):
        load(name, tmp_path / "file")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        InputError, match=r"^cannot write to .*raw, where emnist-balanced files are missing; choose another"
    ):
        load("emnist-balanced", tmp_path)


def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", refuse)
    with pytest.raises(InputError, match=r"^cannot unpack .*gzip\.zip to .*No space left on device\); make room"):
        load("emnist-balanced", write_files(tmp_path, {"gzip.zip": ARCHIVE}))
    assert [path.name for path in (tmp_path / "EMNIST" / "raw").iterdir()] == ["gzip.zip"]


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
