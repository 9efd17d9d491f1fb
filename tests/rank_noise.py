"""What two processes are asked to do with an optimiser's noise: each function gets its rank first (see `ranks`)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualgp.optim import IVON


def optimiser(generator: torch.Generator | None = None) -> tuple[nn.Parameter, IVON]:
    p = nn.Parameter(torch.zeros(50))
    group = dist.group.WORLD
    return p, IVON([("w", p)], num_data=100, total_steps=9, init_std=0.1, generator=generator, process_group=group)


def draw(p: nn.Parameter, optimizer: IVON) -> Tensor:
    with optimizer.sampled_params(train=False):
        return p.detach().clone()


def draw_with_one_seed(rank: int) -> Tensor:
    """A draw from a generator that has the same seed on both ranks."""
    return draw(*optimiser(torch.Generator().manual_seed(5)))


def draw_after_loading(rank: int, state: dict) -> Tensor:
    """A draw after both ranks have loaded one state."""
    p, optimizer = optimiser()
    optimizer.load_state_dict(state)
    return draw(p, optimizer)


def save(rank: int) -> dict:
    p, optimizer = optimiser()
    draw(p, optimizer)
    return optimizer.state_dict()
