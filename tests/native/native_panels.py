"""Panels of NumPy memory with watched surroundings, and a lender of what NumPy cannot express, such as bfloat16."""

from __future__ import annotations

import ctypes
import os

import numpy as np

WORKING = ("float64", "float32")
STORAGE = ("float64", "float32", "bfloat16", "float16")
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}

CPU, CUDA, CUDA_HOST, METAL = 1, 2, 3, 8
FLOAT, BFLOAT = 2, 4

# Quiet NaNs that no computation gives: whoever reads them spoils its result, whoever writes over them is seen.
_CANARIES = {
    "float64": (np.uint64, 0x7FF8_DEAD_BEEF_DEAD),
    "float32": (np.uint32, 0x7FC0_DEAD),
    "bfloat16": (np.uint16, 0x7FDE),
    "float16": (np.uint16, 0x7EAD),
}
# Elements on both sides of a panel. None for the address sanitizer: a panel that fills its allocation to the last byte
# has the sanitizer's own guards next to it, which see reads as well.
GUARD = 0 if os.environ.get("HESD_NATIVE_SANITIZER") == "address" else 16


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_ManagedTensor))
_ManagedTensor._fields_ = (("tensor", _Tensor), ("manager_context", ctypes.c_void_p), ("deleter", _Deleter))

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Lender:
    """Lends memory by DLPack exactly as told, right or wrong; counts what it gave and what came back.

    ``strides=None`` is DLPack's way of saying compact row-major.
    """

    def __init__(
        self,
        memory: np.ndarray,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        code: int = FLOAT,
        bits: int | None = None,
        lanes: int = 1,
        device: int = CPU,
        device_number: int = 0,
        byte_offset: int = 0,
        name: bytes = b"dltensor",
    ):
        self.borrowed = 0
        self.returned = 0
        self._memory = memory
        self._name = name
        self._device = (device, device_number)
        dimensions = len(shape)
        self._shape = (ctypes.c_int64 * dimensions)(*shape)
        self._strides = None if strides is None else (ctypes.c_int64 * dimensions)(*strides)
        tensor = _Tensor(
            memory.ctypes.data,
            _Device(device, device_number),
            dimensions,
            _DataType(code, memory.itemsize * 8 if bits is None else bits, lanes),
            ctypes.cast(self._shape, ctypes.POINTER(ctypes.c_int64)),
            ctypes.cast(self._strides, ctypes.POINTER(ctypes.c_int64)) if strides is not None else None,
            byte_offset,
        )
        self._managed = _ManagedTensor(tensor, None, _Deleter(self._take_back))

    def _take_back(self, managed) -> None:
        self.returned += 1

    def __dlpack__(self, **options):
        self.borrowed += 1
        return _new_capsule(ctypes.addressof(self._managed), self._name, None)

    def __dlpack_device__(self):
        return self._device


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even; the bits as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Panel:
    """Vectors `padding` elements further apart than their length, with canaries in between and around."""

    def __init__(self, values: np.ndarray, precision: str = "float64", padding: int = 3):
        values = np.asarray(values)
        self.precision = precision
        self.rows, self.columns = values.shape
        self.stride = self.columns + padding
        word, canary = _CANARIES[precision]
        length = (self.rows - 1) * self.stride + self.columns if self.rows > 0 else 0
        self._words = np.full(length + 2 * GUARD, canary, dtype=word)
        inner = self._words[GUARD : GUARD + length]
        self._cells = np.lib.stride_tricks.as_strided(
            inner, (self.rows, self.columns), (self.stride * word().itemsize, word().itemsize)
        )
        if precision == "bfloat16":
            self.array = None
            self.borrowed = Lender(inner, values.shape, (self.stride, 1), code=BFLOAT)
            self._cells[...] = to_bfloat16(values)
        else:
            self.array = self.borrowed = self._cells.view(np.dtype(precision)) if self.columns else self._empty()
            self.array[...] = values
        self._before = self._words.copy()

    def _empty(self) -> np.ndarray:
        return np.empty((self.rows, 0), dtype=self.precision)

    @property
    def values(self) -> np.ndarray:
        """What is stored, in float64."""
        if self.precision == "bfloat16":
            return from_bfloat16(self._cells).astype(np.float64)
        return self.array.astype(np.float64)

    def rows_of(self, first: int, count: int) -> np.ndarray:
        """Return a view of some vectors."""
        return self.array[first : first + count]

    def assert_surroundings_untouched(self) -> None:
        """Nothing was written outside the vectors."""
        now = self._words.copy()
        if self.rows * self.columns > 0:
            inner = now[GUARD : len(now) - GUARD]
            cells = np.lib.stride_tricks.as_strided(inner, self._cells.shape, self._cells.strides)
            before = self._before[GUARD : len(now) - GUARD]
            cells[...] = np.lib.stride_tricks.as_strided(before, self._cells.shape, self._cells.strides)
        assert np.array_equal(now, self._before)

    def assert_untouched(self) -> None:
        """Nothing at all was written."""
        assert np.array_equal(self._words, self._before)


def unset(rows: int, columns: int, precision: str = "float64", padding: int = 3) -> Panel:
    """A panel of NaNs: what a kernel overwrites must not be read."""
    return Panel(np.full((rows, columns), np.nan), precision, padding)
