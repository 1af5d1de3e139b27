"""Where posteriors lie: means and standard deviations of latent sites, at several parameters of one program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbvi_conv.posterior.draws import draw
from bbvi_conv.program.program import Program

DRAWS = 1000
NUMBERS = 20_000_000
"""Numbers that the draws at one point may hold; beyond it there are fewer draws."""
_FEWEST = 32

Moments = tuple[NDArray[np.float64], NDArray[np.float64], int]


def moments(program: Program, points: Sequence[Tensor], seed: int) -> Moments | str:
    """Means and standard deviations ``(S, D)`` of the scalar latents, constrained, and the number of draws.

    Local latents of a model with parameters of its own are left out: only its networks give them a meaning, and
    equally good networks give them different ones.

    Args:
        program: the program.
        points: flat parameters ``(P,)``, S of them.
        seed: of the noise, the same at every point.

    Returns:
        The moments, or in words why there are none.
    """
    learned = any(leaf.group != "phi" for leaf in program.leaves)
    local = {program.plate, *program.structure.unit} if learned else set()
    names = [s.name for s in program.structure.latents if not local.intersection(plate[0] for plate in s.plates)]
    if not names:
        return "all latents are local, and networks that are equally good give them different meanings"
    size = sum(site.size for site in program.structure.latents)
    count = max(_FEWEST, min(DRAWS, NUMBERS // max(size, 1)))
    means, deviations = [], []
    for x in points:
        try:
            drawn = draw(program, x, count, seed).latent
        except ValueError as error:
            return str(error)
        flat = torch.cat([drawn[name].reshape(count, -1).to(torch.float64) for name in names], 1).cpu()
        means.append(flat.mean(0).numpy())
        deviations.append(flat.std(0).numpy())
    return np.stack(means), np.stack(deviations), count
