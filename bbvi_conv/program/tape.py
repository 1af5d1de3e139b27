"""The noise tape: every draw of base noise inside Pyro's handlers becomes a slice of an input tensor.

Random operations are found by their dispatcher tag ``nondeterministic_seeded``, never by a list of names. What follows
from normals and uniforms by inverse CDF is a function of the tape; gamma, beta and Dirichlet draws are Marsaglia-Tsang
proposals taken from the tape with implicit (pathwise) gradients, so they too repeat exactly and trace. The rest comes
from a generator seeded by the tape and keeps the program in the eager engine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyro.ops.special
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn
from torch._C._functorch import TransformType, _wrap_functional_tensor, is_functionaltensor, peek_interpreter_stack
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from bbvi_conv.program.forms import FORMS, SafeLog
from bbvi_conv.program.noise import Noise, NoiseLayout

_ABOUT_THE_LEAF = (Tensor.requires_grad.__get__, Tensor.is_leaf.__get__)  # type: ignore[attr-defined]
"""Questions that are about the leaf itself, not about the value that stands in for it."""

_RECURRENT = ("rnn_relu", "rnn_tanh", "gru", "lstm")

GAMMA_ROUNDS = 8
"""Marsaglia-Tsang proposals per gamma draw: each is accepted with probability above 0.95, so all fail below 4e-11."""


@functools.cache
def is_random(name: str) -> bool:
    """Whether an ATen operator of this name is tagged ``nondeterministic_seeded``."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or name.startswith("__") or not hasattr(packet, "overloads"):
        return False
    return any(torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags for overload in packet.overloads())


def _is_random(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a call draws: recurrent layers, tagged as random, do only where something is dropped in training."""
    if name not in _RECURRENT:
        return is_random(name)
    rate = next((i for i, a in enumerate(args) if isinstance(a, float)), None)  # training is said after it
    return rate is None or bool(args[rate] > 0.0 and args[rate + 1])


class TapeEnds(RuntimeError):
    """A run draws more noise than the one that measured the tape."""


def _next(noise: Tensor, start: int, size: int) -> Tensor:
    if start + size > len(noise):
        raise TapeEnds(
            "a run draws more noise than the first one did: sample sites, or their sizes, change from run to run; let "
            "all of them be there in every run, and mask what does not count"
        )
    return noise[start : start + size]


class Tape(TorchFunctionMode):
    """Serve random operations from ``noise`` and answer leaf tensors from ``values``; with no noise, draw and count.

    Args:
        noise: base noise of one run, or None to draw from torch's generator and count.
        values: identity of an unconstrained leaf tensor -> the tensor to use in its place.
        serve: answer random operations, and functions that have a cheaper form; without it only leaves are replaced.
        mark_no_grad: make ``torch.no_grad()`` regions visible to a tracer as detached values.

    Attributes:
        untaped: random operations met that no slice of the tape can serve.
        implicit: whether a draw had an implicit gradient, whose own derivative is not to be had (no Hessian).
        strangers: trainable module parameters that something is computed from and that are not among ``values``: they
            stay constant.
    """

    def __init__(
        self, noise: Noise | None, values: dict[int, Tensor], *, mark_no_grad: bool = False, serve: bool = True
    ) -> None:
        super().__init__()
        self.noise, self.values, self.mark_no_grad, self.serve = noise, values, mark_no_grad, serve
        self.normals = self.uniforms = 0
        self.untaped: set[str] = set()
        self.implicit = False
        self.strangers: dict[int, Tensor] = {}

    @property
    def used(self) -> NoiseLayout:
        """Noise consumed so far."""
        return NoiseLayout(self.normals, self.uniforms)

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        """The next standard normals, shaped."""
        size = math.prod(shape)
        start, self.normals = self.normals, self.normals + size
        if self.noise is None:
            return torch.randn(shape, dtype=like.dtype, device=like.device)
        return _next(self.noise.normal, start, size).reshape(shape).to(like.dtype)

    def uniform(self, shape: torch.Size, like: Tensor) -> Tensor:
        """The next uniforms in the open (0, 1), shaped."""
        size = math.prod(shape)
        start, self.uniforms = self.uniforms, self.uniforms + size
        if self.noise is None:
            return torch.rand(shape, dtype=like.dtype, device=like.device).clamp(torch.finfo(like.dtype).tiny, None)
        return _next(self.noise.uniform, start, size).reshape(shape).to(like.dtype)

    def _swap(self, x: Any, met: dict[int, Tensor]) -> Any:
        """What stands in for a value; ``met`` gets the trainable parameters that nothing stands in for."""
        if isinstance(x, Tensor):
            other = self.values.get(id(x))
            if other is not None:
                return other
            if x.requires_grad and x.is_leaf and isinstance(x, nn.Parameter):
                met[id(x)] = x
            return x
        if type(x) in (list, tuple):
            return type(x)(self._swap(y, met) for y in x)
        return x

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ABOUT_THE_LEAF:
            return func(*args)
        met: dict[int, Tensor] = {}
        args = tuple(self._swap(x, met) for x in args)
        kwargs = {k: self._swap(v, met) for k, v in kwargs.items()} if kwargs else {}
        name = getattr(func, "__name__", "")
        if self.serve and _is_random(name, args):
            rule = _RULES.get(name)
            if rule is not None:
                return rule(self, *args, **kwargs)
            self.untaped.add(name)
        form = FORMS.get(func) if self.serve else None
        out = NotImplemented if form is None else form(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        if name != "__get__" or isinstance(out, Tensor):  # not a question about the leaf, such as its shape
            self.strangers.update(met)
        if self.mark_no_grad and not torch.is_grad_enabled() and not name.endswith("_"):
            out = _each(lambda x: x.detach() if isinstance(x, Tensor) and x.is_floating_point() else x, out)
        if self.mark_no_grad:
            out = _each(functools.partial(_functional, given=(*args, *kwargs.values())), out)
        if self.mark_no_grad and func is Tensor.detach:
            return out.clone()  # torch's gamma clamps a detached alias in place: functionalised, it cuts the gradient
        return out


def _each(function: Callable[[Any], Any], made: Any) -> Any:
    """``function`` of a tensor, or of every one that is held."""
    return tree_map(function, made) if isinstance(made, (tuple, list, dict)) else function(made)


def _functional(made: Any, given: tuple[Any, ...]) -> Any:
    """A new tensor made of constants alone, as one that functionalisation can take changes out of.

    It knows nothing of copies of the data, and takes what ``torch.tensor`` makes for a detached view: what latents are
    written to there would lose their gradients.
    """
    interpreter = peek_interpreter_stack()
    if interpreter is None or interpreter.key() != TransformType.Functionalize or not isinstance(made, Tensor):
        return made
    constants = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    if any(map(is_functionaltensor, constants)):
        return made
    if is_functionaltensor(made):
        return made.clone()
    place = made.untyped_storage().data_ptr()
    if any(t.untyped_storage().data_ptr() == place for t in constants):
        return made
    return _wrap_functional_tensor(made, interpreter.level())


@contextmanager
def taped(tape: Tape) -> Iterator[Tape]:
    """Run under ``tape``.

    For the time being without two autograd functions, torch's of Dirichlet draws and Pyro's log, and with attention
    made of products and a softmax, which have second derivatives.
    """
    with (
        sdpa_kernel(SDPBackend.MATH),
        mock.patch.object(torch.distributions.dirichlet, "_Dirichlet", _TapedDirichlet),
        mock.patch.object(pyro.ops.special, "_SafeLog", SafeLog),
        tape,
    ):
        yield tape


class _TapedDirichlet:
    """Stands in for torch's autograd function: gammas divided by their sum, pathwise in the concentration."""

    @staticmethod
    def apply(concentration: Tensor) -> Tensor:
        return _normalised(torch._standard_gamma(concentration))


def _normalised(gammas: Tensor) -> Tensor:
    return gammas / gammas.sum(-1, True)


def _gamma(tape: Tape, alpha: Tensor, generator: None = None) -> Tensor:
    """Standard gamma by Marsaglia and Tsang (2000) on the tape; the gradient is the implicit one."""
    tape.implicit = True
    fixed = alpha.detach()
    boosted = fixed + (fixed < 1)
    d = boosted - 1 / 3
    c = (9 * d).rsqrt()
    rounds = torch.Size((GAMMA_ROUNDS, *alpha.shape))
    x, u = tape.normal(rounds, fixed), tape.uniform(rounds, fixed)
    cube = (1 + c * x).clamp(min=0) ** 3
    accepted = (cube > 0) & (u.log() < 0.5 * x * x + d - d * cube + d * cube.clamp(min=1e-30).log())
    first = accepted.to(fixed.dtype).argmax(0, keepdim=True)
    draw = d * cube.gather(0, first).squeeze(0)
    boost = tape.uniform(alpha.shape, fixed)
    draw = torch.where(fixed < 1, draw * boost ** (1 / fixed), draw).clamp(min=torch.finfo(fixed.dtype).tiny)
    slope = torch._standard_gamma_grad(fixed, draw)
    return draw + slope * (alpha - fixed)


def _shape(args: tuple[Any, ...]) -> torch.Size:
    return torch.Size(args[0] if len(args) == 1 and not isinstance(args[0], int) else args)


def _like(kwargs: dict[str, Any]) -> Tensor:
    dtype = kwargs.get("dtype")
    return torch.empty((), dtype=dtype or torch.get_default_dtype(), device=kwargs.get("device"))


def _float_like(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else torch.empty((), dtype=torch.get_default_dtype(), device=x.device)


def _size_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size:
    return torch.Size(kwargs["size"]) if "size" in kwargs else _shape(args)


def _normal(tape: Tape, mean: Any, std: Any = 1.0, size: Any = None, **kwargs: Any) -> Tensor:
    if size is not None:
        shaped: Tensor = mean + std * tape.normal(torch.Size(size), _like(kwargs))
        return shaped
    tensors = [x.detach() for x in (mean, std) if isinstance(x, Tensor)]
    shape = torch.Size(broadcast_shape(*(x.shape for x in tensors)))
    mean, std = (x.detach() if isinstance(x, Tensor) else x for x in (mean, std))
    drawn: Tensor = mean + std * tape.normal(shape, tensors[0])
    return drawn


def _bernoulli(tape: Tape, probs: Tensor, p: float | None = None, **_: Any) -> Tensor:
    threshold = probs if p is None else torch.full_like(probs, p)
    return (tape.uniform(probs.shape, probs) < threshold).to(probs.dtype)


def _multinomial(tape: Tape, probs: Tensor, num_samples: int, replacement: bool = False, **_: Any) -> Tensor:
    if not replacement and num_samples > 1:
        tape.untaped.add("multinomial without replacement")
        return torch.multinomial(probs, num_samples)
    cdf = probs.detach().cumsum(-1)
    u = tape.uniform(torch.Size((*probs.shape[:-1], num_samples)), probs) * cdf[..., -1:]
    index = (cdf.unsqueeze(-2) <= u.unsqueeze(-1)).sum(-1)
    return index.clamp(max=probs.shape[-1] - 1)


def _dropout(tape: Tape, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return x
    return x * (tape.uniform(x.shape, x) >= p).to(x.dtype) / (1 - p)


_RULES: dict[str, Callable[..., Tensor]] = {
    "normal": _normal,
    "normal_": lambda tape, x, mean=0.0, std=1.0, **_: x.copy_(mean + std * tape.normal(x.shape, x)),
    "randn": lambda tape, *args, **kwargs: tape.normal(_size_of(args, kwargs), _like(kwargs)),
    "randn_like": lambda tape, x, **kwargs: tape.normal(x.shape, _float_like(x)),
    "uniform_": lambda tape, x, low=0.0, high=1.0, **_: x.copy_(low + (high - low) * tape.uniform(x.shape, x)),
    "rand": lambda tape, *args, **kwargs: tape.uniform(_size_of(args, kwargs), _like(kwargs)),
    "rand_like": lambda tape, x, **kwargs: tape.uniform(x.shape, _float_like(x)),
    "exponential_": lambda tape, x, lambd=1.0, **_: x.copy_(-torch.log(tape.uniform(x.shape, x)) / lambd),
    "cauchy_": lambda tape, x, median=0.0, sigma=1.0, **_: x.copy_(
        median + sigma * torch.tan(math.pi * (tape.uniform(x.shape, x) - 0.5))
    ),
    "log_normal_": lambda tape, x, mean=1.0, std=2.0, **_: x.copy_((mean + std * tape.normal(x.shape, x)).exp()),
    "bernoulli": _bernoulli,
    "bernoulli_": lambda tape, x, p=0.5, **_: x.copy_(
        tape.uniform(x.shape, _float_like(x)) < (p if isinstance(p, float) else p.to(_float_like(x).dtype))
    ),
    "multinomial": _multinomial,
    "dropout": _dropout,
    "_standard_gamma": _gamma,
    "_sample_dirichlet": lambda tape, concentration, generator=None: _normalised(_gamma(tape, concentration)),
}
