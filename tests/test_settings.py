"""Settings go through JSON and come back equal; nothing unknown is made."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from bbvi_conv.families import FAMILIES, SCALE_MAPS, FullRank, MeanField, SoftClip
from bbvi_conv.monitor.strata import Strata
from bbvi_conv.networks.encoders import ENCODERS
from bbvi_conv.objectives import CIWAE, ELBO, IWAE, MIWAE, VRIWAE, GrowingParticles, LinearWarmup, Pair
from bbvi_conv.optim import (
    SGD,
    Adam,
    Ball,
    Constant,
    CosineDecay,
    ExponentialDecay,
    InverseLinear,
    InverseSqrt,
    ProjectedSGD,
    ProximalSGD,
    ScaleFloor,
    TheoremAdam,
)
from bbvi_conv.program import Minibatch
from bbvi_conv.run import Settings
from bbvi_conv.settings import decode, encode, known_classes

VALUES: list[Any] = [
    MeanField(0.3),
    FullRank(scale_map=SoftClip(0.01, 4.0), relative=False),
    ELBO(num_particles=7, estimator="sticking-the-landing"),
    SGD(Constant(1e-3)),
    Adam(ExponentialDecay(0.1, 0.5, 1000), beta1=0.5, beta2=0.99, eps=1e-7),
    Adam(CosineDecay(0.1, 1000, 0.01)),
    Adam(InverseSqrt(1 / 3)),
    ProximalSGD(Constant(0.1), control_variate=True),
    ProjectedSGD(InverseSqrt(0.1), floor=0.01),
    TheoremAdam(0.1, radius=10.0),
    Ball(2.0),
    InverseLinear(2.0, delay=5.0),
    ScaleFloor(0.1),
    Minibatch(128, plate="data", sampling="epoch"),
    Strata(10, 0.2),
    torch.float32,
    torch.float64,
    torch.device("cpu"),
    None,
    True,
    3,
    0.1 + 0.2,
    math.inf,
    "text",
    (1, (2.0, None)),
    [1, 2],
    {"deep": {"minibatch": Minibatch(2, plate="p")}},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_is_written_comes_back_equal(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert back == value
    assert type(back) is type(value)


def test_nan_comes_back() -> None:
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan), allow_nan=False))))


def test_every_setting_of_a_fit_can_be_written() -> None:
    """Defaults, field by field: a new setting whose class is not registered fails here."""
    for field in dataclasses.fields(Settings):
        value = getattr(Settings(), field.name)
        assert decode(encode(value), name=field.name) == value


def test_every_known_class_is_written_under_its_name() -> None:
    examples = {type(value).__name__: value for value in (*VALUES, Constant(1.0), InverseSqrt(1.0))}
    bounds = (IWAE(3), VRIWAE(3, 0.2), MIWAE(2, 3), CIWAE(3), Pair(IWAE(4), ELBO(2)), LinearWarmup(5))
    examples |= {type(value).__name__: value for value in (*bounds, GrowingParticles(IWAE(2), stop=8))}
    examples |= {"ExponentialDecay": ExponentialDecay(1.0, 0.5, 2), "CosineDecay": CosineDecay(1.0, 2)}
    examples |= {make.__name__: make() for make in (*FAMILIES.values(), *SCALE_MAPS.values(), *ENCODERS.values())}
    for name in known_classes():
        assert encode(examples[name])["class"] == name


def own_family(model: Any) -> Any:
    return model


class OwnStepSize(Constant):
    """A subclass is not the class it extends, and must not come back as it."""


def test_a_function_of_the_users_own_is_named_and_asked_for() -> None:
    assert encode(own_family)["function"].endswith(":own_family")
    assert encode(OwnStepSize(0.1))["function"].endswith(":OwnStepSize")
    with pytest.raises(ValueError, match=r"family was the function .*:own_family.*give family as an argument"):
        decode(encode(own_family), name="family")
    with pytest.raises(ValueError, match="step_size was the function"):
        decode(encode(Adam(OwnStepSize(0.1))))


def test_a_value_without_a_place_is_refused() -> None:
    with pytest.raises(TypeError, match="of type set cannot be written"):
        encode({1, 2})
    with pytest.raises(TypeError, match="cannot hold the key 'class'"):
        encode({"class": "Adam"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"class": "os.system", "command": "true"}, "unknown class 'os.system'.*known are MeanField"),
        ({"class": "MeanField", "width": 3}, "does not fit the class MeanField.*width"),
        ({"class": "MeanField", "init_scale": -1.0}, "init_scale must be positive"),
        ({"dtype": "nn"}, "'nn' is no dtype"),
        ({"dtype": 64}, "64 is no dtype"),
        ({"device": "toaster"}, "unknown device 'toaster'"),
        ({"float": "1.0"}, "'1.0' is no float"),
        ({"tuple": 1}, "1 is no tuple"),
        ({"tuple": [], "more": 1}, "'tuple' beside other keys"),
    ],
)
def test_damaged_settings_are_refused_by_name(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(data, name="optimiser")
