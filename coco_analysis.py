"""What is in this annotation file? Its schema, its classes, its boxes, and anchor boxes for them, in one report.

    python coco_analysis.py annotations.json                  the report goes to analysis/annotations/report.md
    python coco_analysis.py annotations.json.gz --k 5 9 --size 640 --resize letterbox
    python coco_analysis.py boxes.txt --bbox-format yxwh      when you know better what the four numbers are

It reads COCO instances JSON, lists of detection results, and text files with one `id: 0, height: 330, width: 1093, bbox:[...]`
a line; which of them it is, it finds out from the content. It prints, for 10,105 such lines (report.md has all of it, with the
evidence, tables and pictures):

    boxes.txt: a text of one box per line: 10,105 boxes and 0 crowds of 80 classes in 10,105 images
    bbox is [y, x, width, height]: 100.0% of the boxes lie inside their images. Read as COCO's [x, y, width, height], 64.7% do.
    anchors in pixels at 416 x 416, stretch; width,height:
      k = 3, mean IoU 0.6329: 71,139, 148,77, 158,161
      ...

Files larger than memory are no problem: annotations are decoded from a window of the file, and what stays is a few numbers for
each. Polygons, most of a COCO file, are dropped before they are decoded.
"""

import os
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")     # before NumPy starts: for small matrices a second thread only waits

import argparse
import csv
import gzip
import io
import json
import re
import shutil
import sys
import tempfile
import zlib
from itertools import islice

import matplotlib
matplotlib.use("Agg")                                  # pictures go to files; no screen is needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import PowerNorm

from kmeans import kmeans

WINDOW = 1 << 20                    # characters of the file held at a time
LONGEST = 1 << 26                   # no record is longer than this; more means a bracket or quote that is never closed
BATCH = 4096                        # records that are turned into columns at a time: NumPy's overhead is paid once a batch
HUGE, TINY = 1e9, 1e-6              # a coordinate beyond the one is no pixel, a side below the other no side
MARGIN = 0.01                       # readings of bbox whose fits differ by less than this cannot be told apart
POOR = 0.9                          # fewer boxes inside than this, and the report warns
SMALL, LARGE = 32 ** 2, 96 ** 2     # COCO's areas in pixels: small up to 32 x 32, large from 96 x 96
NUMBERS = b"0123456789+-.eE, []\n"  # all that polygons are made of

# What four numbers may mean. The order is that of their use in the wild: where two fit equally well, the first is taken.
READINGS = {
    "xywh": ("[x, y, width, height]", lambda a, b, c, d: (a, b, c, d)),
    "yxwh": ("[y, x, width, height]", lambda a, b, c, d: (b, a, c, d)),
    "xyxy": ("[x1, y1, x2, y2]", lambda a, b, c, d: (a, b, c - a, d - b)),
    "yxyx": ("[y1, x1, y2, x2]", lambda a, b, c, d: (b, a, d - b, c - a)),
    "cxcywh": ("[center x, center y, width, height]", lambda a, b, c, d: (a - c / 2, b - d / 2, c, d)),
}
READINGS |= {f"{key}-fraction": (f"{text} as fractions", read) for key, (text, read) in READINGS.items()}

COCO_NAMES = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,
bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,
sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,
banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,
mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,
toothbrush""".replace("\n", "").split(",")
COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})       # COCO's own ids skip these ten

BLUE, RED = "#3b6ea8", "#d1495b"
LOOKS = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "font.size": 9, "savefig.dpi": 110,
         "savefig.bbox": "tight", "figure.constrained_layout.use": True}


class BadInput(Exception):
    """What the user has to mend, said in one line."""


# ---------------------------------------------------------------------------------------------------------- reading the file


def short(value, limit=40):
    """Any value as one short line of printable text."""
    text = "".join(c if c.isprintable() else " " for c in str(value)[:2 * limit])
    return text if len(text) <= limit else text[:limit - 3] + "..."


def drop_polygons(text):
    """Empties every `"segmentation": [[...]]`: decoding the coordinates would take most of the time, and nothing here needs them.

    In valid JSON this key cannot stand inside a string, where its quotes would be escaped. What is not a plain list of lists of
    numbers is left alone, for the decoder to judge.
    """
    key = '"segmentation": [[' if '"segmentation": [[' in text else '"segmentation":[['
    head, *rest = text.split(key)
    pieces = [head]
    for piece in rest:
        polygons, closed, after = piece.partition("]]")
        plain = closed and not polygons.encode().translate(None, NUMBERS) and polygons.count("[") == polygons.count("]")
        pieces += (key[:-1], "]", after) if plain else (key, piece)
    return "".join(pieces)


class Reader:
    """A window that slides over a file (plain or .gz; UTF-8 or, with its byte-order mark, UTF-16) and decodes JSON from it."""

    scan = staticmethod(json.JSONDecoder().scan_once)                # (text, position) -> (value, position behind it), in C
    blank = re.compile(r"[ \t\n\r]*")

    def __init__(self, raw):
        self.raw, self.size = raw, os.fstat(raw.fileno()).st_size
        data = io.BufferedReader(gzip.open(self.raw)) if self.raw.peek(2)[:2] == b"\x1f\x8b" else self.raw
        self.utf16 = data.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
        self.stream = io.TextIOWrapper(data, "utf-16" if self.utf16 else "utf-8-sig", newline="")
        self.text, self.at, self.before, self.record = "", 0, 0, ""  # before: bytes of the file that the window has left behind

    def bytes(self, end):
        return len(self.text[:end].encode("utf-16-le" if self.utf16 else "utf-8", "surrogatepass"))

    def fail(self, what, cure="this is not valid JSON: mend it there", at=None):
        raise BadInput(f"byte {self.before + self.bytes(self.at if at is None else at):,}{self.record}: {what}: {cure}")

    def more(self):
        """Moves the window on: what is decoded leaves it, new text comes in. False at the end of the file."""
        try:
            new = self.stream.read(max(WINDOW, len(self.text) - self.at))      # doubles as long as one value does not fit in
        except UnicodeError as error:
            raise BadInput(f"before byte {self.raw.tell():,}: this is no text: {error.reason}: save it as UTF-8") from None
        if new:
            self.before += self.bytes(self.at)
            self.text, self.at = self.text[self.at:] + new, 0
            if self.size > 50 * WINDOW and sys.stderr.isatty():
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
        if not found:
            self.fail("the file ends in the middle", "it was cut off: fetch it again")
        if found not in wanted:
            self.fail(f"{found!r} where {' or '.join(wanted)} belongs")
        self.at += 1
        return found

    def value(self):
        """Decodes one value; reads on as long as it is not complete."""
        self.peek()
        while True:
            try:
                value, end = self.scan(self.text, self.at)
                if end < len(self.text) or not self.more():                # a number that touches the end may go on behind it
                    self.at = end
                    return value
                continue
            except json.JSONDecodeError as error:
                what, where = error.msg, error.pos
            except StopIteration as error:                                 # so the C decoder says that no value begins there
                what, where = "no value", error.value
            except RecursionError:
                self.fail("brackets nested too deep", "no annotation needs that: mend it there")
            except ValueError as error:                                    # a number of thousands of digits
                self.fail(str(error).split(";")[0], "no annotation needs that: mend it there")
            # Is it broken, or only cut by the end of the window? Then the decoder stopped there, or inside a string.
            if where < len(self.text) - 16 and not what.startswith("Unterminated") or len(self.text) - self.at > LONGEST:
                self.fail(what, at=where)
            if not self.more():
                self.fail(f"{what}; the file ends in the middle", "it was cut off, or is not JSON: fetch it again", where)

    def elements(self, name):
        """Yields the elements of the array that begins here: most of a window at once, and what is left one by one."""
        self.take("[")
        number, mark, tried = 0, "]" if self.peek() == "]" else ",", None
        self.at += mark == "]"
        while mark == ",":
            self.peek()
            window = self.before + len(self.text)
            end = self.text.rfind("},", self.at) if window != tried else -1
            if end > 0:
                # If all up to here decodes as a list, it is one: inside a string or an object, brackets or quotes would not match.
                # If it does not (the array ends in this window, or is broken), the slow way finds the very place.
                try:
                    found = json.loads(f"[{drop_polygons(self.text[self.at:end + 1])}]")
                    yield from found
                    self.at, number = end + 2, number + len(found)
                    if self.more():
                        continue
                except (ValueError, RecursionError):
                    pass
                tried = window
            self.record = f" ({name}[{number}])"
            yield self.value()
            number, mark = number + 1, self.take(",]")
        self.record = ""

    def lines(self):
        """Yields the records of a text file: its lines are JSON without quotes and braces, so these are put back."""
        self.stream.seek(0)
        for number, line in enumerate(iter(lambda: self.stream.readline(BATCH), ""), 1):
            fields = re.sub(r"\b(\w+)\s*:", r'"\1":', line.strip(" \t\r\n,"))
            try:
                if fields:
                    yield json.loads("{" + fields + "}")
            except (ValueError, RecursionError):
                raise BadInput(f"line {number}: neither JSON nor `id: 0, height: 330, width: 1093, bbox:[69, 464, 312, 175]`: give "
                               "a COCO file, a list of detections, or such lines") from None


# ------------------------------------------------------------------------------------------- from records to schema and columns


class Table:
    """Turns the records of one kind, batch by batch, into NumPy columns and a schema."""

    def __init__(self, place):
        self.place = place                                   # how a record is called, such as "annotations[{}]"
        self.count, self.fields, self.columns = 0, {}, {}

    def add(self, records, columns):
        """Takes in a batch of records; columns(records) turns them into {name: array}."""
        for row, record in enumerate(records):
            if type(record) is not dict:
                self.bad(row, f"{short(record)} is no object", "every record must be {...}")
        layouts = dict.fromkeys(map(tuple, records))          # nearly always one
        for key in islice(dict.fromkeys(key for keys in layouts for key in keys), 100):
            values = [record[key] for record in records if key in record]
            field = self.fields.setdefault(key, {"count": 0, "types": set(), "range": (), "example": short(values[0], 60)})
            field["count"] += len(values)
            field["types"] |= set(map(type, values))
            if field["types"] <= {int, float}:
                field["range"] = min(*field["range"], *values[:1], min(values)), max(*field["range"], *values[:1], max(values))
        for name, column in columns(records).items():
            self.columns.setdefault(name, []).append(column)
        self.count += len(records)

    def bad(self, row, what, cure):
        raise BadInput(f"{self.place.format(self.count + row)}: {what}: {cure}")

    def get(self, records, key, default=None):
        """The values of one key, which every record must have unless there is a default."""
        try:
            return [record[key] if default is None else record.get(key, default) for record in records]
        except KeyError:
            self.bad([key in record for record in records].index(False), f"no {key!r}", "every record needs it")

    def numbers(self, records, key, many=1, default=None):
        """The values of one key as (n, many) float64."""
        values = self.get(records, key, default)
        try:
            found = np.array(values)
            if found.size == len(values) * many and found.ndim == 1 + (many > 1) and found.dtype.kind in "iuf":
                return found.astype(np.float64).reshape(-1, many)
        except (ValueError, OverflowError):                  # rows of different lengths
            pass
        rows = [value if many > 1 else [value] for value in values]          # one is wrong, or has too many digits: look closer
        for row, parts in enumerate(rows):
            if not isinstance(parts, list) or len(parts) != many or not all(isinstance(part, (int, float)) for part in parts):
                wanted = "a list of four numbers" if many > 1 else "a number"
                self.bad(row, f"{key!r} is {short(values[row])}", f"it must be {wanted}")
        return np.array([[float(max(min(part, 1e300), -1e300)) for part in parts] for parts in rows])

    def codes(self, records, key, index):
        """The ids under one key as rows of `index`, a dictionary {id: row} that new ids enlarge. (n,) int64."""
        values = self.get(records, key)
        if not set(map(type, values)) <= {int, str}:
            wrong = [not isinstance(value, (int, str)) and not (isinstance(value, float) and value.is_integer())
                     for value in values]
            if any(wrong):
                self.bad(wrong.index(True), f"{key!r} is {short(values[wrong.index(True)])}", "an id is a whole number or a text")
        return np.array([index.setdefault(value, len(index)) for value in values], dtype=np.int64)

    def column(self, name, empty):
        parts = self.columns.pop(name, [])
        return np.concatenate(parts) if parts else empty


class Data:
    """What is kept of a file: N boxes, I images and C classes, each numbered in the order in which the file first names them."""

    def __init__(self, path):
        with open(path, "rb") as raw:
            reader = Reader(raw)
            with reader.stream:
                self.read_file(reader)
        if not self.boxes.count:
            raise BadInput("no annotations: there is nothing to analyse: give it a file with some")
        self.join()

    def read_file(self, reader):
        first = reader.peek()
        self.kind = {"{": "COCO instances JSON", "[": "a list of detections"}.get(first, "a text of one box per line")
        self.images, self.classes, self.names = {}, {}, {}           # {image id: row}, {class id: row}, {class id: name}
        self.boxes = Table({"{": "annotations[{}]", "[": "[{}]"}.get(first, "box {}"))
        self.tables = {"images": Table("images[{}]"), "categories": Table("categories[{}]"), "annotations": self.boxes}
        self.keys = []                                               # of the file itself
        if first == "{":
            self.read_object(reader)
        else:
            self.read(reader.elements("") if first == "[" else reader.lines(), "annotations")
        if first in "{[" and reader.peek():
            reader.fail(f"{reader.peek()!r} behind the end", "a file holds one JSON value: remove the rest")

    def read_object(self, reader):
        """Reads {"key": value, ...}, in whatever order the keys come. Of equal keys the last counts, as everywhere in JSON."""
        mark = reader.take("{")
        while mark != "}":
            if reader.peek() != '"':
                reader.fail("no key")
            self.keys.append(reader.value())
            reader.take(":")
            if self.keys[-1] in self.tables and reader.peek() != "[":
                reader.fail(f"{self.keys[-1]!r} is no list", "COCO has a list of objects there")
            if self.keys[-1] in self.tables:
                self.tables[self.keys[-1]].__init__(self.tables[self.keys[-1]].place)
                self.read(reader.elements(self.keys[-1]), self.keys[-1])
            else:
                reader.value()
            mark = reader.take(",}")
        if "annotations" not in self.keys:
            raise BadInput(f"JSON of another kind, with the keys {short(self.keys)}: a COCO file has 'annotations' (and 'images' "
                           "and 'categories'): take the one called instances_...")

    def read(self, records, name):
        columns = {"images": self.read_images, "categories": self.read_classes, "annotations": self.read_boxes}[name]
        while batch := list(islice(records, BATCH)):
            self.tables[name].add(batch, columns)

    def read_images(self, records):
        table = self.tables["images"]
        return {"row": table.codes(records, "id", self.images),
                "size": np.hstack([table.numbers(records, key, default=np.nan) for key in ("width", "height")])}

    def read_classes(self, records):
        rows = self.tables["categories"].codes(records, "id", self.classes)
        self.names |= {record["id"]: str(record.get("name", f"id {record['id']}")) for record in records}
        return {"row": rows}

    def read_boxes(self, records):
        boxes, text = self.boxes, self.kind.startswith("a text")
        columns = {"bbox": boxes.numbers(records, "bbox", 4), "crowd": boxes.numbers(records, "iscrowd", default=0)[:, 0] != 0}
        if text and "image_id" not in records[0]:                    # then every line is an image of its own
            columns["image"] = np.arange(boxes.count, boxes.count + len(records))
            self.images |= {int(row): row for row in columns["image"]}
        else:
            columns["image"] = boxes.codes(records, "image_id", self.images)
        if text:                                                     # the line says the size of its image
            size = np.hstack([boxes.numbers(records, key, default=np.nan) for key in ("width", "height")])
            for name, column in (("row", columns["image"]), ("size", size)):
                self.tables["images"].columns.setdefault(name, []).append(column)
        columns["class"] = boxes.codes(records, "id" if text and "category_id" not in records[0] else "category_id", self.classes)
        return columns

    def join(self):
        """Joins the tables, once all of them are known."""
        self.bbox, self.crowd = self.boxes.column("bbox", None), self.boxes.column("crowd", None)
        self.image_row, self.class_row = self.boxes.column("image", None), self.boxes.column("class", None)
        rows = self.tables["images"].column("row", np.empty(0, np.int64))
        self.listed = np.bincount(rows, minlength=len(self.images)) > 0            # (I,) is it in `images`?
        size = np.full((len(self.images), 2), np.nan)                              # width and height; NaN where unknown
        size[rows] = self.tables["images"].column("size", np.empty((0, 2)))
        size[~((size >= 1) & (size < HUGE)).all(axis=1)] = np.nan
        self.size = size[self.image_row]                                           # (N, 2): of the image that a box is in
        rows = self.tables["categories"].column("row", np.empty(0, np.int64))
        self.named = np.bincount(rows, minlength=len(self.classes)) > 0            # (C,) is it in `categories`?
        ids, self.assumed = set(self.classes), ""
        if not self.names and ids <= set(range(80)) and 0 in ids:
            self.names, self.assumed = dict(enumerate(COCO_NAMES)), "0..79"
        elif not self.names and ids <= set(COCO_IDS):
            self.names, self.assumed = dict(zip(COCO_IDS, COCO_NAMES)), "1..90"
        self.class_names = [self.names.get(key, f"id {key}") for key in self.classes]


# ------------------------------------------------------------------------------------------------ what the four numbers mean


def to_xywh(bbox, reading, size):
    """bbox (N, 4) under one of READINGS -> (N, 4) x, y, width, height. size (N, 2), NaN where unknown, scales fractions."""
    box = np.stack(READINGS[reading][1](*bbox.T), axis=1)
    if reading.endswith("fraction"):
        box *= np.tile(np.where(np.isfinite(size), size, 1), 2)        # an image of unknown size counts as 1 x 1
    return box


def inside(box, size):
    """(N,) bool: does a box have an area, and lie in its image? Half a pixel (or 1 %) is forgiven, because tools round."""
    slack = np.minimum(0.5, size * 0.01)
    return ((box[:, 2:] > 0) & (box[:, :2] >= -slack) & (box[:, :2] + box[:, 2:] <= size + slack)).all(axis=1)


def try_readings(bbox, size):
    """{reading: share of the boxes (N, 4) that lie inside their images (N, 2) under it}, and the best reading.

    Where no image has a known size, only the order and the signs can be tested: infinite images forgive everything else.
    """
    known = np.isfinite(size).all(axis=1)
    rows = np.flatnonzero(np.isfinite(bbox).all(axis=1) & (known | ~known.any()))
    shares = dict.fromkeys(READINGS, 0.0)
    for part in np.array_split(rows, len(rows) // (1 << 16) + 1):      # a part at a time keeps the memory small
        for reading in READINGS:
            box, fraction = to_xywh(bbox[part], reading, size[part]), reading.endswith("fraction")
            fit = inside(box, np.where(np.isfinite(size[part]), size[part], 1 if fraction else np.inf))
            if not fraction:
                fit &= box[:, 2:].max(axis=1) > 1                      # a box of a pixel at most is a fraction, misread
            shares[reading] += float(fit.sum() / len(rows)) if len(rows) else 0.0
    best = max(shares.values())
    return shares, next(reading for reading in shares if shares[reading] > best - MARGIN)


def explain_reading(shares, reading, asked, sized):
    """The evidence for a reading in a sentence or two, doubts included."""
    alike = [READINGS[key][0] for key in shares if key != reading and abs(shares[key] - shares[reading]) < MARGIN]
    why = f"{shares[reading]:.1%} of the boxes lie inside their images" + (" (the reading that you asked for)." if asked else ".")
    if reading != "xywh":
        why += f" Read as COCO's [x, y, width, height], {shares['xywh']:.1%} do."
    if not sized:
        why += " No image has a known size: only the order and the signs of the numbers could be tested."
    if alike and not asked:
        why += f" A tie: {', '.join(alike)} fits as well, and the most usual reading was taken."
    if shares[reading] < POOR:
        why += " A poor fit: look into it before you trust what follows."
    return why


# ------------------------------------------------------------------------------------------------------ what is in the columns


def count_classes(data):
    """A row per class, the most frequent first: (id, name, boxes, crowds, share of the boxes, images that have it)."""
    boxes, crowds = (np.bincount(data.class_row[mask], minlength=len(data.classes)) for mask in (~data.crowd, data.crowd))
    pairs = np.unique(data.class_row * len(data.images) + data.image_row)               # every pair of class and image once
    images = np.bincount(pairs // len(data.images), minlength=len(data.classes))
    shares = boxes / max(boxes.sum(), 1)
    rows = list(zip(data.classes, data.class_names, boxes.tolist(), crowds.tolist(), shares.tolist(), images.tolist()))
    return sorted(rows, key=lambda row: -(row[2] + row[3]))


def repeated(columns):
    """(N,) bool: does this row of (N, d) float64 equal an earlier one? Compared by 64-bit hashes, which is fast."""
    key = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        key = (key ^ np.ascontiguousarray(column).view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    again = np.ones(len(columns), bool)
    again[np.unique(key, return_index=True)[1]] = False
    return again


def check_quality(data, box):
    """[(what is odd, how often, the first few, are they left out of the clustering?)], and (N,) bool: the boxes that are used."""
    finite = (np.abs(box) < HUGE).all(axis=1)                                           # NaN compares false
    area = finite & (box[:, 2:] > TINY).all(axis=1)
    sized = np.isfinite(data.size).all(axis=1)
    again = repeated(np.column_stack([data.image_row, data.class_row, data.bbox]))
    masks = [("boxes with NaN, infinite or absurdly large numbers", ~finite, True),
             ("boxes without area", finite & ~area, True),
             ("boxes more than half a pixel outside their image", area & sized & ~inside(box, data.size), False),
             ("boxes that repeat an earlier one (image, class and numbers)", again, True),
             ("crowds, each one box around many objects", data.crowd, True)]
    if sized.any():
        masks.append(("boxes in images of unknown size", ~sized, True))
    if data.keys:
        masks += [("annotations whose image does not exist", ~data.listed[data.image_row], False),
                  ("annotations whose class does not exist", ~data.named[data.class_row], False)]
    first = lambda names, mask: [short(names(row)) for row in np.flatnonzero(mask)[:3].tolist()]
    table = [(what, int(mask.sum()), first(data.boxes.place.format, mask), out) for what, mask, out in masks]
    for what, rows, names in (("images", data.image_row, list(data.images)), ("classes", data.class_row, data.class_names)):
        idle = np.bincount(rows, minlength=len(names)) == 0
        table.append((f"{what} without annotations", int(idle.sum()), first(names.__getitem__, idle), False))
    return table, area & ~again & ~data.crowd & (sized | ~sized.any())


def at_input(wh, size, side, resize, fraction):
    """Widths and heights (N, 2) as the network sees them when images of size (N, 2) become side x side, and their unit."""
    unit = f"pixels at {side} x {side}, {resize}"
    if not np.isfinite(size).all():                                                     # sizes unknown
        return (wh * side, unit) if fraction else (wh, "pixels of the images, whose sizes are unknown")
    if resize == "stretch":
        return wh / size * side, unit                                                   # YOLOv2: both sides become `side`
    return wh / size.max(axis=1, keepdims=True) * side, unit                            # YOLOv5: the longer one becomes `side`


def find_anchors(wh, asked, seed):
    """{k: (anchors, mean IoU)} for those asked for and, to see what each anchor gains, from 1 on; as far as the boxes differ."""
    found = {}
    for k in sorted({*range(1, min(max(asked), 9) + 1), *asked}):
        try:
            found[k] = kmeans(wh, k, seed)
        except ValueError:                                                              # fewer different boxes than anchors
            break
    return found


# -------------------------------------------------------------------------------------------------------------------- pictures


def label(name, glyphs=font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()):
    """A name as pictures can show it: "?" for what the font lacks, cut where it is long, and no formula between two $."""
    return short("".join(c if ord(c) in glyphs else "?" for c in short(name, 200)), 24).replace("$", r"\$")


def save(figure, folder, name):
    figure.savefig(os.path.join(folder, name))
    plt.close(figure)


def whole(axis, ticks):
    axis.set_major_locator(matplotlib.ticker.MaxNLocator(ticks, integer=True))


def logarithmic(axis, steps=(1, 2, 5)):
    """Plain numbers along a logarithmic axis."""
    axis._set_axes_scale("log")
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=steps, numticks=9))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def draw_bars(axes, rows, title):
    counts = [row[2] + row[3] for row in rows]
    axes.barh(range(len(rows)), counts, color=BLUE, height=0.75)
    axes.set_yticks(range(len(rows)), [label(row[1]) for row in rows], fontsize=8)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, max(counts + [1]) * 1.15), title=title, xlabel="annotations")
    whole(axes.xaxis, 4)
    for y, count in enumerate(counts):
        axes.text(count, y, f" {count:,}", va="center", fontsize=7)


def draw_classes(rows, folder):
    """Up to 80 classes: a bar for each. More: the curve of all counts, and the twenty at either end."""
    if len(rows) <= 80:
        figure, axes = plt.subplots(figsize=(8, 1.2 + 0.17 * max(len(rows), 4)))
        draw_bars(axes, rows, f"{len(rows)} classes")
    else:
        figure, (curve, most, least) = plt.subplots(1, 3, figsize=(13, 4.6))
        curve.fill_between(range(1, len(rows) + 1), [row[2] + row[3] for row in rows], color=BLUE, step="mid")
        curve.set_yscale("symlog")
        curve.yaxis.set_major_formatter("{x:,.0f}")
        curve.set(ylim=(0, None), xlim=(0.5, len(rows) + 0.5), title=f"{len(rows):,} classes", ylabel="annotations",
                  xlabel="classes, from the most to the least frequent")
        draw_bars(most, rows[:20], "the 20 most frequent")
        filled = [row for row in rows if row[2] + row[3]]
        none = f" ({len(rows) - len(filled):,} have none)" * (len(filled) < len(rows))
        draw_bars(least, filled[-20:], "the 20 least frequent" + none)
    save(figure, folder, "class_distribution.png")


def draw_boxes(data, box, size, folder):
    """Where boxes lie; how many an image has (or, where each has one, their shape); how large they are in COCO's terms."""
    figure, (where, many, area) = plt.subplots(1, 3, figsize=(13, 4))
    known = np.isfinite(size).all()
    extent = size if known else (box[:, :2] + box[:, 2:]).max(axis=0).clip(1e-9)
    centre = (box[:, :2] + box[:, 2:] / 2) / extent
    density = np.histogram2d(*centre.T[::-1], bins=40, range=[[0, 1], [0, 1]])[0]
    figure.colorbar(where.imshow(density, extent=(0, 1, 1, 0), norm=PowerNorm(0.5, 0)), ax=where, label="boxes", shrink=0.8)
    unit = "of the image" if known else "of the largest extent"
    where.set(title="centres of the boxes", xlabel=f"x, fraction {unit}", ylabel=f"y, fraction {unit}")

    counts = np.bincount(data.image_row, minlength=len(data.images))
    if counts.max() > 1:
        top = max(int(np.percentile(counts, 99.5)), 4)
        many.bar(*np.unique(counts.clip(0, top), return_counts=True), width=0.9, color=BLUE)
        many.set(title=f"annotations per image: {counts.mean():.1f} on average, {counts.max():,} at most", ylabel="images",
                 xlabel="annotations" + f" ({top} stands for {top} and more)" * bool(counts.max() > top))
        whole(many.xaxis, 8)
    else:
        many.hist(np.log2(box[:, 2] / box[:, 3]).clip(-4, 4), bins=np.linspace(-4, 4, 41), color=BLUE)
        many.set_xticks(range(-4, 5, 2), ["1:16", "1:4", "1:1", "4:1", "16:1"])
        many.set(title="shape (every image has one box)", xlabel="width : height", ylabel="boxes")

    areas = box[:, 2].clip(1e-3) * box[:, 3].clip(1e-3)
    area.hist(areas, bins=np.geomspace(min(areas.min(), 100), max(areas.max(), 1e5) * 1.01, 60), color=BLUE)
    logarithmic(area.xaxis, (1,))
    for edge in SMALL, LARGE:
        area.axvline(edge, color=RED, linestyle="--")
    shares = (areas < SMALL).mean(), ((areas >= SMALL) & (areas < LARGE)).mean(), (areas >= LARGE).mean()
    area.set(title="small {:.0%}, medium {:.0%}, large {:.0%}".format(*shares), ylabel="boxes",
             xlabel="area in pixels (dashed: COCO's 32 x 32 and 96 x 96)")
    save(figure, folder, "bbox_distribution.png")


def draw_sizes(wh, pixels, anchors, unit, folder):
    """Width against height as a density, readable with a million boxes; anchors on top. Logarithmic, as IoU is about ratios.

    Whole pixels would show as stripes, so each box is spread at random over the pixel that its sides (N, 2) were rounded to.
    """
    figure, axes = plt.subplots(figsize=(6.4, 5.2))
    spread = wh * (1 + np.random.default_rng(0).uniform(-0.5, 0.5, wh.shape) / pixels.clip(1))
    edges = [np.geomspace(max(side.min(), side.max() / 1000) / 1.05, side.max() * 1.05, 81) for side in spread.T]
    density = np.histogram2d(*spread.T, bins=edges)[0].T
    shown = axes.pcolormesh(*edges, np.where(density > 0, density, np.nan), norm=PowerNorm(0.5, 0))
    figure.colorbar(shown, ax=axes, label="boxes", shrink=0.8)
    logarithmic(axes.xaxis)
    logarithmic(axes.yaxis)
    axes.scatter(*anchors.T, marker="P", s=90, color=RED, edgecolor="white", label=f"{len(anchors)} anchors")
    axes.legend(loc="upper left")
    axes.set(xlabel="width", ylabel="height", title=f"{len(wh):,} boxes in {unit}", xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]])
    save(figure, folder, "bbox_wh.png")


def draw_anchors(found, side, unit, folder):
    """For each k its anchors to scale around one centre; their sizes stand in the legend, where they cannot overlap."""
    columns = min(len(found), 4)
    figure, panels = plt.subplots(-(-len(found) // columns), columns, squeeze=False,
                                  figsize=(3.3 * columns, -(-len(found) // columns) * (3.7 + 0.09 * max(found))))
    frame = max(anchors.max() * 1.05 for anchors, _ in found.values())
    frame = max(frame, side) if unit.startswith("pixels at") else frame
    for axes, (k, (anchors, score)) in zip(panels.flat, found.items()):
        for (w, h), colour in zip(anchors[::-1], plt.cm.turbo(np.linspace(0.9, 0.05, k))):
            axes.add_patch(plt.Rectangle((-w / 2, -h / 2), w, h, fill=False, edgecolor=colour, linewidth=1.8,
                                         label=f"{w:.3g} x {h:.3g}"))
        axes.set(xlim=(-frame / 2, frame / 2), ylim=(-frame / 2, frame / 2), aspect="equal", xticks=[], yticks=[],
                 title=f"k = {k}, mean IoU {score:.3f}")
        axes.spines[:].set_visible(True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=2, fontsize=7, frameon=False)
    for axes in panels.flat[len(found):]:
        axes.remove()
    figure.suptitle(f"anchors in {unit}" + (": the frame is the network's input" if frame == side else ""), fontsize=10)
    save(figure, folder, "anchors.png")


def draw_elbow(found, asked, folder):
    figure, axes = plt.subplots(figsize=(6, 3.8))
    axes.plot(list(found), [score for _, score in found.values()], color=BLUE, marker="o", markersize=4)
    for k in asked:
        axes.plot(k, found[k][1], "o", color=RED, markersize=8)
    for k in asked if len(asked) <= 8 else []:
        axes.annotate(f"{found[k][1]:.3f}", (k, found[k][1]), (0, -17), textcoords="offset points", ha="center", fontsize=8)
    whole(axes.xaxis, 10)
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    axes.set(xlabel="k, the number of anchors", ylabel="mean IoU with the best anchor", title="what one more anchor gains")
    save(figure, folder, "anchors_iou.png")


# ---------------------------------------------------------------------------------------------------------------------- report


def cell(value):
    """A text as one cell of a Markdown table: nothing in it ends the cell, makes a link or a picture, or becomes HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|$&#!~])", r"\\\1", short(value, 60))


def markdown(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def describe_fields(data, meaning):
    """A row for every field of every table: how often, type and range, an example, and what it refers to, with the evidence."""
    types = {int: "integer", float: "number", str: "text", list: "list", dict: "object", bool: "true/false", type(None): "null"}
    refers = "{:,} of {:,} are in `{}`".format
    meaning = {"bbox": meaning, "segmentation": "outline, not read", "iscrowd": "1: one box around a crowd",
               "image_id": refers(data.listed[data.image_row].sum(), data.boxes.count, "images") if data.keys else "an image",
               "category_id": refers(data.named[data.class_row].sum(), data.boxes.count, "categories") if data.keys else "a class"}
    if data.kind.startswith("a text"):
        meaning |= {"height": "of the image", "width": "of the image"}
        meaning |= {} if "category_id" in data.boxes.fields else {"id": "a class"}
    limit = lambda value: f"{max(min(value, 1e300), -1e300):.6g}"
    for name, table in data.tables.items():
        for key, field in islice(table.fields.items(), 100):
            numeric = field["range"] and field["types"] <= {int, float}
            yield [name, cell(key), f"{field['count']:,}", ", ".join(sorted(types[kind] for kind in field["types"])),
                   " to ".join(map(limit, field["range"])) if numeric else "",
                   cell("" if key == "segmentation" else field["example"]),
                   meaning.get(key, "") if table is data.boxes else ""]


def yolo(anchors):
    """Anchors as they stand in a YOLO configuration: whole pixels where they are not tiny."""
    digits = 0 if anchors.min() >= 2 else 4
    return ", ".join(f"{w:.{digits}f},{h:.{digits}f}" for w, h in anchors)


def write_tables(folder, title, summary, why, data, reading, shares, quality, classes, found, unit):
    """Writes report.md, class_distribution.csv and anchors.json."""
    text = READINGS[reading][0]
    blocks = [f"# {cell(title)}", summary, "## Schema: what the numbers are", "The fields, as found in all records:",
              markdown(["table", "field", "records", "type", "range", "example", "meaning"], describe_fields(data, text)),
              f"**bbox is {text}**: {why}",
              markdown(["bbox read as", "boxes inside their images"],
                       [[READINGS[key][0], f"{shares[key]:.2%}"] for key in sorted(shares, key=shares.get, reverse=True)])]
    if data.assumed:
        blocks.append(f"The file names no classes. Its ids lie in {data.assumed}, so COCO's names are **assumed**.")
    blocks += ["## Quality of the data",
               markdown(["what", "number", "the first", "in the clustering"],
                        [[what, f"{count:,}", cell(", ".join(names)), "left out" if out and count else ""]
                         for what, count, names, out in quality]),
               "## Classes", "![classes](class_distribution.png)",
               markdown(["id", "name", "boxes", "crowds", "share", "images"],
                        [[cell(key), cell(name), f"{boxes:,}", f"{crowds:,}", f"{share:.2%}", f"{images:,}"]
                         for key, name, boxes, crowds, share, images in classes]),
               "## Boxes", "![boxes](bbox_distribution.png)", "![width and height](bbox_wh.png)",
               f"## Anchors in {unit}", "![anchors](anchors.png)", "![mean IoU](anchors_iou.png)",
               markdown(["k", "mean IoU", "for a YOLO configuration: width,height"],
                        [[k, f"{score:.4f}", f"`{yolo(anchors)}`"] for k, (anchors, score) in found.items()])]
    with open(os.path.join(folder, "report.md"), "w", encoding="utf-8", errors="replace") as file:
        file.write("\n\n".join(blocks) + "\n")
    with open(os.path.join(folder, "class_distribution.csv"), "w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "name", "boxes", "crowds", "share", "images"])
        formula = lambda value: isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
        for *row, share, images in classes:                  # an apostrophe before what a spreadsheet would run as a formula
            writer.writerow(["'" + value if formula(value) else value for value in row] + [f"{share:.6f}", images])
    with open(os.path.join(folder, "anchors.json"), "w", encoding="utf-8") as file:
        json.dump({"unit": unit, "anchors": {k: {"mean_iou": round(score, 6), "width_height": anchors.round(4).tolist()}
                                             for k, (anchors, score) in found.items()}}, file, indent=1)


# ------------------------------------------------------------------------------------------------------------------------ main


def analyse(path, out, asked, side, resize, reading, seed):
    """Reads the file and writes its report: all of it beside `out` first, so that a half-written one never replaces another."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise BadInput(f"--out {out}: is no folder: name another")
    data = Data(path)
    with np.errstate(all="ignore"):                          # NaN and infinity are counted below, not computed with
        shares, best = try_readings(data.bbox, data.size)
        why = explain_reading(shares, reading or best, reading, np.isfinite(data.size).any())
        reading = reading or best
        box = to_xywh(data.bbox, reading, data.size)
        quality, good = check_quality(data, box)
    if not good.any():
        raise BadInput(f"bbox, read as {READINGS[reading][0]}: none of {len(box):,} boxes is usable: mend them, or try another "
                       "--bbox-format")
    box, size, classes = box[good], data.size[good], count_classes(data)
    data.bbox = data.size = None                             # not needed any more, and a fifth of the memory
    wh, unit = at_input(box[:, 2:], size, side, resize, reading.endswith("fraction"))
    tried = find_anchors(wh, asked, seed)
    found = {k: tried[k] for k in asked if k in tried} or {max(tried): tried[max(tried)]}
    summary = (f"{data.kind}: {(~data.crowd).sum():,} boxes and {data.crowd.sum():,} crowds of {len(classes):,} classes in "
               f"{len(data.images):,} images")

    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".analysis-", dir=os.path.dirname(os.path.abspath(out)))
    try:
        draw_classes(classes, folder)
        draw_boxes(data, box, size, folder)
        draw_sizes(wh, box[:, 2:], found[max(found)][0], unit, folder)
        draw_anchors(found, side, unit, folder)
        draw_elbow(tried, list(found), folder)
        write_tables(folder, os.path.basename(path), summary, why, data, reading, shares, quality, classes, found, unit)
        os.makedirs(out, exist_ok=True)
        for name in os.listdir(folder):
            os.replace(os.path.join(folder, name), os.path.join(out, name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    print(f"{short(os.path.basename(path), 100)}: {summary}\nbbox is {READINGS[reading][0]}: {why}")
    for what, count, names, _ in quality:
        if count:
            print(f"  {count:,} {what}: {', '.join(names)}{', ...' if count > len(names) else ''}")
    print(f"anchors in {unit}; width,height:")
    for k, (anchors, score) in found.items():
        print(f"  k = {k}, mean IoU {score:.4f}: {yolo(anchors)}")
    if len(found) < len(asked):
        print(f"  more anchors than {max(tried)} make no sense: no more boxes differ")
    print(f"report: {os.path.join(out, 'report.md')}")


def main():
    parser = argparse.ArgumentParser(description="Schema, classes, boxes and anchors of a detection annotation file.")
    parser.add_argument("file", help="COCO instances JSON, a list of detections, or a text of one box per line; each also as .gz")
    parser.add_argument("--out", help="folder for the report; the default is analysis/<the file's name>")
    parser.add_argument("--k", type=int, nargs="+", default=[3, 4, 5, 6], help="numbers of anchors; the default is the task's")
    parser.add_argument("--size", type=int, default=416, help="side of the network's input in pixels; the default is YOLOv2's")
    parser.add_argument("--resize", choices=["stretch", "letterbox"], default="stretch",
                        help="how images get there: both sides stretched (YOLOv2; the default), or with their shape kept (YOLOv5)")
    parser.add_argument("--bbox-format", choices=READINGS, help="what the four numbers are; the default is to find out")
    parser.add_argument("--seed", type=int, default=0, help="of the search for anchors, which hardly depends on it")
    arguments = parser.parse_args()
    asked, path = sorted(set(arguments.k)), arguments.file
    if not 1 <= asked[0] <= asked[-1] <= 100 or arguments.size < 1 or arguments.seed < 0:
        parser.error("--k must lie in 1..100, --size must be positive, --seed not negative")
    stem = re.sub(r"(\.json|\.txt)?(\.gz)?$", "", os.path.basename(path)) or "report"
    try:
        with plt.rc_context(LOOKS):
            analyse(path, arguments.out or os.path.join("analysis", stem), asked, arguments.size, arguments.resize,
                    arguments.bbox_format, arguments.seed)
    except BadInput as error:
        message = str(error)
    except (OSError, EOFError, UnicodeError, zlib.error) as error:
        message = f"{getattr(error, 'strerror', None) or error}: check the path, the permissions and the content"
    else:
        return
    print(f"coco_analysis.py: {short(path, 300)}: {short(message, 1000)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
