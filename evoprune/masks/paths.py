"""Dead paths: kept weights that cannot influence the output, so that dropping them is free sparsity.

An output channel that no kept weight reads is dead, and with it all weights that make it; so on towards the input. A channel
that no kept weight makes is the same number for all images: weights that read it are dead too, where least-squares repair puts
what they add into a bias. Where channels cannot be told, nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from .channels import Channels
from .genome import Individual, get_bits
from .layout import Layout


def drop_dead(individual: Individual, layout: Layout, channels: Collection[Channels],
              absorbing: Collection[int] = ()) -> dict[int, npt.NDArray[np.bool_]]:
    """Return the genes without dead ones of each layer that has some, by its place in the layout.

    `absorbing` are the places of layers whose repair makes up for an input that is the same for all images.
    """
    kept: dict[int, npt.NDArray[np.bool_]] = {}  # weights
    changed: dict[int, npt.NDArray[np.bool_]] = {}

    def rows(i: int) -> npt.NDArray[np.bool_]:  # (out, in, rest)
        if i not in kept:
            kept[i] = layout[i].expanded(get_bits(individual, i, layout)).reshape(*layout[i].shape[:2], -1)
        return kept[i]

    def leave(i: int, alive: npt.NDArray[np.bool_]) -> bool:
        """Drop the genes none of whose weights are `alive`; return whether there were any."""
        genes = layout[i].any((rows(i) & alive).reshape(layout[i].shape)).reshape(-1)
        left = layout[i].expanded(genes).reshape(rows(i).shape)
        if (left == rows(i)).all():
            return False
        kept[i], changed[i] = left, genes
        return True

    again = True
    while again:
        again = False
        for each in channels:  # later ones first: what is dropped here may be all that read an earlier one
            alive = np.zeros(each.count, bool)
            for i in each.readers:
                alive |= rows(i).any((0, 2)).reshape(each.count, -1).any(1)  # flattened: several inputs a channel
            for i in each.makers:
                again |= bool(rows(i)[~alive].any()) and leave(i, alive[:, None, None])
            if len(each.makers) > 1 or each.padded:
                continue
            varied = rows(each.makers[0]).any((1, 2))
            for i in set(each.readers) & set(absorbing):
                again |= leave(i, np.repeat(varied, rows(i).shape[1] // each.count)[:, None])
    return dict(sorted(changed.items()))
