"""What an instruction computes and moves, counted: a bound on its time without a compiler's word.

Williams et al. 2009, "Roofline" (https://doi.org/10.1145/1498765.1498785): it takes as long as its
FLOPs at the peak, or as its bytes at the memory's bandwidth, whichever is longer.
"""

import math
import re

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
    """Pairs of numbers that a product multiplies.

    Where a convolution's left side is dilated, its zeros do not count: a TPU writes products of a
    batch of matrices so.
    """
    left, right = (operand.arrays[0].dims for operand in computation.operands(product))
    if axes := re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes):
        summed = math.prod(left[int(axis)] for axis in axes[1].split(",") if axis)
    else:
        labels = re.search(r"dim_labels=\w+_(\w+)->", product.attributes)
        assert labels is not None, product.attributes
        summed = math.prod(right) // right[labels[1].index("o")]
        if dilated := re.search(r"lhs_dilate=([\dx]+)", product.attributes):
            summed //= math.prod(map(int, dilated[1].split("x")))
    return math.prod(product.arrays[0].dims) * summed


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
