import io
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from helpers.files import StudyError
from helpers.train.data import (
    CIFAR10_CLASSES,
    augment,
    calibration_images,
    check_available,
    load_data,
    load_parquet,
    lossless_test,
    read_parquet,
)


def write_cifar(folder, images, labels, encoding="PNG", columns=("img", "label")):
    folder.mkdir(exist_ok=True)
    cells = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, encoding)
        cells.append({"bytes": buffer.getvalue(), "path": None})
    for part in ("train", "test"):
        pq.write_table(pa.table(dict(zip(columns, [cells, labels], strict=True))), folder / f"{part}-0.parquet")


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)


def test_png_parquet_gives_the_pixels_that_went_in(tmp_path, pictures):
    write_cifar(tmp_path, pictures, [0, 1, 2, 3, 4, 9])
    images, labels, lossy = read_parquet([tmp_path / "test-0.parquet"])
    assert (images == pictures.transpose(0, 3, 1, 2)).all() and labels.tolist() == [0, 1, 2, 3, 4, 9] and not lossy


def test_a_jpeg_copy_is_recognised_as_lossy(tmp_path, pictures):
    write_cifar(tmp_path, pictures, [0] * 6, "JPEG")
    assert read_parquet([tmp_path / "test-0.parquet"])[2]


@pytest.mark.parametrize(
    ("labels", "columns", "said"),
    [([0] * 5 + [10], ("img", "label"), "0 to 9"), ([0] * 6, ("img", "fine_label"), "img and label")],
)
def test_foreign_parquet_ends_in_a_sentence(tmp_path, pictures, labels, columns, said):
    write_cifar(tmp_path, pictures, labels, columns=columns)
    with pytest.raises(StudyError, match=said):
        load_data("cifar10", str(tmp_path), tmp_path / "cache")


def test_truncated_parquet_ends_in_a_sentence(tmp_path, pictures):
    write_cifar(tmp_path, pictures, [0] * 6)
    path = tmp_path / "train-0.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(StudyError, match="not a readable parquet"):
        load_data("cifar10", str(tmp_path), tmp_path / "cache")


def test_a_damaged_torchvision_folder_ends_in_a_sentence(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half a download")
    with pytest.raises(StudyError, match=r"incomplete or damaged.*\(1\)"):
        load_data("cifar10", str(tmp_path), tmp_path / "cache")


def test_torchvision_s_layout_gives_the_pixels_that_went_in(tmp_path, pictures, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {"data": pictures.transpose(0, 3, 1, 2).reshape(6, -1), "labels": [0, 1, 2, 3, 4, 9]}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))
    # Torchvision insists on the checksums of the original files, which these small ones cannot have.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr("helpers.train.data.CIFAR10_VALIDATION", 6)
    dataset = load_data("cifar10", str(tmp_path), tmp_path / "cache")
    assert dataset.name == "cifar10" and (dataset.test.images.numpy() == pictures.transpose(0, 3, 1, 2)).all()
    assert [len(dataset.train), len(dataset.validation), dataset.test.labels.tolist()] == [24, 6, [0, 1, 2, 3, 4, 9]]
    both = torch.cat([dataset.train.labels, dataset.validation.labels])
    assert sorted(both.tolist()) == sorted([0, 1, 2, 3, 4, 9] * 5)  # every image in one of the two


def test_no_data_names_the_three_ways(tmp_path):
    with pytest.raises(StudyError, match=r"\(1\).*\(2\).*\(3\)"):
        check_available("cifar10", str(tmp_path))


def test_the_splits_of_the_digits_are_all_of_them_once_and_the_hash_is_what_it_was():
    first = load_data("digits")
    assert first.sha256 == "7324cda4c4bc6b160a70f12ec8e55068ba8b8cf573f84da0fa1113deb4e5778d"
    assert [len(first.train), len(first.validation), len(first.test)] == [1257, 180, 360]
    images = torch.cat([first.train.images, first.validation.images, first.test.images])
    assert len({image.numpy().tobytes() for image in images}) == len(load_digits().images)
    normalised = first.normalise(first.train.images)
    assert abs(normalised.mean()) < 1e-3 and abs(normalised.std() - 1) < 1e-3


def test_augment_only_shifts_and_mirrors():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.int32).view(2, 3, 8, 8).to(torch.uint8)
    shifted = augment(images, torch.Generator().manual_seed(0), flip=True, pad=0)
    for before, after in zip(images, shifted, strict=True):
        assert torch.equal(before, after) or torch.equal(before.flip(2), after)
    moved = augment(images[:1].expand(200, -1, -1, -1), torch.Generator().manual_seed(0), flip=False, pad=2)
    padded = torch.nn.functional.pad(images[:1].float(), (2, 2, 2, 2), mode="reflect")[0].to(torch.uint8)
    crops = {padded[:, y : y + 8, x : x + 8].numpy().tobytes() for y in range(5) for x in range(5)}
    assert {picture.numpy().tobytes() for picture in moved} == crops


def test_calibration_images_are_the_same_for_the_same_seed():
    dataset = load_data("digits")
    assert torch.equal(calibration_images(dataset, 8, 1), calibration_images(dataset, 8, 1))
    assert not torch.equal(calibration_images(dataset, 8, 1), calibration_images(dataset, 8, 2))


def test_a_damaged_cache_is_made_again(tmp_path, pictures):
    write_cifar(tmp_path, pictures, range(len(pictures)), "PNG")
    before = load_parquet(tmp_path, tmp_path / "cache")[0]
    (cache,) = (tmp_path / "cache").iterdir()
    content = bytearray(cache.read_bytes())
    content[len(content) // 3] ^= 255
    cache.write_bytes(content)
    assert torch.equal(load_parquet(tmp_path, tmp_path / "cache")[0].images, before.images)


def test_lossless_images_find_their_jpeg_versions(tmp_path, pictures):
    smooth = np.repeat(np.repeat(pictures[:, ::16, ::16], 16, 1), 16, 2)  # noise would not survive JPEG
    write_cifar(tmp_path, smooth, [0, 1, 2, 3, 4, 9], "JPEG")
    dataset = load_parquet(tmp_path, tmp_path / "cache")
    copy = SimpleNamespace(test=dataset[1])
    assert lossless_test(copy, str(tmp_path)) is None
    write_cifar(tmp_path / "png", smooth[[4, 2]], [4, 2])
    (tmp_path / "png" / "test-0.parquet").rename(tmp_path / "lossless_test-0.parquet")
    original, lossy = lossless_test(copy, str(tmp_path))
    assert (original.images.numpy() == smooth[[4, 2]].transpose(0, 3, 1, 2)).all()
    assert torch.equal(lossy.images, copy.test.images[[4, 2]]) and not torch.equal(lossy.images, original.images)


@pytest.mark.skipif(not os.environ.get("CIFAR10_ROOT"), reason="CIFAR10_ROOT is not set: no CIFAR-10 to read")
def test_real_cifar10_is_balanced_and_its_cache_gives_the_same_pixels(tmp_path):
    cold, cached = (load_data("cifar10", cache_dir=tmp_path) for _ in range(2))
    assert cold.sha256 == cached.sha256 and [len(cold.train), len(cold.validation), len(cold.test)] == [
        45000,
        5000,
        10000,
    ]
    assert cold.test.labels.bincount().tolist() == [1000] * 10
    normalised = cold.normalise(cold.test.images)
    assert normalised.mean().abs() < 0.1 and (normalised.std() - 1).abs() < 0.1
