"""
The compiled parts of selective search and of non-maximum suppression. Import this module late: it brings numba.

Every kernel is sequential and works on integers, or on single IEEE operations in a fixed order, so that results are
the same on every run, thread count and machine. All release the GIL. Positions of pixels are `y * width + x`.

Sources: F. = Felzenszwalb and Huttenlocher, Efficient Graph-Based Image Segmentation, IJCV 2004;
U. = Uijlings et al., Selective Search for Object Recognition, IJCV 2013.
"""

import numba
import numpy as np

# Similarities and histograms are fixed-point numbers: 1.0 is ONE.
ONE = 1 << 15

COLOUR_BINS = 16  # per channel
ORIENTATIONS = 8
MAGNITUDES = 5
TEXTURE_BINS = ORIENTATIONS * MAGNITUDES

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
    """Shrinks uint8 `[H, W, C]` to `[height, width, C]`: the mean over the area of each new pixel, rounded."""
    old_height, old_width, channels = image.shape
    result = np.empty((height, width, channels), np.uint8)
    flat = image.reshape(old_height, old_width * channels)
    column_sums = np.empty(old_width * channels, np.int64)
    area = old_height * old_width
    for y in range(height):
        # New row y covers [y, y + 1) * old_height; old row i covers [i, i + 1) * height. All overlaps are integers.
        top, bottom = y * old_height, (y + 1) * old_height
        column_sums[:] = 0
        for i in range(top // height, (bottom - 1) // height + 1):
            overlap = min(bottom, (i + 1) * height) - max(top, i * height)
            for j in range(old_width * channels):
                column_sums[j] += overlap * flat[i, j]
        for x in range(width):
            left, right = x * old_width, (x + 1) * old_width
            for c in range(channels):
                total = area // 2
                for j in range(left // width, (right - 1) // width + 1):
                    total += (min(right, (j + 1) * width) - max(left, j * width)) * column_sums[j * channels + c]
                result[y, x, c] = total // area
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
def to_lab(image, linear, root):
    """
    RGB uint8 `[H, W, 3]` to CIE L*a*b* (D65), L scaled to 0..255 and a, b shifted by 128.

    `linear` `[256]` and `root` `[4096]` are the tables of [`lab_tables`].
    """
    result = np.empty_like(image)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            r, g, b = linear[image[y, x, 0]], linear[image[y, x, 1]], linear[image[y, x, 2]]
            # Rows of the sRGB matrix over the white point, times 2^14; each sums to 2^14.
            fx = root[(7110 * r + 6163 * g + 3111 * b) >> 14]
            fy = root[(3484 * r + 11717 * g + 1183 * b) >> 14]
            fz = root[(291 * r + 1794 * g + 14299 * b) >> 14]
            result[y, x, 0] = min(255, max(0, (1160 * fy - 160 * ONE) * 255 // (1000 * ONE)))
            result[y, x, 1] = min(255, max(0, 128 + 500 * (fx - fy) // ONE))
            result[y, x, 2] = min(255, max(0, 128 + 200 * (fy - fz) // ONE))
    return result


def lab_tables():
    """Intensity 0..255 to linear light 0..4095, and linear light to the f of CIE L*a*b* (1.0 is `ONE`); both int64."""
    s = np.arange(256) / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    t = np.arange(4096) / 4095
    root = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.rint(linear * 4095).astype(np.int64), np.rint(root * ONE).astype(np.int64)


@_jit
def smooth(image):
    """Filters uint8 `[H, W, C]` by 1-2-1 along both axes (like a Gaussian of sigma 0.7): int32, 16 times the value."""
    height, width, channels = image.shape
    result = np.empty((height, width, channels), np.int32)
    flat = image.reshape(height, width * channels)
    columns = np.empty(width * channels, np.int32)
    for y in range(height):
        above, below = max(y - 1, 0), min(y + 1, height - 1)
        for j in range(width * channels):
            columns[j] = np.int32(flat[above, j]) + 2 * np.int32(flat[y, j]) + np.int32(flat[below, j])
        for x in range(width):
            left, right = max(x - 1, 0), min(x + 1, width - 1)
            for c in range(channels):
                result[y, x, c] = (
                    columns[left * channels + c] + 2 * columns[x * channels + c] + columns[right * channels + c]
                )
    return result


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
def edge_weights(image, diagonals):
    """
    Distances between neighbouring pixels of int32 `[H, W, C]`, as uint16.

    Returns `[H * W, D]`, D being 4 with diagonals and 2 without: right, below, below right, below left. Edges that
    would leave the image weigh 65535.
    """
    height, width, channels = image.shape
    directions = 4 if diagonals else 2
    weights = np.full((height * width, directions), 65535, np.uint16)
    for y in range(height):
        for x in range(width):
            for d in range(directions):
                other_y = y + (d > 0)
                other_x = x + (0 if d == 1 else (-1 if d == 3 else 1))
                if other_y < height and 0 <= other_x < width:
                    square = np.int32(0)
                    for c in range(channels):
                        difference = image[y, x, c] - image[other_y, other_x, c]
                        square += difference * difference
                    weights[y * width + x, d] = np.uint16(np.sqrt(np.float32(square)))
    return weights


@_jit
def sort_edges(weights):
    """
    Sorts edges by weight, stable, in linear time (counting sort).

    Returns the indices of the edges in the flat `weights`, lightest first, without those of weight 65535, and
    `starts`: the edges of weight w are `order[starts[w] : starts[w + 1]]`.
    """
    flat = weights.ravel()
    heaviest = 0
    for weight in flat:
        if weight != 65535:
            heaviest = max(heaviest, weight)
    starts = np.zeros(heaviest + 2, np.int32)
    for weight in flat:
        if weight != 65535:
            starts[weight + 1] += 1
    for weight in range(heaviest + 1):
        starts[weight + 1] += starts[weight]
    order = np.empty(starts[heaviest + 1], np.int32)
    place = starts.copy()
    for edge in range(len(flat)):
        weight = flat[edge]
        if weight != 65535:
            order[place[weight]] = edge
            place[weight] += 1
    return order, starts


@_jit
def _find(parent, node):
    """The root of a node; shortens the path by halving."""
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@_jit
def segment_pixels(order, starts, directions, width, num_pixels, scale, min_size):
    """
    F. algorithm 1: walks the edges, lightest first, and joins two regions when the edge is no heavier than
    `internal + scale / size` of both; then joins what is smaller than `min_size` to a neighbour.

    Returns the label of each pixel int32, the heaviest edge inside each region (before the
    small ones were joined) int32 `[R]`, and the neighbourhoods:
    int32 `[E, 3]` of region, region, and the lightest edge between them, in ascending order of that edge.
    """
    offsets = np.array([1, width, width + 1, width - 1], np.int32)
    shift = 2 if directions == 4 else 1
    parent = np.arange(num_pixels).astype(np.int32)
    size = np.ones(num_pixels, np.int32)
    internal = np.zeros(num_pixels, np.int32)
    limit = np.full(num_pixels, np.float32(scale), np.float32)
    waiting = np.empty((len(order), 2), np.int32)  # edges between two regions, and their weight
    num_waiting = 0
    for weight in range(len(starts) - 1):
        for i in range(starts[weight], starts[weight + 1]):
            first = order[i] >> shift
            second = first + offsets[order[i] & (directions - 1)]
            a, b = _find(parent, first), _find(parent, second)
            if a == b:
                continue
            if weight <= limit[a] and weight <= limit[b]:
                if size[a] < size[b]:
                    a, b = b, a
                parent[b] = a
                size[a] += size[b]
                internal[a] = weight
                limit[a] = np.float32(weight) + np.float32(scale) / np.float32(size[a])
            else:
                waiting[num_waiting, 0] = order[i]
                waiting[num_waiting, 1] = weight
                num_waiting += 1

    for i in range(num_waiting):
        first = waiting[i, 0] >> shift
        a, b = _find(parent, first), _find(parent, first + offsets[waiting[i, 0] & (directions - 1)])
        if a != b and (size[a] < min_size or size[b] < min_size):
            if size[a] < size[b]:
                a, b = b, a
            parent[b] = a
            size[a] += size[b]

    labels = np.empty(num_pixels, np.int32)
    number = np.full(num_pixels, -1, np.int32)
    roots = np.empty(num_pixels, np.int32)
    num_regions = 0
    for pixel in range(num_pixels):
        root = _find(parent, pixel)
        if number[root] < 0:
            number[root] = num_regions
            roots[num_regions] = root
            num_regions += 1
        labels[pixel] = number[root]

    seen = np.zeros((num_regions, num_regions), np.bool_)
    neighbours = np.empty((num_waiting, 3), np.int32)
    num_neighbours = 0
    for i in range(num_waiting):
        first = waiting[i, 0] >> shift
        a, b = labels[first], labels[first + offsets[waiting[i, 0] & (directions - 1)]]
        a, b = min(a, b), max(a, b)
        if a != b and not seen[a, b]:
            seen[a, b] = True
            neighbours[num_neighbours] = a, b, waiting[i, 1]
            num_neighbours += 1
    return labels, internal[roots[:num_regions]], neighbours[:num_neighbours]


@_jit
def join_regions(sizes, internal, neighbours, scale):
    """
    F. algorithm 1 on regions instead of pixels: continues a segmentation with a larger `scale`.

    A larger scale joins, with few exceptions, whole regions of a smaller one; starting from those saves the walk over
    the pixels. Returns the new label of each region int32 `[R]`, and the number of new regions.
    """
    parent = np.arange(len(sizes)).astype(np.int32)
    size = sizes.copy()
    heaviest = internal.copy()
    for i in range(len(neighbours)):
        a, b, weight = _find(parent, neighbours[i, 0]), _find(parent, neighbours[i, 1]), neighbours[i, 2]
        if a == b:
            continue
        margin = np.float32(scale)
        if weight <= heaviest[a] + margin / np.float32(size[a]) and weight <= heaviest[b] + margin / np.float32(
            size[b]
        ):
            if size[a] < size[b]:
                a, b = b, a
            parent[b] = a
            size[a] += size[b]
            heaviest[a] = max(heaviest[a], heaviest[b], weight)
    labels = np.full(len(sizes), -1, np.int32)
    num_regions = 0
    for region in range(len(sizes)):
        root = _find(parent, region)
        if labels[root] < 0:
            labels[root] = num_regions
            num_regions += 1
        labels[region] = labels[root]
    return labels, num_regions


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
def join_descriptions(labels, num_regions, sizes, boxes, counts, neighbours):
    """Sizes, boxes, counts and neighbourhoods after [`join_regions`]."""
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
    seen = np.zeros((num_regions, num_regions), np.bool_)
    new_neighbours = np.empty_like(neighbours)
    number = 0
    for i in range(len(neighbours)):
        a, b = labels[neighbours[i, 0]], labels[neighbours[i, 1]]
        a, b = min(a, b), max(a, b)
        if a != b and not seen[a, b]:
            seen[a, b] = True
            new_neighbours[number] = a, b, neighbours[i, 2]
            number += 1
    return new_sizes, new_boxes, new_counts, new_neighbours[:number]


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
def count_votes(boxes, hierarchy, num_hierarchies):
    """
    How many hierarchies hold a box much like each box: with an IoU of at least 3/4.

    Args: boxes xyxy int64 `[N, 4]` in ascending order of area, and the hierarchy int64 `[N]` that each comes from.
    Returns int64 `[N]`, at least 1.
    """
    number = len(boxes)
    agrees = np.zeros((number, num_hierarchies), np.bool_)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in range(number):
        agrees[i, hierarchy[i]] = True
        for j in range(i + 1, number):
            if 4 * areas[i] < 3 * areas[j]:
                break
            width = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0])
            height = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1])
            if width > 0 and height > 0:
                intersection = width * height
                if 4 * intersection >= 3 * (areas[i] + areas[j] - intersection):
                    agrees[i, hierarchy[j]] = True
                    agrees[j, hierarchy[i]] = True
    votes = np.zeros(number, np.int64)
    for i in range(number):
        for j in range(num_hierarchies):
            votes[i] += agrees[i, j]
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
