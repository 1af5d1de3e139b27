"""Where runs start: every seed where a fit of that seed alone would, or where an earlier fit ended."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bbvi_conv.program.buffers import buffers_kept
from bbvi_conv.program.noise import ALONE, random_state
from bbvi_conv.program.program import Program
from bbvi_conv.recipe import Recipe
from bbvi_conv.run import Settings

if TYPE_CHECKING:
    from bbvi_conv.fitting import Fit


def starts(program: Program, settings: Settings, recipe: Recipe, init: Fit | None = None) -> list[Tensor]:
    """Initial parameters of every seed, each flat ``(P,)``; the first are the program's own.

    Later seeds build the program again under their own seed. Networks that come from a model file are made anew by
    running the file again; those handed over ready-made, by their own ``reset_parameters`` (where they have one), and
    they are put back as found. All seeds of a warm start begin where the earlier fit ended.

    Args:
        program: the program of the first seed.
        settings: with ``seed`` and ``num_seeds``.
        recipe: what it was built from.
        init: an earlier fit to start from.

    Raises:
        ValueError: a model that has other parameters under another seed, or none in common with the earlier fit.
    """
    if init is not None:
        return [warm_start(program, init, settings.seed)] * settings.num_seeds
    found = [program.initial()]
    for seed in range(settings.seed + 1, settings.seed + settings.num_seeds):
        with ALONE, warnings.catch_warnings():  # filters are those of all threads
            warnings.simplefilter("ignore")  # the first build has told them
            other = recipe.remade(seed).program(settings, seed)
        if [(leaf.name, leaf.tensor.shape) for leaf in other.leaves] != [
            (leaf.name, leaf.tensor.shape) for leaf in program.leaves
        ]:
            raise ValueError(f"the model has other parameters under seed {seed}: fit the seeds one by one")
        with _renewed(other, seed) if recipe.source is None else buffers_kept(()):
            found.append(other.initial())
    return found


@contextmanager
def _renewed(program: Program, seed: int) -> Iterator[None]:
    """The program's networks as they are newly made under a seed; as found at the end."""
    before = program.initial()
    own = {id(leaf.tensor) for leaf in program.leaves}
    with program.networks_kept(), random_state(program.device, seed):
        try:
            for module in program.modules:
                _reset(module, own)
            yield
        finally:
            program.write_back(before)


def _reset(module: nn.Module, own: set[int]) -> None:
    """Reset a module whose parameters are all trained by the program."""
    parameters = list(module.parameters(recurse=False))
    reset = getattr(module, "reset_parameters", None)
    if callable(reset) and parameters and all(id(parameter) in own for parameter in parameters):
        reset()


WARM_DRAWS = 4096
"""Draws of an earlier fit by which another family is placed: locations are then good to 1/64 of a scale."""


def warm_start(program: Program, init: Fit, seed: int) -> Tensor:
    """Initial parameters: the program's own, replaced by those of an earlier fit where name and shape agree.

    Where no variational parameter has the name of an earlier one, as in another family, a guide that can be placed is
    put at the locations and scales that the earlier fit gives to sites of the same name.
    """
    earlier = {leaf.name: leaf for leaf in init.program.leaves}
    raw = {name: value for group in init.params.values() for name, value in group.items()}
    alike = [leaf for leaf in program.leaves if leaf.name in earlier and raw[leaf.name].shape == leaf.tensor.shape]
    same = {leaf.name: raw[leaf.name] for leaf in alike if earlier[leaf.name].constraint == leaf.constraint}
    starts = {leaf.name: init.constrained_params[leaf.name] for leaf in alike if leaf.name not in same}
    if all(leaf.group == "theta" for leaf in alike) and hasattr(program.guide, "placed"):
        with random_state(program.device, seed), torch.no_grad():
            starts |= program.guide.placed(init.sample(WARM_DRAWS))
    names = [leaf.name for leaf in program.leaves]
    if not {*same, *starts} & set(names):
        raise ValueError(f"init has no parameter that fits: it holds {sorted(raw)}, this fit {names}")
    return program.replaced(program.replaced(program.initial(), same), starts, constrained=True)
