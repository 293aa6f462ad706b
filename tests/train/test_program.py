"""What is compiled to train, apart from the data."""

import dataclasses

from experiments import gpt
from lineage_jax import sharding
from lineage_jax.sharding import MeshConfig


def test_the_step_is_compiled_for_a_mesh_without_data_or_state():
    tiny = gpt.tiny()
    small = dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, num_layers=2, embed_dim=16, num_heads=2, max_len=8),
        data=dataclasses.replace(tiny.data, batch_size=8, seq_len=8),
    )
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    compiled = small.program().compile_for(mesh, accumulate=2)
    assert compiled.memory_analysis().argument_size_in_bytes > 0
    assert "all-gather" in compiled.as_text()  # of the parameters, over fsdp
