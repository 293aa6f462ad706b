"""The loops and branches of a kernel, read from the TPU compiler's listing by its jumps.

One back ends a loop, one ahead passes over a branch. How often a loop goes round stands in the
listing, if that is constant; how often a branch is taken never does.
"""

import dataclasses
import re

BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?\s*:\s*>*\s*{")
"""A line on which a bundle begins; what follows it, up to the next one, is told of it too."""
JUMP = re.compile(r"sbr\.rel (?:\(!?(%\w+)\) )?target = \$region(\d+)")
PLACE = re.compile(r"Start(?:/End empty)? region (\d+)")
ROUNDS = re.compile(
    r"(%\w+) = scmp[\w.]*totalorder (?:\(!?%\w+\), )?%\w+, (\d+) /\* loop exit test"
)
"""What a jump back depends on: it may be found out in a loop inside, on its last round."""

DELAY = 5
"""From a jump to the first bundle that is passed over, or to the first one after a loop: what a v5e
waits. On a chip that waits less, a few bundles after a loop are taken for its own."""

LEAST = 16
"""Bundles of a branch that is counted for itself; smaller ones count as if always taken."""


@dataclasses.dataclass(frozen=True)
class Region:
    """A loop of a kernel, a branch that may be passed over, or all of it.

    Attributes:
      bundles: of one time through it, without those of the regions inside.
      inner: the regions inside, in order.
      loop: whether it is a loop.
      rounds: of a loop, where the compiler knows.
    """

    bundles: int
    inner: tuple["Region", ...] = ()
    loop: bool = False
    rounds: int | None = None

    def parts(self) -> list[int]:
        """Bundles of what has a number of times of its own, in order; first what is always taken.

        Loops of constant rounds count in what they are in, so many times, and small branches once.
        """
        bundles, found = self.bundles, list[int]()
        for region in self.inner:
            mine, *others = region.parts()
            if region.loop and region.rounds is not None:
                bundles += region.rounds * mine
            elif not region.loop and mine < LEAST:
                bundles += mine
            else:
                found.append(mine)
            found += others
        return [bundles, *found]

    @property
    def size(self) -> int:
        """All its bundles, each once."""
        return self.bundles + sum(region.size for region in self.inner)


def regions(text: str) -> Region:
    """The loops and branches of a listing."""
    bundles = list[str]()
    for line in text.splitlines():
        if BUNDLE.match(line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += line
    places = dict[str, int]()
    for at, told in enumerate(bundles):
        places |= {number: at for number in PLACE.findall(told) if number not in places}
    found = [
        (at, test, places.get(to, len(bundles)))  # what begins behind the last bundle is not named
        for at, told in enumerate(bundles)
        for test, to in JUMP.findall(told)
    ]
    jumps = [(at, to) for at, _, to in found]
    rounds = {test: int(count) for told in bundles for test, count in ROUNDS.findall(told)}

    loops = sorted((to, at + DELAY) for at, to in jumps if to <= at)
    counts = {(to, at + DELAY): rounds[test] for at, test, to in found if test in rounds}

    branches = list[tuple[int, int]]()
    for at, to in sorted(jump for jump in jumps if jump[1] > jump[0]):
        begin, inside = at + DELAY, [end for start, end in branches if start <= at < end < to]
        begin = min(inside, default=begin)  # past the end of a branch: what follows is its other
        if begin < to and (begin, to) not in branches:
            branches.append((begin, to))

    spans = [(begin, end, True) for begin, end in loops] + [(*one, False) for one in branches]
    spans.sort(key=lambda span: (span[0], -span[1], span[2]))

    def take(begin: int, end: int) -> tuple[int, tuple[Region, ...]]:
        """Bundles from one to another without those of the regions between; and these."""
        left, inner = end - begin, list[Region]()
        while spans and spans[0][0] < end:
            start, stop, loop = spans.pop(0)
            often, stop = counts.get((start, stop)) if loop else None, min(stop, end)
            mine, regions = take(start, stop)
            inner.append(Region(mine, regions, loop, often))
            left -= stop - start
        return left, tuple(inner)

    return Region(*take(0, len(bundles)))
