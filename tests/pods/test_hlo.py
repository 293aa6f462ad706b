"""Lines of HLO as compilers write them, and what is read of them."""

import pytest

from lineage_jax.pods import hlo

MODULE = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%body (arg: (u32[], bf16[8,128])) -> (u32[], bf16[8,128]) {
  %arg = (u32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  ROOT %out = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) fusion(%arg), kind=kLoop, \
calls=%nothing, metadata={op_name="jit(step)/while/body" source_file="a (b.py"}, \
backend_config={"window_config":{"estimated_cycles":"123"}}
}

%condition (arg.1: (u32[], bf16[8,128])) -> pred[] {
  %arg.1 = (u32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %bound = u32[]{:T(128)} constant(12)
  %counter = u32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

ENTRY %main.9_spmd (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %start = (u32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%p, %p)
  %loop = (u32[]{:T(128)}, bf16[8,128]{1,0}) while(%start), condition=%condition, body=%body
  %kernel = bf16[8,128]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"masked":"0.4"
}}, metadata={
op_name="a kernel
of two lines"}
  ROOT %result = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.parse(MODULE)


def test_computations_are_found_and_the_entry_is_known(module):
    assert set(module.computations) == {"body", "condition", "main.9_spmd"}
    assert module.entry.name == "main.9_spmd"
    assert module.num_partitions == 8


def test_arrays_have_their_sizes_and_their_memory(module):
    (argument,) = [module.computations["body"].instructions["arg"]]
    assert [array.dims for array in argument.arrays] == [(), (8, 128)]
    assert [array.bytes for array in argument.arrays] == [4, 2048]
    assert [array.space for array in argument.arrays] == [0, 1]


def test_instructions_keep_the_order_they_run_in(module):
    names = list(module.entry.instructions)
    assert names == ["p", "start", "loop", "kernel", "result"]
    assert module.entry.root.name == "result"


def test_a_line_that_metadata_breaks_is_one_instruction(module):
    kernel = module.entry.instructions["kernel"]
    assert kernel.opcode == "custom-call"
    assert kernel.operands == ("p",)
    assert '"masked":"0.4"' in kernel.attributes
    assert "of two lines" in kernel.attributes


def test_cycles_and_calls_are_read_from_attributes(module):
    out = module.computations["body"].root
    assert out.cycles == 123
    assert out.calls == {"calls": ("nothing",)}


def test_an_unsigned_counter_gives_the_rounds_of_its_loop(module):
    assert module.trips(module.entry.instructions["loop"]) == 12


def test_the_compilers_own_count_of_rounds_goes_first():
    text = MODULE.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    module = hlo.parse(text)
    assert module.trips(module.entry.instructions["loop"]) == 7


def test_a_loop_without_a_constant_bound_has_no_known_rounds():
    text = MODULE.replace("%bound = u32[]{:T(128)} constant(12)", "%bound = u32[] copy(%arg.1)")
    module = hlo.parse(text)
    assert module.trips(module.entry.instructions["loop"]) is None


@pytest.mark.parametrize(
    ("dtype", "bytes_"),
    [("pred", 3), ("bf16", 6), ("f32", 12), ("f8e4m3fn", 3), ("s4", 2), ("c64", 24), ("token", 0)],
)
def test_every_type_has_its_bytes(dtype, bytes_):
    assert hlo.Array(dtype, (3,)).bytes == bytes_


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match="wanted the text of an HLO module"):
        hlo.parse("hello")
