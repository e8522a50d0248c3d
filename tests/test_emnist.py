import gzip
import hashlib
import io
import os
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
from torchvision.datasets import EMNIST

from grid.config import InputError
from grid.data.load import load, load_test
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


IMAGES, LABELS = BALANCED[TRAIN_IMAGES], BALANCED[TRAIN_LABELS]
COUNT = CLASS_COUNT * TRAIN_PER_CLASS


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        (TRAIN_IMAGES, LABELS, "not an IDX file, it begins with 00000801 and not 00000803; delete it"),
        (TRAIN_LABELS, b"<html>", "not an IDX file, it begins with 3c68746d and not 00000801; delete it"),
        (TRAIN_IMAGES, b"", "truncated, 0 bytes are less than a header; delete it"),
        (TRAIN_IMAGES, IMAGES[:10], "truncated, 10 bytes are less than a header; delete it"),
        (TRAIN_IMAGES, IMAGES[:-1], "truncated, 442191 bytes where its header declares 442192; delete it"),
        (TRAIN_LABELS, LABELS + b"\0", "too long, 573 bytes where its header declares 572; delete it"),
        (TRAIN_LABELS, idx_bytes(np.zeros(COUNT - 1)), "563 labels for 564 images; delete both files"),
        (TRAIN_IMAGES, idx_bytes(np.zeros((COUNT, 28, 32))), "the images are 28x32, not 28x28; delete it"),
        (TRAIN_LABELS, idx_bytes(np.full(COUNT, 47)), r"label 47 is outside 0\.\.46; delete it"),
    ],
)
def test_a_damaged_file_is_named_with_its_problem_and_a_hint(
    file: str, content: bytes, problem: str, data_dir: Path, raw: Path
) -> None:
    (raw / file).write_bytes(content)
    with pytest.raises(InputError, match=f"^{raw / file}: {problem} and run again$"):
        load("emnist-balanced", data_dir)
    assert {path.name for path in raw.iterdir()} == set(BALANCED)


@pytest.mark.parametrize("label", [0, 27])
def test_a_wrong_label_of_letters_is_reported_as_in_the_file(label: int, tmp_path: Path) -> None:
    files = made_files("letters", 26, first_label=1)
    files["emnist-letters-train-labels-idx1-ubyte"] = idx_bytes(np.full(26 * TRAIN_PER_CLASS, label))
    with pytest.raises(InputError, match=rf"label {label} is outside 1\.\.26; delete it"):
        load("emnist-letters", write_files(tmp_path, files))


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


def test_downloaded_files_equal_those_of_the_archive(tmp_path: Path, data_dir: Path, nist: FakeNist) -> None:
    fetched, present = load("emnist-balanced", tmp_path / "new"), load("emnist-balanced", data_dir)
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


def test_a_found_archive_with_a_wrong_checksum_is_named_and_kept(tmp_path: Path, nist: FakeNist) -> None:
    write_files(tmp_path, {"gzip.zip": ARCHIVE[:-1]})
    with pytest.raises(InputError, match=r"raw/gzip\.zip: wrong checksum, .*; delete it and run again$"):
        load("emnist-balanced", tmp_path)
    assert nist.ranges == []


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


def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", refuse)
    with pytest.raises(InputError, match=r"^cannot unpack .*gzip\.zip to .*No space left on device\); make room"):
        load("emnist-balanced", write_files(tmp_path, {"gzip.zip": ARCHIVE}))
    assert [path.name for path in (tmp_path / "EMNIST" / "raw").iterdir()] == ["gzip.zip"]
