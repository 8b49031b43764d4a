"""Into how many groups of chunks kernels split a sequence that one walk would leave long."""

from pallas_kernels.tiles import TILE


def whole_groups(wanted: int, T: int) -> int:
    """About as many groups as wanted, but no more than there are chunks.

    A number of groups that divides the chunks needs no padding, so one within half of the wanted
    number is preferred.
    """
    chunks = -(-T // TILE)
    wanted = max(1, min(wanted, chunks))
    return next((n for n in range(wanted, wanted // 2, -1) if chunks % n == 0), wanted)
