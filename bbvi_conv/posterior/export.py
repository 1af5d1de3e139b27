"""Two thin writers from the neutral dict: ArviZ 0.2x's ``InferenceData``, ArviZ 1.x's ``DataTree``; and netCDF."""

from __future__ import annotations

import os
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbvi_conv.posterior.neutral import CHAIN, SAMPLE, Neutral, neutral

if TYPE_CHECKING:
    from bbvi_conv.fitting import Fit


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return find_spec(package) is not None


def arviz_major() -> int:
    """Major version of the installed ArviZ; 1 where only its parts are.

    Raises:
        ImportError: where there is none.
    """
    try:
        return int(version("arviz").split(".")[0])
    except PackageNotFoundError:
        if installed("arviz_base"):
            return 1
        raise ImportError("ArviZ is not installed; install arviz, or arviz-base and arviz-stats") from None


def legacy_arviz() -> Any:
    """ArviZ 0.2x, without its daily announcement of the version to come."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="\\s*ArviZ is undergoing a major refactor", category=FutureWarning)
        import arviz

    return arviz


def to_arviz(fit: Fit, num_samples: int = 1000) -> Any:
    """The posterior of a fit in the form of the ArviZ that is installed.

    Args:
        fit: the fit.
        num_samples: independent draws of q, for each seed: a chain is a seed.

    Returns:
        ``arviz.InferenceData`` (0.2x) or ``xarray.DataTree`` (1.x).

    Raises:
        ImportError: without ArviZ.
    """
    exported = neutral(fit, num_samples)
    return to_inference_data(exported) if arviz_major() < 1 else to_datatree(exported)


def to_inference_data(exported: Neutral) -> Any:
    """The neutral dict as ``InferenceData`` of ArviZ 0.2x."""
    arviz = legacy_arviz()
    return arviz.InferenceData(attrs=exported.attrs, **_datasets(exported))


def to_datatree(exported: Neutral) -> Any:
    """The neutral dict as ``xarray.DataTree`` of ArviZ 1.x."""
    from arviz_base import from_dict

    chained, dims = {}, {}
    for group, named in exported.groups.items():
        chained[group] = {n: v.values[None] if v.dims[:1] == (SAMPLE,) else v.values for n, v in named.items()}
        if group != "log_likelihood":
            dims.update({n: [d for d in v.dims if d not in (CHAIN, SAMPLE)] for n, v in named.items()})
    attrs = exported.attrs
    return from_dict(chained, dims=dims, coords=exported.coords, attrs={"/": attrs, **dict.fromkeys(chained, attrs)})


def write_netcdf(exported: Neutral, path: str | Path) -> None:
    """Write a netCDF file that both ArviZ generations read; it is whole or not there.

    Args:
        exported: what to write.
        path: the file; an old one is replaced.
    """
    import xarray

    path = Path(path)
    tree = xarray.DataTree.from_dict(_datasets(exported))
    tree.attrs = dict(exported.attrs)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        tree.to_netcdf(name, engine="h5netcdf")
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _datasets(exported: Neutral) -> dict[str, Any]:
    """One ``xarray.Dataset`` per group."""
    import xarray

    out = {}
    for group, named in exported.groups.items():
        variables: dict[str, Any] = {}
        used: set[str] = set()
        for name, array in named.items():
            alone = array.dims[:1] == (SAMPLE,)
            dims = tuple("draw" if dim == SAMPLE else dim for dim in ((CHAIN,) * alone + array.dims))
            variables[name] = (dims, array.values[None] if alone else array.values)
            used.update(dims)
        coords: dict[str, Any] = {d: values for d, values in exported.coords.items() if d in used}
        if "draw" in used:
            length = next(len(values[0]) for dims, values in variables.values() if "draw" in dims)
            coords = {CHAIN: [0], "draw": range(length), **coords}
        out[group] = xarray.Dataset(variables, coords, attrs=exported.attrs)
    return out
