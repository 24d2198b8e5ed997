"""Where an off-by-one of blocks of 128 keys shows, and how errors are judged row by row."""

import numpy as np

# Lengths and starts beside multiples of 128; 128 and 256 themselves are those of most cases.
EDGES = [1, 126, 127, 129, 254, 255, 257]


def relative_rms(got, want):
    """Root mean square of the difference to what was wanted, of the worst row of the batch.

    It is relative to that of what was wanted, of the row or of all rows, whichever is larger: a row
    may want zeros, or next to nothing.
    """
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    rows = tuple(range(1, want.ndim))
    size = np.maximum(np.mean(want**2, axis=rows), np.mean(want**2))
    return float(np.sqrt(np.max(np.mean((got - want) ** 2, axis=rows) / size)))
