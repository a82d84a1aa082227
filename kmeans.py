"""Anchor boxes by k-means with 1 - IoU as the distance, in pure NumPy.

A detector such as YOLO predicts how to stretch k fixed shapes, the anchors. Good anchors resemble
the boxes of the data set, so their (width, height) pairs are clustered (Redmon & Farhadi 2017,
"YOLO9000", arXiv:1612.08242). By Euclidean distance a large box that is 10 % off would weigh more
than a small one that is 100 % off; 1 - IoU ignores scale.

    python kmeans.py    # the textbook's k-means beside this one: for k = 2, mean IoU 0.33 and 0.40

WHY THE MEAN OF A CLUSTER IS NOT ITS BEST ANCHOR. k-means repeats two steps: assign each point to
its nearest centre, then move each centre to the best place for its points. For squared Euclidean
distance that is the mean. For 1 - IoU it is not: take squares of side 1, 1 and 4. Their mean, side
2, has IoU 1/4, 1/4 and 1/4 with them: 0.25 on average. An anchor of side 1 has 1, 1 and 1/16: 0.69.
The median is closer, but treats widths and heights separately, and IoU does not. No formula gives
the best place, so we search for it:

    1. merge    reduce a million boxes to some thousand weighted ones
    2. climb    take k boxes as anchors; replace one by another box while the mean IoU rises: such
                jumps leave local maxima
    3. climb    make one anchor a little wider, narrower, taller, lower, in ever smaller steps
"""

import numpy as np

STARTS = 16   # random starts
COARSE = 500  # merged boxes for jumps,
FINE = 4000   # and for small steps
GAIN = 1e-6   # smaller gains are rounding errors


def iou(boxes, anchors):
    """IoU (N, k) of boxes (N, 2) with anchors (k, 2), widths and heights, with a common corner."""
    w, h = boxes[:, :1], boxes[:, 1:]  # (N, 1) against (k,) broadcasts to (N, k)
    intersection = np.minimum(w, anchors[:, 0]) * np.minimum(h, anchors[:, 1])
    return intersection / (w * h + anchors[:, 0] * anchors[:, 1] - intersection)


def mean_best_iou(boxes, anchors):
    """The mean over boxes (N, 2) of the IoU with their best anchor."""
    parts = np.array_split(boxes, len(boxes) // 65536 + 1)  # to save memory
    return float(sum(iou(part, anchors).max(axis=1).sum() for part in parts) / len(boxes))


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


def climb(points, weights, anchors, propose):
    """Replaces anchors (k, 2) one by one by the best proposal, while the mean IoU rises.

    points (M, 2), weights (M,); propose(anchor) -> boxes (T, 2) and their IoU with points (M, T).
    Returns the anchors and their mean IoU.
    """
    anchors, ious = anchors.copy(), iou(points, anchors)
    score, idle, j = weights @ ious.max(axis=1), 0, 0
    while idle < len(anchors):  # until none can be improved
        others = np.delete(ious, j, axis=1).max(axis=1, initial=0)  # (M,) without anchor j
        tries, similar = propose(anchors[j])
        scores = weights @ np.maximum(similar, others[:, None])     # (T,) with each try instead
        best, idle = scores.argmax(), idle + 1
        if scores[best] > score + GAIN:
            anchors[j], ious[:, j], score, idle = tries[best], similar[:, best], scores[best], 0
        j = (j + 1) % len(anchors)
    return anchors, score


def kmeans(boxes, k, seed=0):
    """The k anchors that fit boxes (N, 2), widths and heights in any unit, best.

    Returns anchors (k, 2) float64, sorted by area, and the mean IoU of boxes with the best anchor.
    Raises ValueError for rows that are not positive and finite, and for too few distinct boxes.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 2)
    good = ((boxes > 1e-100) & (boxes < 1e100)).all(axis=1)  # also false for NaN
    if not good.all():
        raise ValueError(f"row {good.argmin()}: width and height must be positive and finite")
    distinct, counts = np.unique(boxes @ [1, 1j], return_counts=True)  # complex numbers sort fast
    if not 1 <= k <= len(distinct):
        raise ValueError(f"k = {k}, but there are {len(distinct)} distinct boxes")
    distinct = np.stack([distinct.real, distinct.imag], axis=1)
    fine = merge(distinct, counts / len(boxes), max(FINE, 8 * k))
    coarse, weights = merge(*fine, max(COARSE, 8 * k))
    similar, rng = iou(coarse, coarse), np.random.default_rng(seed)

    def step(anchors, size):
        def around(anchor):
            tries = anchor * np.exp(size * np.mgrid[-1:2, -1:2].reshape(2, 9).T)
            return tries, iou(fine[0], tries)

        return climb(*fine, anchors, around)

    best = 0
    for _ in range(STARTS):
        start = rng.permutation(coarse)[:k]
        start, _ = climb(coarse, weights, start, lambda anchor: (coarse, similar))
        start, score = step(step(start, 0.1)[0], 0.05)
        if score > best:
            best, anchors = score, start
    for size in (0.02, 0.01, 0.005, 0.002, 0.001):
        anchors, _ = step(anchors, size)
    anchors = anchors[np.argsort(anchors.prod(axis=1))]
    return anchors, mean_best_iou(boxes, anchors)


def textbook(boxes, k, seed=0):
    """The usual way: move each anchor to the mean of its boxes."""
    anchors = np.random.default_rng(seed).permutation(boxes)[:k]
    for _ in range(100):
        nearest = iou(boxes, anchors).argmax(axis=1)
        anchors = np.array([boxes[nearest == j].mean(axis=0) for j in np.unique(nearest)])
    return anchors, mean_best_iou(boxes, anchors)


def main():
    rng = np.random.default_rng(0)
    shapes = np.array([[15, 20], [40, 30], [60, 150], [200, 90], [250, 300]])
    boxes = shapes[rng.integers(0, len(shapes), 2000)] * np.exp(rng.normal(0, 0.5, (2000, 2)))
    print("k  textbook  ours")
    for k in range(1, 10):
        print(f"{k}  {textbook(boxes, k)[1]:.4f}    {kmeans(boxes, k)[1]:.4f}")


if __name__ == "__main__":
    main()
