"""The images of the study: CIFAR-10 and the digits that come with scikit-learn, in memory as uint8."""

import hashlib
import io
import os
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from helpers.files import StudyError, first_line, path_given, read_arrays, whole_file

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_VALIDATION = 5_000
TRAINING_IMAGES = {"digits": 1_257, "cifar10": 50_000 - CIFAR10_VALIDATION}
DATA_NAMES = tuple(TRAINING_IMAGES)
LOSSLESS = "lossless_test-*.parquet"

THREE_WAYS = (
    "Give CIFAR-10 in one of three ways: (1) set CIFAR10_ROOT or data_dir to a folder that holds torchvision's "
    "cifar-10-batches-py, (2) set it to a folder with the Hugging Face parquet files train-*.parquet and test-*.parquet, "
    "or (3) leave both unset on a machine with network, and torchvision downloads it."
)


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, 3, 32, 32] and their labels int64 [N], 0 to 9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int) -> "Split":
        """The first `n` images (all of them when there are fewer)."""
        return Split(self.images[:n], self.labels[:n])


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits and what a reader must know of them.

    name: the copy of the data (`cifar10-jpeg` is not `cifar10`). sha256: of the decoded pixels and labels, see `pixels_sha256`.
    mean, std: per channel, of pixels scaled to [0, 1]. flip: whether a mirrored image is still the same class.
    """

    name: str
    sha256: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool
    train: Split
    validation: Split
    test: Split

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels uint8 [N, 3, 32, 32] to float32 of the same shape, zero mean and unit variance by channel."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1) * 255
        return (images.float() - mean) / std


def load_data(name: str, data_dir: str = "", cache_dir: Path = Path("runs/cache"), limit: int = 0) -> Dataset:
    """Load a data set by name.

    name: one of DATA_NAMES. data_dir: where CIFAR-10 lies; empty means the environment variable CIFAR10_ROOT, and when
    that is empty too, torchvision's download into `cache_dir`. limit: keep only that many images of each split, 0 for
    all; the name then says so. Raises StudyError for an unknown name and for data that is missing or damaged.
    """
    if name == "digits":
        dataset = _digits()
    elif name == "cifar10":
        dataset = _cifar10(data_dir, Path(cache_dir))
    else:
        raise StudyError(f"data is {name!r}; allowed are {', '.join(DATA_NAMES)}.")
    if limit:
        splits = {part: getattr(dataset, part).first(limit) for part in ("train", "validation", "test")}
        dataset = replace(dataset, name=f"{dataset.name}-first{limit}", **splits)
    return dataset


def calibration_images(dataset: Dataset, n: int, seed: int) -> Tensor:
    """Draw `n` training images without augmentation: float32 [n, 3, 32, 32], normalised. The same seed gives the same images.

    Raises StudyError when there are fewer than `n` training images.
    """
    if not 1 <= n <= len(dataset.train):
        raise StudyError(f"calibration_images is {n}; {dataset.name} allows 1 to {len(dataset.train)}.")
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(seed))
    return dataset.normalise(dataset.train.images[order[:n]])


def augment(images: Tensor, generator: torch.Generator, flip: bool, pad: int = 4) -> Tensor:
    """Shift each image by up to `pad` pixels, the border reflected, and mirror half of them if `flip`.

    images: uint8 [N, 3, H, W], any device; returns the same. Drawn for all images at once; `generator` lives on the CPU.
    """
    n, _, height, width = images.shape

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (n, 1), generator=generator).to(images.device)

    def shifted(size: int) -> Tensor:
        index = (torch.arange(size, device=images.device) + draw(-pad, pad + 1)).abs()
        return torch.where(index >= size, 2 * (size - 1) - index, index)

    rows, columns = shifted(height), shifted(width)
    if flip:
        columns = torch.where(draw(0, 2).bool(), columns.flip(1), columns)
    picture = torch.arange(n, device=images.device).view(n, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
    return images[picture, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


def pixels_sha256(train: Split, test: Split) -> str:
    """SHA-256 over train images, train labels, test images, test labels: C-order bytes, uint8 [N, 3, 32, 32] and int64 [N]."""
    digest = hashlib.sha256()
    for tensor in (train.images, train.labels, test.images, test.labels):
        digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()


def check_available(name: str, data_dir: str = "") -> None:
    """Raise StudyError now if a folder is given that does not hold `name`. Reads no pixels; what must be downloaded is not tried."""
    if name == "cifar10":
        find_cifar10(data_dir)


def _shuffled(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def _digits() -> Dataset:
    """The 1,797 real 8x8 digits of scikit-learn (UCI, Alpaydin and Kaynak 1998), enlarged to 32x32 RGB: 1,257 / 180 / 360."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    large = torch.nn.functional.interpolate(small, size=32, mode="bilinear", align_corners=False)
    images = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(bunch.target).long()
    order = _shuffled(len(labels))
    images, labels = images[order], labels[order]
    ends = pairwise((0, TRAINING_IMAGES["digits"], 1437, len(labels)))
    train, validation, test = (Split(images[a:b], labels[a:b]) for a, b in ends)
    pixels = train.images.double() / 255
    mean, std = float(pixels.mean()), float(pixels.std())
    both = Split(torch.cat([train.images, validation.images]), torch.cat([train.labels, validation.labels]))
    return Dataset(
        "digits",
        pixels_sha256(both, test),
        tuple("0123456789"),
        (mean,) * 3,
        (std,) * 3,
        False,
        train,
        validation,
        test,
    )


def _cifar10(data_dir: str, cache_dir: Path) -> Dataset:
    kind, folder = find_cifar10(data_dir)
    if kind == "parquet":
        train, test, name = load_parquet(folder, cache_dir)
    else:
        train, test, name = _torchvision(folder or cache_dir, download=folder is None)
    if len(train) <= CIFAR10_VALIDATION:
        raise StudyError(
            f"{folder} has {len(train)} training images; more than {CIFAR10_VALIDATION} are needed. {THREE_WAYS}"
        )
    order = _shuffled(len(train))
    held_out, kept = order[:CIFAR10_VALIDATION], order[CIFAR10_VALIDATION:]
    return Dataset(
        name,
        pixels_sha256(train, test),
        CIFAR10_CLASSES,
        CIFAR10_MEAN,
        CIFAR10_STD,
        True,
        Split(train.images[kept], train.labels[kept]),
        Split(train.images[held_out], train.labels[held_out]),
        test,
    )


def find_cifar10(data_dir: str) -> tuple[str, Path | None]:
    """Where CIFAR-10 comes from: ("torchvision" or "parquet", folder), or ("torchvision", None) for a download.

    data_dir: the folder to look in; empty: that of the environment variable CIFAR10_ROOT. Raises StudyError when a folder is
    given and holds neither form.
    """
    given = data_dir or os.environ.get("CIFAR10_ROOT", "")
    if not given:
        return "torchvision", None
    root = path_given(given)
    if (root / "cifar-10-batches-py").is_dir():
        return "torchvision", root
    for folder in (root, root / "plain_text"):
        if any(folder.glob("train-*.parquet")) and any(folder.glob("test-*.parquet")):
            return "parquet", folder
    raise StudyError(f"No CIFAR-10 in {given!r} (from {'data_dir' if data_dir else 'CIFAR10_ROOT'}). {THREE_WAYS}")


def _torchvision(root: Path, download: bool) -> tuple[Split, Split, str]:
    from torchvision.datasets import CIFAR10

    try:
        with FileLock(root / ".lock") if download else nullcontext():  # two notebooks may ask at once
            parts = [CIFAR10(root, train=train, download=download) for train in (True, False)]
    except Exception as error:  # torchvision raises whatever its download or its pickle reader raised
        what = "could not be downloaded" if download else f"in {str(root)!r} is incomplete or damaged"
        raise StudyError(f"CIFAR-10 {what} ({first_line(error)}). {THREE_WAYS}") from error
    train, test = (
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return train, test, "cifar10"


def load_parquet(folder: Path, cache_dir: Path) -> tuple[Split, Split, str]:
    """Decode the parquet files once; later calls read the decoded arrays from `cache_dir`, keyed by path, size and time."""
    files = {part: sorted(folder.glob(f"{part}-*.parquet")) for part in ("train", "test")}
    key = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for fs in files.values() for f in fs])
    cache = cache_dir / f"cifar10-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    with suppress(StudyError):  # missing or damaged
        return _decoded(cache)
    arrays: dict[str, np.ndarray] = {}
    lossy = False
    for part, paths in files.items():
        arrays[f"{part}_images"], arrays[f"{part}_labels"], jpeg = read_parquet(paths)
        lossy |= jpeg
    arrays["name"] = np.array("cifar10-jpeg" if lossy else "cifar10")
    with whole_file(cache) as aside:
        np.savez(aside, **arrays)
    return _decoded(cache)


def _decoded(cache: Path) -> tuple[Split, Split, str]:
    stored = read_arrays(cache)
    train, test = (
        Split(torch.from_numpy(stored[f"{part}_images"]), torch.from_numpy(stored[f"{part}_labels"]))
        for part in ("train", "test")
    )
    return train, test, str(stored["name"])


def lossless_test(dataset: Dataset, data_dir: str = "") -> tuple[Split, Split] | None:
    """Original test images that lie beside a JPEG copy (lossless_test-*.parquet), and the copy's versions of the same images.

    Returns (original, copy), paired by nearest pixels within a class; images that `dataset` does not hold are left out.
    None when there is no such file or nothing in it matches.
    """
    kind, folder = find_cifar10(data_dir)
    files = [] if folder is None else sorted({*folder.glob(LOSSLESS), *folder.parent.glob(LOSSLESS)})
    if kind != "parquet" or not files:
        return None
    images, labels, _ = read_parquet(files)
    original = Split(torch.from_numpy(images), torch.from_numpy(labels))
    distance = torch.cdist(original.images.flatten(1).float(), dataset.test.images.flatten(1).float())
    distance[original.labels[:, None] != dataset.test.labels[None]] = torch.inf
    nearest = distance.min(1)
    same = nearest.values.square() / images[0].size < 255**2 / 10 ** (20 / 10)  # 20 dB: far below what a JPEG loses
    if not same.any():
        return None
    chosen = nearest.indices[same]
    copy = Split(dataset.test.images[chosen], dataset.test.labels[chosen])
    return Split(original.images[same], original.labels[same]), copy


def read_parquet(paths: list[Path]) -> tuple[np.ndarray, np.ndarray, bool]:
    """Decode files in the Hugging Face layout: columns `img` (struct with encoded `bytes`) and `label` (int 0 to 9).

    Returns images uint8 [N, 3, 32, 32], labels int64 [N], and whether any image was stored as JPEG (lossy).
    Raises StudyError for a file that is truncated, has other columns, other image sizes or labels outside 0 to 9.
    """
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    images, labels, lossy = [], [], False
    for path in paths:
        try:
            table = pyarrow.parquet.read_table(path)
        except Exception as error:  # Arrow's own, and what damaged text makes Python raise
            raise StudyError(f"{path} is not a readable parquet file ({first_line(error)}). {THREE_WAYS}") from error
        if not {"img", "label"} <= set(table.column_names):
            raise StudyError(f"{path} has the columns {table.column_names}; CIFAR-10 needs img and label. {THREE_WAYS}")
        try:
            part = table["label"].to_numpy().astype(np.int64)
        except Exception as error:
            raise StudyError(f"{path} has labels that are no numbers ({first_line(error)}). {THREE_WAYS}") from error
        if not len(part):
            raise StudyError(f"{path} has no rows. {THREE_WAYS}")
        if not 0 <= part.min() <= part.max() <= 9:
            raise StudyError(f"{path} has labels from {part.min()} to {part.max()}; CIFAR-10 has 0 to 9. {THREE_WAYS}")
        labels.append(part)
        for row, cell in enumerate(table["img"].to_pylist()):
            try:
                lossy |= cell["bytes"][:2] == b"\xff\xd8"
                picture = np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
            except Exception as error:  # each format of pictures has its own
                why = f"the image cannot be decoded ({first_line(error)})"
                raise StudyError(f"{path}, row {row}: {why}. {THREE_WAYS}") from error
            if picture.shape != (32, 32, 3):
                raise StudyError(
                    f"{path}, row {row}: the image is {picture.shape[:2]}; CIFAR-10 has (32, 32). {THREE_WAYS}"
                )
            images.append(picture)
    return np.stack(images).transpose(0, 3, 1, 2).copy(), np.concatenate(labels), lossy
