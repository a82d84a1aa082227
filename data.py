"""The data: image files become one uint8 tensor, and that becomes augmented batches on the device.

    python data.py                              # downloads Tiny ImageNet
    python data.py --dataset shapes             # no download
    python data.py --dataset folder --data-dir photos
    python data.py --export-coco boxes.json     # the bounding boxes as a COCO file

prints the numbers of images and classes and the size of each split, and writes samples.png.
"""
import argparse
import hashlib
import io
import json
import math
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import NamedTuple

os.environ["MPLBACKEND"] = "Agg"  # draws into files, also in a notebook

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

Image.MAX_IMAGE_PIXELS = None              # telephones take photographs of 200 megapixels
plt.rcParams["text.parse_math"] = False    # class names may contain a $

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FOLDER = "tiny-imagenet-200"
CACHE = "tiny-imagenet-200.v3.pt"     # a new number for new content
SIZE = 64                             # pixels, the side of Tiny ImageNet's images
MEAN, STD = 0.44, 0.28                # of Tiny ImageNet's pixels in [0, 1], all channels alike


class UsageError(Exception):
    """An error that the user can correct; the message says where and how."""


class Dataset(NamedTuple):
    images: torch.Tensor        # (N, 3, size, size) uint8; size is 64, or more for a folder
    labels: torch.Tensor        # (N,) int64
    boxes: torch.Tensor         # (N, 4) int64 pixels: x0, y0, exclusive x1, y1; folders: None
    official_val: torch.Tensor  # (N,) bool: in the given validation set
    class_names: list           # label -> name
    digest: str = ""            # of a folder's files
    notes: str = ""             # what was found in a folder, and left out


def load(name="tiny-imagenet", data_dir="data", seed=0, classes=None, size=SIZE):
    """Returns a Dataset, if asked of the first `classes` classes only. Raises UsageError.

    "shapes" is drawn from seed, "folder" is data_dir itself, read as size x size pixels,
    "tiny-imagenet" is in data_dir, and downloaded if missing.
    """
    if name == "shapes":
        dataset = shapes(seed)
    elif name == "folder":
        dataset = folder(Path(data_dir), size)
    else:
        dataset = tiny_imagenet(Path(data_dir))
    if classes is None:
        return dataset
    kept = dataset.labels < classes
    columns = (None if column is None else column[kept] for column in dataset[:4])
    return Dataset(*columns, dataset.class_names[:classes], *dataset[5:])


def require_same(dataset, checkpoint, data_dir):
    """Raises UsageError if a run had other data: its validation images would be others, too."""
    if (dataset.class_names, dataset.digest) != (checkpoint["classes"], checkpoint["digest"]):
        raise UsageError(f"{data_dir}: the pictures are not those of the run, or in other classes: "
                         "name the run's with --data-dir, restore them, or start a new run")


def split(dataset, kind="70-30", seed=0):
    """Returns the indices of the training and of the validation images, two int64 tensors.

    "70-30" draws 70 % of each class (385 of 550) with seed, "official" is the data set's own split.
    A folder with validation pictures is split as given.
    """
    if kind == "official" or dataset.digest and dataset.official_val.any():
        return torch.where(~dataset.official_val)[0], torch.where(dataset.official_val)[0]
    generator = torch.Generator().manual_seed(seed)
    train_indices, val_indices = [], []
    for label in range(len(dataset.class_names)):
        members = torch.where(dataset.labels == label)[0]
        members = members[torch.randperm(len(members), generator=generator)]
        count = round(0.7 * len(members))
        train_indices.append(members[:count])
        val_indices.append(members[count:])
    return torch.cat(train_indices), torch.cat(val_indices)


def shuffled(indices):
    """The indices (N,) in a random order, the same in every call."""
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]


# --------------------------------------------------------------------------------------------------
# Tiny ImageNet: download, decode, cache


def tiny_imagenet(data_dir):
    """Returns the Dataset, from the cache if there is one. Raises UsageError."""
    cache, archive = data_dir / CACHE, data_dir / f"{FOLDER}.zip"
    folder = data_dir if (data_dir / "wnids.txt").exists() else data_dir / FOLDER
    source = next((path for path in (cache, folder) if path.exists()), archive)
    if not source.exists():
        download(archive)
    try:
        if source == cache:  # mmap: its 1.4 GB are read when used, and shared between processes
            return Dataset(**torch.load(cache, mmap=True, weights_only=True))
        dataset = read_tree(zipfile.Path(archive) / FOLDER if source == archive else folder)
    except Exception as error:  # damaged and incomplete files raise a dozen types
        raise UsageError(f"{source}: cannot be read ({str(error).split('. ')[0]}): if it is "
                         "damaged or incomplete, delete it and start again") from error
    try:
        with replacing(cache) as temporary:
            torch.save(dataset._asdict(), temporary)
    except UsageError as error:
        print(f"{error}; continuing without a cache", file=sys.stderr)
    return dataset


def download(archive):
    from torchvision.datasets.utils import download_url  # slow to import
    print(f"downloading {URL}", file=sys.stderr)
    try:
        with replacing(archive) as temporary:
            download_url(URL, str(temporary.parent), temporary.name, MD5)
    except UsageError as error:
        raise UsageError(f"{URL}: download failed ({error.__cause__}): put the file at "
                         f"{archive} yourself, or try --dataset shapes") from error


def read_tree(folder):
    """Returns the Dataset of a pathlib.Path or zipfile.Path."""
    def table(path):
        return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]

    wnids = sorted(wnid for wnid, in table(folder / "wnids.txt"))
    words = dict(table(folder / "words.txt"))
    class_names = [words[wnid].split(",")[0] for wnid in wnids]  # "goldfish, Carassius auratus"
    rows = []
    for label, wnid in enumerate(wnids):
        part = folder / "train" / wnid
        rows += [(part / "images" / file, label, box, False)
                 for file, *box in sorted(table(part / f"{wnid}_boxes.txt"))]
    part = folder / "val"
    rows += [(part / "images" / file, wnids.index(wnid), box, True)
             for file, wnid, *box in sorted(table(part / "val_annotations.txt"))]
    files, labels, boxes, official_val = zip(*rows)
    images, _, errors = decode(files)
    for error in errors.values():
        raise error
    # the files give the last pixel inside: 0 0 63 63
    boxes = torch.from_numpy(np.array(boxes, np.int64) + [0, 0, 1, 1])
    return Dataset(images, torch.tensor(labels), boxes, torch.tensor(official_val), class_names)


def decode(files, size=SIZE):
    """Reads files, pathlib.Path or zipfile.Path. Returns images (N, 3, size, size) uint8, digests
    [N] of their bytes, and {index: OSError} of files that cannot be read.
    """
    def read(index):
        try:
            content = files[index].read_bytes()
            digests[index] = hashlib.sha256(content).hexdigest()
            images[index] = read_picture(io.BytesIO(content), size)
        except Exception as error:  # Pillow raises a dozen types
            errors[index] = OSError(f"{files[index]}: {str(error).split(' <')[0]}")

    images, errors = torch.empty(len(files), 3, size, size, dtype=torch.uint8), {}
    digests, progress = [""] * len(files), Progress()
    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the GIL
        for index, _ in enumerate(pool.map(read, range(len(files)))):
            progress.show(f"decoded {index:,} of {len(files):,} images")
    return images, digests, errors


def read_picture(file, size=SIZE):
    """The central square of a picture, a path or binary file -> (3, size, size) uint8. Raises what
    Pillow raises.

    Transparent pixels become white; greys of 16 or 32 bits are scaled to their own range.
    """
    with Image.open(file) as picture:
        picture.draft("RGB", (2 * size, 2 * size))  # decodes fewer pixels of a large JPEG
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] in "IF":
            grey = np.array(picture, np.float32)
            grey = (grey - grey.min()) * 255 / (np.ptp(grey) or 1)
            picture = Image.fromarray(grey.astype(np.uint8))
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        picture = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


# --------------------------------------------------------------------------------------------------
# Your own photographs

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def list_folder(path):
    """Returns a row for each file that is not hidden: path, class, is it for validation?

    The folder has a folder for each class, or train/ and perhaps val/ that have them.
    """
    rows = []
    for file in sorted(map(Path, glob("**", root_dir=path, recursive=True))):
        top, *inner = file.parts
        if inner and (path / file).is_file():
            rows.append((path / file, SPLITS.get(top.lower()), top, *inner))
    nested = [row for row in rows if len(row) > 4]
    if {row[1] for row in rows} != {"train", None} and any(row[1] == "train" for row in nested):
        return [(file, name, split == "val") for file, split, _, name, *_ in nested
                if split in ("train", "val")]
    return [(file, top, False) for file, _, top, *_ in rows]


def folder(path, size=SIZE):
    """Returns the Dataset of a folder of photographs. Raises UsageError.

    Of equal files one counts, for validation if possible; none if they are in several classes.
    """
    rows = sorted(list_folder(path), key=lambda row: not row[2])  # validation first
    names = sorted({name for _, name, _ in rows})
    needed = f"{path}: needs a folder for each of several classes, each with several pictures"
    if len(names) < 2:
        found = f"{names[0]}: try --data-dir {path / names[0]}" if names else "none"
        raise UsageError(f"{needed} (found: {found})")
    files, classes, is_val = zip(*rows)
    images, digests, errors = decode(files, size)
    classes_of, kept, left_out = {}, {}, {}
    for digest, name in zip(digests, classes):
        classes_of.setdefault(digest, set()).add(name)
    for index, (file, digest) in enumerate(zip(files, digests)):
        if index in errors:
            reason = f"unreadable {file.suffix} files"
        elif len(classes_of[digest]) > 1:
            reason = "in several classes"
        elif kept.setdefault(digest, index) != index:
            reason = "copies"
        else:
            continue
        left_out.setdefault(reason, []).append(str(errors.get(index, file)))
    left_out = [f"left out, {reason}: {len(files):,} ({', '.join(files[:5])})"
                for reason, files in left_out.items()]

    indices = list(kept.values())
    labels = torch.tensor([names.index(name) for name in classes])[indices]
    official_val = torch.tensor(is_val)[indices]
    digest = hashlib.sha256(repr([*kept, labels.tolist(), official_val.tolist()]).encode())
    names = [os.fsencode(name).decode(errors="replace") for name in names]  # of old archives
    dataset = Dataset(images[indices], labels, None, official_val, names, digest.hexdigest())
    for part, members in zip(("training", "validation"), split(dataset)):
        counts = labels[members].bincount(minlength=len(names))
        if not counts.min():
            needed += f" ({names[counts.argmin()]} has none for {part})"
            raise UsageError("; ".join([needed, *left_out]))
    counts = labels.bincount()
    found = (f"{path}: {len(labels):,} pictures of {len(names)} classes, {counts.min():,} to "
             f"{counts.max():,} of each, median {counts.median():,}; " + (
                 f"{official_val.sum():,} are given for validation" if official_val.any() else
                 "split 70/30, as there is no val/"))
    return dataset._replace(notes="\n- ".join([found, *left_out]))


# --------------------------------------------------------------------------------------------------
# Shapes: a data set that needs no download

# Each shape is the set of points (u, v) in [-1, 1]^2, v pointing down, where the function is true.
SHAPES = {
    "circle": lambda u, v: u**2 + v**2 < 0.8,
    "ring": lambda u, v: (u**2 + v**2 < 0.9) & (u**2 + v**2 > 0.35),
    "crescent": lambda u, v: (u**2 + v**2 < 1) & ((u - 0.5)**2 + v**2 > 0.65),
    "half disc": lambda u, v: (u**2 + (v + 0.4)**2 < 1) & (v > -0.4),
    "triangle": lambda u, v: (v < 0.5) & (1.73 * np.abs(u) - v < 1),
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.75,
    "bar": lambda u, v: (np.abs(u) < 1) & (np.abs(v) < 0.28),
    "cross": lambda u, v: ((np.minimum(np.abs(u), np.abs(v)) < 0.27)
                           & (np.maximum(np.abs(u), np.abs(v)) < 1)),
    "flower": lambda u, v: np.hypot(u, v) < 0.6 + 0.4 * np.cos(5 * np.arctan2(v, u)),
    "hourglass": lambda u, v: (np.abs(u) < np.abs(v)) & (np.abs(v) < 0.9),
}


def shapes(seed=0, per_class=550):
    """Draws a Dataset of per_class images of each of the SHAPES.

    Colour, texture, size, position, rotation and background do not depend on the class.
    """
    rng = np.random.default_rng(seed)
    pixel_y, pixel_x = np.mgrid[:SIZE, :SIZE] + 0.5
    count = per_class * len(SHAPES)
    labels = np.arange(count) % len(SHAPES)
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    boxes = np.empty((count, 4), np.int64)

    def stripes():
        kx, ky = rng.uniform(-0.8, 0.8, 2)
        phase = kx * pixel_x + ky * pixel_y
        return rng.uniform(0, 12) * np.sin(phase + rng.uniform(0, 6))

    for index, label in enumerate(labels):
        radius, angle = rng.uniform(10, 16), rng.uniform(-0.5, 0.5)
        # near the edges, so that a point at the centre misses the shape
        x, y = radius + (SIZE - 2 * radius) * rng.beta(0.5, 0.5, 2)
        dx, dy = (pixel_x - x) / radius, (pixel_y - y) / radius
        inside = list(SHAPES.values())[label](np.cos(angle) * dx + np.sin(angle) * dy,
                                              np.cos(angle) * dy - np.sin(angle) * dx)
        light, dark = rng.uniform(160, 255, (3, 1, 1)), rng.uniform(0, 90, (3, 1, 1))
        tiles = rng.normal(0, 8, (3, 8, 8)).repeat(8, axis=1).repeat(8, axis=2)
        image = np.where(inside, light + stripes(), dark + stripes() + tiles)
        images[index] = (image + rng.normal(0, 5, image.shape)).clip(0, 255)
        columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
        boxes[index] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    arrays = map(torch.from_numpy, (images, labels, boxes, np.arange(count) >= count / 1.1))
    return Dataset(*arrays, list(SHAPES))


# --------------------------------------------------------------------------------------------------
# Batches


@dataclass
class Batches:
    """The images of a split, in batches on the device.

    The data set stays in memory as uint8, so a batch is an index operation and needs no worker
    processes. Random numbers depend on seed and epoch only, so a resumed run sees the same batches.
    """
    dataset: Dataset
    indices: torch.Tensor   # (N,) int64
    batch_size: int         # of all processes together
    device: torch.device
    augment: bool = False   # shuffle, crop, flip, mix; drop the last incomplete batch
    min_crop: float = 1.0   # smallest area of a crop, a fraction
    cutmix: float = 0.0     # fraction of the images that get a patch of another
    seed: int = 0
    rank: int = 0           # of this process among world_size
    world_size: int = 1

    def __len__(self):
        count = len(self.indices) / self.batch_size
        return math.floor(count) if self.augment else math.ceil(count)

    def epoch(self, epoch, resolution):
        """Yields images (B, 3, resolution, resolution) float32, their labels (B,) int64, the other
        labels and own fractions of cut_mix, and the images' indices (B,) int64.
        """
        dataset, order = self.dataset, self.indices
        if self.augment:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = order[torch.randperm(len(order), generator=generator)]
            # of each image: five for its crop, four for CutMix
            uniform = torch.rand(len(order), 9, generator=generator).to(self.device)
        order = order[:len(self) * self.batch_size]
        labels = dataset.labels[order].to(self.device)
        places = order.to(dataset.images.device)
        for start in range(0, len(order), self.batch_size):
            part = slice(start + self.rank, start + self.batch_size, self.world_size)
            images = dataset.images[places[part]].to(self.device)
            others, own = labels[part], torch.ones(len(images), device=self.device)
            theta = random_crops(uniform[part, :5], self.min_crop) if self.augment else None
            images = prepare(images, resolution, theta)
            if self.augment:
                images, others, own = cut_mix(images, others, uniform[part, 5:], self.cutmix)
            yield images, labels[part], others, own, order[part]


def prepare(images, resolution, theta=None):
    """Images (N, 3, H, W) uint8 -> network input (N, 3, resolution, resolution) float32.

    theta (N, 2, 3) maps positions of the output to positions of the image, both in [-1, 1]: one
    matrix crops, flips and resizes at once (Jaderberg et al. 2015, arXiv:1506.02025). The default
    is the whole image. Averaging several samples a pixel (antialiasing) did not improve accuracy.
    """
    count = len(images)
    if not count:  # of several processes' last batch
        return torch.empty(0, 3, resolution, resolution, device=images.device)
    if theta is None:
        theta = torch.eye(2, 3, device=images.device).expand(count, 2, 3)
    grid = F.affine_grid(theta, (count, 3, resolution, resolution), align_corners=False)
    images = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    return (images / 255 - MEAN) / STD


def random_crops(uniform, min_area):
    """Matrices (N, 2, 3) for prepare, from random numbers uniform (N, 5) in [0, 1].

    Each is a crop of at least min_area, half of them flipped: objects appear at many sizes and in
    part (Szegedy et al. 2014, arXiv:1409.4842).
    """
    area = min_area + (1 - min_area) * uniform[:, 0]
    # aspect ratios 3/4 ... 4/3, as far as width and height fit into the image
    ratio = ((4 / 3) ** (2 * uniform[:, 1] - 1)).clamp(area, 1 / area)
    scale = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1)  # (N, 2): w, h
    centre = (2 * uniform[:, 2:4] - 1) * (1 - scale)
    theta = torch.cat([torch.diag_embed(scale), centre[:, :, None]], dim=2)
    theta[:, 0, 0] *= (uniform[:, 4] < 0.5) * 2 - 1  # -1 flips
    return theta


def cut_mix(images, labels, uniform, probability):
    """CutMix (Yun et al. 2019, arXiv:1905.04899): pastes a patch of another image into some images.

    images (N, 3, H, W); labels (N,); uniform (N, 4): random numbers in [0, 1]. Returns images, the
    other images' labels (N,), and the fraction (N,) of each image that is its own. The other image
    is the one in the mirrored place of the batch.
    """
    size = uniform[:, 2].sqrt() * (uniform[:, 3] < probability)         # the area is uniform
    pixel = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1]
    rows, columns = ((pixel - uniform[:, axis, None]).abs() < size[:, None] / 2
                     for axis in (0, 1))                                # (N, H) and (N, W)
    mask = (rows[:, :, None] & columns[:, None, :])[:, None]            # (N, 1, H, W)
    own = 1 - mask.float().mean((1, 2, 3))
    return torch.where(mask, images.flip(0), images), labels.flip(0), own


def centre(images, min_crop):
    """The centre of images (N, 3, S, S), as large as an average crop, so that objects are as large
    as in training (Touvron et al. 2019, arXiv:1906.06423).
    """
    side = images.shape[-1]
    border = round(side * (1 - math.sqrt((1 + min_crop) / 2)) / 2)
    return images[..., border:side - border, border:side - border]


def validation_view(dataset, min_crop):
    """The dataset with the centres of its images, and boxes in their pixels."""
    images, boxes = centre(dataset.images, min_crop), dataset.boxes
    if boxes is not None:
        boxes = boxes - (dataset.images.shape[-1] - images.shape[-1]) // 2
    return dataset._replace(images=images, boxes=boxes)


# --------------------------------------------------------------------------------------------------
# Progress, files and errors


class Progress:
    """A line on stderr, rewritten in place every second; in a file, a new line every minute."""

    def __init__(self, quiet=False):
        self.end, self.interval = ("\r", 1) if sys.stderr.isatty() else ("\n", 60)
        if quiet:
            self.interval = math.inf
        self.shown = time.monotonic()

    def due(self):
        return time.monotonic() - self.shown > self.interval

    def show(self, text):
        if self.due():
            print(f"{text:79}", end=self.end, file=sys.stderr, flush=True)
            self.shown = time.monotonic()


@contextmanager
def replacing(path):
    """Yields a temporary path that replaces path at the end, so path is always complete. Raises
    UsageError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes: two names
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # its errors say more than torch.save's
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UsageError(f"{path}: cannot be written ({reason}): check that {path.parent} can be "
                         "written to and has space left") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_figure(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def run_command(main):
    """Runs a script's main(). Errors that users can correct: one line on stderr, exit code 2."""
    with suppress(AttributeError):  # a notebook's streams
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # characters that a terminal lacks
    try:
        return main()
    except (UsageError, OSError) as error:
        message = error
    except (RuntimeError, MemoryError) as error:  # CUDA, MPS, CPU and NumPy differ
        if "out of memory" not in str(error) and "to allocate" not in str(error):
            raise
        message = "out of memory: choose a smaller --batch-size, or --device cpu"
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


# --------------------------------------------------------------------------------------------------
# The command


def draw_samples(dataset, path):
    """Draws five images of each of five classes, with their boxes if any."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.permutation(len(dataset.class_names))[:5])
    figure, axes = plt.subplots(len(labels), 5, figsize=(8, 1.92 * len(labels)),
                                layout="constrained")
    for row, label in zip(axes, labels):
        row[2].set_title(f"{label}: {dataset.class_names[label]}", fontsize=10)
        for axis in row:
            axis.axis("off")
        for axis, index in zip(row, rng.permutation(np.flatnonzero(dataset.labels == label))):
            axis.imshow(dataset.images[index].permute(1, 2, 0).numpy())
            if dataset.boxes is not None:
                draw_box(axis, dataset.boxes[index], "yellow")
    save_figure(figure, path)


def draw_box(axis, box, colour):
    """Draws a frame around x0, y0, x1, y1; imshow puts the centre of the first pixel at (0, 0)."""
    x0, y0, x1, y1 = (box - 0.5).tolist()
    axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour))


def export_coco(dataset, path):
    """Writes the bounding boxes as a COCO instances file."""
    if dataset.boxes is None:
        raise UsageError("--export-coco: a folder of pictures has no bounding boxes")
    coco = {"images": [], "annotations": [], "categories": [
        {"id": label, "name": name} for label, name in enumerate(dataset.class_names)]}
    for i, (label, box) in enumerate(zip(dataset.labels.tolist(), dataset.boxes.tolist())):
        x, y, width, height = *box[:2], box[2] - box[0], box[3] - box[1]
        coco["images"].append({"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE})
        coco["annotations"].append({"id": i, "image_id": i, "category_id": label, "iscrowd": 0,
                                    "bbox": [x, y, width, height], "area": width * height})
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(coco))


def main():
    parser = argparse.ArgumentParser(description="Loads a data set and describes it.")
    parser.add_argument("--dataset", choices=("tiny-imagenet", "shapes", "folder"),
                        default="tiny-imagenet", help="tiny-imagenet")
    parser.add_argument("--data-dir", default="data",
                        help="folder with tiny-imagenet-200, or with a folder per class: data")
    parser.add_argument("--export-coco", metavar="FILE", help="write the boxes as a COCO file")
    args = parser.parse_args()
    dataset = load(args.dataset, args.data_dir)
    print(dataset.notes or f"{args.dataset}: {len(dataset.labels):,} images of "
          f"{len(dataset.class_names)} classes")
    for kind in ("70-30", "official") if not dataset.notes else ():
        train_indices, val_indices = split(dataset, kind)
        print(f"split {kind}: {len(train_indices):,} training images, "
              f"{len(val_indices):,} validation images")
    if args.export_coco:
        export_coco(dataset, args.export_coco)
        print(f"wrote {args.export_coco}")
    draw_samples(dataset, "samples.png")
    print("wrote samples.png")


if __name__ == "__main__":
    run_command(main)
