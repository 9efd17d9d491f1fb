"""The memory of a stream: a few past data with their sites, chosen by the rules of `dualgp.selection`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualgp.errors import InputError
from dualgp.gp.data import Data
from dualgp.sites import Sites


@dataclass(frozen=True, eq=False)
class Memory:
    """Past data whose sites are stored one by one, so that they can be found anew, re-expanded, or taken out.

    Attributes:
        data: inputs, targets and per-datum parameters.
        sites: their (λ, β).
        ids: number of arrival of each, int64, ascending.
        keys: a uniform number drawn for each on arrival, so that the rule "random" is a fair sample of the stream.
    """

    data: Data
    sites: Sites
    ids: Tensor
    keys: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, rows: Tensor) -> Memory:
        """Return some of it."""
        return Memory(self.data.rows(rows), self.sites[rows], self.ids[rows], self.keys[rows])

    def without(self, rows: Tensor) -> Memory:
        """Return the others."""
        left = torch.ones(len(self), dtype=torch.bool, device=rows.device)
        left[rows] = False
        return self.rows(left.nonzero().reshape(-1))

    def find(self, ids: Tensor) -> Tensor:
        """Return the rows of some ids.

        Raises:
            InputError: naming the ids that are not here.
        """
        at = torch.searchsorted(self.ids, ids)
        at = at.clamp_max(max(len(self) - 1, 0))
        missing = ids if len(self) == 0 else ids[self.ids[at] != ids]
        if len(missing):
            raise InputError(
                f"Data {missing.tolist()[:10]} are not in memory, so their sites are not known one by one; memory "
                f"holds {len(self)} data: see memory.ids."
            )
        return at
