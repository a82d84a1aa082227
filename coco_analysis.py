"""What do the numbers in an annotation file mean? Its fields, classes, boxes, and anchors for them.

    python coco_analysis.py annotations.json             # writes analysis/annotations/report.md
    python coco_analysis.py annotations.json --images .  # draws on the photographs there
    python coco_analysis.py annotations.json --k 5 9 --size 640 --resize letterbox

The file is COCO JSON, or records with a `bbox`: a JSON list (detection results), JSON lines, or
lines like `id: 0, height: 330, width: 1093, bbox:[69, 464, 312, 175],`. The command prints

    bbox is [y, x, width, height]: 100.0% of the boxes lie inside their images; ...
    - k = 3, mean IoU 0.6329: 71.2,138, 149,76.5, 158,160
"""
import argparse
import json
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["MPLBACKEND"] = "Agg"  # draws into files; needs no screen
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageOps

from kmeans import kmeans, mean_best_iou

# ---------------------------------------------------------------------- what the four numbers mean


class Reading(NamedTuple):
    text: str
    order: Callable          # four numbers -> x, y, width, height
    whole: int = None        # a whole side of the image is written as this; None: in pixels
    exchanged: bool = False  # the file exchanges the images' width and height


READINGS = {  # the most common first, which wins a tie
    "xywh": Reading("[x, y, width, height]", lambda a, b, c, d: (a, b, c, d)),
    "yxwh": Reading("[y, x, width, height]", lambda a, b, c, d: (b, a, c, d)),
    "xyxy": Reading("[x1, y1, x2, y2]", lambda a, b, c, d: (a, b, c - a, d - b)),
    "yxyx": Reading("[y1, x1, y2, x2]", lambda a, b, c, d: (b, a, d - b, c - a)),
    "cxcywh": Reading("[center x, center y, width, height]",
                      lambda a, b, c, d: (a - c / 2, b - d / 2, c, d)),
}
PIXELS = list(READINGS)
FRACTIONS = [key + "-fraction" for key in PIXELS]
PERCENTS = [key + "-percent" for key in PIXELS]
for key, fraction, percent in zip(PIXELS, FRACTIONS, PERCENTS):
    text, order, *_ = READINGS[key]
    READINGS[fraction] = Reading(f"{text} as fractions", order, 1)
    READINGS[percent] = Reading(f"{text} in percent", order, 100)
EXCHANGED = "xywh-exchanged"  # other orders cannot be told from exchanged numbers
READINGS[EXCHANGED] = READINGS["xywh"]._replace(
    text="[x, y, width, height], images' width and height exchanged", exchanged=True)
PIXELS.append(EXCHANGED)

COCO, COCO_LIST = "COCO instances JSON", "COCO results or annotations in a list"
LIST, LINES = "a JSON list", "lines of records"


def to_xywh(bbox, size, reading):
    """bbox (N, 4) in images of size (N, 2), under one of READINGS -> x, y, width, height (N, 4) in
    pixels, and the true size (N, 2).
    """
    _, order, whole, exchanged = READINGS[reading]
    size = size[:, ::-1] if exchanged else size
    box = np.stack(order(*bbox.T), axis=1)
    return (box * np.tile(size / whole, 2) if whole else box), size


def inside(box, size):
    """(N,) bool: are boxes (N, 4) inside their images, up to a pixel, as tools round?"""
    slack = np.minimum(1, size / 50)
    start, end = box[:, :2], box[:, :2] + box[:, 2:]
    return ((start >= -slack) & (end > start) & (end <= size + slack)).all(axis=1)


def find_readings(bbox, size, area, kind):
    """Finds out what four numbers mean: under the right reading, boxes lie inside their images.

    bbox (N, 4) as in the file; size (N, 2) of the images and area (N,) of the objects in pixels,
    NaN where unknown; kind of the file. Returns the possible readings, the likeliest first;
    {reading: share of the boxes inside}; {reading: (2,) largest x and y}.
    """
    rows = (bbox[:, 2:] > 0).all(axis=1)
    if not rows.any():
        raise BadInput("no box has an area")
    known = rows & np.isfinite(size).all(axis=1)
    sized = known.any()
    bbox, size, area = (column[known if sized else rows] for column in (bbox, size, area))
    fit, reach, product = {}, {}, {}
    for key, reading in READINGS.items():
        frame = size if sized else np.full_like(size, 1 if reading.whole else np.inf)
        box, frame = to_xywh(bbox, frame, key)
        fit[key] = inside(box, frame).mean()
        reach[key] = (box[:, :2] + box[:, 2:]).max(axis=0)
        product[key] = box[:, 2] * box[:, 3]

    unit, other_unit = find_unit(bbox, size, fit, reach)
    proven = [key for key in unit + other_unit if fit[key] >= 0.5
              and np.isclose(product[key], area, rtol=0.01).mean() > 0.9]
    if proven and unit is not PERCENTS:
        unit, other_unit = proven, []
    keys = [key for key in unit if key != EXCHANGED or (np.ptp(size, axis=1) > 0).any()]
    best = max(map(fit.get, keys))
    margin = dict.fromkeys(keys, 0.01)
    if kind.startswith("COCO"):  # which specifies [x, y, width, height]
        keys.sort(key=lambda key: not key.startswith("xywh"))
        margin[keys[0]] = 0.05 if best >= 0.8 else 0.3
    found = [key for key in keys if fit[key] > best - margin[key]]
    if not sized:  # most orders fit
        first = found[:1] if kind == COCO_LIST else []
        corners = [key for key in found if key.startswith(("xyxy", "yxyx"))]
        if corners and len(bbox) >= 20:  # x1 < x2 and y1 < y2 in all boxes is no coincidence
            found = corners
        else:  # exchanging x and y spreads boxes
            spread = {key: reach[key].prod() for key in found if key.startswith(("xywh", "yxwh"))}
            found = [key for key in found
                     if key not in spread or spread[key] <= 1.1 * min(spread.values())]
        found = list(dict.fromkeys(first + found))
    where = 1 if unit is PIXELS else len(found)
    others = [key for key in other_unit if fit[key] > max(map(fit.get, other_unit)) - 0.01]
    found[where:where] = others[:2]
    return found[:1] if best < 0.5 else found, fit, reach


def find_unit(bbox, size, fit, reach):
    """The readings in the likeliest unit, and those in another if that is possible."""
    if np.median(bbox[:, 2:]) <= 1 and np.quantile(abs(bbox), 0.9) <= 1.1:
        return FRACTIONS, []  # no box is smaller than a pixel
    best = max(PERCENTS, key=fit.get)
    if fit[best] >= 0.8 and fit[best] > 0.05 + max(map(fit.get, PIXELS)):
        return PERCENTS, []
    # Pixels below 100 fit as percent, too. But percent reach 100, and as pixels leave images empty.
    low, high = np.sort(reach[best.removesuffix("-percent")])
    filled = high / np.median(size, axis=0).min()  # NaN without sizes
    many = len(bbox) >= 20
    if fit[best] < 0.5 or filled > 0.9 or many and low < 80:
        return PIXELS, []
    if many and fit[best] >= 0.9 and low >= 97 and high <= 102 and not filled >= 0.5:
        return PERCENTS, PIXELS
    return PIXELS, PERCENTS


def explain(found, fit, bbox, size, kind):
    """A sentence: the first of the readings found, its evidence, and what else is possible."""
    best, *others = found
    why = f"bbox is {READINGS[best].text}"
    if best == "xywh" and kind.startswith("COCO"):
        why += ", as COCO specifies"
    why += f": {fit[best]:.1%} of the boxes"
    if (bbox[:, 2:] <= 0).any():
        why += " with an area"
    why += (" lie inside their images" if np.isfinite(size).any() else
            " fit by order, signs and extent; no image size is known")
    if fit["xywh"] < fit[best]:
        why += f"; read as [x, y, width, height], {fit['xywh']:.1%} do"
    if others:
        why += ". A tie: is it --bbox-format " + " or ".join(others[:3])
        why += f", or {len(others) - 3} more?" if others[3:] else "?"
    elif fit[best] < 0.5:
        why += ". Boxes and image sizes do not belong together"
    return why


# ------------------------------------------------------------------------- counts, faults, anchors


def short(value):
    """Printable text."""
    return "".join(c if c.isprintable() else " " for c in str(value)[:60])


def check_quality(data, box, size):
    """Lines about odd boxes (N, 4) in images of size (N, 2), and (N,) bool: boxes to cluster."""
    rows = np.column_stack([data.bbox, data.image, data.label])
    first = np.unique(rows, axis=0, return_index=True)[1]
    sized = np.isfinite(size).all(axis=1)
    odd = {"without area (left out)": (box[:, 2:] < 1e-6).any(axis=1),
           "crowds, one box around many objects (left out)": data.crowd,
           "repeat an earlier box, class and image (left out)": ~np.isin(range(len(rows)), first),
           "in images of unknown size (left out)": ~sized & sized.any()}
    good = ~np.any(list(odd.values()), axis=0)
    odd["not inside their image"] = good & sized & ~inside(box, size)
    faults = {"unusable (left out)": data.unusable}
    for table, used in ("images", data.image), ("categories", data.label):
        ids = Counter(data.ids[table])
        odd[f"refer to missing {table}"] = (used >= len(ids)) & bool(ids)  # they come last
        faults[f"ids of {table} occur twice"] = [key for key in ids if ids[key] > 1]
    for what, mask in odd.items():
        faults[what] = [data.place.format(number) for number in data.number[mask]]
    lines = [f"- {len(places):,} {what}: " + ", ".join(map(str, places[:3]))
             for what, places in faults.items() if places]
    return lines or ["- no fault found"], good


def at_input(wh, size, side, resize):
    """wh (N, 2) when images of size (N, 2) are resized to side x side; and its unit."""
    if np.isnan(size).any():
        return wh, "pixels of the images, whose sizes are unknown"
    if resize == "letterbox":  # YOLOv5: the longer side becomes `side`
        size = size.max(axis=1, keepdims=True)
    return wh / size * side, f"pixels at {side} x {side}, {resize}"


def find_anchors(wh, asked):
    """{k: (anchors (k, 2) of three digits, mean IoU)}, k at most the number of distinct boxes."""
    found, distinct = {}, len(np.unique(wh, axis=0))
    for k in sorted({min(k, distinct) for k in asked}):
        anchors = np.array([[float(f"{side:.3g}") for side in row] for row in kmeans(wh, k)[0]])
        found[k] = anchors, mean_best_iou(wh, anchors)
    return found


# ---------------------------------------------------------------------------------------- pictures

BLUE, RED = "#3b6ea8", "#d1495b"
LOOKS = {"font.size": 8, "savefig.bbox": "tight", "figure.constrained_layout.use": True,
         "text.parse_math": False}  # class names may contain a $


def open_photos(data, folder):
    """{row of a box: photograph}, of a dozen images; without a folder, {row: None}."""
    first = np.unique(data.image, return_index=True)[1]  # a box of each image
    rows = np.random.default_rng(0).permutation(first).tolist()
    if not folder:
        return dict.fromkeys(rows[:12])
    rows = [row for row in rows if data.photo(folder, row).is_file()][:12]
    if not rows:
        raise BadInput(f"--images: there is no image such as {data.photo(folder, 0)}")
    photos = {}
    for row in rows:
        try:
            photos[row] = ImageOps.exif_transpose(Image.open(data.photo(folder, row)))
        except OSError as error:
            raise BadInput(f"--images: {data.photo(folder, row)}: {error}") from error
    return photos


def draw_readings(data, size, photos, readings, fit, reach):
    """A dozen boxes in their images' frames, or on the photographs, under two readings."""
    figure = plt.figure(figsize=(16, 6))
    for half, reading in zip(figure.subfigures(1, 2), readings):
        half.suptitle(f"bbox read as {READINGS[reading].text}: {fit[reading]:.1%} inside")
        panels = half.subplots(3, 4, subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
        for axes, (row, photo) in zip(panels.flat, photos.items()):
            frame = np.where(np.isfinite(size[[row]]), size[[row]], reach[reading])  # (1, 2)
            box, frame = to_xywh(data.bbox[[row]], frame, reading)
            colour = BLUE if inside(box, frame)[0] else RED
            axes.imshow(photo or [[[0.9] * 3]], "gray", extent=(0, frame[0, 0], frame[0, 1], 0))
            axes.add_patch(plt.Rectangle(box[0, :2], *box[0, 2:], fill=False, edgecolor=colour,
                                         linewidth=2))
            axes.axis("scaled")
            axes.set_title(data.names[data.label[row]][:25])
    return figure


def draw_classes(classes):
    shown = classes[:81]
    columns = [shown[start:start + 27] for start in range(0, len(shown), 27)]
    figure, panels = plt.subplots(1, len(columns), squeeze=False, sharex=True,
                                  figsize=(2 + 2.8 * len(columns), 0.8 + 0.17 * len(columns[0])))
    figure.suptitle(f"boxes of {len(shown)} of {len(classes)} classes, the most frequent first")
    for axes, column in zip(panels[0], columns):
        _, names, counts, _ = zip(*column)
        axes.bar_label(axes.barh(range(len(counts)), counts, color=BLUE), fmt=" {:,.0f}")
        axes.set_yticks(range(len(counts)), names)
        axes.set_ylim(len(columns[0]) - 0.4, -0.6)
        axes.margins(x=0.2)
    return figure


def octaves(values):
    """The powers of two around values."""
    low = np.floor(np.log2(values.min()))
    return 2 ** low, 2 ** max(np.ceil(np.log2(values.max())), low + 1)


def draw_boxes(data, box, size):
    figure, (where, *others) = plt.subplots(1, 3 + data.grouped, figsize=(16, 3.6))
    centre = box[:, :2] + box[:, 2:] / 2
    centre /= np.nan_to_num(size, nan=(box[:, :2] + box[:, 2:]).max())
    *_, heat = where.hist2d(*centre.T, 25, range=[[0, 1]] * 2, cmin=1, vmin=0)
    figure.colorbar(heat, ax=where, label="boxes")
    where.set(title="centres", xlabel="x / width of the image", ylabel="y / height of the image",
              ylim=(1, 0))
    for axes, (label, values) in zip(others, (
            ("width / height", box[:, 2] / box[:, 3]),
            ("root of width x height, pixels", np.sqrt(box[:, 2] * box[:, 3])),
            ("annotations of an image", np.unique(data.image, return_counts=True)[1]))):
        axes.hist(values, np.geomspace(*octaves(values), 41), color=BLUE)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=label, ylabel="images" if "image" in label else "boxes")
    return figure


def draw_sizes(wh, anchors, unit):
    """On logarithmic axes, as IoU is about ratios."""
    figure, axes = plt.subplots()
    some = np.random.default_rng(0).permutation(wh)[:20000]
    axes.scatter(*some.T, 6, BLUE, alpha=0.2 if len(wh) > 1000 else 1, linewidth=0)
    axes.scatter(*anchors.T, 90, RED, marker="P", edgecolor="white")
    axes.loglog(base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title=f"boxes and {len(anchors)} anchors, {unit}", xlabel="width", ylabel="height",
             xlim=octaves(wh[:, 0]), ylim=octaves(wh[:, 1]))
    return figure


def draw_anchors(found, unit):
    """To scale, with a common centre."""
    figure, panels = plt.subplots(1, len(found), squeeze=False, sharey=True,
                                  figsize=(3.5 * len(found), 4.5))
    half = 0.55 * max(anchors.max() for anchors, _ in found.values())
    for axes, (k, (anchors, score)) in zip(panels[0], found.items()):
        for j, (w, h) in enumerate(anchors):
            axes.add_patch(plt.Rectangle((-w / 2, -h / 2), w, h, fill=False, edgecolor=f"C{j}",
                                         linewidth=2, label=f"{w:g} x {h:g}"))
        axes.set(title=f"k = {k}, mean IoU {score:.4f}", xlabel=unit, aspect="equal",
                 xlim=(-half, half), ylim=(half, -half))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
    return figure


# ------------------------------------------------------------------------- the report, the command


def markdown(*rows):
    rows = [[re.sub(r"([\\`*_{}\[\]<>|$&#!~])", r"\\\1", short(value)) for value in row]
            for row in rows]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def describe_fields(data, reading):
    """Rows (table, field, example, meaning)."""
    numbers = sorted(data.classes, key=lambda key: (len(key), key))
    meanings = MEANINGS | {"bbox": READINGS[reading].text,
                           data.class_key: f"the class, {numbers[0]} to {numbers[-1]}"}
    return [(*key, example, meanings.get(key[1], "")) for key, example in data.fields.items()]


def analyse(data, args):
    """The report, {file name: text or figure}."""
    size = data.size[data.image]  # (I, 2) -> (N, 2)
    found, fit, reach = find_readings(data.bbox, size, data.area, data.kind)
    found = [args.bbox_format] if args.bbox_format else found
    why, reading = explain(found, fit, data.bbox, size, data.kind), found[0]
    why = f"As asked, {why}" if args.bbox_format else why
    photos, (_, true_size) = open_photos(data, args.images), to_xywh(data.bbox, size, reading)
    odd = ""
    for row, photo in photos.items():
        w, h = true_size[row]
        if photo and abs(photo.width / photo.height * h / w - 1) > 0.02:  # false without sizes
            odd = f"{data.photo(args.images, row)} has another shape than in the file"
    if READINGS[reading].whole and np.isnan(size).all():
        size = np.ones_like(size)  # boxes stay fractions
    box, true_size = to_xywh(data.bbox, size, reading)
    quality, good = check_quality(data, box, true_size)
    if not good.any():
        raise BadInput("; ".join(["no box is usable", *quality]))
    wh, unit = at_input(box[good, 2:], true_size[good], args.size, args.resize)
    anchors = find_anchors(wh, args.k)

    counts = np.bincount(data.label[~data.crowd], minlength=len(data.classes)).tolist()
    shares = [f"{count / max(sum(counts), 1):.2%}" for count in counts]
    classes = sorted(zip(data.classes, data.names, counts, shares), key=lambda row: -row[2])
    summary = f"{data.kind}: {sum(counts):,} boxes, {len(classes)} classes"
    if data.grouped:
        summary += f", {len(data.images):,} images"
    fits = [(READINGS[key].text, f"{fit[key]:.2%}", "{:.5g} x {:.5g}".format(*reach[key]))
            for key in sorted(fit, key=fit.get, reverse=True) if fit[key]]
    lines = [f"- k = {k}, mean IoU {score:.4f}: " + ", ".join(f"{w:g},{h:g}" for w, h in sides)
             for k, (sides, score) in anchors.items()]
    report = [
        "# Annotations", summary, why, odd, data.assumed, "![](readings.png)",
        markdown(("bbox read as", "boxes inside their images", "largest x and y"), *fits),
        "## Fields",
        markdown(("table", "field", "example", "meaning"), *describe_fields(data, reading)),
        "## Quality", *quality,
        "## Classes", "![](class_distribution.png)",
        markdown(("id", "name", "boxes", "share"), *classes),
        "## Boxes", "![](bbox_distribution.png)", "![](bbox_wh.png)",
        "## Anchors", "![](anchors.png)", f"Anchors: width,height in {unit}", *lines]
    other = "xywh" if reading != "xywh" else max(list(fit)[1:], key=fit.get)
    return {
        "report.md": "\n\n".join(filter(None, report)) + "\n",
        "readings.png": draw_readings(data, size, photos, [other, reading], fit, reach),
        "class_distribution.png": draw_classes(classes),
        "bbox_distribution.png": draw_boxes(data, box[good], true_size[good]),
        "bbox_wh.png": draw_sizes(wh, anchors[max(anchors)][0], unit),
        "anchors.png": draw_anchors(anchors, unit),
    }


def write(files, out):
    """Writes {file name: text or figure} into a folder: all or none."""
    plt.close("all")  # figures can still be saved
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".analysis-", dir=out) as folder:
        for name, content in files.items():
            if isinstance(content, str):
                Path(folder, name).write_bytes(content.encode())
            else:
                content.savefig(Path(folder, name))
        for name in files:
            Path(folder, name).replace(out / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="of annotations")
    add = parser.add_argument
    add("--out", help="folder of the report (analysis/<name>)")
    add("--k", type=int, nargs="+", default=[3, 4, 5, 6], help="numbers of anchors (3 4 5 6)")
    add("--size", type=int, default=416, help="side of the network's input (416)")
    add("--resize", choices=["stretch", "letterbox"], default="stretch",
        help="stretch images (YOLOv2), or keep their shape (YOLOv5)")
    add("--bbox-format", choices=READINGS, help="what bbox is")
    add("--images", metavar="FOLDER", help="draw boxes on the photographs in it")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Glyph .* missing")
    place = args.file
    try:
        data = Annotations(args.file)
        with plt.rc_context(LOOKS):
            files = analyse(data, args)
            place = Path(args.out or Path("analysis", Path(args.file).stem))
            write(files, place)
    except OSError as error:
        print(f"coco_analysis.py: {error.filename or place}: {error.strerror or error}",
              file=sys.stderr)
        sys.exit(2)
    text = [line for line in files["report.md"].split("\n") if line[:1] not in "#!|"]
    print(*text, f"report: {place / 'report.md'}", sep="\n")


# -------------------------------------------------------------------------------- reading the file

TABLES = "annotations", "images", "categories"
CLASS_KEYS = "category_id", "category", "category_name", "label", "class", "class_name"
MEANINGS = {  # https://cocodataset.org/#format-data
    "id": "number of the image, category or annotation",
    "file_name": "the photograph",
    "width": "of the image, in pixels",
    "height": "of the image, in pixels",
    "image_id": "id of the object's image",
    "area": "of the object, in pixels",
    "segmentation": "outline: polygons, or run lengths",
    "iscrowd": "1: one box around many objects",
    "score": "a detector's confidence, 0 to 1",
    "name": "of the class",
    "supercategory": "a group of classes",
}

COCO_NAMES = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,
fire hydrant,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,
giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,
baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,
spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,
toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"""
COCO_NAMES = COCO_NAMES.replace("\n", "").split(",")
COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})

EXPECTED = "expected COCO JSON, or a list or lines of records with a bbox; tools export COCO JSON"


class BadInput(OSError):
    """A fault in the user's input, and its cure."""


def read_tables(path):
    """Returns the kind of the file, and its lists of annotations, images and categories."""
    def read():
        return Path(path).read_text("utf-8-sig", "replace")

    # Polygons fill most of a large file: without them, decoding takes half the time and memory.
    polygons = r'"segmentation":\s*\[[][0-9 .,\n-]*\]'
    try:
        top = json.loads(re.sub(polygons, '"segmentation":"..."', read()))
    except json.JSONDecodeError:
        text = read()
        try:
            top = json.loads(text)  # to name the right place
        except json.JSONDecodeError as error:
            more = error.msg == "Extra data" and text[error.pos] in "{,"
            if more or not text.lstrip().startswith(("{", "[")):
                return LINES, read_lines(text), [], []
            raise BadInput(f"not valid JSON: {error}: correct it there, or export or download the "
                           "file again") from error
    if isinstance(top, list):
        return LIST, top, [], []
    if not isinstance(top, dict) or not {"bbox", *TABLES} & top.keys():
        raise BadInput(f"{short(top)!r}: {EXPECTED}")
    if "bbox" in top:
        return LINES, [top], [], []
    tables = [top.get(name) for name in TABLES]
    return COCO, *(table if isinstance(table, list) else [] for table in tables)


def read_lines(text):
    """Records from lines of JSON, with or without quotes and braces; {} from an empty line."""
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        record = line.strip().rstrip(",")
        if not record.startswith("{"):
            record = "{" + re.sub(r"\b(\w+)\s*:", r'"\1":', record) + "}"
        try:
            records.append(json.loads(record))
        except ValueError:
            raise BadInput(f"line {number}, {short(line)!r}: {EXPECTED}") from None
    return records


def identifier(value):
    """An id as text, as files mix 3, 3.0 and "3"; or ""."""
    return str(value).removesuffix(".0") if isinstance(value, (int, float, str)) else ""


def to_floats(values, count):
    """`count` numbers, also in quotes, as floats; [] if they are anything else or absurd."""
    try:
        floats = list(map(float, values))
        return floats if len(floats) == count and sum(map(abs, floats)) < 1e9 else []
    except (TypeError, ValueError):
        return []


def distinct(keys, used):
    """Distinct keys, others of used (N,) at the end; and (N,) int64: the place of each of used."""
    found = list(dict.fromkeys([*keys, *used]))
    row = {key: number for number, key in enumerate(found)}
    return found, np.array([row[key] for key in used])


class Annotations:
    """What is kept of a file: N annotations, I images and C classes.

    bbox (N, 4) float64, as in the file; area (N,) float64, NaN where unknown; image, label (N,)
    int64: row of image and class; crowd (N,) bool; number (N,): place in the file; size (I, 2)
    float64 in pixels, NaN where unknown; images [I], classes [C]: ids; files [I]; names [C];
    fields {(table, field): example}; grouped: do records name their images?
    """

    def __init__(self, path):
        self.kind, *tables = read_tables(path)
        tables = {name: [record if isinstance(record, dict) else {} for record in table]
                  for name, table in zip(TABLES, tables)}
        annotations, images, categories = tables.values()
        self.fields = {(name, field): value for name, table in tables.items()
                       for record in reversed(table[:1000]) for field, value in record.items()}
        keys = {field for name, field in self.fields if name == "annotations"}
        self.grouped = bool(keys & {"image_id", "file_name"})
        self.class_key = next((key for key in CLASS_KEYS if key in keys), None)
        if not self.grouped and not self.class_key:
            ids = [identifier(record.get("id")) for record in annotations]
            if len(set(ids)) < len(ids):
                self.class_key = "id"  # as in the assignment's file; elsewhere it numbers records
        if self.kind == LIST and {"image_id", "category_id"} <= keys:
            self.kind = COCO_LIST

        self.place, first = ("line {}", 1) if self.kind == LINES else ("annotations[{}]", 0)
        boxes = [to_floats(record.get("bbox"), 4) for record in annotations]
        labels = [identifier(record.get(self.class_key)) if self.class_key else "object"
                  for record in annotations]
        good = [i for i, box in enumerate(boxes) if box and labels[i]]
        self.unusable = [
            f"{self.place.format(i + first)} (class {labels[i] or None}, "
            f"bbox {short(record.get('bbox'))})"
            for i, record in enumerate(annotations) if record and not (boxes[i] and labels[i])]
        if not good:
            raise BadInput("; ".join([EXPECTED, *self.unusable[:3]]) if self.unusable else
                           "no annotations")
        records = [annotations[i] for i in good]
        self.bbox, self.number = np.array([boxes[i] for i in good]), np.array(good) + first
        self.crowd = np.array([record.get("iscrowd") in (1, "1") for record in records])
        area = (record.get("area") for record in records)
        self.area = np.array([a if isinstance(a, (int, float)) else np.nan for a in area], float)

        used = [identifier(record.get("image_id", record.get("file_name"))) or i
                for i, record in zip(good, records)]
        self.ids = {name: [identifier(record.get("id")) for record in tables[name]]
                    for name in ("images", "categories")}
        details = dict(zip(self.ids["images"], images) if self.kind == COCO else zip(used, records))
        self.images, self.image = distinct(details, used)
        details = [details.get(key, {}) for key in self.images]
        self.size = np.array([to_floats((image.get("width"), image.get("height")), 2)
                              or [np.nan] * 2 for image in details])
        self.size[(self.size < 1).any(axis=1)] = np.nan
        self.files = [str(image.get("file_name") or f"{key:0>12}.jpg")  # by default as in COCO
                      for key, image in zip(self.images, details)]

        names = dict(zip(self.ids["categories"], (category.get("name") for category in categories)))
        self.classes, self.label = distinct(names, [labels[i] for i in good])
        self.assumed = "" if self.class_key else (
            'No field names a class: all boxes are of one class, "object".')
        for ids in range(80), COCO_IDS:
            coco = dict(zip(map(str, ids), COCO_NAMES))
            if not names and len(self.classes) >= 75 and set(self.classes) <= coco.keys():
                names = coco
                self.assumed = "Class names are assumed: the ids are those of COCO."
        self.names = [short(names.get(key) or (f"id {key}" if key[:1].isdigit() else key))
                      for key in self.classes]

    def photo(self, folder, row):
        """The path of a box's image."""
        return Path(folder, self.files[self.image[row]])


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
