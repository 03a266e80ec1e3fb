"""How kernels are compiled: cached on disk, free of the interpreter's lock, typed for mypy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])


def _drop_stale_cache(package: Path) -> None:
    """Forget compiled kernels that are older than any source of the package.

    Numba looks only at the file a kernel stands in, not at the kernels it calls from other files, so it
    would go on running the old form of those.
    """
    newest = max(source.stat().st_mtime for source in package.glob("*.py"))
    for index in (package / "__pycache__").glob("*.nbi"):
        with suppress(OSError):
            if index.stat().st_mtime < newest:
                index.unlink()


_drop_stale_cache(Path(__file__).parent)


def kernel(function: Function) -> Function:
    """Compile with numba; where no directory can hold the cache, without one."""
    try:
        return cast(Function, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:
        return cast(Function, numba.njit(nogil=True)(function))


def inlined(function: Function) -> Function:
    """kernel, for what runs once a row and is small: its code stands at each of its calls."""
    try:
        return cast(Function, numba.njit(cache=True, nogil=True, forceinline=True)(function))
    except RuntimeError:
        return cast(Function, numba.njit(nogil=True, forceinline=True)(function))


def compiled(function: Callable[..., Any]) -> Any:
    """Compile with numba without a cache on disk, for functions that are not of this package."""
    return numba.njit(nogil=True)(function)


def _prefetch(_typing_context: Any, array: Any, index: Any) -> Any:
    """Numba's form of an intrinsic: the signature, and the code that LLVM shall make of it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type = signature.args[0]
        value = context.make_array(array_type)(context, builder, arguments[0])
        position = arguments[1]
        if array_type.ndim == 2:
            columns = builder.extract_value(value.shape, 1)
            position = builder.mul(position, columns)
        address = builder.bitcast(builder.gep(value.data, [position]), ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [address.type, flag, flag, flag])
        instruction = builder.module.declare_intrinsic("llvm.prefetch", [address.type], function_type)
        # For reading, kept in every cache level, data rather than instructions.
        builder.call(instruction, [address, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


prefetch: Any = intrinsic(_prefetch)
"""prefetch(array, index): ask for the cache line of a row without waiting; contiguous arrays only."""


def _without_owner(context: Any, builder: Any, numba_type: Any, value: Any) -> Any:
    """The same arrays, in tuples of tuples, with nobody to count references for."""
    if isinstance(numba_type, types.Array):
        array = context.make_array(numba_type)(context, builder, value)
        array.meminfo = ir.Constant(array.meminfo.type, None)
        return array._getvalue()
    if isinstance(numba_type, types.BaseTuple):
        for place in range(len(numba_type)):
            part = builder.extract_value(value, place)
            part = _without_owner(context, builder, cast(Any, numba_type)[place], part)
            value = builder.insert_value(value, part, place)
    return value


def _borrowed(_typing_context: Any, value: Any) -> Any:
    """Numba's form of an intrinsic."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _without_owner(context, builder, signature.args[0], arguments[0])

    return value(value), generate


borrowed: Any = intrinsic(_borrowed)
"""borrowed(arrays): an array, or tuples of arrays, for use until the caller of the kernel has its answer.

Numba counts an array's references at each call and each read of a tuple, with an atomic instruction; a kernel
whose caller holds the arrays anyway saves them, half of its time where rows come and go. Never return one.
"""
