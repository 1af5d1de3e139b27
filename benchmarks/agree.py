"""Whether all sides of a case pose the same problem: the loss of one draw, at the same parameters, rows and latents."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.engine import Calculus
from bbvi_conv.engine.streams import Feed
from bbvi_conv.program.noise import Noise
from benchmarks.case import Arrays, Case, Twin
from benchmarks.families import mean_and_factor


class Losses(NamedTuple):
    """Negative log-weight of one draw, in nats, scaled to N; see :func:`losses`."""

    ours: float
    pyro: float
    numpyro: float


TOLERANCE = 4e-6
"""Relative difference that float32 sums of up to a million terms in another order leave."""


class Disagreement(RuntimeError):
    """Two sides of a case pose different problems: their times cannot be compared."""


def check(name: str, case: Case) -> Losses:
    """The losses, where they agree.

    Raises:
        Disagreement: where they do not.
    """
    found = losses(case)
    for side, value in (("Pyro", found.pyro), ("NumPyro", found.numpyro)):
        if not abs(value - found.ours) <= TOLERANCE * abs(found.ours):
            raise Disagreement(f"case {name}: {side}'s loss is {value}, ours {found.ours}, at the same draw")
    return found


def losses(case: Case, *, by: float = 0.02, seed: int = 0) -> Losses:
    """One draw of the single-draw bound on every side, some way off the start.

    Where the parameters of the guides cannot be set equal, the model's part alone: the negative log joint density.

    Args:
        case: the case.
        by: standard deviation of the move.
        seed: of move, noise and rows.
    """
    program = case.program()
    gen = torch.Generator(program.device).manual_seed(seed)
    x = program.initial()
    x = x + by * torch.randn(x.shape, generator=gen, device=program.device)
    noise = program.layout.draw(gen, 1, 1, dtype=torch.float32)
    rows = (
        None
        if case.minibatch is None
        else torch.randint(case.total, (1, case.minibatch.size), generator=gen, device=program.device)
    )
    one = noise.at(0).at(0)
    batch = program.batch(None if rows is None else rows[0])
    drawn = program.site_values(x, one, batch)
    latents = {name: value.detach() for name, value in drawn.latent.items()}
    taken = None if rows is None else rows[0].cpu().numpy()
    if case.params is None:
        joint = poutine.trace(poutine.condition(case.in_pyro()[0], latents)).get_trace(*program.positional(batch))
        in_pyro = -float(joint.log_prob_sum().detach())
        return Losses(-float(drawn.log_p.detach()), in_pyro, _in_numpyro(case, None, latents, taken))
    (own,) = Calculus(program, bc.ELBO(1), program.log_weights, 1.0).losses(x, Feed(noise, rows))
    in_numpyro = _in_numpyro(case, case.params(program, x), latents, taken)
    return Losses(float(own), _in_pyro(case, program, x, one, batch), in_numpyro)


def _in_pyro(case: Case, program: bc.Program, x: Tensor, noise: Noise, batch: Any) -> float:
    """Pyro's own ``Trace_ELBO`` on Pyro's own guide, its noise served from the same tape."""
    program.write_back(x)
    args = program.positional(batch)
    with pyro.get_param_store().scope():
        model, guide = case.in_pyro()
        if case.guide is None:
            guide(*args)
            _set(guide, program, x)
        with program.handlers(noise, batch):
            return float(Trace_ELBO().differentiable_loss(model, guide, *args).detach())


def _set(guide: Any, program: bc.Program, x: Tensor) -> None:
    """Give Pyro's Gaussian guide our parameters."""
    if isinstance(guide, AutoNormal):
        for name, value in program.constrained(x).items():
            _, kind, site = name.split(".", 2)
            setattr(getattr(guide, kind), site, value)
        return
    loc, tril = mean_and_factor(program, x)
    guide.loc = torch.nn.Parameter(loc)
    guide.scale, guide.scale_tril = tril.diag(), tril / tril.diag()[:, None]


def _in_numpyro(case: Case, params: Arrays | None, drawn: dict[str, Tensor], rows: np.ndarray | None) -> float:
    """Minus log p, plus log q where there are parameters for it, under NumPyro's densities."""
    import jax
    from jax.flatten_util import ravel_pytree
    from numpyro.handlers import seed
    from numpyro.infer.autoguide import AutoContinuous
    from numpyro.infer.util import log_density, unconstrain_fn

    twin = case.twin()
    given = {} if rows is None else {"rows": rows}
    start = {} if params is None else numpyro_start(case, twin, params)
    latents: dict[str, Any] = {name: value.cpu().numpy() for name, value in drawn.items()}
    if params is not None and isinstance(twin.guide, AutoContinuous):
        free = unconstrain_fn(seed(twin.model, 0), twin.args, given, latents)
        latents["_auto_latent"] = ravel_pytree(free)[0]

    @jax.jit
    def loss(everything: dict[str, Any], *args: Any) -> Any:
        log_p, _ = log_density(seed(twin.model, 0), args, given, everything)
        if params is None:
            return -log_p
        log_q, _ = log_density(seed(twin.guide, 0), args, given, everything)
        return log_q - log_p

    return float(loss({**start, **latents}, *twin.args))


def numpyro_start(case: Case, twin: Twin, params: Arrays | None) -> dict[str, Any]:
    """NumPyro's constrained parameters after initialisation, with ``params`` in place of its own."""
    import jax
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    svi = SVI(twin.model, twin.guide, Adam(case.step_size), twin.loss)
    start = svi.get_params(svi.init(jax.random.PRNGKey(0), *twin.args, init_params=params))
    if params is not None and set(params) != set(start):
        raise ValueError(f"NumPyro has the parameters {sorted(start)}, ours are {sorted(params)}")
    return dict(start)
