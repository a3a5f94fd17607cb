"""Loads the extension module so that MLX's matrix products come through the BLAS that it brings.

MLX's Linux wheel holds the reference BLAS, some thirty times slower than OpenBLAS.  The module has a cblas_sgemm of its own (OpenBLAS
on all cores); MLX takes it if it stands among the global symbols when MLX first multiplies.
"""

import os
import sys
import warnings


def _load():
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_GLOBAL | os.RTLD_LAZY)
    try:
        from . import _core
    except ImportError as error:
        if "libmlx" not in str(error):
            raise
        import mlx.core  # noqa: F401  installed elsewhere: once it is loaded, the module finds it by its name
        from . import _core
    finally:
        sys.setdlopenflags(flags)
    return _core


def _multiplies_with_ours(core):
    import mlx.core as mx

    if not sys.platform.startswith("linux") or mx.default_device() != mx.Device(mx.cpu):
        return True
    before = core.gemm_calls()
    x = mx.ones((16, 16))
    mx.eval(x @ x)
    return core.gemm_calls() > before


core = _load()
if not _multiplies_with_ours(core):
    warnings.warn(
        "mlx.core multiplied matrices before veloxquant_mlx was imported and stays with its slow BLAS, in models that mlx_lm runs on "
        "the CPU: import veloxquant_mlx first",
        stacklevel=3,
    )
