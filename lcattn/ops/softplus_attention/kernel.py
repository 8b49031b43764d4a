"""What kernels for GPUs and TPUs are given."""

import importlib
import math

from lcattn.ops.softplus_attention.rows import FLAT, Reweighting, Rows, unit
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array


def attend(
    backend: str,
    q: Array,
    k: Array,
    v: Array,
    rows: Rows,
    visibility: Visibility,
    reweighting: Reweighting | None,
    *,
    is_packed: bool,
) -> Array:
    """Attention, of a call that the backend's objection lets pass.

    Its kernels take scaled queries and scores in powers of two.
    """
    # Imported where it can run: it takes longer to import than the rest of the ops.
    kernels = importlib.import_module(f"pallas_kernels.softplus_attention.{backend}")
    from pallas_kernels.softplus_attention.rows import Scales

    # Rounded once, with the factor of the scores: as exact as a factor after the products.
    scaled = unit(q) * (rows.length_scale / math.log(2))[..., None, None]
    return kernels.softplus_attention(
        scaled.astype(q.dtype), unit(k).astype(k.dtype), v, Scales(rows.length, rows.offset),
        (visibility.queries, visibility.end) if is_packed else None,
        power=None if reweighting is None else int(reweighting.power), flat_below=FLAT,
    )  # fmt: skip
