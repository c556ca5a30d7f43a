"""Triton's CPU interpreter, made right and strict.

With TRITON_INTERPRET=1, set before Triton is imported, Triton runs a kernel as Python over numpy arrays, one program
after another. What the stock interpreter (3.6 to 3.9) does, and what it does after `install()`:

    bfloat16    Values are uint16 bit patterns, and arithmetic, dot, reductions and scans take them for integers; float32
                is truncated to bfloat16. -> Operands are widened to float32, the result is rounded to nearest even.
    bounds      An address outside the kernel's tensors reads or corrupts whatever lies there. -> Every load, store and
                atomic must hit elements of a tensor that was passed to the launch (the gaps of a strided view are outside).
    poison      A masked load without `other` gives 0 where the mask is off; on a GPU that is undefined. -> It gives NaN,
                or the largest integer.
    order       Programs run in ascending order. -> They run in a random order, fixed by a seed (`program_order`).
    products    The order in which numpy sums a float32 dot depends on the shape of the tile, so that two kernels get different bits
                for one number. -> It is summed as a GPU does without tensor cores: by fused multiply-adds, in the order of k.
    sums        Triton 3.6 takes the sum of a dot for float32 unless out_dtype says otherwise, 3.9 for what it is. -> It has to be said.
    subnormal   exp2, sqrt and rsqrt take and give subnormal numbers. -> To them these are zeros, as on NVIDIA's GPUs; sqrt_rn, products
                and quotients have them.
    booleans    The result of a comparison carries its operands' type, so that a later cast misreads it. -> It is int1.
    scalars     Triton 3.6 cannot use a scalar as a loop bound under numpy >= 2.4. -> It can.

Still more exact than a GPU: float32 dot ignores tf32, and a reduction of float16 or bfloat16 accumulates in float32.

All this replaces private functions of triton.runtime.interpreter. Each patch takes the function it replaces as its first
argument; one that is no longer there is an error that names it. What only makes it faster is in interpreter_speed.py.
"""

from __future__ import annotations

import contextlib
import functools
import random
from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

from fastprimer.interpreter_speed import FASTER

Handle = stock.TensorHandle


# bfloat16


def _is_bfloat16(handle) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar.name == "bf16"


def _widen(handle):
    if not _is_bfloat16(handle):
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(handle):
    """float32 to bfloat16, to nearest, ties to even: add half of the last place kept, less one if that place is even."""
    bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32).reshape(handle.data.shape)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return Handle(np.where(np.isnan(handle.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def _truncate(handle):
    bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32).reshape(handle.data.shape)
    return Handle((bits >> 16).astype(np.uint16), tl.bfloat16)


def _compute(original, builder, *operands):
    """An arithmetic operation; its result is bfloat16 if all of its operands are."""
    narrow = [_is_bfloat16(o) for o in operands if isinstance(o, Handle)]
    result = original(builder, *(map(_widen, operands) if any(narrow) else operands))
    if result.data.dtype.kind == "b":
        return Handle(result.data, tl.int1)
    return _round(result) if all(narrow) else result


def _dot(original, builder, a, b, accumulator, *options):
    if not a.dtype.scalar == b.dtype.scalar == accumulator.dtype.scalar == tl.float32:
        return _compute(original, builder, a, b, accumulator, *options)
    total, product = accumulator.data.copy(), np.empty(accumulator.data.shape)  # float64: the products are exact
    x, y = a.data.astype(np.float64), b.data.astype(np.float64)
    for k in range(x.shape[-1]):
        np.multiply(x[..., :, k, None], y[..., k, None, :], out=product)
        np.add(total, product, out=total, casting="same_kind")
    return Handle(total, tl.float32)


def _typed_dot(original, semantic, a, b, accumulator, *options):
    said = options[-1] or tl.float32
    if accumulator is not None and accumulator.dtype.scalar != said:
        raise TypeError(f"dot: Triton 3.6 expects out_dtype={accumulator.dtype.scalar} beside a sum of that type, got {said}")
    return original(semantic, a, b, accumulator, *options)


def _flushing(original, builder, argument):
    return _flushed(original(builder, _flushed(argument)))


def _flushed(handle):
    if handle.dtype.scalar != tl.float32:
        return handle
    subnormal = np.abs(handle.data) < np.finfo(np.float32).tiny
    return Handle(np.where(subnormal, np.copysign(np.float32(0), handle.data), handle.data), handle.dtype)


def _cast(original, builder, source, dtype, *rounding):
    if _is_bfloat16(source):
        source = _widen(source)
        if dtype.scalar == tl.float32:
            return source
    if dtype.scalar != tl.bfloat16:
        return original(builder, source, dtype, *rounding)
    if source.dtype.scalar != tl.float32:
        source = original(builder, source, tl.float32, *rounding)
    return _truncate(source) if stock._ir.ROUNDING_MODE.RTZ in rounding else _round(source)


def _bfloat16_constant(builder, value):
    return _round(Handle(np.array([value], dtype=np.float32), tl.float32))


def _retyped(tensor, handle):
    dtype = handle.dtype.scalar
    return tl.core.tensor(handle, tl.block_type(dtype, tensor.shape) if tensor.type.is_block() else dtype)


def _reduce_or_scan(original, operation, inputs):
    if not isinstance(inputs, tuple):
        return _reduce_or_scan(original, operation, (inputs,))[0]
    outputs = original(operation, tuple(_retyped(t, _widen(t.handle)) for t in inputs))
    narrow = [_is_bfloat16(t.handle) for t in inputs]
    return tuple(_retyped(t, _round(t.handle)) if was and t.dtype == tl.float32 else t for t, was in zip(outputs, narrow, strict=False))


# Memory


@dataclass(frozen=True)
class Extent:
    """The bytes of a tensor's elements: runs of `run` bytes, repeated along `outer` = [(stride in bytes, count)], widest first."""

    name: str
    start: int
    outer: list[tuple[int, int]]
    run: int

    @staticmethod
    def of(name: str, tensor) -> Extent:
        run, outer = tensor.element_size(), []
        for stride, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            stride *= tensor.element_size()
            if stride == run:
                run *= count
            elif stride and count > 1:
                outer.insert(0, (stride, count))
        return Extent(name, tensor.data_ptr(), outer, run)

    def contains(self, addresses: np.ndarray, size: int) -> np.ndarray:
        offset = (addresses - np.uint64(self.start)).view(np.int64)
        inside = offset >= 0
        for stride, count in self.outer:
            offset = offset - np.minimum(offset // stride, count - 1) * stride
        return inside & (offset + size <= self.run)


_extents: list[Extent] = []


def _prepare_launch(original, executor, args, kwargs):
    """Note the extents of a launch's tensors."""
    host_args, host_kwargs = original(executor, args, kwargs)
    _extents.clear()
    for name, argument in [*zip(executor.arg_names, host_args, strict=False), *host_kwargs.items()]:
        _note(name, argument)
    return host_args, host_kwargs


def _note(name: str, argument) -> None:
    if isinstance(argument, tuple):
        for element in argument:
            _note(name, element)
    elif isinstance(argument, stock.TensorDescriptor):
        _note(name, argument.base)
    elif hasattr(argument, "data_ptr"):
        tensor = stock._unwrap_tensor(argument)
        if tensor.numel():
            _extents.append(Extent.of(name, tensor))


@dataclass
class Traffic:
    """Bytes that kernels have loaded and stored."""

    bytes: int = 0


_traffic: list[Traffic] = []


@contextlib.contextmanager
def counted_traffic():
    """Within the block, count the bytes of every load, store and atomic that is not masked out; yields a Traffic."""
    _traffic.append(Traffic())
    try:
        yield _traffic[-1]
    finally:
        _traffic.pop()


def _check_bounds(builder, access: str, pointers, mask) -> None:
    addresses = np.ascontiguousarray(pointers.data[np.broadcast_to(mask, pointers.data.shape)])
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    for traffic in _traffic:
        traffic.bytes += addresses.size * size
    for extent in _extents:
        addresses = addresses[~extent.contains(addresses, size)]
        if not addresses.size:
            return
    if addresses.size:
        raise IndexError(f"out-of-bounds {access} by program {builder.grid_idx}: {addresses.size} addresses, {_place(int(addresses[0]))}")


def _place(address: int) -> str:
    before = [extent for extent in _extents if extent.start <= address]
    if not before:
        return "the first before every tensor of the launch"
    nearest = max(before, key=lambda extent: extent.start)
    return f"the first {address - nearest.start} bytes from the start of {nearest.name}"


_other_given = False


def _load(original, semantic, pointers, mask, other, *rest, **options):
    """Note that there is an `other`: one that is a single 0 Triton's `if other` takes for none, and so gives what was asked for."""
    global _other_given
    _other_given = other is not None
    try:
        return original(semantic, pointers, mask, other, *rest, **options)
    finally:
        _other_given = False


def _masked_load(original, builder, pointers, mask, other, *rest, **options):
    mask_data = np.asarray(mask.data)
    _check_bounds(builder, "load", pointers, mask_data)
    loaded = original(builder, pointers, mask, other, *rest, **options)
    if other is not None or _other_given or mask_data.all():
        return loaded
    return Handle(np.where(mask_data, loaded.data, _poison(loaded.data.dtype)), loaded.dtype)


def _poison(dtype: np.dtype):
    """NaN, or the largest integer: which taken as the bits of a bfloat16 or float8 is a NaN too."""
    if dtype.kind == "f":
        return dtype.type(np.nan)
    return dtype.type(True) if dtype == np.bool_ else dtype.type(np.iinfo(dtype).max)


def _masked_store(original, builder, pointers, value, mask, *rest, **options):
    _check_bounds(builder, "store", pointers, np.asarray(mask.data))
    return original(builder, pointers, value, mask, *rest, **options)


def _atomic_update(original, builder, operation, pointers, value, mask, *rest):
    _check_bounds(builder, "atomic", pointers, np.asarray(mask.data))
    return original(builder, operation, pointers, value, mask, *rest)


def _atomic_exchange(original, builder, pointers, *rest):
    _check_bounds(builder, "atomic", pointers, True)
    return original(builder, pointers, *rest)


# Order of programs


_seed: int | None = 0
_order: list[int] = []


@contextlib.contextmanager
def program_order(seed: int | None):
    """Within the block, the programs of a launch run in the random order of this seed, or ascending (None)."""
    global _seed
    before, _seed = _seed, seed
    try:
        yield
    finally:
        _seed = before


def _set_grid(original, builder, *grid):
    global _order
    original(builder, *grid)
    _order = list(range(grid[0] * grid[1] * grid[2]))
    if _seed is not None:
        random.Random(_seed).shuffle(_order)


def _set_program(original, builder, x, y, z):
    _, ny, nz = builder.grid_dim
    program, z = divmod(_order[(x * ny + y) * nz + z], nz)
    original(builder, *divmod(program, ny), z)


# The language


def _patch_language(original, function):
    """Replace the builtins once a launch, not again at every call of a device function, which took two thirds of a test's time."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return original(function)


@functools.cache
def _languages(function):
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def _patch_tensor(original, tensor, scope):
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


PATCHES = {
    "InterpreterBuilder.binary_op": _compute,
    "InterpreterBuilder.unary_op": _compute,
    "InterpreterBuilder.create_clampf": _compute,
    "InterpreterBuilder.create_fma": _compute,
    "InterpreterBuilder.create_exp2": _flushing,
    "InterpreterBuilder.create_sqrt": _flushing,
    "InterpreterBuilder.create_rsqrt": _flushing,
    "InterpreterBuilder.create_dot": _dot,
    "InterpreterBuilder.cast_impl": _cast,
    "InterpreterBuilder.create_fp_to_fp": _cast,
    "ReduceScanOpInterface.apply": _reduce_or_scan,
    "GridExecutor._init_args_hst": _prepare_launch,
    "TritonSemantic.dot": _typed_dot,
    "TritonSemantic.load": _load,
    "InterpreterBuilder.create_masked_load": _masked_load,
    "InterpreterBuilder.create_masked_store": _masked_store,
    "InterpreterBuilder.create_atomic_rmw": _atomic_update,
    "InterpreterBuilder.create_atomic_cas": _atomic_exchange,
    "InterpreterBuilder.set_grid_dim": _set_grid,
    "InterpreterBuilder.set_grid_idx": _set_program,
    "_patch_lang": _patch_language,
    "_patch_lang_tensor": _patch_tensor,
}


@functools.cache
def install() -> None:
    """Patch Triton's interpreter for the rest of the process."""
    for path, patch in PATCHES.items():
        _replace(path, functools.partial(_calling, patch))
    for path, faster in FASTER.items():
        _replace(path, faster)
    stock.InterpreterBuilder.get_bf16 = _bfloat16_constant  # Triton 3.6 has none.


def _calling(patch, original):
    @functools.wraps(original)
    def patched(*args, **kwargs):
        return patch(original, *args, **kwargs)

    return patched


def _replace(path: str, replacement) -> None:
    """Put what `replacement` makes of the original, a private function of Triton's, in its place."""
    owner, (*names, name) = stock, path.split(".")
    for part in names:
        owner = getattr(owner, part, None)
    original = getattr(owner, name, None)
    if original is None:
        raise RuntimeError(f"fastprimer.interpreter does not fit Triton {triton.__version__}: triton.runtime.interpreter.{path} has gone")
    setattr(owner, name, replacement(original))
