"""Anchor boxes by k-means with 1 - IoU as the distance, in pure NumPy.

A detector like YOLO stretches k fixed shapes, the anchors. Good anchors resemble the boxes, so we
cluster their widths and heights (Redmon & Farhadi 2017, "YOLO9000", arXiv:1612.08242). Euclidean
distance would favour large boxes; 1 - IoU ignores scale.

    1. k-means  assign each box to the anchor of largest IoU; move each anchor to their mean
    2. jumps    replace an anchor by a box while the mean IoU rises: this leaves local maxima
    3. steps    make anchors slightly wider, narrower, taller, lower while the mean IoU rises

Half of the searches omit k-means, which can lead them all to one local maximum. The mean IoU of 500
boxes with 8 anchors (assets/measurements.md):

    k-means  + jumps  + steps  without k-means  best of 20
     0.5273   0.5761   0.5767           0.5807      0.5807

WHY THE MEAN OF A CLUSTER IS NOT ITS BEST ANCHOR. Take squares of side 1, 1 and 4. Their mean, side
2, has IoU 1/4 with each; their median, side 1, has 0.69 on average. No formula, not even the
median, is always best, so we search.
"""

import numpy as np

STARTS = 20
COARSE = 500  # merged boxes: for k-means and jumps,
FINE = 4000   # and for steps


def iou(boxes, anchors):
    """IoU (N, k) of boxes (N, 2) with anchors (k, 2), widths and heights, with a common corner.

    IoU = intersection / union, where union = sum of the areas - intersection.
    """
    w, h = boxes[:, :1], boxes[:, 1:]  # (N, 1) against (k,) broadcasts to (N, k)
    intersection = np.minimum(w, anchors[:, 0]) * np.minimum(h, anchors[:, 1])
    return intersection / (w * h + anchors[:, 0] * anchors[:, 1] - intersection)


def mean_best_iou(boxes, anchors):
    """The mean over boxes (N, 2) of the IoU with their best anchor."""
    return float(iou(boxes, anchors).max(axis=1).mean())


def plain_kmeans(boxes, weights, anchors):
    """k-means: boxes (N, 2), weights (N,), first anchors (k, 2) -> anchors (k, 2)."""
    anchors = anchors.copy()
    for _ in range(20):  # usually enough
        nearest = iou(boxes, anchors).argmax(axis=1)  # (N,)
        for j in set(nearest):  # an anchor without boxes stays where it is
            mine = nearest == j
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
        if scores[best] > score + 1e-6:  # not a rounding error
            anchors[j], ious[:, j], score, idle = tries[best], similar[:, best], scores[best], 0
        j = (j + 1) % len(anchors)
    return anchors, score


def step(boxes, weights, anchors, *sizes):
    """Climbs to neighbours of the anchors, relative sizes away. Returns as climb."""
    for size in sizes:
        factors = np.exp(size * np.mgrid[-1:2, -1:2].reshape(2, 9).T)  # (9, 2)
        anchors, score = climb(boxes, weights, anchors, lambda anchor: (
            anchor * factors, iou(boxes, anchor * factors)))
    return anchors, score


def merge(boxes, weights, limit):
    """Merges boxes in cells of a growing logarithmic grid, to `limit` at most."""
    cell = 0.01
    while len(boxes) > limit:
        logs = np.log2(boxes)
        x, y = np.floor(logs / cell).T
        _, label = np.unique(x + 1j * y, return_inverse=True)
        total = np.bincount(label, weights)
        boxes = np.exp2([np.bincount(label, weights * side) / total for side in logs.T]).T
        weights, cell = total, 1.3 * cell
    return boxes, weights


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
    coarse = [part.astype(np.float32) for part in merge(*fine, max(COARSE, 8 * k))]  # faster
    jumps = coarse[0], iou(coarse[0], coarse[0])
    rng, found = np.random.default_rng(seed), []
    for number in range(STARTS):
        anchors = rng.permutation(coarse[0])[:k]
        if number % 2:
            anchors = plain_kmeans(*coarse, anchors)
        anchors, _ = climb(*coarse, anchors, lambda anchor: jumps)
        found.append(step(*fine, np.float64(anchors), 0.1))
    anchors, _ = max(found, key=lambda pair: pair[1])
    anchors, _ = step(*fine, anchors, 0.03, 0.01, 0.003)
    anchors = anchors[np.argsort(anchors.prod(axis=1))]
    return anchors, mean_best_iou(boxes, anchors)
