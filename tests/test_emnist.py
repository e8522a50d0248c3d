import gzip
import hashlib
import io
import os
import resource
import struct
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import EMNIST

from grid.config import InputError
from grid.data.load import is_on_disk, load, load_test
from tests.small_emnist import (
    BALANCED,
    CLASS_COUNT,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    TRAIN_PER_CLASS,
    idx_bytes,
    made_files,
    write_files,
)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_files(tmp_path, BALANCED)


@pytest.fixture
def raw(data_dir: Path) -> Path:
    return data_dir / "EMNIST" / "raw"


@dataclass
class FakeNist:
    """A server of one archive, which may break off or ignore ranges, and records its requests and answers."""

    archive: bytes
    break_after: int | None = None
    knows_ranges: bool = True
    content_type: str = "application/zip"
    content_range: str | None = None
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
        request.send_header("Content-Type", self.content_type)
        if start and self.content_range:
            request.send_header("Content-Range", self.content_range)
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


IMAGES, LABELS = BALANCED[TRAIN_IMAGES], BALANCED[TRAIN_LABELS]
COUNT = CLASS_COUNT * TRAIN_PER_CLASS


def relabelled(change: Callable[[np.ndarray], object]) -> bytes:
    """Return the file of labels after a change of the labels."""
    labels = np.frombuffer(LABELS, np.uint8, offset=8).copy()
    change(labels)
    return idx_bytes(labels)


def without_g(labels: np.ndarray) -> None:
    labels[labels == 16] = 0


def only_z(labels: np.ndarray) -> None:
    labels[:] = 35


FLOATS = bytes([0, 0, 0x0D, 3]) + struct.pack(">3I", 1, 28, 28) + bytes(4 * 28 * 28)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        (
            TRAIN_IMAGES,
            LABELS,
            r"has 1 axes, not 3: are images and labels mixed up\? Put the right file there; or delete it",
        ),
        (
            TRAIN_LABELS,
            IMAGES,
            r"has 3 axes, not 1: are images and labels mixed up\? Put the right file there; or delete it",
        ),
        (
            TRAIN_LABELS,
            b"<html><body>",
            "text that begins with '<html><b.*', where an IDX file begins with two zeros; delete it",
        ),
        (TRAIN_LABELS, b'{"error": 403}', "text that begins with '{\"error\"'.*"),
        (TRAIN_IMAGES, b"\x89PNG\r\n\x1a\n" + IMAGES, "begins with the bytes 89504e47, where an IDX file .*"),
        (TRAIN_IMAGES, FLOATS, "holds float32, not bytes; delete it"),
        (TRAIN_IMAGES, b"\0\0\x42\3" + IMAGES[4:], "holds unknown values, not bytes; delete it"),
        (TRAIN_IMAGES, b"", "truncated, 0 bytes are less than a header; delete it"),
        (TRAIN_IMAGES, IMAGES[:10], "truncated, 10 bytes are less than a header; delete it"),
        (TRAIN_IMAGES, IMAGES[:-1], "truncated, 442175 bytes of values where its header declares 442176; delete it"),
        (
            TRAIN_IMAGES,
            IMAGES[:4] + b"\xff" * 12 + IMAGES[16:],
            "truncated, 442176 bytes of values where .*; delete it",
        ),
        (
            TRAIN_LABELS,
            LABELS + b"\0",
            "too long, more than the 564 bytes of values that its header declares; delete it",
        ),
        (TRAIN_LABELS, idx_bytes(np.zeros(COUNT - 1)), "563 labels for 564 images; delete both files"),
        (TRAIN_IMAGES, idx_bytes(np.zeros((COUNT, 28, 32))), "the images are 28x32, not 28x28; delete it"),
        (TRAIN_LABELS, idx_bytes(np.full(COUNT, 47)), r"label 47 is outside 0\.\.46; delete it"),
        (
            TRAIN_LABELS,
            relabelled(without_g),
            r"too few images of 'G' \(label 16\): 0; each class needs 6 train images or more; get the .*: delete it",
        ),
        (
            TRAIN_LABELS,
            relabelled(only_z),
            r"too few images of '0' \(label 0\): 0, .* and 43 more classes; each .*: delete it",
        ),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_file_is_named_with_its_problem_and_a_hint(
    file: str, content: bytes, problem: str, packed: bool, data_dir: Path, raw: Path
) -> None:
    found = raw / f"{file}.gz" if packed else raw / file
    (raw / file).unlink()
    found.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match=f"^{found}: {problem}( and run again)?$"):
        load("emnist-balanced", data_dir)
    assert {path.name for path in raw.iterdir()} == {*BALANCED, found.name} - {file if packed else ""}


@pytest.mark.parametrize("label", [0, 27])
def test_a_wrong_label_of_letters_is_reported_as_in_the_file(label: int, tmp_path: Path) -> None:
    files = made_files("letters", 26, first_label=1)
    files["emnist-letters-train-labels-idx1-ubyte"] = idx_bytes(np.full(26 * TRAIN_PER_CLASS, label))
    with pytest.raises(InputError, match=rf"label {label} is outside 1\.\.26; delete it"):
        load("emnist-letters", write_files(tmp_path, files))


def spell(name: str) -> str:
    return name.replace("-idx", ".idx")


@pytest.mark.parametrize(
    ("folder", "rename"),
    [
        ("EMNIST/raw", lambda name: f"{name}.gz"),
        ("EMNIST/raw", spell),
        ("EMNIST/raw", str.upper),
        ("EMNIST/raw", lambda name: f"{spell(name)}.GZ".capitalize()),
        ("", str),
        ("raw", str),
        ("EMNIST", lambda name: f"{name}.gz"),
        ("gzip", lambda name: f"{name}.gz"),
        ("EMNIST/raw/gzip", lambda name: f"{name}.gz"),
        ("emnist/RAW", spell),
        ("downloads/emnist/all", str),
    ],
)
@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_files_are_found_wherever_they_lie_and_however_they_are_spelt(
    folder: str,
    rename: Callable[[str], str],
    pack: Callable[[bytes], bytes],
    data_dir: Path,
    tmp_path: Path,
    offline: None,
) -> None:
    """Packed or not: their content says so, not their name."""
    before = load("emnist-balanced", data_dir).fingerprint
    lying = tmp_path / "other"
    (lying / folder).mkdir(parents=True)
    for name, content in BALANCED.items():
        (lying / folder / rename(name)).write_bytes(pack(content))
    listing = sorted(lying.rglob("*"))
    assert is_on_disk("emnist-balanced", lying)
    assert load("emnist-balanced", lying).fingerprint == before
    assert sorted(lying.rglob("*")) == listing


def test_files_in_folders_of_their_names_are_found(data_dir: Path, raw: Path, offline: None) -> None:
    """As some sites pack them."""
    before = load("emnist-balanced", data_dir).fingerprint
    for name in BALANCED:
        (raw / name).rename(raw / "moved")
        (raw / name).mkdir()
        (raw / "moved").rename(raw / name / name)
    assert load("emnist-balanced", data_dir).fingerprint == before


@pytest.mark.parametrize("given", ["EMNIST/raw/deeper", "data"])
def test_files_above_the_data_folder_are_named_with_the_option_that_finds_them(
    given: str, data_dir: Path, raw: Path, offline: None
) -> None:
    right = raw if "raw" in given else data_dir
    with pytest.raises(InputError, match=f"^no emnist-balanced-train-.* in .*, but in {raw}; pass --data-dir {right}$"):
        load("emnist-balanced", data_dir / given)
    load("emnist-balanced", right)


def test_the_usual_place_comes_first(data_dir: Path, raw: Path) -> None:
    (data_dir / TRAIN_IMAGES).write_bytes(b"another copy")
    load("emnist-balanced", data_dir)


@pytest.mark.parametrize(
    "damage", [lambda packed: packed[:-20], lambda packed: packed[:5], lambda packed: packed[:-4] + b"1234"]
)
def test_a_damaged_gzip_is_named(damage: Callable[[bytes], bytes], data_dir: Path, raw: Path, offline: None) -> None:
    (raw / TRAIN_IMAGES).unlink()
    (raw / f"{TRAIN_IMAGES}.gz").write_bytes(damage(gzip.compress(IMAGES)))
    with pytest.raises(InputError, match=rf"{TRAIN_IMAGES}\.gz: damaged \(.+\); delete it and run again$"):
        load("emnist-balanced", data_dir)


@pytest.mark.parametrize("place", ["", "EMNIST", "EMNIST/raw", f"EMNIST/raw/{TRAIN_LABELS}"])
def test_a_broken_link_is_named(place: str, data_dir: Path, offline: None) -> None:
    link = data_dir / "linked" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(data_dir / "gone")
    with pytest.raises(InputError, match=f"^{link}: a broken link to {data_dir / 'gone'}; restore "):
        load("emnist-balanced", data_dir / "linked")


@pytest.mark.parametrize("place", ["", "EMNIST", "EMNIST/raw"])
def test_a_file_where_a_folder_is_wanted_is_named(place: str, data_dir: Path, offline: None) -> None:
    file = data_dir / "filed" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    with pytest.raises(
        InputError, match=f"^{file}: a file where a folder is wanted; move it, or pass another --data-dir$"
    ):
        load("emnist-balanced", data_dir / "filed")


@pytest.mark.parametrize("place", ["EMNIST", "EMNIST/raw", f"EMNIST/raw/{TRAIN_LABELS}"])
def test_what_may_not_be_read_is_named(place: str, offline: None) -> None:
    with as_nobody() as folder:
        closed = write_files(folder, BALANCED) / place
        closed.chmod(0)
        with pytest.raises(InputError, match=rf"^{closed}.*: cannot be read \(Permission denied\); make it readable$"):
            load("emnist-balanced", folder)
        closed.chmod(0o700)


@contextmanager
def as_nobody() -> Iterator[Path]:
    """Provide a folder, and give up the rights of root, who may read everything."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        try:
            os.seteuid(65534 if user == 0 else user)
            yield Path(folder) / "data"
        finally:
            os.seteuid(user)


def test_an_old_pickle_of_torchvision_is_not_read(data_dir: Path) -> None:
    before = load("emnist-balanced", data_dir).fingerprint
    processed = data_dir / "EMNIST" / "processed"
    processed.mkdir()
    for name in ("training_balanced.pt", "test_balanced.pt"):
        torch.save((torch.zeros(564, 28, 28, dtype=torch.uint8), torch.zeros(564)), processed / name)
    assert load("emnist-balanced", data_dir).fingerprint == before


def test_missing_files_are_downloaded_and_unpacked_once(tmp_path: Path, nist: FakeNist) -> None:
    data = load("emnist-balanced", tmp_path)
    load_test("emnist-balanced", tmp_path)
    assert len(data.train_labels) == 470
    assert nist.ranges == [None]
    assert {path.name for path in (tmp_path / "EMNIST" / "raw").iterdir()} == {*BALANCED, "gzip.zip"}


def test_downloaded_files_equal_those_of_the_archive(tmp_path: Path, data_dir: Path, nist: FakeNist) -> None:
    fetched, present = load("emnist-balanced", tmp_path / "new" / "data"), load("emnist-balanced", data_dir)
    assert fetched.fingerprint == present.fingerprint


def test_an_existing_archive_is_used_without_a_network(tmp_path: Path, offline: None) -> None:
    load("emnist-balanced", write_files(tmp_path, {"gzip.zip": ARCHIVE}))


def test_an_interrupted_download_continues_where_it_stopped(tmp_path: Path, nist: FakeNist) -> None:
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


def test_a_complete_partial_file_is_only_verified(tmp_path: Path, nist: FakeNist) -> None:
    load("emnist-balanced", write_files(tmp_path, {"gzip.zip.part": ARCHIVE}))
    assert nist.sent_bytes == []


def test_a_download_with_a_wrong_checksum_is_deleted(tmp_path: Path, nist: FakeNist) -> None:
    nist.archive = ARCHIVE[:-1] + b"?"
    with pytest.raises(InputError, match=r"gzip\.zip: wrong checksum, the damaged download was deleted; run again$"):
        load("emnist-balanced", tmp_path)
    assert list(tmp_path.iterdir()) == []
    nist.archive = ARCHIVE
    load("emnist-balanced", tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (ARCHIVE[:-1], "wrong checksum, the download was damaged or cut short; delete it"),
        (ARCHIVE[: len(ARCHIVE) // 2], "wrong checksum, the download was damaged or cut short; delete it"),
        (
            b"<!DOCTYPE html>\n<title>Log in",
            "not a zip archive but text that begins with '<!DOCTYPE html> <title>Log in'; delete it",
        ),
        (b'{"message": "rate limited"}', "not a zip archive but text that begins with '{\"message\": .*'; delete it"),
        (b"", "not a zip archive but empty; delete it"),
        (zipped({"cats": b"and dogs"}), r"wrong checksum and no emnist-balanced-\* among its 1 files, so not NIST's.*"),
        (
            zipped({**BALANCED, "more": b""}),
            r"wrong checksum, .*; if you trust it, unpack its emnist-balanced-\* here; else.*",
        ),
        (zipped({f"../../{TRAIN_IMAGES}": IMAGES}), "wrong checksum, so not NIST's archive; if you trust it, .*"),
    ],
)
@pytest.mark.parametrize("folder", ["", "EMNIST", "EMNIST/raw"])
def test_a_found_archive_that_is_not_nists_is_described_and_kept(
    content: bytes, problem: str, folder: str, tmp_path: Path, nist: FakeNist
) -> None:
    archive = tmp_path / folder / "gzip.zip"
    archive.parent.mkdir(parents=True, exist_ok=True)
    archive.write_bytes(content)
    with pytest.raises(InputError, match=f"^{archive}: {problem} and run again$|^{archive}: {problem}$"):
        load("emnist-balanced", tmp_path)
    assert nist.ranges == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


@pytest.mark.parametrize(
    ("content", "kind", "begins"),
    [
        (
            b"<!DOCTYPE html><html>Please log in</html>" * 9,
            "text/html; charset=utf-8",
            "text that begins with '<!DOCTYPE html>",
        ),
        (b'{"error": "quota"}', "application/json", "text that begins with '{"),
        (b"\x1f\x8b\x08\0" * 99, "application/gzip", "begins with the bytes 1f8b0800"),
    ],
)
def test_an_answer_that_is_no_archive_is_described_and_not_kept(
    content: bytes, kind: str, begins: str, tmp_path: Path, nist: FakeNist
) -> None:
    nist.archive, nist.content_type = content, kind
    described = f"did not send a zip archive but {kind.partition(';')[0]} of {len(content)} bytes, {begins}"
    with pytest.raises(InputError, match=f"^http.*gzip.zip {described}.*; get gzip.zip with a browser and put it"):
        load("emnist-balanced", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_partial_file_that_is_no_archive_is_begun_again(tmp_path: Path, nist: FakeNist) -> None:
    load("emnist-balanced", write_files(tmp_path, {"gzip.zip.part": b"<html>"}))
    assert nist.ranges == [None]


def test_a_server_that_continues_elsewhere_is_not_believed(tmp_path: Path, nist: FakeNist) -> None:
    nist.content_range = "bytes 5-99/100"
    write_files(tmp_path, {"gzip.zip.part": ARCHIVE[:1000]})
    with pytest.raises(InputError, match=r"the server continued at another place; it begins again\)"):
        load("emnist-balanced", tmp_path)
    nist.content_range = None
    load("emnist-balanced", tmp_path)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file grow beyond a size, which ends as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_during_the_download_is_no_lost_connection(tmp_path: Path, nist: FakeNist) -> None:
    unfinished = tmp_path / "EMNIST" / "raw" / "gzip.zip.part"
    problem = rf"^cannot write {unfinished} \(File too large\); make room and run again, which continues the download$"
    with room_for(len(ARCHIVE) // 2), pytest.raises(InputError, match=problem):
        load("emnist-balanced", tmp_path)
    load("emnist-balanced", tmp_path)
    assert nist.ranges == [None, f"bytes={len(ARCHIVE) // 2}-"]


def test_without_a_network_the_message_says_which_files_to_put_where(tmp_path: Path, offline: None) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    problem = rf"no emnist-balanced-train-\*-ubyte in {raw} and the download failed \(.*refused\)"
    with pytest.raises(InputError, match=rf"^{problem}; put them there or run again with a network"):
        load("emnist-balanced", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_server_is_reported(tmp_path: Path, nist: FakeNist) -> None:
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


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        InputError, match=r"^cannot write to .*raw, where emnist-balanced files are missing; choose another"
    ):
        load("emnist-balanced", tmp_path)


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, offline: None) -> None:
    write_files(tmp_path, {"gzip.zip": ARCHIVE})
    problem = r"^cannot unpack .*gzip\.zip to .*File too large\); make room or choose another"
    with room_for(len(IMAGES) // 2), pytest.raises(InputError, match=problem):
        load("emnist-balanced", tmp_path)
    assert [path.name for path in (tmp_path / "EMNIST" / "raw").iterdir()] == ["gzip.zip"]
