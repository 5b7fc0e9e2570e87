"""CIFAR-10 from disk: `cifar10_jpeg.npz`, or a folder with the python batches. Pickles may hold arrays and nothing else.

cifar10_jpeg.npz holds jpeg: uint8, the JPEG files one after another; offsets: int64 ``[count + 1]``; labels: uint8
``[count]``; n_train: how many of them, from the first, are for training.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nm_compiler.errors import NMError

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]
_SIDE = 32
_WAY_OUT = "--data takes cifar10_jpeg.npz, or the folder with data_batch_1 to data_batch_5 and test_batch"


def load(path: str | Path, limit: int | None = None) -> Arrays:
    """Returns training images uint8 ``[count, 3, 32, 32]``, their labels int64, and the same of the test.

    limit: how many training images, and at most how many test images, from the first. Raises NMError for a path that
    cannot be read.
    """
    place = Path(path)
    if not place.exists():
        raise NMError(f"{place}: no such file or folder. {_WAY_OUT}")
    if place.is_dir():
        return _from_batches(place, limit)
    if place.suffix != ".npz":
        raise NMError(f"{place} is neither a .npz file nor a folder. {_WAY_OUT}")
    return _from_npz(place, limit)


def _from_npz(path: Path, limit: int | None) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as archive:
            jpeg, offsets, labels = (archive[name] for name in ("jpeg", "offsets", "labels"))
            split = int(archive["n_train"])
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise NMError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as cifar10_jpeg.npz: {error}. It is truncated, damaged or "
            "another file: fetch it again"
        ) from error
    count = len(labels)
    if offsets.shape != (count + 1,) or (np.diff(offsets) <= 0).any() or offsets[0] < 0 or offsets[-1] > len(jpeg):
        raise NMError(f"{path}: {count} labels and {len(jpeg)} JPEG bytes do not fit its offsets: fetch the file again")
    if not 0 < split < count:
        raise NMError(f"{path}: n_train={split} of {count} images leaves no training or no test images: fetch the file again")
    used = min(split, limit or split)
    chosen = [*range(used), *range(split, min(count, split + (limit or count)))]
    images = np.empty((len(chosen), _SIDE, _SIDE, 3), np.uint8)
    for row, index in enumerate(chosen):
        images[row] = _decoded(jpeg[offsets[index] : offsets[index + 1]].tobytes(), path, index)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    kept = torch.from_numpy(labels[chosen].astype(np.int64))
    return pixels[:used], kept[:used], pixels[used:], kept[used:]


def _decoded(jpeg: bytes, path: Path, index: int) -> np.ndarray[Any, Any]:
    from PIL import Image

    try:
        image = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise NMError(f"{path}: image {index} ({len(jpeg)} bytes) is no readable JPEG: fetch the file again") from error
    if image.shape != (_SIDE, _SIDE, 3):
        raise NMError(f"{path}: image {index} is {image.shape[1]}x{image.shape[0]}, CIFAR-10's are {_SIDE}x{_SIDE}")
    return image


def _from_batches(folder: Path, limit: int | None) -> Arrays:
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    names = [f"data_batch_{number}" for number in range(1, 6)]
    missing = [name for name in (*names, "test_batch") if not (folder / name).is_file()]
    if missing:
        raise NMError(f"{folder} lacks {', '.join(missing)}. {_WAY_OUT}")
    parts = [_batch(folder / name) for name in names]
    train, labels = (torch.cat(tensors)[:limit] for tensors in zip(*parts, strict=True))
    test, wanted = _batch(folder / "test_batch")
    return train, labels, test[:limit], wanted[:limit]


def _batch(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        pixels = torch.from_numpy(np.array(batch[b"data"], dtype=np.uint8))
        labels = torch.tensor(batch[b"labels"], dtype=torch.int64)
        return pixels.view(len(labels), 3, _SIDE, _SIDE), labels
    except Exception as error:
        size = path.stat().st_size
        raise NMError(f"{path} ({size} bytes) is no CIFAR-10 python batch: {error!r}. Unpack the archive again") from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers; any other class is refused before it can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            import _codecs

            return _codecs.encode
        raise pickle.UnpicklingError(f"{module}.{name} has no business in a CIFAR-10 batch")
