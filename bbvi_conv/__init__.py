"""Black-box variational inference on Pyro that knows whether it has converged and whether its answer can be trusted.

Names are resolved when first used (PEP 562): ``import bbvi_conv`` loads neither torch nor Pyro nor ArviZ.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        SoftClip,
        Softplus,
        Structured,
        StudentT,
        Sylvester,
    )
    from bbvi_conv.fitting import Fit, ModelSource, fit, load
    from bbvi_conv.monitor.signal import SignalToNoise, signal_to_noise
    from bbvi_conv.monitor.svi import GradientMonitor
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
    from bbvi_conv.optim import SGD, Adam, Constant, CosineDecay, ExponentialDecay, InverseSqrt
    from bbvi_conv.program.build import build
    from bbvi_conv.program.minibatch import Minibatch
    from bbvi_conv.program.program import Program
    from bbvi_conv.run import FitState, Settings
    from bbvi_conv.verdict import Verdict

__version__ = "0.1.0"

_WHERE = {
    "Adam": "optim",
    "CIWAE": "objectives",
    "GrowingParticles": "objectives",
    "IWAE": "objectives",
    "LinearWarmup": "objectives",
    "MIWAE": "objectives",
    "PIWAE": "objectives",
    "Pair": "objectives",
    "SignalToNoise": "monitor.signal",
    "VRIWAE": "objectives",
    "signal_to_noise": "monitor.signal",
    "Constant": "optim",
    "CosineDecay": "optim",
    "ELBO": "objectives",
    "ExponentialDecay": "optim",
    "Fit": "fitting",
    "FitState": "run",
    "GradientMonitor": "monitor.svi",
    "InverseSqrt": "optim",
    "MLP": "networks.encoders",
    "Conv": "networks.encoders",
    "Minibatch": "program.minibatch",
    "Amortized": "families",
    "Exp": "families",
    "FAMILIES": "families",
    "FullRank": "families",
    "IAF": "families",
    "Linear": "families",
    "LowRank": "families",
    "MeanField": "families",
    "Mixture": "families",
    "NeuralSpline": "families",
    "Planar": "families",
    "Radial": "families",
    "RealNVP": "families",
    "SoftClip": "families",
    "Softplus": "families",
    "Structured": "families",
    "StudentT": "families",
    "Sylvester": "families",
    "ModelSource": "fitting",
    "OBJECTIVES": "objectives",
    "Program": "program.program",
    "SGD": "optim",
    "Settings": "run",
    "Verdict": "verdict",
    "build": "program.build",
    "fit": "fitting",
    "load": "fitting",
}

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
    "Radial",
    "RealNVP",
    "Settings",
    "SignalToNoise",
    "SoftClip",
    "Softplus",
    "Structured",
    "StudentT",
    "Sylvester",
    "Verdict",
    "build",
    "fit",
    "load",
    "signal_to_noise",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
