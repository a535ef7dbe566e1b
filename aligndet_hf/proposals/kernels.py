"""
The compiled parts of selective search and of non-maximum suppression. Import this module late: it brings numba.

Every kernel is sequential and works on integers, or on single IEEE operations in a fixed order, so that results are
the same on every run, thread count and machine. All release the GIL. Positions of pixels are `y * width + x`.

Sources: F. = Felzenszwalb and Huttenlocher, Efficient Graph-Based Image Segmentation, IJCV 2004;
U. = Uijlings et al., Selective Search for Object Recognition, IJCV 2013.
"""

import functools
import math

import cv2
import numba
import numpy as np

# Similarities and histograms are fixed-point numbers: 1.0 is ONE.
ONE = 1 << 15

COLOUR_BINS = 16  # per channel
ORIENTATIONS = 8
MAGNITUDES = 5
TEXTURE_BINS = ORIENTATIONS * MAGNITUDES

NO_EDGE = 8191  # the weight of what is no edge; others are at most 16 * 255 * sqrt(3)
_BINOMIAL = np.array([1, 2, 1], np.float32)
_TINY = np.finfo(np.float64).tiny


def _jit(function):
    """Compiles on the first call, and keeps the result beside this file or else in the user's cache folder."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder can be written: compile in every process
        return numba.njit(nogil=True)(function)


# ---- pixels


@_jit
def resize_area(image, height, width):
    """Shrinks uint8 `[H, W, 3]` to `[height, width, 3]`: the mean over the area of each new pixel, rounded."""
    old_height, old_width, _ = image.shape
    result = np.empty((height, width, 3), np.uint8)
    flat = image.reshape(old_height, 3 * old_width)
    sums = np.empty(3 * old_width, np.int32)
    area = old_height * old_width
    inverse = 1.0 / area
    # New row y covers [y, y + 1) * old_height; old row i covers [i, i + 1) * height. All overlaps are integers.
    lefts = np.arange(width + 1) * old_width
    first, last = lefts[:-1] // width, (lefts[1:] - 1) // width
    for y in range(height):
        top, bottom = y * old_height, (y + 1) * old_height
        sums[:] = 0
        for i in range(top // height, (bottom - 1) // height + 1):
            overlap = np.int32(min(bottom, (i + 1) * height) - max(top, i * height))
            row = flat[i]
            for j in range(len(row)):
                sums[j] += np.int32(overlap * np.int32(row[j]))
        for x in range(width):
            red = green = blue = area // 2  # rounds to nearest
            for i in range(first[x], last[x] + 1):
                overlap = min(lefts[x + 1], (i + 1) * width) - max(lefts[x], i * width)
                red += overlap * sums[3 * i]
                green += overlap * sums[3 * i + 1]
                blue += overlap * sums[3 * i + 2]
            result[y, x, 0] = np.uint8(red * inverse)
            result[y, x, 1] = np.uint8(green * inverse)
            result[y, x, 2] = np.uint8(blue * inverse)
    return result


@_jit
def to_hsv(image):
    """RGB uint8 `[H, W, 3]` to hue, saturation and value, each 0..255."""
    result = np.empty_like(image)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            r, g, b = np.int32(image[y, x, 0]), np.int32(image[y, x, 1]), np.int32(image[y, x, 2])
            value = max(r, g, b)
            spread = value - min(r, g, b)
            hue = 0
            if spread > 0:
                if value == r:
                    hue = (g - b) * 128 // spread
                elif value == g:
                    hue = (b - r) * 128 // spread + 256
                else:
                    hue = (r - g) * 128 // spread + 512
                hue = (hue + 768) % 768 // 3
            result[y, x, 0] = hue
            result[y, x, 1] = spread * 255 // max(value, 1)
            result[y, x, 2] = value
    return result


@_jit
def to_lab(image, linear, root, lightness):
    """
    RGB uint8 `[H, W, 3]` to CIE L*a*b* (D65), L scaled to 0..255 and a, b shifted by 128.

    The other arguments are the tables of [`lab_tables`].
    """
    result = np.empty_like(image)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            r, g, b = linear[image[y, x, 0]], linear[image[y, x, 1]], linear[image[y, x, 2]]
            # Rows of the sRGB matrix over the white point, times 2^14; each sums to 2^14.
            fx = root[(7110 * r + 6163 * g + 3111 * b) >> 14]
            luminance = (3484 * r + 11717 * g + 1183 * b) >> 14
            fy = root[luminance]
            fz = root[(291 * r + 1794 * g + 14299 * b) >> 14]
            result[y, x, 0] = lightness[luminance]
            result[y, x, 1] = min(255, max(0, 128 + (500 * (fx - fy) >> 15)))
            result[y, x, 2] = min(255, max(0, 128 + (200 * (fy - fz) >> 15)))
    return result


@functools.cache
def lab_tables():
    """Tables int32: intensity 0..255 to linear light 0..4095, that to f of L*a*b* (1.0 is `ONE`) and to L 0..255."""
    s = np.arange(256) / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    t = np.arange(4096) / 4095
    root = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    tables = linear * 4095, root * ONE, (1.16 * root - 0.16) * 255
    return tuple(np.rint(table).astype(np.int32) for table in tables)


def smooth(image):
    """
    Filters uint8 `[H, W, C]` by 1-2-1 along both axes, much like a Gaussian of sigma 0.7.

    Returns int32 `[C, H, W]`, 16 times the value.
    """
    # Whole numbers throughout, as in the kernels.
    filtered = cv2.sepFilter2D(image, cv2.CV_16S, _BINOMIAL, _BINOMIAL, borderType=cv2.BORDER_REPLICATE)
    return np.ascontiguousarray(filtered.transpose(2, 0, 1), np.int32)


@_jit
def texture(intensity):
    """
    Index of the gradient of a smoothed channel int32 `[H, W]` (16 times the value): octant times magnitude, uint8.

    U. section 3.2 takes Gaussian derivatives in 8 orientations; the octant of one gradient serves as well here.
    """
    height, width = intensity.shape
    result = np.empty((height, width), np.uint8)
    for y in range(height):
        above, below = max(y - 1, 0), min(y + 1, height - 1)
        for x in range(width):
            dx = intensity[y, min(x + 1, width - 1)] - intensity[y, max(x - 1, 0)]
            dy = intensity[below, x] - intensity[above, x]
            octant = (4 if dx < 0 else 0) + (2 if dy < 0 else 0) + (1 if abs(dy) > abs(dx) else 0)
            magnitude = abs(dx) + abs(dy)
            level = (magnitude > 64) + (magnitude > 160) + (magnitude > 400) + (magnitude > 1000)
            result[y, x] = octant * MAGNITUDES + level
    return result


# ---- graph segmentation of pixels (F.)


@_jit
def edge_weights(planes):
    """
    Euclidean distances between neighbouring pixels of int32 `[3, H, W]`, as uint16.

    Returns `[4, H, W]`: to the neighbour on the right, below, below right and below left; `NO_EDGE` where none is.
    """
    _, height, width = planes.shape
    weights = np.full((4, height, width), NO_EDGE, np.uint16)
    for direction in range(4):
        dy = 0 if direction == 0 else 1
        left, right = (
            (0, 1) if direction in (0, 2) else ((0, 0) if direction == 1 else (1, 0))
        )  # of pixel and neighbour
        length = width - max(left, right)
        for y in range(height - dy):
            row = weights[direction, y, left : left + length]
            first, others_first = planes[0, y, left : left + length], planes[0, y + dy, right : right + length]
            second, others_second = planes[1, y, left : left + length], planes[1, y + dy, right : right + length]
            third, others_third = planes[2, y, left : left + length], planes[2, y + dy, right : right + length]
            for x in range(length):  # 32 bits, and rows of their own: compiled to vector instructions
                d1 = np.int32(first[x] - others_first[x])
                d2 = np.int32(second[x] - others_second[x])
                d3 = np.int32(third[x] - others_third[x])
                square = np.int32(d1 * d1) + np.int32(d2 * d2) + np.int32(d3 * d3)
                row[x] = np.int32(math.sqrt(np.float32(np.int32(square))))
    return weights


@_jit
def prune_edges(weights):
    """
    Removes from [`edge_weights`] the heaviest edge of every triangle of pixels.

    Its ends are connected by lighter edges, so it is in no minimum spanning tree, which is all that F. algorithm 1
    follows but for rare cases. More than half of the edges go, and with them most of the time.
    """
    height = weights.shape[1]
    kept = weights.copy()
    for y in range(height - 1):
        # The squares of pixels between two rows have these sides and diagonals.
        top, bottom = weights[0, y, :-1], weights[0, y + 1, :-1]
        left, right = weights[1, y, :-1], weights[1, y, 1:]
        falling, rising = weights[2, y, :-1], weights[3, y, 1:]
        # Of equal edges the diagonal goes; of two equal sides, none.
        _drop_heaviest(kept[2, y, :-1], falling, top, right, left, bottom, 0)
        _drop_heaviest(kept[3, y, 1:], rising, top, left, right, bottom, 0)
        _drop_heaviest(kept[0, y, :-1], top, right, falling, left, rising, 1)
        _drop_heaviest(kept[0, y + 1, :-1], bottom, left, falling, right, rising, 1)
        _drop_heaviest(kept[1, y, :-1], left, bottom, falling, top, rising, 1)
        _drop_heaviest(kept[1, y, 1:], right, top, falling, bottom, rising, 1)
    return kept


@_jit
def _drop_heaviest(kept, edges, a, b, c, d, margin):
    """Removes edges that are heavier, by `margin` at least, than both other sides of a triangle: a, b or c, d."""
    for x in range(len(edges)):
        lightest = min(max(a[x], b[x]), max(c[x], d[x]))
        kept[x] = NO_EDGE if edges[x] >= lightest + margin else kept[x]


@_jit
def sort_edges(weights):
    """
    Sorts the edges of [`edge_weights`], lightest first, in linear time (a counting sort, stable).

    Returns int32 `[E, 3]`: pixel, pixel, weight.
    """
    height, width = weights.shape[1:]
    flat = weights.reshape(4, height * width)
    # First the edges alone: their number is not known, and a branch on it could not be predicted.
    present = np.empty(flat.size + 1, np.int32)
    ends = np.zeros(5, np.int64)
    number = 0
    for direction in range(4):
        for pixel in range(height * width):
            present[number] = pixel
            number += flat[direction, pixel] != NO_EDGE
        ends[direction + 1] = number
    starts = np.zeros(NO_EDGE + 1, np.int32)
    for direction in range(4):
        for pixel in present[ends[direction] : ends[direction + 1]]:
            starts[flat[direction, pixel] + 1] += 1
    for weight in range(NO_EDGE):
        starts[weight + 1] += starts[weight]
    edges = np.empty((number, 3), np.int32)
    for direction in range(4):
        offset = (1, width, width + 1, width - 1)[direction]
        for pixel in present[ends[direction] : ends[direction + 1]]:
            weight = flat[direction, pixel]
            place = starts[weight]
            edges[place, 0], edges[place, 1], edges[place, 2] = pixel, pixel + offset, weight
            starts[weight] = place + 1
    return edges


@_jit
def _find(parent, node):
    """The root of a node; shortens the path by halving."""
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@_jit
def _number_roots(parent):
    """Labels int32 `[N]` of the trees in the order of their first nodes, and the root of each label."""
    labels = np.full(len(parent), -1, np.int32)
    roots = np.empty(len(parent), np.int32)
    number = 0
    for node in range(len(parent)):
        root = _find(parent, node)
        if labels[root] < 0:
            labels[root] = number
            roots[number] = root
            number += 1
        labels[node] = labels[root]
    return labels, roots[:number]


@_jit
def join_regions(sizes, internal, edges, scale):
    """
    F. algorithm 1: walks the edges, lightest first, and joins two regions where the edge is no heavier than
    `internal + scale / size` of both.

    The regions may be pixels (sizes 1, internal 0), or come from a smaller scale: a larger one joins, with few
    exceptions, whole regions of a smaller one, and has a small part of the edges left to walk.

    Args: sizes int32 `[N]`, the heaviest edge used inside each region int32 `[N]`, edges int32 `[E, 3]` (region,
    region, weight), ascending in weight.
    Returns: the new label of each region int32 `[N]`, and sizes, internal and edges of the new regions.
    """
    parent = np.arange(len(sizes)).astype(np.int32)
    size, heaviest = sizes.copy(), internal.copy()
    limit = np.empty(len(sizes), np.float32)
    for region in range(len(sizes)):
        limit[region] = np.float32(heaviest[region]) + np.float32(scale) / np.float32(size[region])
    waiting = np.empty(len(edges), np.int32)
    num_waiting = 0
    for i in range(len(edges)):
        a, b = parent[edges[i, 0]], parent[edges[i, 1]]
        if a == b:
            continue
        a, b = _find(parent, a), _find(parent, b)
        parent[edges[i, 0]], parent[edges[i, 1]] = a, b
        if a == b:
            continue
        weight = edges[i, 2]
        if weight <= limit[a] and weight <= limit[b]:
            if size[a] < size[b]:
                a, b = b, a
            parent[b] = a
            size[a] += size[b]
            heaviest[a] = weight
            limit[a] = np.float32(weight) + np.float32(scale) / np.float32(size[a])
        else:
            waiting[num_waiting] = i
            num_waiting += 1

    labels, roots = _number_roots(parent)
    left = np.empty((num_waiting, 3), np.int32)
    num_left = 0
    for i in waiting[:num_waiting]:
        a, b = labels[edges[i, 0]], labels[edges[i, 1]]
        if a != b:
            left[num_left, 0], left[num_left, 1], left[num_left, 2] = a, b, edges[i, 2]
            num_left += 1
    return labels, size[roots], heaviest[roots], left[:num_left]


@_jit
def absorb_small(sizes, edges, min_size):
    """
    Joins regions of less than `min_size` pixels with a neighbour, over the lightest edges first (F. section 6).

    Takes sizes and edges like [`join_regions`]. Returns the new label of each region int32 `[N]`, the number R of new
    regions, and which of them are neighbours, int32 `[E', 2]`, every pair once.
    """
    parent = np.arange(len(sizes)).astype(np.int32)
    size = sizes.copy()
    for i in range(len(edges)):
        a, b = _find(parent, edges[i, 0]), _find(parent, edges[i, 1])
        if a != b and (size[a] < min_size or size[b] < min_size):
            if size[a] < size[b]:
                a, b = b, a
            parent[b] = a
            size[a] += size[b]

    labels, roots = _number_roots(parent)
    seen = np.zeros((len(roots), len(roots)), np.bool_)
    neighbours = np.empty((len(edges), 2), np.int32)
    number = 0
    for i in range(len(edges)):
        a, b = labels[edges[i, 0]], labels[edges[i, 1]]
        if a != b and not seen[a, b]:
            seen[a, b] = seen[b, a] = True
            neighbours[number, 0], neighbours[number, 1] = a, b
            number += 1
    return labels, len(roots), neighbours[:number]


# ---- hierarchical grouping of regions (U.)


@_jit
def describe_regions(labels, num_regions, colour, gradient):
    """
    Boxes and histograms of regions (U. section 3.2).

    Args: labels `[H * W]`, their number R, an image uint8 `[H, W, 3]` and texture indices uint8 `[H, W]`.
    Returns: sizes in pixels int32 `[R]`, boxes xyxy int32 `[R, 4]`, and counts of colours and textures
    int32 `[R, 3 * COLOUR_BINS + TEXTURE_BINS]`.
    """
    height, width = gradient.shape
    boxes = np.empty((num_regions, 4), np.int32)
    boxes[:, 0], boxes[:, 1], boxes[:, 2], boxes[:, 3] = width, height, 0, 0
    sizes = np.zeros(num_regions, np.int32)
    counts = np.zeros((num_regions, 3 * COLOUR_BINS + TEXTURE_BINS), np.int32)
    for y in range(height):
        for x in range(width):
            region = labels[y * width + x]
            sizes[region] += 1
            boxes[region, 0] = min(boxes[region, 0], x)
            boxes[region, 1] = min(boxes[region, 1], y)
            boxes[region, 2] = max(boxes[region, 2], x + 1)
            boxes[region, 3] = max(boxes[region, 3], y + 1)
            for c in range(3):
                counts[region, c * COLOUR_BINS + colour[y, x, c] * COLOUR_BINS // 256] += 1
            counts[region, 3 * COLOUR_BINS + gradient[y, x]] += 1
    return sizes, boxes, counts


@_jit
def join_descriptions(labels, num_regions, sizes, boxes, counts):
    """Sizes, boxes and counts of [`describe_regions`] after the regions were joined: region i is now `labels[i]`."""
    new_sizes = np.zeros(num_regions, np.int32)
    new_boxes = np.empty((num_regions, 4), np.int32)
    new_boxes[:, :2], new_boxes[:, 2:] = np.int32(2**30), 0
    new_counts = np.zeros((num_regions, counts.shape[1]), np.int32)
    for old in range(len(sizes)):
        new = labels[old]
        new_sizes[new] += sizes[old]
        for i in range(2):
            new_boxes[new, i] = min(new_boxes[new, i], boxes[old, i])
            new_boxes[new, i + 2] = max(new_boxes[new, i + 2], boxes[old, i + 2])
        for i in range(counts.shape[1]):
            new_counts[new, i] += counts[old, i]
    return new_sizes, new_boxes, new_counts


@_jit
def _normalise(counts, size, histogram):
    """Writes counts over their sum per channel (3 of colour, 1 of texture) as fixed-point numbers."""
    colours = 3 * COLOUR_BINS
    for i in range(colours):
        histogram[i] = np.int32(np.float32(counts[i]) * (np.float32(ONE) / np.float32(3 * size)))
    for i in range(colours, len(counts)):
        histogram[i] = np.int32(np.float32(counts[i]) * (np.float32(ONE) / np.float32(size)))


@_jit
def _similarity(a, b, sizes, boxes, histograms, area, weights):
    """
    U. equations 1 to 4: weighted sum of the similarities in colour, texture, size and fill, at most `4 * ONE`.

    `weights` int64 `[4]` are 0 or 1.
    """
    total = np.int64(0)
    start = 0 if weights[0] else 3 * COLOUR_BINS
    stop = histograms.shape[1] if weights[1] else 3 * COLOUR_BINS
    common = np.int32(0)
    for i in range(start, stop):
        common += min(histograms[a, i], histograms[b, i])
    total += common
    size = np.int64(sizes[a]) + sizes[b]
    if weights[2]:
        total += ONE - size * ONE // area
    if weights[3]:
        hull = np.int64(max(boxes[a, 2], boxes[b, 2]) - min(boxes[a, 0], boxes[b, 0])) * (
            max(boxes[a, 3], boxes[b, 3]) - min(boxes[a, 1], boxes[b, 1])
        )
        total += ONE - (hull - size) * ONE // area
    return np.int32(total)


@_jit
def _most_similar(region, similarity, num_slots):
    """The slot most similar to `region`, the first of several, and the similarity; -1 where it has no neighbour."""
    best, best_similarity = -1, np.int32(-1)
    for other in range(num_slots):
        if similarity[region, other] > best_similarity:
            best, best_similarity = other, similarity[region, other]
    return best, best_similarity


@_jit
def group_regions(sizes, boxes, counts, neighbours, area, weights):
    """
    U. algorithm 1: joins the two most similar neighbours until one region is left (or none has neighbours).

    Ties go to the regions that come first. Returns, for the R regions followed by the unions in the order of their
    making: boxes xyxy int32 `[2R - 1, 4]`, sizes, and the similarities at which a node was made and was used up,
    int32 (-1 for the given regions, and for what is left at the end).
    """
    number = len(sizes)
    sizes, boxes, counts = sizes.copy(), boxes.copy(), counts.copy()
    node_boxes = np.empty((2 * number - 1, 4), np.int32)
    node_sizes = np.empty(2 * number - 1, np.int32)
    made = np.full(2 * number - 1, -1, np.int32)
    used = np.full(2 * number - 1, -1, np.int32)
    parents = np.full(2 * number - 1, -1, np.int32)
    node_boxes[:number], node_sizes[:number] = boxes, sizes

    histograms = np.empty(counts.shape, np.int32)
    for region in range(number):
        _normalise(counts[region], sizes[region], histograms[region])
    # A slot holds one of the present regions; a union takes the slot of its first part.
    node = np.arange(number)
    similarity = np.full((number, number), -1, np.int32)
    for i in range(len(neighbours)):
        a, b = neighbours[i, 0], neighbours[i, 1]
        similarity[a, b] = _similarity(a, b, sizes, boxes, histograms, area, weights)
        similarity[b, a] = similarity[a, b]
    best = np.empty(number, np.int64)
    best_similarity = np.empty(number, np.int32)
    for region in range(number):
        best[region], best_similarity[region] = _most_similar(region, similarity, number)

    num_nodes = number
    while True:
        a = 0
        for region in range(number):
            if best_similarity[region] > best_similarity[a]:
                a = region
        if best_similarity[a] < 0:
            break
        b = best[a]
        used[node[a]] = used[node[b]] = made[num_nodes] = best_similarity[a]
        parents[node[a]] = parents[node[b]] = num_nodes
        sizes[a] += sizes[b]
        for i in range(2):
            boxes[a, i] = min(boxes[a, i], boxes[b, i])
            boxes[a, i + 2] = max(boxes[a, i + 2], boxes[b, i + 2])
        for i in range(counts.shape[1]):
            counts[a, i] += counts[b, i]
        _normalise(counts[a], sizes[a], histograms[a])
        node[a] = num_nodes
        node_boxes[num_nodes], node_sizes[num_nodes] = boxes[a], sizes[a]
        num_nodes += 1

        best_similarity[b] = similarity[a, b] = similarity[b, a] = -1
        for other in range(number):
            if similarity[a, other] >= 0 or similarity[b, other] >= 0:
                similarity[b, other] = similarity[other, b] = -1
                new = _similarity(a, other, sizes, boxes, histograms, area, weights)
                similarity[a, other] = similarity[other, a] = new
                if best[other] == a or best[other] == b:
                    best[other], best_similarity[other] = _most_similar(other, similarity, number)
                elif new > best_similarity[other] or (new == best_similarity[other] and a < best[other]):
                    best[other], best_similarity[other] = a, new
        best[a], best_similarity[a] = _most_similar(a, similarity, number)
    return node_boxes[:num_nodes], node_sizes[:num_nodes], made[:num_nodes], used[:num_nodes], parents[:num_nodes]


# ---- boxes


@_jit
def collect_votes(boxes, hierarchies):
    """
    Which hierarchies hold a box much like each box: with an IoU of at least 3/4.

    Args: distinct boxes xyxy int64 `[N, 4]` in ascending order of area, and the hierarchies that hold exactly each
    box, bits of an int64 `[N]`.
    Returns their number for each box, int64 `[N]`.
    """
    number = len(boxes)
    agreeing = hierarchies.copy()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in range(number):
        left, top, right, bottom = boxes[i]
        for j in range(i + 1, number):
            if 4 * areas[i] < 3 * areas[j]:
                break
            width = min(right, boxes[j, 2]) - max(left, boxes[j, 0])
            height = min(bottom, boxes[j, 3]) - max(top, boxes[j, 1])
            intersection = max(width, 0) * max(height, 0)
            if 4 * intersection >= 3 * (areas[i] + areas[j] - intersection):
                agreeing[i] |= hierarchies[j]
                agreeing[j] |= hierarchies[i]
    votes = np.zeros(number, np.int64)
    for i in range(number):
        while agreeing[i]:
            agreeing[i] &= agreeing[i] - 1  # drops the lowest bit
            votes[i] += 1
    return votes


@_jit
def suppress(boxes, order, threshold, max_boxes):
    """
    Greedy non-maximum suppression of float64 `xywh` boxes `[N, 4]`, visited in `order`; see
    [`~aligndet_hf.proposals.filters.nms`].
    """
    kept = np.empty(min(len(order), max_boxes), np.int64)
    number = 0
    for index in order:
        if number == len(kept):
            break
        x, y, width, height = boxes[index]
        covered = False
        for i in range(number):
            other = boxes[kept[i]]
            overlap_x = max(min(x + width, other[0] + other[2]) - max(x, other[0]), 0.0)
            overlap_y = max(min(y + height, other[1] + other[3]) - max(y, other[1]), 0.0)
            intersection = overlap_x * overlap_y
            union = other[2] * other[3] + width * height - intersection
            if intersection / max(union, _TINY) > threshold:
                covered = True
                break
        if not covered:
            kept[number] = index
            number += 1
    return kept[:number]
