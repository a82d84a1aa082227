"""Anchor boxes by k-means with 1 - IoU as the distance, in pure NumPy.

A detector like YOLO predicts how to stretch k fixed shapes, the anchors. Good anchors resemble
the boxes, so we cluster their (width, height) pairs (Redmon & Farhadi 2017, "YOLO9000",
arXiv:1612.08242). Euclidean distance would favour large boxes; 1 - IoU ignores scale.

    1. k-means  assign each box to the anchor of largest IoU; move each anchor to their mean
    2. jumps    replace an anchor by a box while the mean IoU rises: this leaves local maxima
    3. steps    make an anchor slightly wider, narrower, taller, lower while the mean IoU rises

`python kmeans.py` prints the mean IoU after each stage, on 500 made boxes:

    k  k-means  + jumps  + steps  best of 16 starts
    5  0.5083   0.5451   0.5464   0.5464
    6  0.5363   0.5605   0.5618   0.5689

WHY THE MEAN OF A CLUSTER IS NOT ITS BEST ANCHOR. It is for squared Euclidean distance. Take
squares of side 1, 1 and 4. Their mean, side 2, has IoU 1/4 with each. An anchor of side 1 has 1, 1
and 1/16: 0.69 on average. No formula gives the best place, so we search.
"""

import numpy as np

STARTS = 16
COARSE = 500  # merged boxes: for k-means and jumps,
FINE = 4000   # and for steps
SIZES = (0.1, 0.03, 0.01, 0.003)  # of steps
GAIN = 1e-6   # smaller gains are rounding errors


def iou(boxes, anchors):
    """IoU (N, k) of boxes (N, 2) with anchors (k, 2), widths and heights, with a common corner."""
    w, h = boxes[:, :1], boxes[:, 1:]  # (N, 1) against (k,) broadcasts to (N, k)
    intersection = np.minimum(w, anchors[:, 0]) * np.minimum(h, anchors[:, 1])
    return intersection / (w * h + anchors[:, 0] * anchors[:, 1] - intersection)


def mean_best_iou(boxes, anchors):
    """The mean over boxes (N, 2) of the IoU with their best anchor."""
    return float(iou(boxes, anchors).max(axis=1).mean())


def plain_kmeans(boxes, weights, anchors):
    """k-means: boxes (N, 2), weights (N,), first anchors (k, 2) -> anchors (k, 2)."""
    anchors, nearest = anchors.copy(), None
    for _ in range(20):
        before, nearest = nearest, iou(boxes, anchors).argmax(axis=1)  # (N,)
        if np.array_equal(nearest, before):
            break
        for j in range(len(anchors)):
            mine = nearest == j
            if mine.any():  # an anchor without boxes stays where it is
                anchors[j] = weights[mine] @ boxes[mine] / weights[mine].sum()
    return anchors


def climb(boxes, weights, anchors, propose):
    """Replaces anchors (k, 2) one by one by the best proposal, while the mean IoU rises.

    boxes (N, 2), weights (N,); propose(anchor) -> shapes (T, 2), their IoU with boxes (N, T).
    Returns the anchors and their mean IoU.
    """
    anchors, ious = anchors.copy(), iou(boxes, anchors)
    score, idle, j = weights @ ious.max(axis=1), 0, 0
    while idle < len(anchors):  # until none can be improved
        others = np.delete(ious, j, axis=1).max(axis=1, initial=0)  # (N,) without anchor j
        tries, similar = propose(anchors[j])
        scores = weights @ np.maximum(similar, others[:, None])     # (T,) with each try instead
        best, idle = scores.argmax(), idle + 1
        if scores[best] > score + GAIN:
            anchors[j], ious[:, j], score, idle = tries[best], similar[:, best], scores[best], 0
        j = (j + 1) % len(anchors)
    return anchors, score


def jumps(boxes):
    """For climb: proposes all boxes."""
    similar = iou(boxes, boxes)
    return lambda anchor: (boxes, similar)


def steps(boxes, size):
    """For climb: proposes the anchor's neighbours, a relative `size` away."""
    factors = np.exp(size * np.mgrid[-1:2, -1:2].reshape(2, 9).T)  # (9, 2)
    return lambda anchor: (anchor * factors, iou(boxes, anchor * factors))


def merge(points, weights, limit):
    """Merges weighted points (M, 2) in cells of a growing logarithmic grid, to `limit` at most."""
    cell = 0.01
    while len(points) > limit:
        logs = np.log2(points)
        x, y = (logs / cell).astype(np.int64).T
        _, label = np.unique(x * 2 ** 32 + y, return_inverse=True)
        total = np.bincount(label, weights)
        points = np.exp2([np.bincount(label, weights * side) / total for side in logs.T]).T
        weights, cell = total, 1.3 * cell
    return points, weights


def kmeans(boxes, k, seed=0):
    """The k anchors that fit boxes (N, 2), widths and heights in any unit, best.

    Returns anchors (k, 2) float64, sorted by area, and their mean_best_iou. Raises ValueError for
    rows that are not positive and finite, and for too few distinct boxes.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 2)
    good = ((boxes > 1e-100) & (boxes < 1e100)).all(axis=1)  # also false for NaN
    if not good.all():
        raise ValueError(f"row {good.argmin()}: width and height must be positive and finite")
    distinct, counts = np.unique(boxes, axis=0, return_counts=True)
    if not 1 <= k <= len(distinct):
        raise ValueError(f"k = {k}, but there are {len(distinct)} distinct boxes")
    fine = merge(distinct, counts / len(boxes), max(FINE, 8 * k))
    coarse = merge(*fine, max(COARSE, 8 * k))
    jump, rng = jumps(coarse[0]), np.random.default_rng(seed)
    best = 0
    for _ in range(STARTS):
        start = plain_kmeans(*coarse, rng.permutation(coarse[0])[:k])
        start, _ = climb(*coarse, start, jump)
        start, score = climb(*fine, start, steps(fine[0], SIZES[0]))
        if score > best:
            best, anchors = score, start
    for size in SIZES[1:]:
        anchors, _ = climb(*fine, anchors, steps(fine[0], size))
    anchors = anchors[np.argsort(anchors.prod(axis=1))]
    return anchors, mean_best_iou(boxes, anchors)


def main():
    rng = np.random.default_rng(0)
    shapes = np.array([[15, 20], [40, 30], [60, 150], [200, 90], [250, 300]])
    boxes = shapes[rng.integers(0, 5, 500)] * np.exp(rng.normal(0, 0.5, (500, 2)))
    weights = np.ones(500) / 500
    print("k  k-means  + jumps  + steps  best of 16 starts")
    for k in range(2, 10):
        anchors = plain_kmeans(boxes, weights, rng.permutation(boxes)[:k])
        plain = mean_best_iou(boxes, anchors)
        anchors, jumped = climb(boxes, weights, anchors, jumps(boxes))
        for size in SIZES:
            anchors, stepped = climb(boxes, weights, anchors, steps(boxes, size))
        print(f"{k}  {plain:.4f}   {jumped:.4f}   {stepped:.4f}   {kmeans(boxes, k)[1]:.4f}")


if __name__ == "__main__":
    main()
