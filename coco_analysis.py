"""What is in this annotation file? Its schema, its classes, its boxes, and anchor boxes for them, in one report.

    python coco_analysis.py annotations.json                  the report goes to analysis/annotations/report.md
    python coco_analysis.py annotations.json.gz --k 5 9 --size 640 --resize letterbox
    python coco_analysis.py boxes.txt --bbox-format yxwh      when you know better what the four numbers are

It reads COCO instances JSON, lists of detection results, and text files with one
`id: 0, height: 330, width: 1093, bbox:[69, 464, 312, 175],` a line; which of them it is, it finds out from the content.
It prints, for 10,105 such lines (report.md has all of it, with the evidence, tables and pictures):

    boxes.txt: a text of one box per line: 10,105 boxes and 0 crowds of 80 classes in 10,105 images
    bbox is [y, x, width, height]: 100.0% of the boxes lie inside their images. Read as COCO's ...
    anchors in pixels at 416 x 416, stretch; width,height:
      k = 3, mean IoU 0.6329: 71,139, 148,77, 158,161
      ...

Files larger than memory are no problem: records are decoded from a window of the file, and what stays is a few numbers
for each. Polygons, most of a COCO file, are dropped before they are decoded.
"""
import argparse
import csv
import gzip
import io
import json
import os
import re
import sys
import tempfile
import warnings
import zlib
from array import array
from itertools import islice
from pathlib import Path

import matplotlib
matplotlib.use("Agg")  # draw into files; there may be no screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker
from matplotlib.colors import PowerNorm

from kmeans import kmeans

WINDOW = 1 << 18                    # characters of the file held at a time: as Python objects they take ten times that
LONGEST = 1 << 26                   # no record is longer: if one seems to be, a bracket or quote is never closed
BATCH = 1024                        # records that are turned into columns at a time: NumPy's overhead is per call
HUGE, TINY = 1e9, 1e-6              # more than a billion pixels is a mistake, and so is a side below a millionth
MARGIN = 0.01                       # readings of bbox whose fits differ by less than this cannot be told apart
POOR = 0.9                          # fewer boxes inside than this, and the report warns
SMALL, LARGE = 32 ** 2, 96 ** 2     # COCO's areas in pixels: small up to 32 x 32, large from 96 x 96

KINDS = {"{": "COCO instances JSON", "[": "a list of detections"}      # by the first character; all else is a text
TABLES = ("images", "categories", "annotations")
POLYGONS = re.compile(r'("segmentation":\s*\[)(?:\s*\[[-+.eE0-9,\s]*\],?)+\s*\]')

# What four numbers may mean, in the order of their use in the wild: where two fit equally well, the first is taken (but
# see try_readings for images of unknown size).
READINGS = {
    "xywh": ("[x, y, width, height]", lambda a, b, c, d: (a, b, c, d)),
    "yxwh": ("[y, x, width, height]", lambda a, b, c, d: (b, a, c, d)),
    "xyxy": ("[x1, y1, x2, y2]", lambda a, b, c, d: (a, b, c - a, d - b)),
    "yxyx": ("[y1, x1, y2, x2]", lambda a, b, c, d: (b, a, d - b, c - a)),
    "cxcywh": ("[center x, center y, width, height]", lambda a, b, c, d: (a - c / 2, b - d / 2, c, d)),
}
READINGS |= {f"{key}-fraction": (f"{text} as fractions", read) for key, (text, read) in READINGS.items()}

COCO_NAMES = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,
frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,
wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")
COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})  # COCO's own ids skip these ten

BLUE, RED = "#3b6ea8", "#d1495b"
LOOKS = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "font.size": 9, "savefig.dpi": 110,
         "savefig.bbox": "tight", "figure.constrained_layout.use": True, "text.parse_math": False}  # names may have a $


class BadInput(Exception):
    """What the user has to mend, said in one line."""


def short(value, limit=40):
    """Any value as one short line of printable text."""
    text = "".join(c if c.isprintable() else " " for c in str(value)[:2 * limit])
    return text if len(text) <= limit else text[:limit - 3] + "..."


# ----------------------------------------------------------------------------------------------------- reading the file


class Reader:
    """A window that slides over a file (plain or .gz, in UTF-8) and decodes records from it."""

    decode = json.JSONDecoder().raw_decode                  # (text, position) -> (value, position behind it)
    blank = re.compile(r"[ \t\n\r]*")

    def __init__(self, raw):
        self.raw, self.size = raw, os.fstat(raw.fileno()).st_size
        data = gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        self.stream = io.TextIOWrapper(data, "utf-8-sig", newline="")
        self.text, self.at, self.fresh = "", 0, True        # the window; what of it is decoded; is it a new one?
        self.before, self.record = 0, ""                    # for messages: the bytes left behind, and the record,
        self.numbers = array("q")                           # and of a text file the line of each record

    def fail(self, what, cure="no valid JSON, or cut off: mend it there, or fetch it again", at=None):
        byte = self.before + len(self.text[:at or self.at].encode())
        raise BadInput(f"byte {byte:,}{self.record}: {what}: {cure}")

    def more(self):
        """Moves the window on: what is decoded leaves it, new text comes in. False at the end of the file."""
        new = self.stream.read(max(WINDOW, len(self.text) - self.at))       # doubles while one value does not fit in
        if new:
            self.before += len(self.text[:self.at].encode())
            self.text, self.at, self.fresh = self.text[self.at:] + new, 0, True
            if self.size > 200 * WINDOW and sys.stderr.isatty():
                print(f"  reading {self.raw.tell() / self.size:4.0%}", end="\r", file=sys.stderr)
        return bool(new)

    def peek(self):
        """The next character that is not blank, or "" at the end of the file."""
        while True:
            self.at = self.blank.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at:self.at + 1]

    def take(self, wanted):
        """Steps over the next character, which must be one of `wanted`, and returns it."""
        found = self.peek()
        if not found or found not in wanted:
            self.fail(f"{repr(found) if found else 'the file ends'} where {' or '.join(wanted)} belongs")
        self.at += 1
        return found

    def value(self):
        """Decodes one value, and moves the window on for as long as it is not complete."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if end + 2 < len(self.text) or not self.more():     # else it may be a number cut behind "1" or "1e+"
                    self.at = end
                    return value
            except json.JSONDecodeError as error:                   # broken, or cut by the end of the window?
                if len(self.text) - self.at > LONGEST or not self.more():
                    self.fail(error.msg, at=error.pos)
            except (RecursionError, ValueError) as error:
                self.fail(str(error).split(";")[0], "nothing here is so deeply nested or has so many digits: mend it")

    def most_elements(self):
        """Decodes a new window's elements up to its last "}," at once, far faster than one by one; [] if that fails.

        It fails where this "}" is inside a string or an object, whose quotes or brackets are then left open, where the
        array ends before it, and where the text is broken: then elements() goes on one by one.
        POLYGONS never match inside a string of valid JSON, where their quotes would be escaped.
        """
        end = self.text.rfind("},", self.at) + 1 if self.fresh else 0
        self.fresh = False
        try:
            found = json.loads("[" + POLYGONS.sub(r"\1]", self.text[self.at:end]) + "]")
        except (RecursionError, ValueError):
            return []
        self.at = end if found else self.at
        return found

    def elements(self, name):
        """Yields the elements of the array that begins here."""
        self.take("[")
        number, mark = 0, self.take("]") if self.peek() == "]" else ","
        while mark == ",":
            self.record = f" ({name}[{number}])"
            found = self.most_elements() or [self.value()]
            yield from found
            number, mark = number + len(found), self.take(",]")
        self.record = ""

    def members(self):
        """Yields (key, its elements) for each list in the object {"key": value, ...} that begins here."""
        self.take("{")
        keys, mark = [], self.take("}") if self.peek() == "}" else ","
        while mark == ",":
            key = self.value()
            self.take(":")
            if self.peek() == "[" and key not in keys:
                yield key, self.elements(key)               # also a list that nobody wants: it may not fit into memory
            elif key in TABLES:
                self.fail(f"{key!r} is no list, or not the only one", "COCO has one list of objects there")
            else:
                self.value()
            keys.append(key)
            mark = self.take(",}")

    def lines(self):
        """Yields the records of a text file: its lines are JSON without quotes and braces, so these are put back."""
        self.stream.seek(0)
        for number, line in enumerate(iter(lambda: self.stream.readline(WINDOW), ""), 1):
            fields = re.sub(r"\b(\w+)\s*:", r'"\1":', line.strip(" \t\r\n,"))
            try:
                if fields:
                    self.numbers.append(number)
                    yield json.loads("{" + fields + "}")
            except (RecursionError, ValueError):
                raise BadInput(f"line {number}: neither JSON nor `id: 0, height: 330, width: 1093, bbox:[69, 464, 312, "
                               "175]`: give a COCO file, a list of detections, or such lines") from None

    def tables(self):
        """Yields (name, its records) for each list in the file, of whichever kind it is."""
        first = self.peek()
        if first == "{":
            yield from self.members()
        else:
            yield "annotations", self.elements("annotations") if first == "[" else self.lines()
        if first in KINDS and self.peek():
            self.fail(f"{self.peek()!r} behind the end", "a file holds one JSON value: remove the rest, or make one "
                      "list [...] of lines of JSON")


# --------------------------------------------------------------------------------- from records to a schema and columns


class Table:
    """The records of one kind: their number and schema, and their values as NumPy arrays or an error that names one."""

    def __init__(self, name):
        self.name, self.count, self.fields = name, 0, {}    # count: of the records before the present batch
        self.lines = []                                     # of a text file: where each record stands

    def where(self, row):
        return f"line {self.lines[row]}" if self.lines else f"{self.name}[{row}]"

    def blame(self, row, what, cure):
        raise BadInput(f"{self.where(self.count + row)}: {what}: {cure}")

    def describe(self, records):
        """Adds the fields of a batch of records to the schema."""
        for row, record in enumerate(records):
            if type(record) is not dict:
                self.blame(row, f"{short(record)} is no object", "every record must be {...}")
        for key in {key: None for record in records for key in record}:
            if key not in self.fields and len(self.fields) == 100:  # then keys are data, and a hundred examples do
                continue
            values = [record[key] for record in records if key in record]
            field = self.fields.setdefault(key, {"count": 0, "types": set(), "low": np.inf, "high": -np.inf,
                                                 "example": short(values[0], 60)})
            field["count"] += len(values)
            field["types"] |= set(map(type, values))
            if field["types"] <= {int, float}:
                field["low"], field["high"] = min(field["low"], *values), max(field["high"], *values)

    def numbers(self, records, key, shape=(), default=None):
        """The values of one key as (n, *shape) float64."""
        def convert(values):
            try:
                found = np.array(values, np.float64)        # null becomes NaN, and "12" becomes 12
            except (TypeError, ValueError, OverflowError):  # a word, lists of different lengths, 400 digits
                return None
            return found if found.shape[1:] == shape else None

        values = [record.get(key, default) for record in records]
        found = convert(values)
        if found is None:
            row = next(row for row, value in enumerate(values) if convert([value]) is None)
            wanted = "a list of four numbers" if shape else "a number"
            self.blame(row, f"no {key!r}" if key not in records[row] else f"{key!r} is {short(repr(values[row]))}",
                       f"it must be {wanted}")
        return found

    def codes(self, records, key, index):
        """The ids under one key as rows of `index`, a dictionary {id: row} that new ids enlarge. (n,) int64."""
        for row, record in enumerate(records):
            if not isinstance(record.get(key), (int, float, str)):
                self.blame(row, f"no id in {key!r}", "every record needs one, a number or a text")
        return np.array([index.setdefault(record[key], len(index)) for record in records], dtype=np.int64)


class Data:
    """What is kept of a file: N boxes, I images and C classes, numbered in the order in which the file names them.

    bbox (N, 4) float64, as in the file; crowd (N,) bool; image_row and class_row (N,) int64: the box's image and class;
    images {id: row}, of a text file range(I), as its images have no ids; classes {id: row}; class_names [C];
    size (I, 2) float64: width and height of the images, NaN where unknown; listed (I,) and named (C,) bool: do the
    file's own tables have it?; assumed: the range of ids that got COCO's names.
    """

    def __init__(self, path):
        self.images, self.classes, self.names = {}, {}, {}
        self.tables = {name: Table(name) for name in TABLES}
        self.boxes = self.tables["annotations"]
        self.columns = {"listed": [np.empty(0, int)], "size": [np.empty((0, 2))], "named": [np.empty(0, int)],
                        "bbox": [], "crowd": [], "image": [], "class": []}          # lists of arrays, one a batch
        with open(path, "rb") as raw:
            try:
                reader = Reader(raw)
                first = reader.peek()
                self.is_coco, self.is_text = first == "{", first not in KINDS
                self.kind = KINDS.get(first, "a text of one box per line")
                self.boxes.lines = reader.numbers
                for name, records in reader.tables():
                    while batch := list(islice(records, BATCH)):
                        if name in self.tables:
                            self.take_in(self.tables[name], batch)
            except UnicodeError as error:
                raise BadInput(f"before byte {raw.tell():,}: {error.reason}: save it as UTF-8 text") from None
        if not self.boxes.count:
            raise BadInput("no annotations, or JSON of another kind: of COCO's files take the one called instances_...")
        self.join()

    def take_in(self, table, records):
        """Takes a batch of records of one table into the columns."""
        keep = lambda column, values: self.columns[column].append(values)
        table.describe(records)
        rows = np.arange(table.count, table.count + len(records))
        if table.name == "images" or self.is_text:          # each line of a text is an image too, and has its size
            sides = [table.numbers(records, key, default=np.nan) for key in ("width", "height")]
            keep("size", np.stack(sides, axis=1))
            keep("listed", rows if self.is_text else table.codes(records, "id", self.images))
        if table.name == "categories":
            keep("named", table.codes(records, "id", self.classes))
            self.names |= {record["id"]: str(record["name"]) for record in records if record.get("name") is not None}
        if table is self.boxes:
            keep("bbox", table.numbers(records, "bbox", (4,)))
            keep("crowd", table.numbers(records, "iscrowd", default=0) > 0)
            keep("image", rows if self.is_text else table.codes(records, "image_id", self.images))
            keep("class", table.codes(records, "id" if self.is_text else "category_id", self.classes))
        table.count += len(records)

    def join(self):
        """Joins the batches, and the tables, once all of them are known."""
        joined = lambda name: np.concatenate(self.columns.pop(name))        # popped: so the batches' memory is let go
        self.bbox, self.crowd, self.image_row, self.class_row = map(joined, ("bbox", "crowd", "image", "class"))
        self.images = range(self.boxes.count) if self.is_text else self.images
        listed = joined("listed")
        self.listed = np.bincount(listed, minlength=len(self.images)) > 0
        self.named = np.bincount(joined("named"), minlength=len(self.classes)) > 0
        self.size = np.full((len(self.images), 2), np.nan)
        self.size[listed] = joined("size")
        self.size[~((self.size >= 1) & (self.size < HUGE)).all(axis=1)] = np.nan
        ids, self.assumed = set(self.classes), ""
        if not self.names and ids <= set(range(80)) and 0 in ids:
            self.names, self.assumed = dict(enumerate(COCO_NAMES)), "0..79"
        elif not self.names and ids <= set(COCO_IDS):
            self.names, self.assumed = dict(zip(COCO_IDS, COCO_NAMES)), "1..90"
        self.class_names = [self.names.get(key, f"id {key}") for key in self.classes]


# ------------------------------------------------------------------------------------------- what the four numbers mean


def to_xywh(bbox, reading, size):
    """bbox (N, 4) under one of READINGS -> (N, 4) x, y, width, height. size (N, 2), NaN if unknown: for fractions."""
    box = np.stack(READINGS[reading][1](*bbox.T), axis=1)
    if reading.endswith("fraction"):
        box *= np.tile(np.where(np.isfinite(size), size, 1), 2)     # an image of unknown size counts as 1 x 1
    return box


def inside(box, size):
    """(N,) bool: does a box have an area, and lie in its image? Half a pixel (or 1 %) is forgiven: tools round."""
    slack = np.minimum(0.5, size * 0.01)
    return ((box[:, 2:] > 0) & (box[:, :2] >= -slack) & (box[:, :2] + box[:, 2:] <= size + slack)).all(axis=1)


def try_readings(bbox, size):
    """{reading: share of the boxes (N, 4) that lie inside their images (N, 2) under it}, and the best reading.

    Where no image has a known size, only the order and the signs can be tested: infinite images forgive all else. Then
    any positive numbers may be x, y, width, height; but that x1 < x2 and y1 < y2 in box after box is no chance.
    """
    known = np.isfinite(size).all(axis=1)
    rows = np.isfinite(bbox).all(axis=1) & (known | ~known.any())
    bbox, size, shares = bbox[rows], size[rows], {}
    for reading in READINGS:
        box, fraction = to_xywh(bbox, reading, size), reading.endswith("fraction")
        fit = inside(box, np.where(np.isfinite(size), size, 1 if fraction else np.inf))
        if not fraction:
            fit &= box[:, 2:].max(axis=1) > 1                       # a box of a pixel at most is a fraction, misread
        shares[reading] = float(fit.sum() / max(len(fit), 1))
    best = max(shares.values())
    alike = [reading for reading in shares if shares[reading] > best - MARGIN]
    corners = [reading for reading in alike if reading.startswith("xyxy")]
    return shares, (corners if corners and best > POOR and len(bbox) >= 20 and not known.any() else alike)[0]


def explain_reading(shares, reading, asked, sized):
    """The evidence for a reading in a sentence or two, doubts included."""
    alike = [READINGS[key][0] for key in shares if key != reading and abs(shares[key] - shares[reading]) < MARGIN]
    why = f"{shares[reading]:.1%} of the boxes lie inside their images"
    why += " (the reading that you asked for)." if asked else "."
    if reading != "xywh":
        why += f" Read as COCO's [x, y, width, height], {shares['xywh']:.1%} do."
    if not sized:
        why += " No box is in an image of known size: only the order and the signs of the numbers could be tested."
    if alike and not asked and shares[reading]:
        why += f" A tie: about as many do under {', '.join(alike)}; the likeliest reading was taken."
    if shares[reading] < POOR:
        why += " A poor fit: look into it before you trust what follows."
    return why


# --------------------------------------------------------------------------------------------- classes, faults, anchors


def count_classes(data):
    """A row per class, the most frequent first: (id, name, boxes, crowds, share of the boxes, images that have it)."""
    boxes = np.bincount(data.class_row[~data.crowd], minlength=len(data.classes))
    crowds = np.bincount(data.class_row[data.crowd], minlength=len(data.classes))
    pairs = np.unique(data.class_row * len(data.images) + data.image_row)       # every pair of class and image once
    images = np.bincount(pairs // len(data.images), minlength=len(data.classes))
    shares = boxes / max(boxes.sum(), 1)
    columns = boxes.tolist(), crowds.tolist(), shares.tolist(), images.tolist()
    return sorted(zip(data.classes, data.class_names, *columns), key=lambda row: -(row[2] + row[3]))


def check_quality(data, box, size):
    """[(what is odd, how often, the first few, left out of the clustering?)], and (N,) bool: the boxes that are used.

    box (N, 4) x, y, width, height; size (N, 2) of their images.
    """
    finite = (np.abs(box) < HUGE).all(axis=1)                       # NaN compares false
    area = finite & (box[:, 2:] > TINY).all(axis=1)
    sized = np.isfinite(size).all(axis=1)
    same, again = np.column_stack([data.image_row, data.class_row, data.bbox]), np.ones(len(box), bool)
    again[np.unique(same, axis=0, return_index=True)[1]] = False    # the first of equal rows
    table = []

    def count(what, mask, out, name=data.boxes.where):
        table.append((what, int(mask.sum()), [short(name(row)) for row in np.flatnonzero(mask)[:3].tolist()], out))

    count("boxes with NaN, infinite or absurdly large numbers", ~finite, True)
    count("boxes without area", finite & ~area, True)
    count("boxes more than half a pixel outside their image", area & sized & ~inside(box, size), False)
    count("boxes that repeat an earlier one (image, class and numbers)", again, True)
    count("crowds, each one box around many objects", data.crowd, True)
    if sized.any():
        count("boxes in images of unknown size", ~sized, True)
    if data.is_coco:
        count("annotations whose image does not exist", ~data.listed[data.image_row], False)
        count("annotations whose class does not exist", ~data.named[data.class_row], False)
    for what, rows, names in (("images", data.image_row, list(data.images)),
                              ("classes", data.class_row, data.class_names)):
        count(f"{what} without annotations", np.bincount(rows, minlength=len(names)) == 0, False, names.__getitem__)
    return table, area & ~again & ~data.crowd & (sized | ~sized.any())


def at_input(wh, size, side, resize, fraction):
    """Widths and heights (N, 2) as the network sees them when images of size (N, 2) become side x side; their unit."""
    if not np.isfinite(size).all():                                 # sizes unknown
        if not fraction:
            return wh, "pixels of the images, whose sizes are unknown"
        size, resize = np.ones_like(size), "stretch"                # letterbox would need their shapes
    unit = f"pixels at {side} x {side}, {resize}"
    if resize == "letterbox":
        size = size.max(axis=1, keepdims=True)                      # YOLOv5: the longer side becomes `side`
    return wh / size * side, unit                                   # YOLOv2: both do


def find_anchors(wh, asked, seed):
    """{k: (anchors, mean IoU)} for the k asked for and, to show what each anchor gains, for k = 1, 2, ... as well."""
    found = {}
    for k in sorted({*range(1, min(max(asked), 9) + 1), *asked}):
        try:
            found[k] = kmeans(wh, k, seed)
        except ValueError:                                          # fewer different boxes than anchors
            break
    return found


# ------------------------------------------------------------------------------------------------------------- pictures


def plain_ticks(axis, steps=(1, 2, 5)):
    """Plain numbers along a logarithmic axis."""
    axis.set_major_locator(ticker.LogLocator(subs=steps, numticks=9))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def save(figure, path):
    """Writes a picture and lets go of it: five that wait for the end take more memory than a small file's boxes."""
    figure.savefig(path)
    plt.close(figure)


def draw_bars(axes, rows, title):
    counts = [row[2] + row[3] for row in rows]
    bars = axes.barh(range(len(rows)), counts, color=BLUE, height=0.75)
    axes.bar_label(bars, [f" {count:,}" for count in counts], fontsize=7)
    axes.set_yticks(range(len(rows)), [short(row[1], 24) for row in rows], fontsize=8)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, max(counts) * 1.15), title=title, xlabel="annotations")
    axes.locator_params(axis="x", nbins=4, integer=True)


def draw_density(axes, points, **options):
    """A histogram of points (N, 2); the root of a count as its colour lets single boxes be seen beside thousands."""
    counts, *_, image = axes.hist2d(*points.T, norm=PowerNorm(0.5, 0), **options)
    image.set_clim(0, max(np.nanmax(counts, initial=0), 1))         # also where all points lie outside
    axes.figure.colorbar(image, ax=axes, label="boxes", shrink=0.8)


def draw_classes(rows, path):
    """Up to 80 classes: a bar for each. More: the curve of all counts, and the twenty at either end."""
    if len(rows) <= 80:
        figure, axes = plt.subplots(figsize=(8, 1.2 + 0.17 * max(len(rows), 4)))
        draw_bars(axes, rows, f"{len(rows)} classes")
    else:
        figure, (curve, most, least) = plt.subplots(1, 3, figsize=(13, 4.6))
        curve.fill_between(range(1, len(rows) + 1), [row[2] + row[3] for row in rows], color=BLUE, step="mid")
        curve.set(yscale="symlog", ylim=(0, None), xlim=(0.5, len(rows) + 0.5), title=f"{len(rows):,} classes",
                  xlabel="classes, from the most to the least frequent", ylabel="annotations")
        curve.yaxis.set_major_formatter("{x:,.0f}")
        filled = [row for row in rows if row[2] + row[3]]
        none = f" ({len(rows) - len(filled):,} have none)" if len(filled) < len(rows) else ""
        some = min(20, len(filled))
        draw_bars(most, filled[:some], f"the {some} most frequent")
        draw_bars(least, filled[-some:], f"the {some} least frequent{none}")
    save(figure, path)


def draw_boxes(data, box, size, fraction, path):
    """Where boxes lie; how many an image has (or, where none has two, their shape); how large they are for COCO.

    box (N, 4) x, y, width, height; size (N, 2) of their images.
    """
    figure, (where, many, area) = plt.subplots(1, 3, figsize=(13, 4))
    known = np.isfinite(size).all()
    extent = size if known else (box[:, :2] + box[:, 2:]).max(axis=0).clip(1e-9)
    draw_density(where, (box[:, :2] + box[:, 2:] / 2) / extent, bins=40, range=[[0, 1], [0, 1]])
    unit = "of the image" if known else "of the largest extent"
    where.set(title="centres of the boxes", xlabel=f"x, fraction {unit}", ylabel=f"y, fraction {unit}", ylim=(1, 0),
              aspect="equal")

    counts = np.bincount(data.image_row, minlength=len(data.images))
    if counts.max() > 1:
        top = max(int(np.percentile(counts, 99.5)), 4)
        many.bar(*np.unique(counts.clip(0, top), return_counts=True), width=0.9, color=BLUE)
        more = f" ({top} stands for {top} and more)" if counts.max() > top else ""
        many.set(title=f"annotations per image: {counts.mean():.1f} on average, {counts.max():,} at most",
                 xlabel="annotations" + more, ylabel="images")
        many.locator_params(axis="x", nbins=8, integer=True, min_n_ticks=1)
    else:
        many.hist(np.log2(box[:, 2] / box[:, 3]).clip(-4, 4), bins=np.linspace(-4, 4, 41), color=BLUE)
        many.set_xticks(range(-4, 5, 2), ["1:16", "1:4", "1:1", "4:1", "16:1"])
        many.set(title="shape (no image has two boxes)", xlabel="width : height", ylabel="boxes")

    fraction = fraction and not known
    areas = box[:, 2:].clip(TINY if fraction else 1e-3).prod(axis=1)
    low, high = (areas.min() / 2, max(areas.max(), 1)) if fraction else (min(areas.min(), 100), max(areas.max(), 1e5))
    area.hist(areas, bins=np.geomspace(low, high * 1.01, 60), color=BLUE)
    area.set(xscale="log", ylabel="boxes")
    if fraction:
        area.set(title="area", xlabel="area, fraction of the image")
    else:
        for edge in SMALL, LARGE:
            area.axvline(edge, color=RED, linestyle="--")
        shares = np.histogram(areas, [0, SMALL, LARGE, np.inf])[0] / len(areas)
        area.set(title="small {:.0%}, medium {:.0%}, large {:.0%}".format(*shares),
                 xlabel="area in pixels (dashed: COCO's 32 x 32 and 96 x 96)")
    plain_ticks(area.xaxis, (1,))
    save(figure, path)


def draw_sizes(wh, pixels, anchors, unit, path):
    """Width against height as a density, readable with a million boxes; anchors on top. Logarithmic: IoU is of ratios.

    Whole pixels would show as stripes, so a whole side is spread at random over the pixel it was rounded to: pixels
    (N, 2) in the image, wh (N, 2) at the network's input.
    """
    figure, axes = plt.subplots(figsize=(6.4, 5.2))
    whole = (pixels % 1 == 0) & (pixels > 1)                        # a side of 1 may be a fraction, all of the image
    spread = wh * (1 + whole * np.random.default_rng(0).uniform(-0.5, 0.5, wh.shape) / pixels.clip(1))
    edges = [np.geomspace(max(side.min(), side.max() / 1000) / 1.05, side.max() * 1.05, 81) for side in spread.T]
    draw_density(axes, spread, bins=edges, cmin=1)
    axes.scatter(*anchors.T, marker="P", s=90, color=RED, edgecolor="white", label=f"{len(anchors)} anchors")
    axes.legend(loc="upper left", framealpha=1)
    axes.set(xlabel="width", ylabel="height", title=f"{len(wh):,} boxes in {unit}", xscale="log", yscale="log",
             xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]])
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    save(figure, path)


def draw_anchors(found, side, unit, path):
    """For each k its anchors to scale around one centre; their sizes stand in the legend, where they cannot overlap."""
    rows, columns = (len(found) + 3) // 4, min(len(found), 4)
    figure = plt.figure(figsize=(3.3 * columns, rows * (3.7 + 0.09 * max(found))))
    half = max(side, *(1.05 * anchors.max() for anchors, _ in found.values())) / 2
    for panel, (k, (anchors, score)) in enumerate(found.items(), 1):
        axes = figure.add_subplot(rows, columns, panel)
        for (w, h), colour in zip(anchors[::-1], plt.cm.turbo(np.linspace(0.9, 0.05, k))):
            axes.add_patch(plt.Rectangle((-w / 2, -h / 2), w, h, fill=False, edgecolor=colour, linewidth=1.8,
                                         label=f"{w:.3g} x {h:.3g}"))
        axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", xticks=[], yticks=[],
                 title=f"k = {k}, mean IoU {score:.3f}")
        axes.spines[:].set_visible(True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=2, fontsize=7, frameon=False)
    figure.suptitle(f"anchors in {unit}; the frame is {2 * half:.4g} x {2 * half:.4g}", fontsize=10)
    save(figure, path)


def draw_elbow(tried, asked, path):
    figure, axes = plt.subplots(figsize=(6, 3.8))
    axes.plot(list(tried), [score for _, score in tried.values()], color=BLUE, marker="o", markersize=4)
    axes.plot(asked, [tried[k][1] for k in asked], "o", color=RED, markersize=8)
    for k in asked[::len(asked) // 9 + 1]:                          # more labels would overlap
        axes.annotate(f"{tried[k][1]:.3f}", (k, tried[k][1]), (0, -17), textcoords="offset points", ha="center", size=8)
    axes.locator_params(axis="x", nbins=10, integer=True)
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    axes.set(title="what one more anchor gains", xlabel="k, number of anchors", ylabel="mean IoU with the best anchor")
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------- the report


def cell(value):
    """A text as one cell of a Markdown table: nothing in it ends the cell, makes a link or a picture, or is HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|$&#!~])", r"\\\1", short(value, 60))


def markdown(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def describe_fields(data, reading):
    """A row for every field: table, name, how often, types, range, an example, what it means, with the evidence."""
    types = {int: "integer", float: "number", str: "text", list: "list", dict: "object", bool: "true/false",
             type(None): "null"}
    meaning = {"bbox": READINGS[reading][0], "segmentation": "outline, not read",
               "iscrowd": "1: one box around a crowd", "image_id": "an image", "category_id": "a class"}
    if data.is_text:
        meaning |= {"height": "of the image", "width": "of the image", "id": "a class"}
    if data.is_coco:
        listed, named = data.listed[data.image_row].sum(), data.named[data.class_row].sum()
        meaning |= {"image_id": f"{listed:,} of {data.boxes.count:,} are in `images`",
                    "category_id": f"{named:,} of {data.boxes.count:,} are in `categories`"}
    for name, table in data.tables.items():
        for key, field in table.fields.items():
            limits = [max(min(limit, 1e300), -1e300) for limit in (field["low"], field["high"])]
            numeric = field["types"] <= {int, float} and limits[0] <= limits[1]
            yield [name, cell(key), f"{field['count']:,}", ", ".join(sorted(types[kind] for kind in field["types"])),
                   f"{limits[0]:.12g} to {limits[1]:.12g}" if numeric else "",
                   cell(field["example"]) if key != "segmentation" else "",
                   meaning.get(key, "") if table is data.boxes else ""]


def yolo(anchors):
    """Anchors as they stand in a YOLO configuration: whole pixels where they are not tiny."""
    digits = 0 if anchors.min() >= 2 else 4
    return ", ".join(f"{w:.{digits}f},{h:.{digits}f}" for w, h in anchors)


def write_report(path, title, summary, why, data, reading, shares, quality, classes, found, unit):
    shares = [[READINGS[key][0], f"{share:.2%}"] for key, share in sorted(shares.items(), key=lambda item: -item[1])]
    quality = [[what, f"{count:,}", cell(", ".join(names)), "left out" if out and count else ""]
               for what, count, names, out in quality]
    classes = [[cell(key), cell(name), f"{boxes:,}", f"{crowds:,}", f"{share:.2%}", f"{images:,}"]
               for key, name, boxes, crowds, share, images in classes]
    anchors = [[k, f"{score:.4f}", f"`{yolo(anchors)}`"] for k, (anchors, score) in found.items()]
    fields = ["table", "field", "records", "type", "range", "example", "meaning"]
    assumed = f"The file names no classes. Its ids lie in {data.assumed}, so COCO's names are **assumed**."
    blocks = [f"# {cell(title)}", summary,
              "## Schema: what the numbers are",
              "The fields, as found in all records:", markdown(fields, describe_fields(data, reading)),
              f"**bbox is {READINGS[reading][0]}**: {why}",
              markdown(["bbox read as", "boxes inside their images"], shares),
              *([assumed] if data.assumed else []),
              "## Quality of the data", markdown(["what", "number", "the first", "in the clustering"], quality),
              "## Classes", "![classes](class_distribution.png)",
              markdown(["id", "name", "boxes", "crowds", "share", "images"], classes),
              "## Boxes", "![boxes](bbox_distribution.png)", "![width and height](bbox_wh.png)",
              f"## Anchors in {unit}", "![anchors](anchors.png)", "![mean IoU](anchors_iou.png)",
              markdown(["k", "mean IoU", "for a YOLO configuration: width,height"], anchors)]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def write_classes(path, classes):
    def harmless(value):
        """An apostrophe before what a spreadsheet would run as a formula."""
        return "'" + value if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value

    with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "name", "boxes", "crowds", "share", "images"])
        for key, name, boxes, crowds, share, images in classes:
            writer.writerow([harmless(key), harmless(name), boxes, crowds, f"{share:.6f}", images])


def write_anchors(path, found, unit):
    anchors = {k: {"mean_iou": round(score, 6), "width_height": anchors.round(4).tolist()}
               for k, (anchors, score) in found.items()}
    path.write_text(json.dumps({"unit": unit, "anchors": anchors}, indent=1), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- the command


def run(args, out):
    """Reads the file and writes its report: all of it in a folder of `out` first, so that no half replaces another."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: is no folder: name another")
    data, asked = Data(args.file), sorted(set(args.k))
    size = data.size[data.image_row]                                # (N, 2): of the image that a box is in
    with np.errstate(all="ignore"):                                 # NaN and infinity are counted, not computed with
        shares, best = try_readings(data.bbox, size)
        reading = args.bbox_format or best
        box = to_xywh(data.bbox, reading, size)
        quality, good = check_quality(data, box, size)
    why = explain_reading(shares, reading, args.bbox_format, np.isfinite(size).any())
    if not good.any():
        raise BadInput(f"bbox, read as {READINGS[reading][0]}: none of {len(box):,} boxes is usable: mend them, or try "
                       "another --bbox-format")
    box, size, classes = box[good], size[good], count_classes(data)
    fraction = reading.endswith("fraction")
    wh, unit = at_input(box[:, 2:], size, args.size, args.resize, fraction)
    tried = find_anchors(wh, asked, args.seed)
    found = {k: tried[k] for k in asked if k in tried} or {max(tried): tried[max(tried)]}
    summary = (f"{data.kind}: {(~data.crowd).sum():,} boxes and {data.crowd.sum():,} crowds of {len(classes):,} "
               f"classes in {len(data.images):,} images")
    name = Path(args.file).name

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".analysis-", dir=out) as folder:
        folder = Path(folder)
        draw_classes(classes, folder / "class_distribution.png")
        draw_boxes(data, box, size, fraction, folder / "bbox_distribution.png")
        draw_sizes(wh, box[:, 2:], found[max(found)][0], unit, folder / "bbox_wh.png")
        draw_anchors(found, args.size, unit, folder / "anchors.png")
        draw_elbow(tried, list(found), folder / "anchors_iou.png")
        write_report(folder / "report.md", name, summary, why, data, reading, shares, quality, classes, found, unit)
        write_classes(folder / "class_distribution.csv", classes)
        write_anchors(folder / "anchors.json", found, unit)
        for file in list(folder.iterdir()):
            file.replace(out / file.name)

    print(f"{short(name, 100)}: {summary}\nbbox is {READINGS[reading][0]}: {why}")
    if data.assumed:
        print("the file names no classes: COCO's names are assumed")
    for what, count, names, _ in quality:
        if count:
            print(f"  {count:,} {what}: {', '.join(names)}{', ...' if count > len(names) else ''}")
    print(f"anchors in {unit}; width,height:")
    for k, (anchors, score) in found.items():
        print(f"  k = {k}, mean IoU {score:.4f}: {yolo(anchors)}")
    if max(asked) not in tried:
        print(f"  more anchors than {max(tried)} make no sense: no more boxes differ")
    print(f"report: {out / 'report.md'}")


def main():
    parser = argparse.ArgumentParser(description="Schema, classes, boxes and anchors of a detection annotation file.")
    parser.add_argument("file", help="COCO instances JSON, a list of detections, or a text of one box per line; or .gz")
    parser.add_argument("--out", help="folder for the report; the default is analysis/<the file's name>")
    parser.add_argument("--k", type=int, nargs="+", default=[3, 4, 5, 6], help="numbers of anchors; default: 3 4 5 6")
    parser.add_argument("--size", type=int, default=416, help="side of the network's input; default: 416, YOLOv2's")
    parser.add_argument("--resize", choices=["stretch", "letterbox"], default="stretch", help="how images get there: "
                        "both sides stretched (YOLOv2; the default), or with their shape kept (YOLOv5)")
    parser.add_argument("--bbox-format", choices=READINGS, help="what the four numbers are; the default is to find out")
    parser.add_argument("--seed", type=int, default=0, help="of the search for anchors, which hardly depends on it")
    args = parser.parse_args()
    if not 1 <= min(args.k) <= max(args.k) <= 100 or not 1 <= args.size <= 100_000 or args.seed < 0:
        parser.error("--k must lie in 1..100, --size in 1..100000, --seed must not be negative")
    stem = re.sub(r"(\.json|\.txt)?(\.gz)?$", "", os.path.basename(args.file)) or "report"
    warnings.filterwarnings("ignore", "Glyph .* missing")           # the font lacks it: the picture has an empty box
    try:
        with plt.rc_context(LOOKS):
            run(args, Path(args.out or f"analysis/{stem}"))
    except (BadInput, OSError, EOFError, zlib.error) as error:
        file, what = args.file, error
        if isinstance(error, OSError):                              # in Python's words "[Errno 2] ..."
            file, what = error.filename2 or error.filename or file, error.strerror or error
        cure = "" if isinstance(error, BadInput) else ": check the path, the permissions and the content"
        print(f"coco_analysis.py: {short(file, 300)}: {short(what, 1000)}{cure}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                        # a class name that the terminal's encoding lacks
    main()
