"""Which part of a step's memory layers leave for the backward pass."""

import re

from lineage_jax.pods.hlo import Computation, Instruction, Module

AGAIN = ("bitcast", "copy", "copy-start", "copy-done", "opt-barrier")
"""Opcodes whose result holds what their operand does."""


def activations(module: Module) -> int:
    """Bytes of a device's arrays that one loop fills, a part in each round, and a later one takes.

    A loop over layers leaves what the loop of their gradients reads; a gradient that a loop fills
    goes to no loop after it.
    """
    total = 0
    for computation in module.computations.values():
        loops = [one for one in computation.instructions.values() if one.opcode == "while"]
        for loop in loops:
            body = module.called(loop, "body")
            taken = {
                name
                for other in loops
                if other is not loop
                for name in sources(computation, other.operands[0])
            }
            for index, result in enumerate(body.operands(body.root)):
                element = f"{loop.name}[{index}]"
                if element in taken and in_place(module, body, result):
                    total += loop.arrays[index].bytes
    return total


def sources(computation: Computation, name: str) -> set[str]:
    """Elements of loops' results, as "while.1[2]", that a tuple holds."""
    found = set()
    for part in computation.instructions[name].operands:
        one = computation.instructions[part]
        while one.opcode in AGAIN:
            one = computation.instructions[one.operands[0]]
        if one.opcode == "get-tuple-element":
            found.add(f"{one.operands[0]}[{index_of(one)}]")
    return found


def in_place(module: Module, computation: Computation, one: Instruction) -> bool:
    """Whether an instruction returns one of its operands with a part of it replaced."""
    while one.opcode in AGAIN:
        one = computation.instructions[one.operands[0]]
    if one.opcode == "get-tuple-element":
        index, one = index_of(one), computation.instructions[one.operands[0]]
        if one.opcode != "fusion":
            return False
        computation = module.called(one)
        return in_place(module, computation, computation.operands(computation.root)[index])
    if one.opcode == "fusion":
        computation = module.called(one)
        return in_place(module, computation, computation.root)
    return one.opcode == "dynamic-update-slice"


def index_of(element: Instruction) -> int:
    """Of a tuple, which element it is."""
    found = re.search(r"\bindex=(\d+)", element.attributes)
    assert found is not None, element.attributes
    return int(found[1])
