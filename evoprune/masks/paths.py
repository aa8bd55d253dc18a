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
    genes: dict[int, npt.NDArray[np.bool_]] = {}

    def rows(i: int) -> npt.NDArray[np.bool_]:  # (out, in, rest)
        if i not in genes:
            genes[i] = get_bits(individual, i, layout).reshape(*layout[i].shape[:2], -1)
        return genes[i]

    changed: set[int] = set()
    again = True
    while again:
        again = False
        for each in channels:  # later ones first: what is dropped here may be all that read an earlier one
            alive = np.zeros(each.count, bool)
            for i in each.readers:
                alive |= rows(i).any((0, 2)).reshape(each.count, -1).any(1)  # flattened: several inputs a channel
            for i in each.makers:
                if rows(i)[~alive].any():
                    genes[i] = rows(i) & alive[:, None, None]
                    changed.add(i)
                    again = True
            if len(each.makers) > 1 or each.padded:
                continue
            varied = rows(each.makers[0]).any((1, 2))
            for i in set(each.readers) & set(absorbing):
                read = rows(i) & np.repeat(varied, rows(i).shape[1] // each.count)[:, None]
                if (read != rows(i)).any():
                    genes[i] = read
                    changed.add(i)
                    again = True
    return {i: genes[i].reshape(-1) for i in sorted(changed)}
