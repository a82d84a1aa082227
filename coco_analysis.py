"""What do the numbers in an annotation file mean? Its fields, classes, boxes, and anchors for them.

    python coco_analysis.py annotations.json             # writes analysis/annotations/report.md
    python coco_analysis.py annotations.json --images .  # draws on the photographs there

The file is COCO JSON, or records with a `bbox`: a JSON list (detection results), JSON lines, or
lines like `id: 0, height: 330, width: 1093, bbox:[69, 464, 312, 175],`. The command prints

    bbox is [y, x, width, height]: 100.0% of the boxes lie inside their images; ...
    - k = 3, mean IoU 0.6328: 71.2,138.5, 149,76.5, 158.2,159.6

THE RULE. Read rightly, boxes lie inside their images.

    1. If the median of the last two numbers is at most 1, they are fractions; otherwise pixels.
    2. Under each order in READINGS, the boxes inside their images are counted.
    3. Orders within CLOSE of the best are possible, [x, y, width, height] within CLEAR.
    4. The first possible one in READINGS computes the anchors; the others are named.
    5. Without image sizes, from MANY boxes on, orders whose boxes reach over 10% further than the
       tightest go, except [x, y, width, height].
"""
import argparse
import gc
import json
import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ["MPLBACKEND"] = "Agg"  # draws into files; needs no screen
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageOps

from kmeans import kmeans, mean_best_iou

CLOSE, CLEAR, MANY = 0.01, 0.1, 20

READINGS = {  # first two and last two numbers p, q (N, 2) -> (x, y), (width, height)
    "xywh": ("[x, y, width, height]", lambda p, q: (p, q)),
    "xyxy": ("[x1, y1, x2, y2]", lambda p, q: (p, q - p)),
    "cxcywh": ("[center x, center y, width, height]", lambda p, q: (p - q / 2, q)),
    "yxyx": ("[y1, x1, y2, x2]", lambda p, q: (np.fliplr(p), np.fliplr(q - p))),
    "exchanged": ("[x, y, width, height], images' width and height exchanged",
                  lambda p, q: (p, q)),
    "yxwh": ("[y, x, width, height]", lambda p, q: (np.fliplr(p), q)),
    "yxhw": ("[y, x, height, width]", lambda p, q: (np.fliplr(p), np.fliplr(q))),
}

EXPECTED = "expected COCO JSON, as most tools export, or a list or lines of records with bbox"
CLASS_KEYS = "category_id", "category", "category_name", "label", "class", "class_name"
MEANINGS = {  # https://cocodataset.org/#format-data
    "id": "number of the annotation, image or category",
    "file_name": "the photograph",
    "width": "of the image, in pixels",
    "height": "of the image, in pixels",
    "image_id": "id of the image",
    "area": "of the object, in pixels",
    "segmentation": "outline: polygons [x, y, x, y, ...], or run lengths",
    "iscrowd": "1: a group of objects, or any mask of CVAT",
    "score": "a detector's confidence",
    "name": "of the class",
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


class BadInput(OSError):
    """A fault in the user's input, and its cure."""


# -------------------------------------------------------------------------------- reading the file


class Box(NamedTuple):
    """An annotation with its image's fields; ids are text."""
    place: str
    bbox: list
    label: str
    image: str
    file_name: str
    size: tuple  # NaN where unknown


def short(value):
    return re.sub(r"\s", " ", str(value)[:60])


def identifier(value):
    """Text, as files mix 3, 3.0 and "3"; or ""."""
    return str(value).removesuffix(".0") if isinstance(value, (int, float, str)) else ""


def to_floats(values):
    """A list of numbers, also in quotes, as floats; [] for anything else."""
    try:
        floats = list(map(float, values)) if isinstance(values, list) else []
        return floats if sum(map(abs, floats)) < 1e9 else []
    except (TypeError, ValueError):
        return []


def read_lines(text):
    """{place: record} of JSON lines, also without quotes and braces."""
    records = {}
    for number, line in enumerate(text.split("\n"), 1):
        record = line.strip().rstrip(",")
        if record and record[0] != "{":
            record = "{" + re.sub(r"\b(\w+)\s*:", r'"\1":', record) + "}"
        try:
            if record:
                records[f"line {number}"] = json.loads(record)
        except ValueError:
            raise BadInput(f"line {number}, {short(line)!r}: {EXPECTED}") from None
    return records


def without_polygons(text):
    """Halves time and memory; the first stays, as an example."""
    first = iter([True])
    return re.sub(r'"segmentation":\s*\[[][0-9 .,\n-]*\]', lambda outline: outline[0] if next(
        first, None) else '"segmentation":null', text)


def read(path):
    """What a file is, and its tables {name: {place: record}}: "annotations", of COCO JSON also
    "images" and "categories".
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (IsADirectoryError, UnicodeDecodeError):
        raise BadInput(f"not a text file in UTF-8: {EXPECTED}") from None
    if not re.search(r'^\s*\[|"(annotations|images)"\s*:\s*\[', text):
        return "lines of records", {"annotations": read_lines(text)}
    try:
        top = json.loads(without_polygons(text))
    except ValueError:
        try:
            top = json.loads(text)  # names the place
        except ValueError as error:
            raise BadInput(f"not valid JSON: {error}: correct it there (are these two files?), or "
                           "export or download the file again") from error
    kind, tables = "a JSON list", {"annotations": top}
    if isinstance(top, dict):
        kind = "COCO instances JSON"
        tables = {name: top.get(name, []) for name in ("annotations", "images", "categories")}
    for name, table in tables.items():
        if not isinstance(table, list) or not all(isinstance(record, dict) for record in table):
            raise BadInput(f"{short(table)!r}: {EXPECTED}")
        tables[name] = {f"{name}[{i}]": record for i, record in enumerate(table)}
    return kind, tables


def flatten(annotations, images={}, categories={}):
    """The field that names the class, or None; a list of Box; places of unusable annotations;
    {id of a class: its name or None}.
    """
    fields = set().union(*annotations.values())
    if not fields:
        raise BadInput("no annotations")
    if "bbox" not in fields:
        raise BadInput(f"annotations have no bbox, only {', '.join(sorted(fields))}; {EXPECTED}")
    class_key = next((key for key in CLASS_KEYS if key in fields), None)
    ids = {identifier(record.get("id")) for record in annotations.values()}
    if not class_key and not fields & {"image_id", "file_name"} and len(ids) < len(annotations):
        class_key = "id"  # as in the assignment's file; elsewhere it numbers records
    images = {identifier(record.get("id")): record for record in images.values()}
    names = {identifier(record.get("id")): record.get("name") for record in categories.values()}
    boxes, unusable, details = [], [], {}
    for place, record in annotations.items():
        label = identifier(record.get(class_key)) if class_key else "object"
        bbox = to_floats(record.get("bbox"))
        if not label or len(bbox) != 4:
            unusable.append(f"{place} (class {label or None}, bbox {short(record.get('bbox'))})")
            continue
        names.setdefault(label)
        key = identifier(record.get("image_id", record.get("file_name"))) or place
        if key not in details:
            image = images.get(key, record)  # a record of a list has the image's fields, too
            size = to_floats([image.get("width"), image.get("height")])
            details[key] = (str(image.get("file_name") or f"{key:0>12}.jpg"),  # as in COCO
                            size if min(size, default=0) >= 1 else (np.nan, np.nan))
        boxes.append(Box(place, bbox, label, key, *details[key]))
    if not boxes:
        raise BadInput("; ".join([EXPECTED, *unusable[:3]]))
    return class_key, boxes, unusable, names


# ---------------------------------------------------------------------- what the four numbers mean


def to_xywh(bbox, size, reading, fractions):
    """bbox (N, 4) in images of size (N, 2) -> x, y, width, height in pixels; the true size."""
    size = np.fliplr(size) if reading == "exchanged" else size
    box = np.hstack(READINGS[reading][1](bbox[:, :2], bbox[:, 2:]))
    return (box * np.tile(size, 2) if fractions else box), size


def inside(box, size):
    """(N,) bool: are boxes (N, 4) inside their images, up to a pixel?"""
    start, end = box[:, :2], box[:, :2] + box[:, 2:]
    return ((start >= -1) & (end > start) & (end <= size + 1)).all(axis=1)


def find_readings(bbox, size, fractions, shape=0):
    """bbox (N, 4) as in the file; size (N, 2) of the images, NaN where unknown; shape: positive if
    photographs confirm which side is longer, negative if they deny it -> the possible readings,
    {reading: share of the boxes inside}.
    """
    sized, fit, reach = np.isfinite(size).any(), {}, {}
    frame = size if sized else np.full_like(size, np.inf)
    for key in READINGS:
        box, true_frame = to_xywh(bbox, frame, key, fractions)
        fit[key] = inside(box, true_frame).mean()
        reach[key] = (box[:, :2] + box[:, 2:]).max(axis=0).prod()
    keys = list(READINGS)
    if fractions or np.array_equal(*frame.T, equal_nan=True):  # these would equal xywh
        keys = [key for key in keys if key not in ("exchanged", "yxhw")]
    elif shape:
        keys = [key for key in keys if (key == "exchanged") == (shape < 0)]
    best = max(fit[key] for key in keys)
    found = [key for key in keys if fit[key] >= best - (CLEAR if key == "xywh" else CLOSE)]
    if not sized and len(bbox) >= MANY:
        limit = 1.1 * min(reach[key] for key in found)
        found = [key for key in found if key == "xywh" or reach[key] <= limit]
    return found, fit


def explain(found, fit, fractions, bbox, size):
    best, *others = found
    why = f"bbox is {READINGS[best][0]}{' as fractions' * fractions}: {fit[best]:.1%} of the boxes "
    why += ("lie inside their images" if np.isfinite(size).any() else
            "fit by signs and extent; no image size is known")
    if fit["xywh"] < fit[best]:
        why += f"; read as [x, y, width, height], {fit['xywh']:.1%} do"
    if not fractions and bbox.max() <= 100 < size.min():
        why += ". They may be percent: no number exceeds 100"
    if others:
        why += ". A tie: is it --bbox-format "
        why += " or ".join(f"{key} ({fit[key]:.1%})" for key in others) + "?"
    return why


# ------------------------------------------------------------------------- counts, faults, anchors


def check_coco(annotations, images, categories):
    """{fault: places} where pycocotools stops or loses annotations, and images without boxes."""
    faults = {}
    for name, table, field in (("annotations", annotations, "id"), ("images", images, "image_id"),
                               ("categories", categories, "category_id")):
        places = {}
        faults[f"{name} without an id of their own"] = [
            place for place, record in table.items() if record.get("id") is None
            or places.setdefault(record["id"], place) != place]
        if field != "id":
            faults[f'annotations whose {field} is not in {name} ("1" is not 1)'] = [
                place for place, record in annotations.items() if record.get(field) not in places]
    faults["annotations without numbers as bbox, area and iscrowd"] = [
        place for place, record in annotations.items()
        if any(to_floats(values) != values for values in (
            record.get("bbox"), [record.get("area"), record.get("iscrowd")]))]
    used = {identifier(record.get("image_id")) for record in annotations.values()}
    faults["images without boxes"] = [
        place for place, record in images.items() if identifier(record.get("id")) not in used]
    return faults


def check_boxes(boxes, box, size, photos):
    """{fault: places} of boxes (N, 4) in images of size (N, 2), and (N,) bool: those to cluster."""
    known, first = np.isfinite(size).all(axis=1), {}
    larger = (box[:, 2:] > size + 1).any(axis=1)
    w, h = size[larger.argmax()]
    unfit = {
        "narrower or lower than a pixel (left out)": (box[:, 2:] < 1).any(axis=1),
        f"larger than their image, the first of {w:g} x {h:g} (left out)": larger,
        "in images of unknown size (left out)": ~known & known.any(),
        "repeat an earlier box, class and image (left out)": np.array([
            first.setdefault((b.image, b.label, *b.bbox), b) is not b for b in boxes])}
    good = ~np.any(list(unfit.values()), axis=0)
    unfit["not inside their image"] = good & known & ~inside(box, size)
    faults = {fault: [boxes[i].place for i in mask.nonzero()[0]] for fault, mask in unfit.items()}
    faults["photographs of another size"] = [
        "{} ({}x{} on disk, {:g}x{:g} in the file)".format(
            boxes[row].file_name, *photo.size, *size[row])
        for row, photo in photos.items()
        if photo and boxes[row].size[0] > 0 and (size[row] != photo.size).any()]
    return faults, good


def at_input(wh, size, side, resize):
    """wh (N, 2) when images of size (N, 2) are resized to side x side; and its unit."""
    if np.isnan(size).any():
        return wh, "pixels of the images, whose sizes are unknown"
    if resize == "letterbox":  # YOLOv5
        size = size.max(axis=1, keepdims=True)
    return np.minimum(wh / size, 1) * side, f"pixels at {side} x {side}, {resize}"


def find_anchors(wh, asked):
    """{k: (anchors (k, 2), mean IoU)} for k up to the number of distinct boxes."""
    found, distinct = {}, len(np.unique(wh, axis=0))
    for k in sorted({min(k, distinct) for k in asked}):
        anchors = kmeans(wh, k)[0].round(1)
        found[k] = anchors, mean_best_iou(wh, anchors)
    return found


# ---------------------------------------------------------------------------------------- pictures

BLUE, RED = "#3b6ea8", "#d1495b"


def open_photos(boxes, folder):
    """{row of a box: photograph, or None without a folder}, of a dozen images."""
    first = {}
    for row, box in enumerate(boxes):
        first.setdefault(Path(folder or "", box.file_name), row)
    paths = {row: path for path, row in first.items() if not folder or path.is_file()}
    if not paths:
        raise BadInput(f"--images: there is no image such as {next(iter(first))}")
    rows = np.random.default_rng(0).permutation(list(paths))[:12].tolist()
    return {row: folder and ImageOps.exif_transpose(Image.open(paths[row])).convert("RGB")
            for row in rows}


def draw_readings(bbox, size, fractions, titles, photos, readings, fit):
    """A dozen boxes in their images' frames, or on the photographs, under two readings."""
    figure = plt.figure(figsize=(16, 6))
    for half, reading in zip(figure.subfigures(1, 2), readings):
        half.suptitle(f"bbox read as {READINGS[reading][0]}: {fit[reading]:.1%} inside")
        panels = half.subplots(3, 4, subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
        box, frame = to_xywh(bbox, size, reading, fractions)
        frame = np.where(np.isfinite(frame), frame, (box[:, :2] + box[:, 2:]).max(axis=0))
        colours = np.where(inside(box, frame), BLUE, RED)
        for axes, (row, photo) in zip(panels.flat, photos.items()):
            w, h = photo.size if photo and np.isnan(size[row, 0]) else frame[row]
            axes.imshow(photo or [[[0.9] * 3]], extent=(0, w, h, 0))
            axes.add_patch(plt.Rectangle(box[row, :2], *box[row, 2:], fill=False, linewidth=2,
                                         edgecolor=colours[row]))
            axes.axis("scaled")
            axes.set_title(titles[row][:25])
    return figure


def draw_classes(classes):
    _, names, counts, _ = zip(*classes[:80])
    figure, axes = plt.subplots(figsize=(2 + 0.17 * len(names), 4))
    axes.bar(range(len(names)), counts, color=BLUE)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set(ylabel="boxes", title=f"{len(names)} of {len(classes)} classes")
    axes.margins(x=0.01)
    return figure


def draw_centres(box, size):
    figure, axes = plt.subplots()
    centre = box[:, :2] + box[:, 2:] / 2
    centre /= np.nan_to_num(size, nan=(box[:, :2] + box[:, 2:]).max())
    *_, heat = axes.hist2d(*centre.T, 25, range=[[0, 1]] * 2, cmin=1, vmin=0)
    figure.colorbar(heat, label="boxes")
    axes.set(title="centres of the boxes", xlabel="x / width of the image",
             ylabel="y / height of the image", ylim=(1, 0))
    return figure


def draw_sizes(wh, anchors, unit):
    """On logarithmic axes, as IoU is about ratios."""
    figure, axes = plt.subplots()
    some = np.random.default_rng(0).permutation(wh)[:20000]
    axes.scatter(*some.T, 6, BLUE, alpha=0.4, linewidth=0)
    axes.scatter(*anchors.T, 90, RED, marker="P", edgecolor="white")
    axes.loglog(base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    limits = wh.min() / 2, wh.max() * 2
    axes.set(title=f"boxes and {len(anchors)} anchors, {unit}", xlabel="width", ylabel="height",
             xlim=limits, ylim=limits)
    return figure


def draw_anchors(found, unit):
    figure, panels = plt.subplots(1, len(found), squeeze=False, sharey=True,
                                  figsize=(3.5 * len(found), 4.5))
    half = 0.55 * max(anchors.max() for anchors, _ in found.values())
    for axes, (k, (anchors, score)) in zip(panels[0], found.items()):
        for j, (w, h) in enumerate(anchors):
            axes.add_patch(plt.Rectangle((-w / 2, -h / 2), w, h, fill=False, edgecolor=f"C{j}",
                                         linewidth=2, label=f"{w:g} x {h:g}"))
        axes.set(title=f"k = {k}, mean IoU {score:.4f}", xlabel=unit, aspect="equal",
                 xlim=(-half, half), ylim=(half, -half))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    return figure


# ------------------------------------------------------------------------- the report, the command


def markdown(*rows):
    rows = [[re.sub(r"([\\`*_{}\[\]<>|$&#!~])", r"\\\1", short(value)) for value in row]
            for row in rows]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def describe_fields(tables, meanings):
    for name, table in tables.items():
        for field in dict.fromkeys(field for record in table.values() for field in record):
            values = [record[field] for record in table.values() if field in record]
            yield name, field, f"{len(values):,}", values[0], meanings.get(field, "")


def count_classes(boxes, names):
    """[(id, name, boxes, share)] of {id: name or None}, and whether the names are assumed."""
    assumed = False
    for ids in range(80), COCO_IDS:
        if names.keys() == set(map(str, ids)) and not any(names.values()):
            names, assumed = dict(zip(map(str, ids), COCO_NAMES)), True
    counts = Counter(box.label for box in boxes)
    return sorted(((key, short(name or (f"id {key}" if key.isdigit() else key)), counts[key],
                    f"{counts[key] / len(boxes):.2%}")
                   for key, name in names.items()), key=lambda row: -row[2]), assumed


def analyse(args):
    kind, tables = read(args.file)
    class_key, boxes, unusable, names = flatten(**tables)
    classes, assumed = count_classes(boxes, names)
    bbox = np.array([box.bbox for box in boxes], float)  # (N, 4)
    size = np.array([box.size for box in boxes], float)
    fractions = bool(np.median(bbox[:, 2:][bbox[:, 2:] > 0]) <= 1)
    size = np.nan_to_num(size, nan=args.size) if fractions else size
    photos = open_photos(boxes, args.images)
    shape = np.nansum([np.sign(photo.width - photo.height) * np.sign(size[row] @ (1, -1))
                       for row, photo in photos.items() if photo])
    found, fit = find_readings(bbox, size, fractions, shape)
    found = [args.bbox_format] if args.bbox_format else found
    why = "As asked, " * bool(args.bbox_format) + explain(found, fit, fractions, bbox, size)
    reading = found[0]
    box, true_size = to_xywh(bbox, size, reading, fractions)

    faults, good = check_boxes(boxes, box, true_size, photos)
    faults["unusable (left out)"] = unusable
    faults["with iscrowd = 1: in COCO a group of objects (1% of its boxes), in CVAT's files any "
           "mask"] = [place for place, record in tables["annotations"].items()
                      if record.get("iscrowd") in (1, "1")]
    if "images" in tables:
        faults |= check_coco(**tables)
        faults["not [x, y, width, height] in pixels, as COCO has it"] = [
            b.place for b in boxes if fractions or reading != "xywh"]
        faults["byte order mark, where pycocotools stops"] = [
            "byte 0"] * Path(args.file).read_bytes().startswith(b"\xef\xbb\xbf")
    quality = [f"- {len(places):,} {fault}: {', '.join(places[:3])}"
               for fault, places in faults.items() if places] or ["- no fault found"]
    if not good.any():
        raise BadInput("; ".join(["no box is usable", *quality]))

    wh, unit = at_input(box[good, 2:], true_size[good], args.size, args.resize)
    anchors = find_anchors(wh, args.k)
    summary = f"{kind}: {len(boxes):,} boxes, {len(classes)} classes"
    summary += f", {len(tables['images']):,} images" if "images" in tables else ""
    report = [
        f"# Annotations in {Path(args.file).resolve()}", summary, why,
        "Class names are assumed: the ids are those of COCO." * assumed,
        'No field names a class: all boxes are of one class, "object".' * (not class_key),
        "![](readings.png)",
        markdown(("bbox read as", "boxes inside their images"),
                 *((text, f"{fit[key]:.2%}") for key, (text, _) in READINGS.items())),
        "## Fields", markdown(("table", "field", "records", "example", "meaning"), *describe_fields(
            tables, MEANINGS | {"bbox": READINGS[reading][0], class_key: "the class"})),
        "## Quality", *quality,
        "## Classes", "![](class_distribution.png)",
        markdown(("id", "name", "boxes", "share"), *classes),
        "## Boxes", "![](bbox_distribution.png)", "![](bbox_wh.png)",
        "## Anchors", "![](anchors.png)", f"Anchors: width,height in {unit}",
        *(f"- k = {k}, mean IoU {score:.4f}: " + ", ".join(f"{w:g},{h:g}" for w, h in sides)
          for k, (sides, score) in anchors.items())]
    names = {key: name for key, name, *_ in classes}
    other = "xywh" if reading != "xywh" else max(list(fit)[1:], key=fit.get)
    return {
        "readings.png": draw_readings(
            bbox, size, fractions, [names[b.label] for b in boxes], photos, [other, reading], fit),
        "class_distribution.png": draw_classes(classes),
        "bbox_distribution.png": draw_centres(box[good], true_size[good]),
        "bbox_wh.png": draw_sizes(wh, anchors[max(anchors)][0], unit),
        "anchors.png": draw_anchors(anchors, unit),
        "report.md": "\n\n".join(filter(None, report)) + "\n",
    }


def write(files, out):
    """Writes {file name: text or figure} into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, str):
            (out / name).write_text(content, "utf-8")
        else:
            content.savefig(out / name)
            plt.close(content)


def choose_folder(path):
    """analysis/<name>; with its parents' names where another file's report is."""
    path = Path(path).resolve()
    for start in range(len(path.parts) - 1, 0, -1):
        out = Path("analysis", "-".join([*path.parts[start:-1], path.stem]))
        report = out / "report.md"
        if not report.exists() or f" {path}\n" in report.read_text("utf-8"):
            return out


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
    gc.disable()  # loading is twice as fast
    warnings.simplefilter("ignore")  # of fonts that lack a letter
    place = args.file
    try:
        with plt.rc_context({"font.size": 8, "savefig.bbox": "tight", "text.parse_math": False,
                             "figure.constrained_layout.use": True}):  # names may contain a $
            files = analyse(args)
            place = Path(args.out or choose_folder(args.file))
            write(files, place)
    except OSError as error:
        print(f"coco_analysis.py: {error.filename or place}: {error.strerror or error}",
              file=sys.stderr)
        sys.exit(2)
    text = [line for line in files["report.md"].split("\n") if line[:1] not in "#!|"]
    print(*text, f"report: {place / 'report.md'}", sep="\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
