"""Pictures of your own: a folder of image files as the splits that the study calibrates and scores with."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from helpers.files import StudyError, first_line, path_given, refused
from helpers.train.data import Dataset, Split

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
THE_FOLDER = (
    f"Give a folder with image files ({', '.join(SUFFIXES)}), or one with a subfolder of them for each class, "
    "and nothing but subfolders then."
)


def load_pictures(folder: str, size: int, most: int, seed: int, mean: Sequence[float], std: Sequence[float]) -> Dataset:
    """Read image files of any size and mode: `train` to calibrate with, `test` to score, each image in one of them.

    folder: image files, or subfolders that are the classes, in the order of their names. size: height and width that the
    model takes, see `fitted`. most: images in all, drawn by `seed`; a third of them, at least one, is scored. mean, std: per
    channel, of pixels scaled to [0, 1]. Without subfolders `classes` is empty and labels are 0. Raises StudyError for a
    folder that is missing, empty or has images beside its subfolders, for fewer than two images, and for a file that is no
    picture.
    """
    files, classes = picture_files(folder)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:most]
    chosen = [files[index] for index in order]
    images = torch.from_numpy(np.ascontiguousarray(np.stack([fitted(path, size) for path, _ in chosen])))
    labels = torch.tensor([label for _, label in chosen])
    digest = hashlib.sha256(images.numpy().data)
    digest.update(labels.numpy().data)
    scored = max(1, len(chosen) // 3)
    test, train = (Split(images[a:b], labels[a:b]) for a, b in ((0, scored), (scored, len(chosen))))
    name = f"{Path(folder).resolve().name}-{size}"
    none = Split(images[:0], labels[:0])
    return Dataset(name, digest.hexdigest(), classes, tuple(mean), tuple(std), False, train, none, test)


def picture_files(folder: str) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """The image files of a folder with their labels, and the classes: the names of its subfolders. Raises StudyError."""
    root = path_given(folder)
    if not root.is_dir():
        raise StudyError(f"images is {folder!r}, which is no folder. {THE_FOLDER}")
    with refused(f"images is {folder!r}, which cannot be read. {THE_FOLDER}"):
        beside = _pictures_in(root.iterdir())
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        inside = [_pictures_in(path.rglob("*")) for path in folders]
    if beside and any(inside):
        raise StudyError(f"{folder} has images beside the folders of its classes ({beside[0].name}). {THE_FOLDER}")
    if empty := [path.name for path, found in zip(folders, inside, strict=True) if any(inside) and not found]:
        raise StudyError(f"{folder} has a folder without images ({empty[0]}). {THE_FOLDER}")
    files = [(path, 0) for path in beside] or [(path, label) for label, of in enumerate(inside) for path in of]
    if len(files) < 2:
        raise StudyError(f"{folder} has {len(files)} images; at least two are needed. {THE_FOLDER}")
    return files, tuple(path.name for path in folders) if any(inside) else ()


def _pictures_in(paths) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith("."))


def fitted(path: Path, size: int) -> np.ndarray:
    """One image file as uint8 [3, size, size]: RGB, the shorter side scaled to `size`, the middle cut out.

    Transparent pixels keep their colour. Raises StudyError for a file that is no whole picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            if picture.mode.startswith("I;16"):  # which Pillow would clip, not scale
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            upright = ImageOps.exif_transpose(picture).convert("RGB")
            return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    except Exception as error:  # each format has its own
        raise StudyError(f"{path} is no whole picture ({first_line(error)}); take it out of the folder.") from error


def resized(dataset: Dataset, size: int, most: int, mean: Sequence[float], std: Sequence[float]) -> Dataset:
    """The study's images at another size and normalised otherwise, as a model of yours takes them; the first `most` of each split."""

    def larger(images: Tensor) -> Tensor:
        if images.shape[-1] == size:
            return images
        scaled = torch.nn.functional.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
        return scaled.round().to(torch.uint8)

    splits = {
        part: Split(larger(split.first(most).images), split.first(most).labels)
        for part in ("train", "validation", "test")
        for split in (getattr(dataset, part),)
    }
    return replace(dataset, mean=tuple(mean), std=tuple(std), **splits)
