"""What an instruction computes and moves, counted: a bound on its time without a compiler's word.

Williams et al. 2009, "Roofline" (https://doi.org/10.1145/1498765.1498785): it takes as long as its
FLOPs at the peak, or as its bytes at the memory's bandwidth, whichever is longer.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from lineage_jax.pods.hlo import Computation, Instruction, Module

PRODUCTS = frozenset({"convolution", "dot"})
"""Opcodes of matrix products; a TPU's are all convolutions."""

SAME = frozenset({"bitcast", "get-tuple-element", "copy", "reshape", "transpose", "convert"})
"""Opcodes whose result is read for what they are of, where they are fused with what reads it."""

SLICES = frozenset({"dynamic-slice", "slice", "gather"})
"""Opcodes that read as much of their first operand as they return."""


def flops(module: Module, computation: Computation, one: Instruction) -> int:
    """Of the matrix products in an instruction: a multiplication and an addition for each term."""
    inside = [(computation, one), *module.inside(one)]
    return sum(terms(where, inner) for where, inner in inside if inner.opcode in PRODUCTS) * 2


def terms(computation: Computation, product: Instruction) -> int:
    """Pairs of numbers that a product multiplies."""
    left, right = (operand.arrays[0].dims for operand in computation.operands(product))
    out = product.arrays[0].dims
    if axes := re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes):
        return math.prod(out) * math.prod(left[int(axis)] for axis in axes[1].split(",") if axis)
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes)
    assert found is not None, product.attributes
    given, kernel, made = (
        dict(zip(labels, dims, strict=True))
        for labels, dims in zip(found.groups(), (left, right, out), strict=True)
    )
    count = made["b"] * made["f"] * kernel["i"]
    for axis in (label for label in made if label.isdigit()):
        count *= meetings(given[axis], kernel[axis], made[axis], window(product, int(axis)))
    return count


def window(convolution: Instruction, axis: int) -> dict[str, int]:
    """Of one spatial axis: its stride, dilations, and the padding before it."""
    found = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    each = {name: value.split("x")[axis].split("_")[0] for name, value in fields.items()}
    defaults = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
    return {name: int(each.get(name, default)) for name, default in defaults.items()}


def meetings(left: int, right: int, out: int, window: Mapping[str, int]) -> int:
    """How often a number of the left meets one of the right along one axis of a convolution.

    Padding does not count, nor do zeros between what is dilated: a TPU writes products of a batch
    of matrices so.
    """
    stretch = window["lhs_dilate"]
    at = np.arange(out)[:, None] * window["stride"] + np.arange(right) * window["rhs_dilate"]
    at -= window["pad"]
    return int(((at >= 0) & (at < left * stretch) & (at % stretch == 0)).sum())


def moved(module: Module, computation: Computation, one: Instruction) -> int:
    """Bytes of a device's memory that an instruction reads and writes, once each."""
    operands = computation.operands(one)
    read = sum(
        used(module, computation, one, position)
        for position, operand in enumerate(operands)
        if operand.bytes and operand.arrays[0].space == 0
    )
    return read + written(module, computation, one)


def used(module: Module, computation: Computation, one: Instruction, position: int) -> int:
    """Bytes of one of its operands that an instruction reads."""
    whole = computation.operands(one)[position].bytes
    if one.opcode == "fusion":
        inside = module.called(one)
        return min(whole, read(module, inside, inside.parameters[position]))
    if one.opcode in SLICES and position == 0:
        return min(whole, one.bytes)
    if one.opcode == "dynamic-update-slice" and position == 0:  # in place
        return 0
    return whole


def read(module: Module, computation: Computation, one: Instruction) -> int:
    """Bytes of an instruction's result that the others read, each of them for itself."""
    return sum(
        read(module, computation, user)
        if user.opcode in SAME and not user.root
        else used(module, computation, user, position)
        for user in computation.instructions.values()
        for position, name in enumerate(user.operands)
        if name == one.name and user.opcode not in ("parameter", "constant")
    )


def written(module: Module, computation: Computation, one: Instruction) -> int:
    """Bytes of its result that an instruction writes to memory."""
    if one.arrays and all(array.space for array in one.arrays):  # on the chip
        return 0
    if one.opcode == "fusion":
        inside = module.called(one)
        results = [inside.root]
        if inside.root.opcode == "tuple":
            results = inside.operands(inside.root)
            if len(results) == len(one.arrays):
                results = [x for x, to in zip(results, one.arrays, strict=True) if not to.space]
        return sum(written(module, inside, result) for result in results)
    if one.opcode == "bitcast":
        return written(module, computation, computation.operands(one)[0])
    if one.opcode == "dynamic-update-slice":
        return computation.operands(one)[1].bytes
    return one.bytes
