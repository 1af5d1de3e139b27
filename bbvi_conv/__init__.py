"""Black-box variational inference on Pyro that knows whether it has converged and whether its answer can be trusted.

Names are resolved when first used (PEP 562): ``import bbvi_conv`` loads neither torch nor Pyro nor ArviZ.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bbvi_conv import data, evaluate
    from bbvi_conv.families import (
        FAMILIES,
        IAF,
        Amortized,
        Exp,
        FullRank,
        Linear,
        LowRank,
        MeanField,
        Mixture,
        NeuralSpline,
        Planar,
        Radial,
        RealNVP,
        ScoreMeanField,
        SoftClip,
        Softplus,
        Structured,
        StudentT,
        Sylvester,
    )
    from bbvi_conv.fitting import Fit, fit, load
    from bbvi_conv.monitor.signal import SignalToNoise, signal_to_noise
    from bbvi_conv.monitor.svi import GradientMonitor
    from bbvi_conv.networks import BoundedLinear, SoftClipping, bounded_mlp, soft_clip
    from bbvi_conv.networks.encoders import MLP, Conv
    from bbvi_conv.objectives import (
        CIWAE,
        ELBO,
        IWAE,
        MIWAE,
        OBJECTIVES,
        PIWAE,
        VRIWAE,
        GrowingParticles,
        LinearWarmup,
        Pair,
    )
    from bbvi_conv.optim import (
        SGD,
        Adam,
        Ball,
        Constant,
        CosineDecay,
        ExponentialDecay,
        InverseLinear,
        InverseSqrt,
        Projected,
        ProjectedSGD,
        ProximalSGD,
        ScaleFloor,
        TheoremAdam,
        Within,
        gradient_mapping,
    )
    from bbvi_conv.program.build import build
    from bbvi_conv.program.minibatch import Minibatch
    from bbvi_conv.program.program import Program
    from bbvi_conv.program.scan import scan
    from bbvi_conv.recipe import ModelSource
    from bbvi_conv.run import FitState, Settings
    from bbvi_conv.theory import Assumptions, assumptions
    from bbvi_conv.variational_em import VariationalEM
    from bbvi_conv.verdict import Verdict

__version__ = "0.1.0"

_WHERE = {
    "Adam": "optim",
    "Amortized": "families",
    "Assumptions": "theory",
    "assumptions": "theory",
    "Ball": "optim",
    "bounded_mlp": "networks",
    "BoundedLinear": "networks",
    "build": "program.build",
    "CIWAE": "objectives",
    "Constant": "optim",
    "Conv": "networks.encoders",
    "CosineDecay": "optim",
    "ELBO": "objectives",
    "Exp": "families",
    "ExponentialDecay": "optim",
    "FAMILIES": "families",
    "Fit": "fitting",
    "fit": "fitting",
    "FitState": "run",
    "FullRank": "families",
    "gradient_mapping": "optim",
    "GradientMonitor": "monitor.svi",
    "GrowingParticles": "objectives",
    "IAF": "families",
    "InverseLinear": "optim",
    "InverseSqrt": "optim",
    "IWAE": "objectives",
    "Linear": "families",
    "LinearWarmup": "objectives",
    "load": "fitting",
    "LowRank": "families",
    "MeanField": "families",
    "Minibatch": "program.minibatch",
    "MIWAE": "objectives",
    "Mixture": "families",
    "MLP": "networks.encoders",
    "ModelSource": "recipe",
    "NeuralSpline": "families",
    "OBJECTIVES": "objectives",
    "Pair": "objectives",
    "PIWAE": "objectives",
    "Planar": "families",
    "Program": "program.program",
    "Projected": "optim",
    "ProjectedSGD": "optim",
    "ProximalSGD": "optim",
    "Radial": "families",
    "RealNVP": "families",
    "ScaleFloor": "optim",
    "scan": "program.scan",
    "ScoreMeanField": "families",
    "Settings": "run",
    "SGD": "optim",
    "signal_to_noise": "monitor.signal",
    "SignalToNoise": "monitor.signal",
    "soft_clip": "networks",
    "SoftClip": "families",
    "SoftClipping": "networks",
    "Softplus": "families",
    "Structured": "families",
    "StudentT": "families",
    "Sylvester": "families",
    "TheoremAdam": "optim",
    "VariationalEM": "variational_em",
    "Verdict": "verdict",
    "VRIWAE": "objectives",
    "Within": "optim",
}

_ROOMS = ("data", "evaluate")
"""Rooms that are used by their name, as in ``bc.evaluate.log_likelihood``."""

__all__ = [
    "CIWAE",
    "ELBO",
    "FAMILIES",
    "IAF",
    "IWAE",
    "MIWAE",
    "MLP",
    "OBJECTIVES",
    "PIWAE",
    "SGD",
    "VRIWAE",
    "Adam",
    "Amortized",
    "Assumptions",
    "Ball",
    "BoundedLinear",
    "Constant",
    "Conv",
    "CosineDecay",
    "Exp",
    "ExponentialDecay",
    "Fit",
    "FitState",
    "FullRank",
    "GradientMonitor",
    "GrowingParticles",
    "InverseLinear",
    "InverseSqrt",
    "Linear",
    "LinearWarmup",
    "LowRank",
    "MeanField",
    "Minibatch",
    "Mixture",
    "ModelSource",
    "NeuralSpline",
    "Pair",
    "Planar",
    "Program",
    "Projected",
    "ProjectedSGD",
    "ProximalSGD",
    "Radial",
    "RealNVP",
    "ScaleFloor",
    "ScoreMeanField",
    "Settings",
    "SignalToNoise",
    "SoftClip",
    "SoftClipping",
    "Softplus",
    "Structured",
    "StudentT",
    "Sylvester",
    "TheoremAdam",
    "VariationalEM",
    "Verdict",
    "Within",
    "assumptions",
    "bounded_mlp",
    "build",
    "data",
    "evaluate",
    "fit",
    "gradient_mapping",
    "load",
    "scan",
    "signal_to_noise",
    "soft_clip",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
