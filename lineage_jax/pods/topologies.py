"""Slices of TPU chips that need not exist: "v5e:16x16" as devices, a mesh, and a torus of links."""

import dataclasses
import math
import re
from typing import Any

from jax.experimental import topologies
from jax.sharding import Mesh

from lineage_jax import sharding
from lineage_jax.pods.chips import CHIPS, Chip
from lineage_jax.sharding import MeshConfig

INSTALL = "pip install 'lineage-jax[tpu]' (it needs no TPU)"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: which chips, and how many of them along each dimension of their torus."""

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """The slice of a name such as "v5e:16x16" or "v5p:8x8x8".

        Raises:
          ValueError: for an unknown chip, or a shape of the wrong number of dimensions.
        """
        name, _, shape = text.partition(":")
        if name not in CHIPS:
            raise ValueError(
                f"topology {text!r}: wanted a chip of {', '.join(CHIPS)}, got {name!r}; write it "
                "as v5e:16x16"
            )
        chip = CHIPS[name]
        example = "x".join(["4"] * chip.torus_dims)
        if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{chip.torus_dims - 1}}}", shape):
            raise ValueError(
                f"topology {text!r}: the torus of {name} has {chip.torus_dims} dimensions, got "
                f"{shape!r}; write it as {name}:{example}"
            )
        return cls(chip, tuple(int(extent) for extent in shape.split("x")))

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Along which dimensions the last chip is a neighbour of the first."""
        at = self.chip.wraps_at
        if self.chip.torus_dims == 2:
            return tuple(extent == at for extent in self.shape)
        return (all(extent % at == 0 for extent in self.shape),) * len(self.shape)

    def devices(self) -> list[Any]:
        """The slice's devices, which can be compiled for and not computed with.

        Raises:
          ImportError: if libtpu is not installed.
          ValueError: if libtpu has no such slice.
        """
        try:
            import libtpu  # noqa: F401
        except ImportError as error:
            raise ImportError(f"the TPU compiler is not installed: {INSTALL}") from error
        how: dict[str, Any] = {}
        if min(self.shape[:2]) == 1:  # less than a host, which has 2 x 2 chips
            how["chips_per_host_bounds"] = [*self.shape, 1][:3]
        if self.chip.config:
            how["chip_config_name"] = self.chip.config
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **how)
        except Exception as error:  # whatever libtpu raises: it has no types of its own
            why = " ".join(str(error).split())
            raise ValueError(f"topology {self.name}: libtpu has no such slice ({why})") from error
        return list(found.devices)

    def mesh(self, config: MeshConfig) -> Mesh:
        """A mesh over the whole slice.

        Raises:
          ValueError: if the axes do not multiply to the number of devices.
        """
        config.sizes(self.num_devices)  # an error of one line before libtpu is loaded
        return sharding.make_mesh(config, self.devices())
