"""Where each of several seeds starts: where a fit of that seed alone would."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bbvi_conv.families import MeanField
from bbvi_conv.program.buffers import buffers_kept
from bbvi_conv.program.build import build
from bbvi_conv.program.program import Program
from bbvi_conv.run import Settings

if TYPE_CHECKING:
    from bbvi_conv.fitting import ModelSource


def starts(
    program: Program,
    settings: Settings,
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
    source: ModelSource | None,
) -> list[Tensor]:
    """Initial parameters of every seed, each flat ``(P,)``; the first are the program's own.

    Later seeds build the program again under their own seed. Networks that come from a model file are made anew by
    running the file again; those handed over ready-made, by their own ``reset_parameters`` (where they have one), and
    they are put back as found.

    Args:
        program: the program of the first seed.
        settings: with ``seed`` and ``num_seeds``.
        model, guide, args, kwargs: what it was built from.
        source: the file they came from, if any.

    Raises:
        ValueError: a model that has other parameters under another seed.
    """
    found = [program.initial()]
    for seed in range(settings.seed + 1, settings.seed + settings.num_seeds):
        own_model, own_guide = model, guide
        if source is not None:
            from bbvi_conv.model_file import load_programs

            own_model, own_guide = load_programs(source.path, source.name, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first build has told them
            other = build(
                own_model,
                own_guide,
                args,
                kwargs,
                family=None if own_guide is not None else settings.family or MeanField(),
                minibatch=settings.minibatch,
                dtype=program.dtype,
                device=program.device,
                seed=seed,
            )
        if [(leaf.name, leaf.tensor.shape) for leaf in other.leaves] != [
            (leaf.name, leaf.tensor.shape) for leaf in program.leaves
        ]:
            raise ValueError(f"the model has other parameters under seed {seed}: fit the seeds one by one")
        with _renewed(other, seed) if source is None else buffers_kept(()):
            found.append(other.initial())
    return found


@contextmanager
def _renewed(program: Program, seed: int) -> Iterator[None]:
    """The program's networks as they are newly made under a seed; as found at the end."""
    before = program.initial()
    own = {id(leaf.tensor) for leaf in program.leaves}
    with buffers_kept(program.modules), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
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
