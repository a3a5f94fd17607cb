"""Loads the extension module and has MLX multiply with the BLAS that it brings.

MLX's Linux wheel holds the reference BLAS, some thirty times slower than OpenBLAS.  The module has a cblas_sgemm of its own (OpenBLAS
on all cores), and puts it into the table through which libmlx.so calls that function.
"""

import sys
import warnings


def _load():
    try:
        from . import _core
    except ImportError as error:
        if "libmlx" not in str(error):
            raise
        import mlx.core  # noqa: F401  installed elsewhere: once it is loaded, the module finds it by its name
        from . import _core
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
core.take_mlx_products()
core.warn_of_narrow_kernel()
if not _multiplies_with_ours(core):
    warnings.warn("this MLX multiplies with a BLAS of its own, which may be slow, in models that mlx_lm runs on the CPU", stacklevel=3)
