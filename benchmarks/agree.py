"""Whether all sides of a case pose the same problem: the loss of one draw, at the same parameters, rows and latents."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.engine import Calculus
from bbvi_conv.engine.streams import Feed
from bbvi_conv.program.noise import Noise
from benchmarks.case import Arrays, Case, Twin


class Losses(NamedTuple):
    """Negative log-weight of one draw, in nats, scaled to N."""

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
    """One draw of the single-draw bound on every side.

    The parameters are some way off the start; at zero where a case cannot set them equal elsewhere.

    Args:
        case: the case.
        by: standard deviation of the move.
        seed: of move, noise and rows.
    """
    gen = torch.Generator().manual_seed(seed)
    program = case.program()
    x = program.initial()
    x = torch.zeros_like(x) if case.params is None else x + by * torch.randn(x.shape, generator=gen)
    noise = program.layout.draw(gen, 1, 1, dtype=torch.float32)
    rows = None if case.minibatch is None else torch.randint(case.total, (1, case.minibatch.size), generator=gen)
    calculus = Calculus(program, bc.ELBO(1), program.log_weights, 1.0)
    (own,) = calculus.losses(x, Feed(noise, rows))
    batch = program.batch(None if rows is None else rows[0])
    drawn = program.site_values(x, noise.at(0).at(0), batch)
    values = {name: value.detach().numpy() for name, value in drawn.latent.items()}
    taken = None if rows is None else rows[0].numpy()
    return Losses(
        float(own), _in_pyro(case, program, x, noise.at(0).at(0), batch), _in_numpyro(case, program, x, values, taken)
    )


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
    """Give Pyro's guide our parameters; a guide of another make is set to zero."""
    values = program.constrained(x)
    if isinstance(guide, AutoNormal):
        for name, value in values.items():
            _, kind, site = name.split(".", 2)
            setattr(getattr(guide, kind), site, value)
    elif isinstance(guide, AutoMultivariateNormal):
        q = program.bind(lambda: program.guide.get_posterior(), x)()
        guide.loc = torch.nn.Parameter(q.loc.detach())
        guide.scale, guide.scale_tril = q.scale.detach(), q.tril.detach()
    else:
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.zero_()


def _in_numpyro(case: Case, program: bc.Program, x: Tensor, values: Arrays, rows: np.ndarray | None) -> float:
    import jax
    from jax.flatten_util import ravel_pytree
    from numpyro.handlers import seed
    from numpyro.infer.autoguide import AutoContinuous
    from numpyro.infer.util import log_density, unconstrain_fn

    twin = case.twin()
    given = {} if rows is None else {"rows": rows}
    params = numpyro_start(case, twin, None if case.params is None else case.params(program, x))
    latents: dict[str, Any] = dict(values)
    if isinstance(twin.guide, AutoContinuous):
        free = unconstrain_fn(seed(twin.model, 0), twin.args, given, values)
        latents["_auto_latent"] = ravel_pytree(free)[0]
    if case.params is None:
        params = jax.tree.map(lambda p: 0 * p, params)

    @jax.jit
    def loss(everything: dict[str, Any], *args: Any) -> Any:
        log_q, _ = log_density(seed(twin.guide, 0), args, given, everything)
        log_p, _ = log_density(seed(twin.model, 0), args, given, everything)
        return log_q - log_p

    return float(loss({**params, **latents}, *twin.args))


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
