"""Anchor boxes by k-means with 1 - IoU as the distance, in pure NumPy.

A detector such as YOLO does not predict a box from nothing: it starts from one of k fixed shapes, the anchors, and
predicts how to stretch it. Good anchors look like the boxes of the data set, so one clusters the (width, height) pairs
of all boxes (Redmon & Farhadi 2017, "YOLO9000", arXiv:1612.08242, section 2). Not by Euclidean distance, in which a
large box that is 10 % off weighs more than a small one that is 100 % off, but by 1 - IoU, which is blind to scale.

    python kmeans.py            2,000 made-up boxes: the textbook's k-means beside ours, for k = 1..9

        k   textbook   ours     anchors (width x height)
        1   0.2473     0.2477   138 x 132
        2   0.3336     0.3956   24 x 25, 159 x 139
        3   0.4219     0.4582   23 x 23, 74 x 117, 223 x 210
        ...

    from kmeans import iou, kmeans
    anchors, mean_iou = kmeans(boxes, k=5)      # boxes: (N, 2) widths and heights in any unit

WHY THE MEAN OF A CLUSTER IS NOT ITS BEST ANCHOR. k-means repeats two steps: give each point to its nearest centre, then
move each centre to where it serves its points best. For squared Euclidean distance that place is the mean. For 1 - IoU
it is not: take the squares of side 1, 1 and 4. Their mean, side 2, has IoU 1/4, 1/4 and 1/4 with them: 0.25 on average.
An anchor of side 1 has 1, 1 and 1/16: 0.69. The median (a common remedy) is closer, but it looks at widths and heights
one by one, and IoU does not. No formula gives the best place, so we do what the second step is *for*: we look for it.

    1. merge    a million boxes -> some hundred weighted ones, by rounding on a logarithmic grid (IoU is about ratios)
    2. swap     take k of these boxes as anchors, and exchange one for another box as long as the mean IoU rises; from
                several random starts. An exchange can jump across a valley where k-means stays stuck for good.
    3. polish   leave the boxes: make each anchor a little wider, narrower, taller, lower; keep what helps; halve the
                step

The mean IoU never falls and only moves that raise it by more than rounding are made, hence the search always ends.
"""

import numpy as np

STARTS = 16        # random starts, each as it is and after the swaps: together they leave little to the seed
FINALISTS = 8      # the best of them are polished on more boxes: which are the best anchors shows only there
COARSE = 600       # merged boxes for the swaps, which look at all COARSE x COARSE IoUs,
FINE = 5000        # for polishing the finalists,
FULL = 20000       # and for polishing the winner
ROWS = 1 << 16     # rows at a time where all boxes are looked at: (65536, k) floats stay in a few MB
GAIN = 1e-6        # smaller gains of the mean IoU are rounding, and following them could go on for ever
SMALLEST, LARGEST = 1e-100, 1e100  # beyond these, width x height no longer fits in a float


def iou(boxes, anchors):
    """IoU of every box with every anchor, both placed with one corner at the same point.

    boxes (N, 2) and anchors (k, 2): positive widths and heights. Returns (N, k), each in (0, 1].
    """
    w, h = boxes[:, :1], boxes[:, 1:]  # (N, 1) against (k,) broadcasts to (N, k)
    intersection = np.minimum(w, anchors[:, 0]) * np.minimum(h, anchors[:, 1])
    return intersection / (w * h + anchors[:, 0] * anchors[:, 1] - intersection)


def mean_best_iou(boxes, anchors):
    """What anchors are judged by: the mean over all boxes (N, 2) of the IoU with their best anchor. A float."""
    parts = [iou(boxes[i:i + ROWS], anchors).max(axis=1).sum() for i in range(0, len(boxes), ROWS)]
    return float(sum(parts) / len(boxes))


def check(boxes, k):
    """Returns boxes as (N, 2) float64; raises ValueError, with the first bad row's number, for bad boxes or a bad k."""
    boxes = np.asarray(boxes, dtype=np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 2:
        raise ValueError(f"boxes must have the shape (N, 2), width and height; these have {boxes.shape}")
    if len(boxes) == 0 or not (k >= 1 and k % 1 == 0):  # of infinity and NaN the remainder is NaN
        raise ValueError(f"at least one box and a whole k of at least 1 are needed: {len(boxes)} boxes, k = {k}")
    good = ((boxes >= SMALLEST) & (boxes <= LARGEST)).all(axis=1)  # NaN compares false, so it is caught here as well
    if not good.all():
        row = int(np.argmin(good))
        width, height = boxes[row]
        raise ValueError(f"row {row}: width {width:g}, height {height:g}: both must be positive and finite")
    return boxes


def merge(points, weights, cell):
    """Merges weighted boxes that fall into one cell of a logarithmic grid, of a side in octaves (factors of 2).

    points (M, 2), weights (M,) -> the same with fewer rows; a new point is the weighted geometric mean of its cell.
    """
    logs = np.log2(points)
    x, y = ((logs - logs.min(axis=0)) / cell).T
    cells = x.astype(np.int64) << 32 | y.astype(np.int64)  # two numbers in one integer
    _, label = np.unique(cells, return_inverse=True)
    total = np.bincount(label, weights)
    return np.exp2([np.bincount(label, weights * logs[:, i]) / total for i in (0, 1)]).T, total


def thin(points, weights, limit):
    """Merges weighted boxes until at most `limit` are left, but not much fewer: at least a quarter of it."""
    if len(points) <= limit:
        return points, weights
    cell = 2.0 ** -6  # 1 %
    found = merge(points, weights, cell)
    while len(found[0]) < limit / 4:  # where boxes differ by less. Half the side makes four cells of one at most, so
        cell /= 2                     # that from below a quarter of the limit the number does not jump above the limit
        found = merge(points, weights, cell)
    while len(found[0]) > limit:
        cell *= 1.25
        found = merge(*found, cell)
    return found


def swap(similar, weights, chosen):
    """Exchanges anchors for other boxes, one by one, as long as the mean IoU rises.

    similar (M, M): the IoU of every box with every other; chosen (k,): the boxes that are anchors. Returns new ones.
    """
    k = len(chosen)
    score, idle = weights @ similar[:, chosen].max(axis=1), 0
    while idle < k:  # until k anchors in a row could not be bettered
        others = similar[:, chosen[1:]].max(axis=1, initial=0)   # (M,) what boxes get when the first is taken out
        scores = weights @ np.maximum(similar, others[:, None])  # (M,) the mean IoU with each box in its place
        best, idle = scores.argmax(), idle + 1
        if scores[best] > score + GAIN:
            chosen = np.concatenate([[best], chosen[1:]])
            score, idle = scores[best], 0
        chosen = np.roll(chosen, -1)
    return chosen


def polish(points, weights, anchors, step):
    """Moves anchors (k, 2) to the nearest top of the mean IoU over weighted points (M, 2); returns them and that IoU.

    Each anchor in turn tries the eight neighbours around it, first by the factors exp(+-step), then by half that step.
    """
    moves = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if (x, y) != (0, 0)])
    anchors, similar = anchors.copy(), iou(points, anchors)                # (k, 2) and (M, k)
    score = weights @ similar.max(axis=1)
    while step > 1e-4:
        before = score
        for j in range(len(anchors)):
            others = np.delete(similar, j, axis=1).max(axis=1, initial=0)  # (M,) boxes may change their anchor at once
            tries = anchors[j] * np.exp(step * moves)                      # (8, 2)
            ious = iou(points, tries)                                      # (M, 8)
            scores = weights @ np.maximum(ious, others[:, None])
            best = scores.argmax()
            if scores[best] > score + GAIN:
                score, anchors[j], similar[:, j] = scores[best], tries[best], ious[:, best]
        if score == before:
            step /= 2
    return anchors, score


def kmeans(boxes, k, seed=0):
    """The k anchors that fit boxes (N, 2) best.

    Returns anchors (k, 2), sorted by area, and the mean over the boxes of the IoU with their best anchor. Raises
    ValueError for rows that are not positive and finite, and where there are fewer different boxes than k.
    """
    boxes, k = check(boxes, k), int(k)
    rng = np.random.default_rng(seed)
    full = merge(boxes, np.full(len(boxes), 1 / len(boxes)), cell=2.0 ** -20)  # at first what is equal to six digits
    if len(full[0]) < k:
        raise ValueError(f"{len(full[0])} different boxes are too few for {k} anchors")
    full = thin(*full, max(FULL, 32 * k))
    fine = thin(*full, max(FINE, 8 * k))
    points, weights = thin(*fine, max(COARSE, 4 * k))

    similar = iou(points, points)
    drawn = [rng.choice(len(points), k, replace=False, p=weights) for _ in range(STARTS)]
    starts = {frozenset(start.tolist()) for start in drawn + [swap(similar, weights, start) for start in drawn]}
    tops = (polish(points, weights, points[sorted(start)], step=0.25) for start in sorted(starts, key=sorted))
    tops = {round(score, 5): (anchors, score) for anchors, score in tops}  # many starts end on the same top
    finals = [tops[score] for score in sorted(tops, reverse=True)[:FINALISTS]]
    anchors, _ = max((polish(*fine, anchors, step=0.1) for anchors, _ in finals), key=lambda found: found[1])
    anchors, _ = polish(*full, anchors, step=0.02)
    anchors = anchors[np.argsort(anchors.prod(axis=1))]
    return anchors, mean_best_iou(boxes, anchors)


def textbook(boxes, k, seed=0):
    """What most implementations do: assign by IoU, move each anchor to the mean of its boxes, until nothing changes."""
    anchors = boxes[np.random.default_rng(seed).choice(len(boxes), k, replace=False)]
    nearest = None
    for _ in range(300):
        before, nearest = nearest, iou(boxes, anchors).argmax(axis=1)
        if before is not None and (before == nearest).all():
            break
        anchors = np.array([boxes[nearest == j].mean(axis=0) if (nearest == j).any() else anchors[j]
                            for j in range(k)])
    return anchors, mean_best_iou(boxes, anchors)


def main():
    rng = np.random.default_rng(0)
    shapes = np.array([[15, 20], [40, 30], [60, 150], [200, 90], [250, 300]])
    boxes = shapes[rng.integers(0, len(shapes), 2000)] * np.exp(rng.normal(0, 0.5, (2000, 2)))
    print("k   textbook   ours     anchors (width x height)")
    for k in range(1, 10):
        anchors, score = kmeans(boxes, k)
        sizes = ", ".join(f"{w:.0f} x {h:.0f}" for w, h in anchors)
        print(f"{k}   {textbook(boxes, k)[1]:.4f}     {score:.4f}   {sizes}")


if __name__ == "__main__":
    main()
