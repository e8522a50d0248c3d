import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.datasets import EMNIST

from grid.config import InputError
from grid.data import glyphs
from grid.data.dataset import Images, Labels, Split
from grid.data.glyphs import CLASSES, render, render_if_missing
from grid.data.idx import read_pair
from grid.data.sources import idx_files, read_glyphs

SMALL = {"TRAIN_PER_CLASS": 3, "TEST_PER_CLASS": 2}


@pytest.fixture(scope="module")
def sample() -> tuple[Tensor, Tensor]:
    return render(40, seed=5)


@pytest.fixture(scope="module")
def means(sample: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = sample
    return torch.stack([images[labels == index].float().mean(0) for index in range(len(CLASSES))])


@pytest.fixture(scope="module")
def masters() -> Tensor:
    return glyphs._masters()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(glyphs, name, value)


def mean_of(means: Tensor, character: str) -> Tensor:
    return means[CLASSES.index(character)]


def digest(images: Tensor) -> str:
    return sha256(images.numpy().tobytes()).hexdigest()


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_classes_are_those_of_emnist_balanced_in_its_order() -> None:
    assert list(CLASSES) == EMNIST.classes_split_dict["balanced"]


def test_images_are_bytes_of_28_by_28_and_the_classes_are_balanced(sample: tuple[Tensor, Tensor]) -> None:
    images, labels = sample
    assert images.shape == (47 * 40, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [40] * 47


def test_any_prefix_is_balanced_up_to_one_image(sample: tuple[Tensor, Tensor]) -> None:
    counts = sample[1][:100].bincount(minlength=47)
    assert counts.max() - counts.min() == 1


def test_the_same_seed_renders_the_same_bytes() -> None:
    assert digest(render(2, seed=1)[0]) == digest(render(2, seed=1)[0])


def test_another_process_renders_the_same_bytes() -> None:
    written = "sys.stdout.buffer.write(render(2, seed=1)[0].numpy().tobytes())"
    code = f"import sys; from grid.data.glyphs import render; {written}"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert sha256(other.stdout).hexdigest() == digest(render(2, seed=1)[0])


def test_the_number_of_threads_does_not_change_the_bytes() -> None:
    threads = torch.get_num_threads()
    rendered = []
    for count in (1, 2):
        torch.set_num_threads(count)
        rendered.append(digest(render(2, seed=1)[0]))
    torch.set_num_threads(threads)
    assert rendered[0] == rendered[1]


def test_rendering_neither_reads_nor_moves_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = render(1, seed=1)[0]
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(1)
    assert render(1, seed=1)[0].equal(first)


def test_another_seed_renders_other_images() -> None:
    assert not render(1, seed=1)[0].equal(render(1, seed=2)[0])


def test_no_image_occurs_twice_in_train_and_test(tmp_path: Path, small: None) -> None:
    both = torch.from_numpy(np.concatenate([stored(tmp_path, part)[0] for part in ("train", "test")]))
    assert len(both) == 47 * 5
    assert len(both.flatten(1).unique(dim=0)) == len(both)


def test_less_than_one_image_per_class_is_refused() -> None:
    with pytest.raises(InputError, match="glyphs per class must be at least 1, not 0"):
        render(0, seed=1)


@pytest.mark.parametrize("font", range(len(glyphs.FONTS)), ids=glyphs.FONTS)
def test_every_font_draws_every_class_with_a_shape_of_its_own(font: int, masters: Tensor) -> None:
    drawn = masters[:, font].flatten(1)
    apart = torch.cdist(drawn, drawn).fill_diagonal_(torch.inf)
    assert apart.min() > 2.0


def test_every_class_differs_from_every_other_in_its_mean_image(means: Tensor) -> None:
    flat = means.flatten(1) / 255
    apart = torch.cdist(flat, flat).fill_diagonal_(torch.inf)
    assert apart.min() > 1.0


def test_ink_is_white_on_black_and_centred(means: Tensor) -> None:
    average = means.mean(0) / 255
    rows, columns = average.sum(1), average.sum(0)
    position = torch.arange(28) - 13.5
    assert 0.1 < average.mean() < 0.3
    assert abs((rows * position).sum() / rows.sum()) < 1
    assert abs((columns * position).sum() / columns.sum()) < 1


def test_hardly_any_glyph_is_clipped(sample: tuple[Tensor, Tensor]) -> None:
    images = sample[0]
    border = torch.cat([images[:, [0, -1]].flatten(1), images[:, :, [0, -1]].flatten(1)], dim=1)
    assert (border > 127).float().mean() < 0.01


def test_rendered_images_are_upright(means: Tensor) -> None:
    assert_upright(means)


def assert_upright(means: Tensor) -> None:
    low_left = mean_of(means, "L")[14:, :14].sum()
    assert low_left > 2 * mean_of(means, "L")[:14, 14:].sum()
    assert mean_of(means, "T")[:14].sum() > 1.2 * mean_of(means, "T")[14:].sum()
    assert mean_of(means, "7")[:10].sum() > 1.2 * mean_of(means, "7")[18:].sum()


def stored(folder: Path, part: Split = "train") -> tuple[Images, Labels]:
    """Render if necessary, and return the images as they are stored, and the labels."""
    return read_pair(*idx_files(render_if_missing(folder), "glyphs", part), size=glyphs.IMAGE_SIZE)


def test_files_hold_the_rendered_images_transposed_as_those_of_nist(tmp_path: Path, small: None) -> None:
    images, labels = render(3, glyphs.TRAIN_SEED)
    read, classes = stored(tmp_path)
    assert np.array_equal(read.transpose(0, 2, 1), images.numpy())
    assert np.array_equal(classes, labels.numpy())


def test_files_that_are_read_are_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "TRAIN_PER_CLASS", 20)
    read = read_glyphs("glyphs", tmp_path, "train")
    images = torch.from_numpy(read.images.astype(np.float32))
    assert_upright(torch.stack([images[torch.from_numpy(read.labels) == index].mean(0) for index in range(47)]))
    assert read.classes == CLASSES


def test_the_files_have_the_names_and_folders_of_emnist(tmp_path: Path, small: None) -> None:
    folder = render_if_missing(tmp_path)
    assert folder == tmp_path / "Glyphs" / "raw"
    parts = [f"emnist-glyphs-{split}" for split in ("test", "train")]
    assert sorted(modified(folder)) == [f"{p}-{kind}-ubyte" for p in parts for kind in ("images-idx3", "labels-idx1")]


def test_the_files_are_written_once(tmp_path: Path, small: None) -> None:
    before = modified(render_if_missing(tmp_path))
    assert modified(render_if_missing(tmp_path)) == before


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
    ],
    ids=["missing", "truncated", "empty", "zeros"],
)
def test_a_missing_or_damaged_file_is_written_again(
    spoil: Callable[[Path], object], tmp_path: Path, small: None
) -> None:
    images, _ = stored(tmp_path)
    spoil(render_if_missing(tmp_path) / "emnist-glyphs-train-images-idx3-ubyte")
    assert np.array_equal(stored(tmp_path)[0], images)


def test_a_leftover_partial_file_does_no_harm(tmp_path: Path, small: None) -> None:
    leftover = tmp_path / "Glyphs" / "raw" / "emnist-glyphs-train-images-idx3-ubyte.0123.partial"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    assert stored(tmp_path)[0].shape == (47 * 3, 28, 28)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InputError, match=r"cannot write glyphs to .*: No space left on device; choose another folder"):
        render_if_missing(tmp_path)
    assert list((tmp_path / "Glyphs" / "raw").iterdir()) == []


def test_two_processes_at_once_write_whole_files(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from grid.data import glyphs;"
        f"vars(glyphs).update({SMALL}); glyphs.render_if_missing(Path(sys.argv[1]))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    written = tmp_path / "Glyphs" / "raw" / "emnist-glyphs-train-images-idx3-ubyte"
    images = render(SMALL["TRAIN_PER_CLASS"], glyphs.TRAIN_SEED)[0]
    assert written.read_bytes()[16:] == images.transpose(1, 2).contiguous().numpy().tobytes()


def accuracy(model: nn.Module, epochs: int) -> float:
    """Train on 100 images per class with Adam at 1e-3, return the accuracy on 40 others."""
    images, labels = render(100, seed=1)
    held_images, held_labels = render(40, seed=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(128):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            cross_entropy(model(images[batch].flatten(1) / 255), labels[batch]).backward()
            optimizer.step()
    logits = model.eval()(held_images.flatten(1) / 255)
    return float((logits.argmax(1) == held_labels).float().mean())


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())


@pytest.mark.slow
def test_a_linear_model_is_clearly_worse_than_an_mlp() -> None:
    torch.manual_seed(0)
    linear = accuracy(nn.Linear(784, 47), epochs=12)
    mlp = accuracy(nn.Sequential(block(784, 512), block(512, 256), block(256, 128), nn.Linear(128, 47)), epochs=12)
    assert 0.5 < linear < 0.75
    assert 0.82 < mlp < 0.95
