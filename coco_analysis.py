"""What do the numbers in an annotation file mean? Its fields, classes, boxes, and anchors for them.

    python coco_analysis.py annotations.json             # writes analysis/annotations/report.md
    python coco_analysis.py annotations.json --images .  # draws on the photographs there
    python coco_analysis.py annotations.json --k 5 9 --size 640 --resize letterbox

The file is COCO JSON, or records with a `bbox`: a JSON list (detection results), JSON lines, or
lines like `id: 0, height: 330, width: 1093, bbox:[69, 464, 312, 175],`. The command prints

    lines of records: 10,105 boxes, 80 classes
    bbox is [y, x, width, height]: 100.0% of the boxes lie inside their images; ...
    - k = 3, mean IoU 0.6329: 71,139, 149,77, 158,160
"""
import argparse
import csv
import io
import json
import re
import sys
import tempfile
import warnings
from array import array
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from kmeans import kmeans, mean_best_iou

plt.switch_backend("Agg")  # needs no screen

# ---------------------------------------------------------------------- what the four numbers mean

ORDERS = {  # the most common first, which wins a tie
    "xywh": ("[x, y, width, height]", lambda a, b, c, d: (a, b, c, d)),
    "yxwh": ("[y, x, width, height]", lambda a, b, c, d: (b, a, c, d)),
    "xyxy": ("[x1, y1, x2, y2]", lambda a, b, c, d: (a, b, c - a, d - b)),
    "yxyx": ("[y1, x1, y2, x2]", lambda a, b, c, d: (b, a, d - b, c - a)),
    "cxcywh": ("[center x, center y, width, height]",
               lambda a, b, c, d: (a - c / 2, b - d / 2, c, d)),
}
UNITS = {"": ("", None), "-fraction": (" as fractions", 1), "-percent": (" in percent", 100)}
# {key: (text, function to x, y, width, height, what a whole side is written as)}
READINGS = {order + unit: (text + words, read, whole)
            for unit, (words, whole) in UNITS.items() for order, (text, read) in ORDERS.items()}

MARGIN = 0.01  # readings whose fits differ by less cannot be told apart
POOR = 0.9     # fits below this are doubtful


def to_xywh(bbox, reading, size):
    """bbox (N, 4) under one of READINGS -> (N, 4) x, y, width, height; size (N, 2) of images."""
    _, read, whole = READINGS[reading]
    box = np.stack(read(*bbox.T), axis=1)
    return box * np.tile(size / whole, 2) if whole else box


def inside(box, size):
    """(N,) bool: are boxes (N, 4) inside their images, up to a pixel, as tools round?"""
    slack = np.minimum(1, size / 50)
    start, end = box[:, :2], box[:, :2] + box[:, 2:]
    return ((start >= -slack) & (end > start) & (end <= size + slack)).all(axis=1)


def try_readings(bbox, size, results=False):
    """Finds out what four numbers mean: under the right reading, boxes lie inside their images.

    bbox (N, 4) as in the file; size (N, 2) of the images in pixels, NaN where unknown; results: are
    these COCO detection results, [x, y, width, height] by specification? Returns the readings that
    fit, the best first; {reading: share of the boxes inside}; {reading: (2,) largest x and y}.
    """
    known = np.isfinite(size).all(axis=1)
    sized = known.any()
    bbox, size = (bbox[known], size[known]) if sized else (bbox, np.ones_like(size))
    fit, reach = {}, {}
    for key, (_, _, whole) in READINGS.items():
        box = to_xywh(bbox, key, size)
        fit[key] = inside(box, size if sized or whole else size * np.inf).mean()
        reach[key] = (box[:, :2] + box[:, 2:]).max(axis=0)

    # Fractions and percentages fit as pixels, too: they come first, but percentages only if images
    # are larger than 100 pixels or, of unknown size, filled.
    for whole in (1, 100, None):
        unit = [key for key in READINGS if READINGS[key][2] == whole]
        best = max(unit, key=fit.get)
        large = np.median(size) > 100 if sized else reach[best].min() > 0.98
        if fit[best] >= POOR and (whole != 100 or large):
            break
    else:
        unit, best = list(READINGS), max(fit, key=fit.get)

    # Without image sizes most orders fit. But x1 < x2 and y1 < y2 in all boxes is no coincidence,
    # and exchanging x and y spreads the boxes.
    alike = [key for key in unit if fit[key] > fit[best] - MARGIN]
    if results and (fit[unit[0]] >= POOR or fit[best] < 1 - MARGIN):
        alike = unit[:1]
    elif not sized:
        narrow, wide = sorted(unit[:2], key=lambda key: reach[key].prod())
        if unit[2] in alike and len(bbox) >= 20:
            alike = unit[2:4]
        elif wide in alike and reach[wide].prod() > 1.1 * reach[narrow].prod():
            alike.remove(wide)
    return alike, fit, reach


def explain(alike, fit, sized, exchanged):
    best = alike[0]
    why = f"bbox is {READINGS[best][0]}: {fit[best]:.1%} of the boxes "
    why += ("lie inside their images" if sized else
            "are possible, by order, signs and extent: no image size is known")
    if fit["xywh"] < fit[best]:
        why += f"; read as [x, y, width, height], {fit['xywh']:.1%} do"
    if exchanged:
        why += ". The images' width and height were exchanged"
    if alike[1:]:
        why += ". A tie: is it --bbox-format " + " or ".join(alike[1:]) + "?"
    if fit[best] < POOR:
        why += ". A poor fit"
    return why


# ------------------------------------------------------------------------- counts, faults, anchors


def short(value):
    """Printable text."""
    return "".join(c if c.isprintable() else " " for c in str(value)[:60])


def count_classes(data):
    """Rows (id, name, boxes without crowds, their share), the most frequent first."""
    boxes = np.bincount(data.label[data.crowd == 0], minlength=len(data.classes)).tolist()
    shares = [f"{number / max(sum(boxes), 1):.2%}" for number in boxes]
    return sorted(zip(data.classes, data.names, boxes, shares), key=lambda row: -row[2])


def check_quality(data, box, size):
    """A line for each oddity of boxes (N, 4) in images (N, 2), and (N,) bool: those to cluster."""
    lines, good = [], np.ones(len(box), bool)
    if data.unusable:
        lines.append(f"- {len(data.unusable):,} unusable (left out): "
                     + "; ".join(data.unusable[:3]))

    def check(what, mask, name=lambda row: data.place.format(data.number[row])):
        odd = np.flatnonzero(mask).tolist()
        if odd:
            lines.append(f"- {len(odd):,} {what}: " + ", ".join(str(name(row)) for row in odd[:3]))
        if "left out" in what:
            good[odd] = False

    sized = np.isfinite(size).all(axis=1)
    check("without area (left out)", (box[:, 2:] < 1e-6).any(axis=1))
    check("crowds, one box around many objects (left out)", data.crowd)
    check("repeat an earlier box, class and image (left out)",
          repeats(np.column_stack([data.bbox, data.image, data.label])))
    if sized.any():
        check("in images of unknown size (left out)", ~sized)
        check("not inside their image", good & ~inside(box, size))
    if data.is_coco:
        for table, used, ids in (("images", data.image, data.images),
                                 ("categories", data.label, data.classes)):
            missing = ~np.isin([float(hash(key)) for key in ids], data.ids[table])
            check(f"refer to missing {table}", missing[used])
            unused = np.bincount(used, minlength=len(ids)) == 0
            check(f"{table} without annotations", unused, ids.__getitem__)
        for table, ids in data.ids.items():
            check(f"{table} with the id of an earlier one", repeats(np.array(ids)[:, None]),
                  f"{table}[{{}}]".format)
    return lines, good


def at_input(wh, size, side, resize):
    """wh (N, 2) when images of size (N, 2) are resized to side x side; and its unit."""
    if np.isnan(size).any():
        return wh, "pixels of the images, whose sizes are unknown"
    if resize == "letterbox":  # YOLOv5: the longer side becomes `side`
        size = size.max(axis=1, keepdims=True)
    return wh / size * side, f"pixels at {side} x {side}, {resize}"


def find_anchors(wh, asked):
    """{k: (anchors (k, 2), mean IoU)} for each k asked, at most the number of distinct boxes.

    Decimals are dropped as long as that costs less than 0.0005.
    """
    found, distinct = {}, len(np.unique(wh, axis=0))
    for k in sorted({min(k, distinct) for k in asked}):
        exact, best = kmeans(wh, k)
        for digits in range(9):
            anchors = exact.round(digits)
            score = mean_best_iou(wh, anchors)
            if score > best - 0.0005:
                break
        found[k] = anchors, score
    return found


# ---------------------------------------------------------------------------------------- pictures

BLUE, RED = "#3b6ea8", "#d1495b"
LOOKS = {"font.size": 8, "savefig.bbox": "tight", "figure.constrained_layout.use": True,
         "text.parse_math": False}  # class names may contain a $


def draw_readings(data, size, readings, fit, reach, photos):
    """A dozen boxes in their images' frames, or on the photographs, under two readings."""
    first = np.unique(data.image, return_index=True)[1]  # a box of each image
    rows = [row for row in np.random.default_rng(0).permutation(first)
            if not photos or data.photo(photos, row).is_file()][:12]
    if not rows:
        raise BadInput(f"--images: there is no image such as {data.photo(photos, 0)}")
    figure = plt.figure(figsize=(16, 6))
    for half, reading in zip(figure.subfigures(1, 2), readings):
        half.suptitle(f"bbox read as {READINGS[reading][0]}: {fit[reading]:.1%} inside")
        panels = half.subplots(3, 4, subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
        for axes, row in zip(panels.flat, rows):
            frame = np.where(np.isfinite(size[[row]]), size[[row]], reach[reading])  # (1, 2)
            box = to_xywh(data.bbox[[row]], reading, frame)
            width, height = frame[0]
            colour = BLUE if inside(box, frame)[0] else RED
            picture = plt.imread(data.photo(photos, row)) if photos else [[[0.9] * 3]]
            axes.imshow(picture, "gray", extent=(0, width, height, 0))
            axes.add_patch(plt.Rectangle(box[0, :2], *box[0, 2:], fill=False, edgecolor=colour,
                                         linewidth=2))
            axes.axis("scaled")
            axes.set_title(data.names[data.label[row]])
    return figure


def draw_classes(classes):
    _, names, counts, _ = zip(*classes[:80])
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.17 * len(counts)))
    axes.bar_label(axes.barh(range(len(counts)), counts, color=BLUE), fmt=" {:,.0f}")
    axes.set_yticks(range(len(counts)), names)
    axes.set(ylim=(len(counts) - 0.4, -0.6), xlabel="boxes", title="most frequent classes")
    return figure


def draw_boxes(data, box, size):
    figure, (where, *others) = plt.subplots(1, 3 + data.grouped, figsize=(16, 3.6))
    centre = box[:, :2] + box[:, 2:] / 2
    centre /= np.nan_to_num(size, nan=(box[:, :2] + box[:, 2:]).max())
    cells = int(np.clip(len(box) ** 0.5 / 3, 8, 40))  # fewer boxes in a cell are noise
    *_, heat = where.hist2d(*centre.T, cells, range=[[0, 1]] * 2, cmin=1)
    figure.colorbar(heat, ax=where, label="boxes")
    where.set(title="centres", ylim=(1, 0))
    for axes, (title, values) in zip(others, (
            ("width : height", box[:, 2] / box[:, 3]),
            ("root of width x height", np.sqrt(box[:, 2] * box[:, 3])),
            ("annotations of an image", np.unique(data.image, return_counts=True)[1]))):
        axes.hist(np.log2(values), 40, color=BLUE)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.xaxis.set_major_formatter(lambda power, _: f"{2 ** power:g}")
        axes.set(title=title, ylabel="count")
    return figure


def draw_sizes(wh, anchors, unit):
    """On logarithmic axes, as IoU is about ratios."""
    figure, axes = plt.subplots()
    some = np.random.default_rng(0).permutation(wh)[:20000]
    axes.scatter(*some.T, 6, BLUE, alpha=0.2, linewidth=0)
    axes.scatter(*anchors.T, 90, RED, marker="P", edgecolor="white")
    axes.loglog(base=2**0.5)
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.set(title=f"boxes and anchors in {unit}", xlabel="width", ylabel="height")
    return figure


def draw_anchors(found):
    """Side by side and to scale, a row for each k."""
    side = 1.1 * max(anchors.max() for anchors, _ in found.values())
    figure, panels = plt.subplots(len(found), squeeze=False,
                                  figsize=(1.6 * max(found), 2 * len(found)))
    for axes, (k, (anchors, score)) in zip(panels.flat, found.items()):
        bars = axes.bar(np.arange(k) * side, anchors[:, 1], anchors[:, 0], align="edge", color=BLUE)
        axes.bar_label(bars, [f"{w:g} x {h:g}" for w, h in anchors])
        axes.set(xlim=(0, max(found) * side), ylim=(0, 1.1 * side), aspect="equal")
        axes.set_title(f"k = {k}, mean IoU {score:.4f}", loc="left")
        axes.axis("off")
    return figure


def draw_gain(found):
    figure, axes = plt.subplots()
    axes.plot(list(found), [score for _, score in found.values()], "o-", color=BLUE)
    axes.set(xlabel="anchors", ylabel="mean IoU", xticks=list(found))
    return figure


# ------------------------------------------------------------------------- the report, the command


def markdown(*rows):
    rows = [[re.sub(r"([\\`*_{}\[\]<>|$&#!~])", r"\\\1", short(value)) for value in row]
            for row in rows]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def analyse(data, args):
    """The report, {file name: text or figure}."""
    size = data.size[data.image]  # (I, 2) -> (N, 2)
    results = {"image_id", "category_id", "bbox", "score"} <= {name for _, name in data.fields}
    alike, fit, reach = try_readings(data.bbox, size, results)
    turned = try_readings(data.bbox, size[:, ::-1], results)
    exchanged = fit[alike[0]] < POOR <= turned[1][turned[0][0]]
    if exchanged:
        (alike, fit, reach), size = turned, size[:, ::-1]
    if args.bbox_format:
        alike = [args.bbox_format]
    why = explain(alike, fit, np.isfinite(size).any(), exchanged)
    reading = alike[0]
    if READINGS[reading][2] and np.isnan(size).all():
        size = np.ones_like(size)  # boxes stay fractions
    box = to_xywh(data.bbox, reading, size)
    quality, good = check_quality(data, box, size)
    if not good.any():
        raise BadInput(f"no usable {READINGS[reading][0]}: try another --bbox-format")
    wh, unit = at_input(box[good, 2:], size[good], args.size, args.resize)
    found = find_anchors(wh, args.k)

    classes = count_classes(data)
    counts = {"boxes": (data.crowd == 0).sum(), "crowds": data.crowd.sum(),
              "unusable annotations": len(data.unusable), "classes": len(classes),
              "images": len(data.images) * data.grouped}
    summary = f"{data.kind}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)
    fits = [(READINGS[key][0], f"{fit[key]:.2%}", "{:.5g} x {:.5g}".format(*reach[key]))
            for key in sorted(fit, key=fit.get, reverse=True) if fit[key]]
    anchors = [f"- k = {k}, mean IoU {score:.4f}: " + ", ".join(f"{w:g},{h:g}" for w, h in anchors)
               for k, (anchors, score) in found.items()]
    report = [
        "# Annotations", summary, why, data.assumed, "![](readings.png)",
        markdown(("bbox read as", "boxes inside their images", "largest x and y"), *fits),
        "## Fields",
        markdown(("table", "field", "example"), *((*key, data.fields[key]) for key in data.fields)),
        "## Quality", *quality,
        "## Classes", "![](class_distribution.png)", markdown(CLASSES, *classes),
        "## Boxes", "![](bbox_distribution.png)", "![](bbox_wh.png)",
        "## Anchors", "![](anchors.png)", "![](anchors_iou.png)",
        f"Anchors: width,height in {unit}", *anchors]
    other = "xywh" if reading != "xywh" else max(list(fit)[1:], key=fit.get)
    table = io.StringIO(newline="")
    csv.writer(table).writerows([CLASSES, *classes])
    return {
        "report.md": "\n\n".join(filter(None, report)) + "\n",
        "readings.png": draw_readings(data, size, [other, reading], fit, reach, args.images),
        "class_distribution.png": draw_classes(classes),
        "class_distribution.csv": table.getvalue(),
        "bbox_distribution.png": draw_boxes(data, box[good], size[good]),
        "bbox_wh.png": draw_sizes(wh, found[max(found)][0], unit),
        "anchors.png": draw_anchors(found),
        "anchors_iou.png": draw_gain(found),
        "anchors.json": json.dumps({"unit": unit, "anchors": {
            k: {"mean_iou": score, "width_height": anchors.tolist()}
            for k, (anchors, score) in found.items()}}),
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
    parser.add_argument("--out", help="folder of the report (analysis/<name>)")
    parser.add_argument("--k", type=int, nargs="+", default=[3, 4, 5, 6],
                        help="numbers of anchors (3 4 5 6)")
    parser.add_argument("--size", type=int, default=416, help="side of the network's input (416)")
    parser.add_argument("--resize", choices=["stretch", "letterbox"], default="stretch",
                        help="stretch images (YOLOv2), or keep their shape (YOLOv5)")
    parser.add_argument("--bbox-format", choices=READINGS, help="what bbox is")
    parser.add_argument("--images", metavar="FOLDER", help="draw boxes on the photographs in it")
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
        place = getattr(error, "filename", None) or place
        what = getattr(error, "strerror", None) or error
        print(f"coco_analysis.py: {place}: {what}", file=sys.stderr)
        sys.exit(2)
    text = [line for line in files["report.md"].split("\n") if line[:1] not in "#!|"]
    print(*text, f"report: {place / 'report.md'}", sep="\n")


# -------------------------------------------------------------------------------- reading the file

WINDOW = 1 << 18  # characters in memory; more if a record is longer
POLYGONS = re.compile(r'"segmentation":\s*\[(?:\s*\[[-+.eE0-9,\s]*\],?)+\s*\]')
CLASSES = "id", "name", "boxes", "share"

COCO_NAMES = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,
fire hydrant,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,
giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,
baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,
spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,
toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"""
COCO_NAMES = COCO_NAMES.replace("\n", "").split(",")
COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})

EXPECTED = "expected COCO JSON, or a list or lines of records with a bbox; tools write COCO JSON"


class BadInput(OSError):
    """A fault in the user's input, and its cure."""


class Reader:
    """Decodes JSON in a window that slides over a file of any length."""

    decode = json.JSONDecoder().raw_decode  # (text, start) -> (value, end)

    def __init__(self, stream):
        self.stream, self.text, self.at, self.place = stream, "", 0, "the start"

    def more(self):
        """Moves the window on; False at the end of the file."""
        new = self.stream.read(max(WINDOW, len(self.text) - self.at))
        if new:
            self.text, self.at = POLYGONS.sub('"segmentation":[]', self.text[self.at:] + new), 0
            self.batch = self.text.rfind("},") + 1
        return bool(new)

    def take(self, pattern=None):
        """Returns what matches a pattern, without blanks, or decodes a value."""
        while True:
            try:
                if pattern:
                    found = re.compile(rf"\s*({pattern})\s*").match(self.text, self.at)
                    value, end = found[1], found.end()
                else:
                    value, end = self.decode(self.text, self.at)
                if end + 2 < len(self.text) or not self.more():  # else "1" may become "1e+5"
                    self.at = end
                    return value
            except (ValueError, TypeError):  # TypeError: the pattern is not found
                if not self.more():
                    raise BadInput(f"broken or cut off after {self.place}: "
                                   "export or download it again") from None

    def take_batch(self):
        """Decodes up to the last "}," of a window at once, which is fast; [] if that fails."""
        end, self.batch = self.batch, 0
        try:
            found = json.loads(f"[{self.text[self.at:end]}]")
        except ValueError:
            return []
        if found:
            self.at = end
        return found

    def items(self, closing):
        """Continues where each item of a list or an object begins."""
        mark = self.take(rf"\{closing}?")
        while mark != closing:
            yield
            mark = self.take(rf"[,\{closing}]")

    def table(self, name):
        """Yields (name, number, record) from a list."""
        number = 0
        for _ in self.items("]"):
            self.place = f"{name}[{number}]"
            for record in self.take_batch() or [self.take()]:
                yield name, number, record
                number += 1

    def records(self):
        """Yields (table, number, record) from a list, or an object's lists."""
        if self.take(r"[{[]") == "[":
            yield from self.table("annotations")
        else:
            for _ in self.items("}"):
                self.place = name = str(self.take())
                self.take(":")
                if self.take(r"\[?"):
                    yield from self.table(name)
                else:
                    self.take()
        self.take("$")


def read_lines(stream):
    """Yields ("annotations", line, record) from JSON with or without quotes and braces."""
    for number, line in enumerate(stream, 1):
        text = line.strip().rstrip(",")
        if not text.startswith("{"):
            text = "{" + re.sub(r"\b(\w+)\s*:", r'"\1":', text) + "}"
        try:
            record = json.loads(text)
        except ValueError:
            raise BadInput(f"line {number}, {short(line)!r}: {EXPECTED}") from None
        if record:
            yield "annotations", number, record


def identifier(value):
    """An id as text, as files mix 3, 3.0 and "3"; None if it is neither."""
    return str(value).removesuffix(".0") if isinstance(value, (int, float, str)) else None


def to_floats(values):
    """Numbers, or some in quotes, as floats; two NaN if one is anything else or absurd."""
    try:
        floats = [float(value) for value in values]
        if sum(map(abs, floats)) < 1e9:
            return floats
    except (TypeError, ValueError):
        pass
    return [np.nan, np.nan]


def repeats(values):
    """(N,) bool: is a row of values (N, M) equal to an earlier one?"""
    repeated = np.ones(len(values), bool)
    repeated[np.unique(values, axis=0, return_index=True)[1]] = False
    return repeated


class Annotations:
    """What is kept of a file: N annotations, I images and C classes.

    bbox (N, 4) float64, as in the file; image, label (N,) int64: row of image and class; crowd (N,)
    0 or 1; size (I, 2) float64, NaN where unknown; images [I], classes [C]: ids as text; names [C];
    ids {table: hashes}; fields {(table, field): example}; unusable: annotations left out;
    grouped: do records name their images?
    """

    def __init__(self, path):
        self.unusable, self.rows, self.fields = [], array("d"), {}
        self.images, self.details, self.classes, self.named = {}, [], {}, {}
        self.ids = {table: array("d") for table in ("images", "categories", "annotations")}
        with open(path, encoding="utf-8-sig", errors="replace") as text:
            for table, number, record in self.open(text):
                if table in self.ids:
                    self.add(table, number, record if isinstance(record, dict) else {})
        if not self.rows:
            raise BadInput("; ".join([f"{self.start!r}: {EXPECTED}", *self.unusable[:3]]))
        columns = np.frombuffer(self.rows).reshape(-1, 8)
        self.bbox = columns[:, :4]
        self.image, self.label, self.crowd, self.number = columns[:, 4:].astype(int).T
        self.size = np.array([details[:2] for details in self.details])
        self.size[(self.size < 1).any(axis=1)] = np.nan
        self.grouped, self.assumed = any(isinstance(key, str) for key in self.images), ""
        for ids in range(80), COCO_IDS:
            names = dict(zip(map(str, ids), COCO_NAMES))
            if not self.named and len(self.classes) >= 75 and names.keys() >= self.classes.keys():
                self.named = names
                self.assumed = "Class names are assumed: the ids are those of COCO."
        self.images, self.classes = list(self.images), list(self.classes)
        self.names = [self.named.get(key, f"id {key}") for key in self.classes]

    def open(self, text):
        """Finds out what the file is, and yields (table, number, record)."""
        start = text.read(WINDOW).lstrip()
        self.start = short(start)
        text.seek(0)
        try:
            is_record = not self.ids.keys() & json.loads(start.split("\n")[0]).keys()
        except (ValueError, AttributeError):  # the first line is no object
            is_record = start[:1] not in ("{", "[")
        self.is_coco = start.startswith("{") and not is_record
        self.class_key = "category_id" if self.is_coco or "category_id" in start else "id"
        self.place = "line {}" if is_record else "annotations[{}]"
        self.kind = ("lines of records" if is_record else
                     "COCO instances JSON" if self.is_coco else "a JSON list")
        return read_lines(text) if is_record else Reader(text).records()

    def add(self, table, number, record):
        ids = self.ids[table]
        if len(ids) < 1000:
            for name, value in record.items():
                self.fields.setdefault((table, name), value)
        key = identifier(record.get("id"))
        ids.append(len(ids) if key is None else hash(key))
        if table == "images":
            self.add_image(key, record)
        elif table == "categories":
            self.classes.setdefault(key, len(self.classes))
            self.named[key] = short(record.get("name", f"id {key}"))
        else:
            image = identifier(record.get("image_id", record.get("file_name")))
            label, bbox = identifier(record.get(self.class_key)), record.get("bbox")
            box = to_floats(bbox)
            if len(box) == 4 and label is not None:
                image = number if image is None else image
                row = self.add_image(image, {} if self.is_coco else record)
                label = self.classes.setdefault(label, len(self.classes))
                self.rows.extend((*box, row, label, record.get("iscrowd") in (1, "1"), number))
                return
            place = self.place.format(number)
            self.unusable.append(f"{place} (id {key}, image {image}) has class {label}, "
                                 f"bbox {short(bbox)}")

    def add_image(self, key, record):
        row = self.images.setdefault(key, len(self.images))
        if record or row == len(self.details):
            size = to_floats((record.get("width"), record.get("height")))
            self.details[row:row + 1] = [(*size, record.get("file_name"))]
        return row

    def photo(self, folder, row):
        """The path of an image, by default as in COCO."""
        image = self.image[row]
        return Path(folder, str(self.details[image][2] or f"{self.images[image]:0>12}.jpg"))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
