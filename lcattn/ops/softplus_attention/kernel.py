"""What kernels for GPUs and TPUs are given."""

import math
from collections.abc import Callable

from lcattn.ops.softplus_attention.rows import FLAT, Reweighting, Rows, unit
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array


def attend_by(
    run: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    rows: Rows,
    visibility: Visibility,
    reweighting: Reweighting | None,
    *,
    is_packed: bool,
) -> Array:
    """Attention by kernels `run`, which take scaled queries and scores in powers of two."""
    from pallas_kernels.softplus_attention.rows import Scales

    # Rounded once, with the factor of the scores: as exact as a factor after the products.
    scaled = unit(q) * (rows.length_scale / math.log(2))[..., None, None]
    return run(
        scaled.astype(q.dtype), unit(k).astype(k.dtype), v, Scales(rows.length, rows.offset),
        (visibility.queries, visibility.end) if is_packed else None,
        power=None if reweighting is None else int(reweighting.power), flat_below=FLAT,
    )  # fmt: skip
