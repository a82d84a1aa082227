"""The data: from files to one uint8 tensor, and from there to augmented batches on the device.

    python data.py                                # Tiny ImageNet: downloads it, decodes it, says what is in it
    python data.py --dataset shapes               # the built-in data set, no download
    python data.py --export-coco boxes.json       # its bounding boxes as a COCO file, for coco_analysis.py

prints the number of images, classes and images per split, and writes samples.png, a picture of five classes.
"""
import argparse
import functools
import hashlib
import http.client
import json
import math
import os
import socket
import sys
import tempfile
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets.utils import download_url, extract_archive

matplotlib.use("Agg")  # draw into files; there may be no screen

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FOLDER = "tiny-imagenet-200"
SIZE = 64                             # every image is SIZE x SIZE pixels
MEAN, STD = (0.480, 0.448, 0.398), (0.277, 0.269, 0.282)  # of Tiny ImageNet's red, green and blue, in [0, 1]


class DataError(Exception):
    """Something is wrong with the data, in words for the user: the file, the place and the cure."""


class Dataset(NamedTuple):
    name: str
    images: torch.Tensor        # (N, 3, 64, 64) uint8
    labels: torch.Tensor        # (N,) int64, 0 ... number of classes - 1
    boxes: torch.Tensor         # (N, 4) int64: x0, y0, x1, y1 of the object in pixels; x1 and y1 lie just outside it
    official_val: torch.Tensor  # (N,) bool: belongs to the official validation set
    wnids: list                 # label -> WordNet id, n01443537
    class_names: list           # label -> name, goldfish


def load(name="tiny-imagenet", data_dir="data", seed=0, classes=None):
    """The data set of that name, or only its first so many classes. Raises DataError.

    "shapes" is drawn from seed; "tiny-imagenet" is looked for in data_dir, and downloaded if it is not there.
    """
    dataset = shapes(seed) if name == "shapes" else tiny_imagenet(Path(data_dir))
    if classes is None or classes >= len(dataset.class_names):
        return dataset
    kept = dataset.labels < classes
    columns = (column[kept] for column in dataset[1:5])
    return Dataset(name, *columns, dataset.wnids[:classes], dataset.class_names[:classes])


def split(dataset, kind="70-30", seed=0):
    """Indices of the training and of the validation images, two int64 tensors.

    "70-30" takes 70 % of each class at random (385 of its 550 images), fixed by seed: the assignment's split, made fair
    to every class. "official" is the data set's own, 100,000 and 10,000 images: the one that papers report.
    """
    if kind == "official":
        return torch.where(~dataset.official_val)[0], torch.where(dataset.official_val)[0]
    generator = torch.Generator().manual_seed(seed)
    train, val = [], []
    for label in range(len(dataset.class_names)):
        members = torch.where(dataset.labels == label)[0]
        members = members[torch.randperm(len(members), generator=generator)]
        count = round(0.7 * len(members))
        train.append(members[:count])
        val.append(members[count:])
    return torch.cat(train), torch.cat(val)


def shuffled(indices):
    """The indices (N,) in a random order, the same in every call, so that pictures and figures can be compared."""
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]


# ---------------------------------------------------------------------------------------------------------------------
# Tiny ImageNet: download, check, decode, cache


def tiny_imagenet(data_dir):
    folder = find_or_download(data_dir)
    wnids, names, files = list_files(folder)
    try:
        stats = [os.stat(path) for path, *_ in files]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}: extract the zip file again") from error
    # The cache is valid for exactly these files: their names, sizes and times of change.
    state = [(os.path.basename(path), stat.st_size, stat.st_mtime_ns, *known)
             for (path, *known), stat in zip(files, stats)]
    fingerprint = hashlib.sha256(repr((wnids, names, state)).encode()).hexdigest()
    cache = data_dir / f"{FOLDER}.pt"
    try:
        # mmap: pages of the 1.4 GB are read when they are touched, and shared between processes.
        saved = torch.load(cache, mmap=True, weights_only=True)
        if saved["fingerprint"] == fingerprint:
            return Dataset("tiny-imagenet", *(saved[key] for key in Dataset._fields[1:5]), wnids, names)
        print(f"{cache}: made from another state of {folder}; decoding anew", file=sys.stderr)
    except FileNotFoundError:
        pass
    except Exception:  # whatever is wrong with a cache, the cure is to make it again
        print(f"{cache}: cannot be read; decoding anew", file=sys.stderr)

    images = torch.from_numpy(decode([path for path, *_ in files]))
    labels, boxes, official_val = (torch.tensor(column) for column in zip(*(row[1:] for row in files)))
    dataset = Dataset("tiny-imagenet", images, labels, boxes, official_val, wnids, names)
    for leftover in data_dir.glob(f".{cache.name}.*"):  # of a process that was killed while it wrote its 1.4 GB
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3600:  # else another process may be writing it now
                leftover.unlink()
    try:
        with replacing(cache) as temporary:
            torch.save({"fingerprint": fingerprint, **{key: getattr(dataset, key) for key in Dataset._fields[1:5]}},
                       temporary)
    except DataError as error:
        print(f"{error}; going on without, the next start decodes again", file=sys.stderr)
    return dataset


def find_or_download(data_dir):
    """The data set's folder: as it is, or out of the zip file, or out of the internet. Raises DataError."""
    folder, archive = data_dir / FOLDER, data_dir / f"{FOLDER}.zip"
    if folder.is_dir():
        return folder
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            download(archive)
        print(f"extracting {archive} ...", file=sys.stderr)
        # Into a temporary folder first: what is called tiny-imagenet-200 is always the whole of it.
        with tempfile.TemporaryDirectory(dir=data_dir) as temporary:
            extract_archive(archive, temporary)
            os.replace(Path(temporary) / FOLDER, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, FileNotFoundError) as error:
        raise DataError(f"{archive}: not the whole zip file ({error}): delete it and start again") from error
    except OSError as error:
        raise DataError(f"{data_dir}: cannot be written ({error}): name another folder with --data-dir") from error
    return folder


def download(archive):
    part = archive.with_suffix(".zip.part")
    socket.setdefaulttimeout(60)  # a server that falls silent is an error, not an endless wait
    try:
        print(f"downloading {URL}", file=sys.stderr)
        download_url(URL, str(part.parent), part.name, MD5)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{URL}: download failed ({error}): put the file at {archive} yourself, or try "
                        "`python train.py --dataset shapes`, which needs none") from error
    os.replace(part, archive)


def list_files(folder):
    """Reads the folder's text files, which list its images, each with what is known of it; opens no image yet.

    Returns wnids and names (label -> wnid, label -> name) and rows of (path, label, box, is it official val).
    Raises DataError that names the file and the line.
    """
    wnids = sorted(line[0] for line in read_table(folder / "wnids.txt", 1))
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    words = {wnid: names for wnid, names in read_table(folder / "words.txt", 2)}
    missing = [wnid for wnid in wnids if wnid not in words]
    if missing:
        raise DataError(f"{folder / 'words.txt'}: no line for {missing[0]}: extract the zip file again")
    # "German shepherd, German shepherd dog, ...": the first synonym will do, unless two classes have the same.
    first = [words[wnid].split(",")[0] for wnid in wnids]
    names = [name if first.count(name) == 1 else words[wnid] for wnid, name in zip(wnids, first)]

    rows = []
    for wnid in wnids:
        images, table = folder / "train" / wnid / "images", folder / "train" / wnid / f"{wnid}_boxes.txt"
        rows += [(os.path.join(images, name), label_of[wnid], box(table, numbers), False)
                 for name, *numbers in sorted(read_table(table, 5))]
    images, table = folder / "val" / "images", folder / "val" / "val_annotations.txt"
    for name, wnid, *numbers in sorted(read_table(table, 6)):
        if wnid not in label_of:
            raise DataError(f"{table}: {name} is of class {wnid}, which is not in wnids.txt")
        rows.append((os.path.join(images, name), label_of[wnid], box(table, numbers), True))

    for part, is_val in (("train", False), ("val", True)):
        counts = np.bincount([row[1] for row in rows if row[3] == is_val], minlength=len(wnids))
        if not counts.any():
            raise DataError(f"{folder / part}: its text files name no images: extract the zip file again")
        usual = np.bincount(counts).argmax()
        for label in np.flatnonzero(counts != usual)[:1]:
            raise DataError(f"{folder / part}: class {wnids[label]} ({names[label]}) has {counts[label]} images, "
                            f"the others have {usual}: extract the zip file again")
    return wnids, names, rows


def read_table(path, columns):
    """The tab-separated rows of a text file, each with that many columns. Raises DataError with the line's number."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: extract the zip file again") from error
    rows = []
    for number, line in enumerate(lines, 1):
        fields = line.strip().split("\t")
        if len(fields) == columns:
            rows.append(fields)
        elif line.strip():
            raise DataError(f"{path}, line {number}: {len(fields)} columns instead of {columns}: {line.strip()[:60]!r}")
    return rows


def box(path, numbers):
    """x0, y0, x1, y1 from four texts. The files name the last pixel inside: 0 0 63 63 is the whole image."""
    with suppress(ValueError):
        x0, y0, x1, y1 = (int(number) for number in numbers)
        if 0 <= x0 <= x1 < SIZE and 0 <= y0 <= y1 < SIZE:
            return x0, y0, x1 + 1, y1 + 1
    shown = " ".join(numbers)[:60]
    raise DataError(f"{path}: a box of {shown!r}: must be left, top, right, bottom in 0 ... {SIZE - 1}")


def decode(paths):
    """Decodes images into one array (N, 3, 64, 64) uint8, grey ones to RGB. Raises DataError naming a bad file."""
    def one(path):
        try:
            with Image.open(path) as image:
                if image.size != (SIZE, SIZE):
                    raise DataError(f"{path}: {image.width}x{image.height} pixels instead of {SIZE}x{SIZE}")
                return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except (OSError, Image.DecompressionBombError) as error:  # no image, half of one, or one of an absurd size
            raise DataError(f"{path}: does not decode ({error}): extract the zip file again") from error

    images = np.empty((len(paths), 3, SIZE, SIZE), np.uint8)
    progress = Progress()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock, so threads help
        for index, image in enumerate(pool.map(one, paths)):
            images[index] = image
            if progress.due():
                progress.show(f"decoded {index:,} of {len(paths):,} images")
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: a data set for trying everything without a download

# Each shape is the set of points (u, v) in [-1, 1]^2, v pointing down, for which the function is true.
SHAPES = {
    "circle": lambda u, v: u**2 + v**2 < 0.8,
    "ring": lambda u, v: (u**2 + v**2 < 0.9) & (u**2 + v**2 > 0.35),
    "crescent": lambda u, v: (u**2 + v**2 < 1) & ((u - 0.5)**2 + v**2 > 0.65),
    "half disc": lambda u, v: (u**2 + (v + 0.4)**2 < 1) & (v > -0.4),
    "triangle": lambda u, v: (v < 0.5) & (1.73 * np.abs(u) - v < 1),
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.75,
    "bar": lambda u, v: (np.abs(u) < 1) & (np.abs(v) < 0.28),
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.27) & (np.maximum(np.abs(u), np.abs(v)) < 1),
    "flower": lambda u, v: np.hypot(u, v) < 0.6 + 0.4 * np.cos(5 * np.arctan2(v, u)),
    "hourglass": lambda u, v: (np.abs(u) < np.abs(v)) & (np.abs(v) < 0.9),
}


def shapes(seed=0, per_class=550):
    """Draws per_class images of each of the ten SHAPES, another data set for each seed, in about three seconds.

    Colour, texture, size, place, rotation and background are drawn in the same way for every class, so nothing but the
    shape gives the class away.
    """
    rng = np.random.default_rng(seed)
    pixel = np.arange(SIZE) + 0.5
    count = per_class * len(SHAPES)
    labels = np.arange(count) % len(SHAPES)
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    boxes = np.empty((count, 4), np.int64)
    for index, label in enumerate(labels):
        radius, angle = rng.uniform(10, 16), rng.uniform(-0.5, 0.5)
        # This beta distribution prefers the edges: to point at the middle of the image is to miss the shape.
        x, y = radius + (SIZE - 2 * radius) * rng.beta(0.5, 0.5, 2)
        dx, dy = (pixel[None, :] - x) / radius, (pixel[:, None] - y) / radius
        inside = list(SHAPES.values())[label](np.cos(angle) * dx + np.sin(angle) * dy,
                                              np.cos(angle) * dy - np.sin(angle) * dx)
        # Any colours, but the shape is the lighter one: it is easily found, and what takes learning is its form.
        colour, background = rng.uniform(160, 255, (3, 1, 1)), rng.uniform(0, 90, (3, 1, 1))
        tiles = rng.normal(0, 8, (3, 8, 8)).repeat(8, axis=1).repeat(8, axis=2)
        image = np.where(inside, colour + stripes(rng, pixel), background + stripes(rng, pixel) + tiles)
        images[index] = (image + rng.normal(0, 5, image.shape)).clip(0, 255)
        columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
        boxes[index] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    names = list(SHAPES)
    return Dataset("shapes", torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(boxes),
                   torch.arange(count) >= 500 * count // 550, names, names)


def stripes(rng, pixel):
    """A wave of random direction, width and strength, the same in all colours: (1, 64, 64)."""
    kx, ky = rng.uniform(-0.8, 0.8, 2)
    return (rng.uniform(0, 12) * np.sin(kx * pixel[None, :] + ky * pixel[:, None] + rng.uniform(0, 6)))[None]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def margin(min_crop):
    """How many pixels are cut off each side of a validation image; min_crop is that of the training's random_crops.

    A network that was trained on crops knows objects as the crops show them: larger. The middle of the image, as large
    as the average crop, shows them so too (Touvron et al. 2019, "Fixing the train-test resolution discrepancy",
    arXiv:1906.06423). After 50 epochs with 20 classes: 61.8 % instead of 59.7 % for whole images.
    """
    return round(SIZE * (1 - math.sqrt((1 + min_crop) / 2)) / 2)


def for_validation(images, resolution, min_crop):
    """Images (N, 3, 64, 64) uint8 without their margin -> (N, 3, resolution, resolution) float32, normalised."""
    border = margin(min_crop)
    return prepare(images[..., border:SIZE - border, border:SIZE - border], resolution)


def prepare(images, resolution, theta=None):
    """Images (N, 3, H, W) uint8 -> what the network is fed: (N, 3, resolution, resolution) float32, normalised.

    theta (N, 2, 3) maps each place of the result to the place in the image that it is taken from, both in [-1, 1]: one
    matrix that crops, mirrors and resizes at once (Jaderberg et al. 2015, "Spatial Transformer Networks",
    arXiv:1506.02025). Without it the whole image is taken.
    """
    count = len(images)
    if theta is None:
        theta = torch.eye(2, 3, device=images.device).expand(count, 2, 3)
    grid = F.affine_grid(theta, (count, 3, resolution, resolution), align_corners=False)
    edge = 1 - 1 / images.shape[-1]  # the centres of the outermost pixels: nothing is taken from beyond them
    images = F.grid_sample(images.float(), grid.clamp(-edge, edge), align_corners=False)
    mean, std = mean_and_std(images.device)
    return (images - mean) / std


@functools.cache  # to copy even three numbers to a GPU at every step would make the host wait for it
def mean_and_std(device):
    return [torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (MEAN, STD)]


@functools.lru_cache(maxsize=1)  # one copy, however many Batches share it; an earlier data set is let go
def resident(images, device):
    """The images on the device if that is a GPU with room for them, else where they are."""
    fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return images.to(device) if fits else images


class Batches:
    """The images of a split, in batches on the device.

    The whole data set stays in memory as uint8, on a GPU's where it fits, so that a batch costs one gather and a few
    operations on the device, and needs no worker processes. What is drawn for an epoch depends on seed and epoch alone:
    a resumed run sees what the uninterrupted one would have seen, on any device.

    dataset: a Dataset; indices (N,) int64: the images to take; batch_size: of all processes together; augment: shuffle,
    mirror, crop and mix, else take the centre; min_crop: smallest area of a crop, as a fraction of the image's; cutmix:
    share of the images that get a patch of another; rank, world_size: this process's number, and how many there are.
    """

    def __init__(self, dataset, indices, batch_size, device, augment, min_crop=1.0, cutmix=0.0, seed=0, rank=0,
                 world_size=1):
        self.device, self.augment, self.min_crop, self.cutmix = torch.device(device), augment, min_crop, cutmix
        self.seed, self.rank, self.world_size = seed, rank, world_size
        # As many batches as needed, all of them of nearly the same size: no last one of a single image, on which
        # BatchNorm has no variance to divide by.
        self.count = math.ceil(len(indices) / batch_size)
        self.images = resident(dataset.images, self.device)
        self.labels, self.indices = dataset.labels.to(self.images.device), indices.to(self.images.device)

    def __len__(self):
        return self.count

    def epoch(self, epoch, resolution):
        """Yields, until every index was there once: images (B, 3, resolution, resolution) float32; their labels (B,)
        int64; the labels (B,) of the images that the patches come from; the share (B,) of each image that is its own.
        """
        total, order = len(self.indices), self.indices
        if self.augment:
            # Drawn on the CPU, whose random numbers are the same everywhere, for the whole epoch at once.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = order[torch.randperm(total, generator=generator).to(order.device)]
            theta = random_crops(total, self.min_crop, generator).to(self.device)
            patch = random_patches(total, self.cutmix, generator).to(self.device)
        for batch in range(self.count):
            part = slice(batch * total // self.count + self.rank, (batch + 1) * total // self.count, self.world_size)
            images = self.images[order[part]].to(self.device)
            labels = self.labels[order[part]].to(self.device)
            if self.augment:
                yield cut_mix(prepare(images, resolution, theta[part]), labels, patch[part])
            else:
                images = for_validation(images, resolution, self.min_crop)
                yield images, labels, labels, torch.ones_like(labels, dtype=torch.float32)


def random_crops(count, min_area, generator):
    """Matrices (N, 2, 3) for prepare: crops of at least min_area of the image, of any place, half of them mirrored.

    Each then fills the whole picture, so that objects are seen at many sizes and in part: of all augmentations the one
    that does most against overfitting (Szegedy et al. 2014, "Going Deeper with Convolutions", arXiv:1409.4842).
    """
    uniform = torch.rand(5, count, generator=generator)
    area = min_area + (1 - min_area) * uniform[0]
    # Width to height: 3/4 ... 4/3, and less where one of them would exceed the image's.
    ratio = ((4 / 3) ** (2 * uniform[1] - 1)).clamp(area, 1 / area)
    scale = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1)  # (N, 2): width, height
    middle = (2 * uniform[2:4].T - 1) * (1 - scale)
    theta = torch.cat([torch.diag_embed(scale), middle[:, :, None]], dim=2)
    theta[:, 0, 0] *= (uniform[4] < 0.5) * 2 - 1  # -1 is the mirror image
    return theta


def random_patches(count, probability, generator):
    """(N, 3) in [0, 1]: row and column of the centre of a square patch, and its side; 0 where there is to be none."""
    uniform = torch.rand(count, 4, generator=generator)
    uniform[:, 2] = uniform[:, 2].sqrt() * (uniform[:, 3] < probability)  # the area, not the side, is uniform
    return uniform[:, :3]


def cut_mix(images, labels, patch):
    """Puts a patch of another image of the batch into each, and says whose: the label is then to be shared out in the
    same proportion (Yun et al. 2019, "CutMix", arXiv:1905.04899).

    images (N, 3, H, W); labels (N,); patch (N, 3) of random_patches -> images, labels, the others' labels (N,), and the
    share (N,) of each image that is still its own.
    """
    size = images.shape[-1]
    pixel = (torch.arange(size, device=images.device) + 0.5) / size
    # Which rows (N, H) and which columns (N, W) the patch covers.
    rows, columns = ((pixel - patch[:, axis, None]).abs() < patch[:, 2, None] / 2 for axis in (0, 1))
    mask = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(mask, images.flip(0), images), labels, labels.flip(0), 1 - mask.float().mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Progress, and files that are whole


class Progress:
    """A line on stderr, rewritten in place while something takes long; if stderr is a file, a new line a minute."""

    def __init__(self, quiet=False):
        self.quiet, self.moves = quiet, sys.stderr.isatty()
        self.looked = self.shown = time.monotonic()

    def due(self):
        """True at most once a second."""
        if time.monotonic() - self.looked < 1:
            return False
        self.looked = time.monotonic()
        return True

    def show(self, text):
        if not self.quiet and (self.moves or time.monotonic() - self.shown > 60):
            # Back to the start of the line: whatever is printed next takes its place.
            print(f"{text:79}", end="\r" if self.moves else "\n", file=sys.stderr, flush=True)
            self.shown = time.monotonic()


@contextmanager
def replacing(path):
    """A temporary name beside path, moved onto path at the end: path is whole, old or new, whenever we are stopped.

    Raises DataError if it cannot be written.
    """
    if not Path(path).name:
        raise DataError(f"{path}: is a folder: name a file")
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError to torch.save
        reason = getattr(error, "strerror", None) or f"{str(error).partition(chr(10))[0]}; is the disk full?"
        raise DataError(f"{path}: cannot be written ({reason}): make room, or name another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_figure(figure, path):
    """Writes a PNG file whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def draw_samples(dataset, path, seed=0, per_class=5):
    """Five images of each of five classes, or as many as there are, with their boxes, into a PNG file."""
    rng = np.random.default_rng(seed)
    classes = len(dataset.class_names)
    labels = np.sort(rng.choice(classes, min(5, classes), replace=False))
    figure, axes = plt.subplots(len(labels), per_class, squeeze=False, layout="constrained",
                                figsize=(1.6 * per_class, 1.92 * len(labels)))
    for row, label in zip(axes, labels):
        row[per_class // 2].set_title(f"{label}: {dataset.class_names[label]} ({dataset.wnids[label]})", fontsize=10)
        for axis, index in zip(row, rng.permutation(np.flatnonzero(dataset.labels == label))):
            axis.imshow(dataset.images[index].permute(1, 2, 0).numpy())
            x0, y0, x1, y1 = dataset.boxes[index].tolist()
            axis.add_patch(plt.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color="yellow"))
    for axis in axes.flat:
        axis.axis("off")
    save_figure(figure, path)


def export_coco(dataset, path):
    """Writes the data set's bounding boxes as a COCO instances file, one object per image."""
    images = [{"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE} for i in range(len(dataset.labels))]
    annotations = [{"id": i, "image_id": i, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
                   for i, (label, (x0, y0, x1, y1)) in enumerate(zip(dataset.labels.tolist(), dataset.boxes.tolist()))]
    categories = [{"id": label, "name": name} for label, name in enumerate(dataset.class_names)]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def main():
    parser = argparse.ArgumentParser(description="Loads a data set and says what is in it.")
    parser.add_argument("--dataset", choices=("tiny-imagenet", "shapes"), default="tiny-imagenet",
                        help="tiny-imagenet, which the assignment asks for; shapes needs no download")
    parser.add_argument("--data-dir", default="data", help="where Tiny ImageNet is, or is put")
    parser.add_argument("--seed", type=int, default=0, help="of the 70/30 split, of the shapes and of the picture")
    parser.add_argument("--out", default="samples.png", help="the picture's file")
    parser.add_argument("--export-coco", metavar="FILE", help="write the boxes as a COCO file instead of a picture")
    args = parser.parse_args()
    if not 0 <= args.seed <= 2**31:
        parser.error("--seed must be at least 0 and at most 2147483648")
    try:
        start = time.perf_counter()
        dataset = load(args.dataset, args.data_dir, args.seed)
        print(f"{dataset.name}: {len(dataset.labels):,} images of {len(dataset.class_names)} classes, "
              f"loaded in {time.perf_counter() - start:.1f} s")
        for kind in ("70-30", "official"):
            train, val = split(dataset, kind, args.seed)
            print(f"split {kind}: {len(train):,} to train on, {len(val):,} to validate")
        if args.export_coco:
            export_coco(dataset, args.export_coco)
            print(f"wrote {args.export_coco}: try `python coco_analysis.py {args.export_coco}`")
        else:
            draw_samples(dataset, args.out, args.seed)
            print(f"wrote {args.out}: five images of five classes, with their boxes")
    except (DataError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
