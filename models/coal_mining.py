r"""Coal-mining disasters: in which year did they become rarer? Two Poisson rates and a year, which is summed out.

The year is a discrete latent that no guide draws, so that all its values are enumerated; it comes back in the draws,
given the rates and the data. With gamma priors of the rates the evidence and the law of the year are known.
Source: Jarrett (1979), "A note on the intervals between coal-mining disasters", Biometrika 66; counts of explosions in
British mines that killed ten or more. The model: Carlin, Gelfand and Smith (1992), Applied Statistics 41.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

FIRST = 1851
DISASTERS = (4, 5, 4, 1, 0, 4, 3, 4, 0, 6, 3, 3, 4, 0, 2, 6, 3, 3, 5, 4, 5, 3, 1, 4, 4, 1, 5, 5)
DISASTERS += (3, 4, 2, 5, 2, 2, 3, 4, 2, 1, 3, 2, 2, 1, 1, 1, 1, 3, 0, 0, 1, 0, 1, 1, 0, 0, 3, 1)
DISASTERS += (0, 3, 2, 2, 0, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 2, 1, 0, 0, 0, 1, 1, 0, 2, 3, 3, 1, 1)
DISASTERS += (2, 1, 1, 1, 1, 2, 4, 2, 0, 0, 0, 1, 4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1)
SHAPE, RATE = 2.0, 1.0
"""Of the gamma prior of both rates."""


def model(disasters: Tensor) -> None:
    """early, late ~ Gamma(2, 1), change uniform, disasters_t ~ Poisson(early up to the change, then late); ``(T,)``."""
    early = pyro.sample("early", dist.Gamma(SHAPE, RATE))
    late = pyro.sample("late", dist.Gamma(SHAPE, RATE))
    change = pyro.sample("change", dist.Categorical(torch.ones(len(disasters) - 1)))
    with pyro.plate("year", len(disasters)) as year:
        pyro.sample("disasters", dist.Poisson(torch.where(year <= change, early, late)), obs=disasters)


def data() -> tuple[Tensor]:
    """Disasters in each of the years 1851 to 1962."""
    return (torch.tensor(DISASTERS, dtype=torch.float64),)


def posterior(disasters: Tensor) -> tuple[Tensor, Tensor]:
    """Log evidence ``()`` in nats, and the probability ``(T - 1,)`` that each year was the last of the early ones."""
    sums = disasters.cumsum(0)
    years = torch.arange(1, len(disasters), dtype=disasters.dtype)
    before, after = sums[:-1], sums[-1] - sums[:-1]

    def segment(count: Tensor, length: Tensor) -> Tensor:
        """Log of the integral of a rate's prior and of what depends on it of the likelihood."""
        shape = SHAPE + count
        start = SHAPE * torch.tensor(RATE).log() - torch.lgamma(torch.tensor(SHAPE))
        return start + torch.lgamma(shape) - shape * (RATE + length).log()

    constant = -torch.lgamma(disasters + 1).sum() - torch.tensor(float(len(years))).log()
    each = constant + segment(before, years) + segment(after, len(disasters) - years)
    return each.logsumexp(0), each.softmax(0)
