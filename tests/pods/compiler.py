"""A compiler that takes no time: a step at a given MFU, in memory that a given rule fills."""

from collections.abc import Callable

import pytest

from lineage_jax.pods import DoesNotFitError, Plan, Request, search
from lineage_jax.pods.plan import ACTIVATIONS, TEMPORARIES
from lineage_jax.sharding import AXES


def stub(
    monkeypatch: pytest.MonkeyPatch,
    mfu: Callable[[Request], float],
    room: Callable[[Request], float],
    activations: Callable[[Request], float] | None = None,
) -> list[Request]:
    """Puts it in place of the real one, for sketches too; what it will be asked stands in the list.

    Args:
      monkeypatch: takes it away after the test.
      mfu: that a request reaches.
      room: the bytes that a request needs, all devices together.
      activations: how many of them are; all, if not given.
    """
    asked: list[Request] = []

    def make_plan(request: Request, tokens: float) -> Plan:
        asked.append(request)
        program, slice_ = request.program(), request.topology
        if program.batch_size % request.accumulate:
            raise ValueError("the batch does not divide")
        used, has = room(request), slice_.num_chips * slice_.chip.hbm_bytes
        if used > has:
            raise DoesNotFitError("does not fit: a device needs more; split it further")
        grows = activations(request) if activations else used
        peak = slice_.num_chips * slice_.chip.peak_flops
        per_second = mfu(request) * peak / program.flops_per_token
        hours = tokens / per_second / 3600
        axes = zip(AXES, request.mesh.sizes(slice_.num_devices), strict=True)
        return Plan(
            topology=slice_.name,
            chips=slice_.num_chips,
            mesh={axis: size for axis, size in axes if size > 1},
            params=1,
            tokens_per_step=program.tokens_per_step,
            hbm={
                ACTIVATIONS: 0,
                TEMPORARIES: round(grows / slice_.num_devices),
                "state": round((used - grows) / slice_.num_devices),
            },
            hbm_limit=has // slice_.num_devices,
            compute=program.tokens_per_step / per_second,
            memory=0.0,
            exposed=0.0,
            network=0.0,
            traffic=(),
            tokens_per_second_per_chip=per_second / slice_.num_chips,
            mfu=mfu(request),
            tokens=tokens,
            days=hours / 24,
            cost=hours * slice_.num_chips * slice_.chip.price,
            compile_seconds=0.0,
            assumptions=("a stub",),
        )

    monkeypatch.setattr(search, "make_plan", make_plan)
    monkeypatch.setattr(search, "make_sketch", make_plan)
    return asked
