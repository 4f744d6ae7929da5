"""Packed rows for tests: segment ids, rotary positions, and the batch contract's mask in its simplest form."""

import torch

#: name -> (rows as lists of (segment id, length), tokens per row)
LAYOUTS = {
    "one example": ([[(1, 37)]], 37),
    "packed": ([[(1, 5), (2, 1), (3, 20)], [(1, 26)]], 29),
    "prefix": ([[(0, 7), (1, 5), (2, 13), (3, 1)]], 31),
    "two rows, one with a prefix": ([[(0, 3), (1, 40)], [(1, 11), (2, 17)]], 43),
    "a row of padding": ([[(0, 9), (1, 3)], []], 12),
    "blocks of keys and sums of queries": ([[(0, 70), (1, 90), (2, 5), (3, 521)], [(1, 300), (2, 386)]], 700),
}


def segment_ids(*rows, tokens):
    """Segment ids [B, T] of rows given as lists of (segment id, length), padded to ``tokens``."""
    ids = torch.full((len(rows), tokens), -1)
    for row, layout in enumerate(rows):
        start = 0
        for segment, length in layout:
            ids[row, start : start + length] = segment
            start += length
    return ids


def layout_ids(name):
    """Segment ids [B, T] of one of :data:`LAYOUTS`."""
    rows, tokens = LAYOUTS[name]
    return segment_ids(*rows, tokens=tokens)


def two_rows():
    """Segment ids and rotary positions [2, 19]: a row with a shared prefix of 4 tokens, and a packed row."""
    layouts = ([(0, 4), (1, 6), (2, 7)], [(1, 9), (2, 10)])
    segments, positions = segment_ids(*layouts, tokens=19), torch.zeros(2, 19, dtype=torch.long)
    for row, layout in enumerate(layouts):
        start, prefix = 0, layout[0][1] if layout[0][0] == 0 else 0
        for segment, length in layout:
            positions[row, start : start + length] = torch.arange(length) + (prefix if segment > 0 else 0)
            start += length
    return segments, positions


def dense_mask(segments_BT):
    """The batch contract's rule as a bool mask [B, T, T]: true if the query (second axis) attends to the key."""
    index = torch.arange(segments_BT.shape[1])
    query, key = segments_BT[:, :, None], segments_BT[:, None]
    return (index[:, None] >= index) & ((query == key) | ((key == 0) & (query > 0)))
