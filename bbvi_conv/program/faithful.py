"""Whether a program, whose parameters and noise are put in place of Pyro's own, is still the program that Pyro runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import random_state
from bbvi_conv.program.program import Program


def total_and_slopes(run: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor]) -> list[Tensor]:
    """One number that depends on everything a run gives, and its gradient in every leaf, zero where there is none."""
    with torch.enable_grad():
        total = torch.as_tensor(sum(weight * part.sum() for weight, part in enumerate(run(), 1)))
    known = total.requires_grad and len(leaves) > 0
    reached = torch.autograd.grad(total, leaves, allow_unused=True) if known else [None] * len(leaves)
    return [total.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, reached, strict=True))]


def differing(found: Sequence[Tensor], right: Sequence[Tensor]) -> list[int]:
    """Which of the numbers of :func:`total_and_slopes` differ by more than roundings."""
    largest = max((float(x.nan_to_num().abs().max()) for x in right[1:] if x.numel()), default=0.0)

    def differ(index: int) -> bool:
        a, b = found[index], right[index]  # of a parameter of another type Pyro's own gradient is of that type
        single = torch.float32 in (a.dtype, b.dtype)
        a, b, tolerance = (a.float(), b.float(), 1e-3) if single else (a, b, 1e-6)
        return not torch.allclose(a, b, rtol=tolerance, atol=tolerance * (largest if index else 1.0), equal_nan=True)

    return [index for index in range(len(right)) if differ(index)]


def generator_state(device: torch.device) -> tuple[object, ...]:
    """The states of torch's generator for a device, NumPy's and Python's: as they were where nothing has been drawn."""
    own = torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    numpys = np.random.get_state(legacy=False)  # noqa: NPY002 - what plain np.random.* draws from
    theirs = numpys["state"]["key"].tobytes(), numpys["state"]["pos"], numpys["has_gauss"]
    return own.numpy().tobytes(), theirs, random.getstate()


def check(program: Program) -> bool:
    """Compare gradients of one draw, some way off the start, with those that Pyro's own parameters get.

    A program whose densities are not the same in two runs is left alone.

    Returns:
        Whether a run draws from torch's own generator although all its noise is given, inside a function of torch's, or
        from NumPy's or Python's. Its gradients are then not compared, for its noise is another every time.
    Raises:
        ValueError: naming the parameter whose gradient differs.
    """
    start = program.initial()
    moved = start + 0.01 * torch.sin(torch.arange(1.0, len(start) + 1.0, device=start.device)).to(start)
    noise, batch = program.example()
    theta, phi, values = _parameters(program, moved)
    owned = {leaf.name: leaf.tensor for leaf in program.leaves if leaf.tensor.requires_grad}

    def run(theta: dict[str, Tensor], phi: dict[str, Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        with program.networks_kept():
            return total_and_slopes(lambda: program.log_weights(theta, phi, phi, noise, batch), leaves)

    given = [values[name] for name in owned]
    with random_state(program.device, 0):
        before = generator_state(program.device)
        found = run(theta, phi, given)
        if generator_state(program.device) != before:
            return True
        program.write_back(moved)
        try:
            right = run({}, {}, list(owned.values()))
        finally:
            program.write_back(start)
        wrong = differing(found, right)
        if not wrong or differing(run(theta, phi, given), found):
            return False
    hidden = [list(owned)[index - 1] for index in wrong if index]
    raise ValueError(
        f"parameter {hidden[0] if hidden else next(iter(owned))!r} is handed to something that hides it, so that its "
        "gradient would be wrong: torch.func, torch.jit, torch.utils.checkpoint or an autograd function of your own; "
        "hand it a product with one, as in 1.0 * weight, or leave it out"
    )


def check_gaps(program: Program, told: str) -> None:
    """Refuse data that are not finite, unless the model reads past them, as where it masks and fills what is missing.

    With a minibatch this is tried on rows that hold such a number in every place where there is one.

    Args:
        program: over these data.
        told: what to say of them; empty where all are finite.

    Raises:
        ValueError: if the density, or its gradient, is not finite.
    """
    if not told:
        return
    if program.by_index:  # the rows that hold them are not known
        raise ValueError(told)
    noise, batch = program.example()
    theta, phi, values = _parameters(program, program.initial())
    for some in _with_gaps(program) or [batch]:
        with program.networks_kept(), random_state(program.device, 0):
            terms = partial(program.log_weights, theta, phi, phi, noise, some)
            found = total_and_slopes(terms, list(values.values()))
        if not all(bool(torch.isfinite(part).all()) for part in found):
            raise ValueError(told)


def _with_gaps(program: Program) -> list[Batch]:
    """Batches of rows that are not finite: for every place in a row one of those that are not finite there."""
    if program.minibatch is None:
        return []
    gaps = [~torch.isfinite(program.args[i]).reshape(program.total, -1) for i in program.batched]
    rows = torch.unique(torch.cat([bad[:, bad.any(0)].int().argmax(0) for bad in gaps]))
    size = program.minibatch.size
    places = torch.arange(size, device=rows.device)
    return [program.batch(rows[(start + places) % len(rows)]) for start in range(0, len(rows), size)]


@contextmanager
def with_gaps(told: str) -> Iterator[None]:
    """Say of whatever goes wrong first what was ``told`` of the data, which may be why.

    Raises:
        ValueError: with both.
    """
    try:
        yield
    except Exception as error:
        if not told or told in str(error):
            raise
        first = str(error).split("\n")[0].split(", but found invalid values")[0]
        raise ValueError(f"{told} ({type(error).__name__}: {first})") from error


def _parameters(program: Program, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of the model and of the guide at ``x``, and all of them, as leaves."""
    theta, phi = program.split(x)
    values = {name: value.detach().clone().requires_grad_() for name, value in {**theta, **phi}.items()}
    return {name: values[name] for name in theta}, {name: values[name] for name in phi}, values
