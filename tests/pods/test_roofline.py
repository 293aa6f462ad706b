"""FLOPs and bytes of single instructions, counted by hand."""

import pytest

from lineage_jax.pods import hlo, roofline


def counted(line: str, given: str, computations: str = "") -> tuple[int, int]:
    """FLOPs and bytes of the last line of a program."""
    entry = f"ENTRY %main (p: f32[]) -> f32[] {{\n{given}\n  {line}\n}}\n"
    module = hlo.parse(f"HloModule one\n{computations}\n{entry}")
    one = module.entry.root
    return roofline.flops(module, module.entry, one), roofline.moved(module, module.entry, one)


PRODUCT = """
  %x = bf16[4,256,64] parameter(0)
  %w = bf16[64,512] parameter(1)
"""
GRADIENT = """
  %x = bf16[4,256,64] parameter(0)
  %w = bf16[4,256,512] parameter(1)
"""
BATCH = """
  %x = bf16[8,256,64] parameter(0)
  %w = bf16[8,64,128] parameter(1)
"""


@pytest.mark.parametrize(
    ("given", "line", "expected"),
    [
        (
            PRODUCT,
            "ROOT %y = bf16[4,256,512] dot(%x, %w), lhs_contracting_dims={2}, "
            "rhs_contracting_dims={0}",
            2 * 4 * 256 * 64 * 512,
        ),
        (
            PRODUCT.replace("[64,512]", "[64,512,1]"),
            "ROOT %y = bf16[4,256,512] convolution(%x, %w), window={size=1}, "
            "dim_labels=0bf_io0->0bf",
            2 * 4 * 256 * 64 * 512,
        ),
        (  # x^T g: the rows of the batch are a window, and summed
            GRADIENT,
            "ROOT %y = bf16[64,512,1] convolution(%x, %w), window={size=4}, "
            "dim_labels=0fb_0io->bf0",
            2 * 4 * 256 * 64 * 512,
        ),
        (  # one row of a batch meets the four of another, one at a time: the rest is padding
            """
  %x = bf16[512,64,1] parameter(0)
  %w = bf16[4,256,64] parameter(1)
""",
            "ROOT %y = bf16[512,4,256] convolution(%x, %w), window={size=4 pad=3_3 "
            "rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
            2 * 4 * 256 * 64 * 512,
        ),
        (  # eight products; dilated with zeros, the eight windows meet one matrix each
            BATCH,
            "ROOT %y = bf16[8,256,128] convolution(%x, %w), window={size=8 stride=7 pad=0_0 "
            "lhs_dilate=8}, dim_labels=0bf_0io->0bf",
            2 * 8 * 256 * 64 * 128,
        ),
    ],
)
def test_products_are_counted_in_each_way_they_are_written(given, line, expected):
    assert counted(line, given)[0] == expected


def test_a_fusion_counts_the_products_in_it_and_reads_what_they_read():
    inside = """
%fused (a: bf16[4,256,64], b: bf16[32,64,512], n: s32[]) -> bf16[4,256,512] {
  %a = bf16[4,256,64] parameter(0)
  %b = bf16[32,64,512] parameter(1)
  %n = s32[] parameter(2)
  %zero = s32[] constant(0)
  %layer = bf16[1,64,512] dynamic-slice(%b, %n, %zero, %zero), dynamic_slice_sizes={1,64,512}
  %turned = bf16[64,512,1] bitcast(%layer)
  ROOT %y = bf16[4,256,512] convolution(%a, %turned), window={size=1}, dim_labels=0bf_io0->0bf
}
"""
    given = """
  %x = bf16[4,256,64] parameter(0)
  %stacked = bf16[32,64,512] parameter(1)
  %n = s32[] parameter(2)
"""
    line = "ROOT %f = bf16[4,256,512] fusion(%x, %stacked, %n), kind=kOutput, calls=%fused"
    flops, moved = counted(line, given, inside)
    assert flops == 2 * 4 * 256 * 64 * 512
    assert moved == 2 * (4 * 256 * 64 + 64 * 512 + 4 * 256 * 512) + 4  # one layer of 32


def test_an_update_in_place_moves_the_update_alone():
    inside = """
%fused (all: f32[32,1024], one: f32[1024], n: s32[]) -> f32[32,1024] {
  %all = f32[32,1024] parameter(0)
  %one = f32[1024] parameter(1)
  %n = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,1024] bitcast(%one)
  ROOT %put = f32[32,1024] dynamic-update-slice(%all, %row, %n, %zero)
}
"""
    given = """
  %all = f32[32,1024] parameter(0)
  %one = f32[1024] parameter(1)
  %n = s32[] parameter(2)
"""
    line = "ROOT %f = f32[32,1024] fusion(%all, %one, %n), kind=kLoop, calls=%fused"
    assert counted(line, given, inside) == (0, 2 * 4096 + 4)


def test_what_stays_on_the_chip_does_not_pass_its_memory():
    inside = """
%fused (a: f32[1024], b: f32[1024]) -> (f32[1024], f32[1024]) {
  %a = f32[1024] parameter(0)
  %b = f32[1024] parameter(1)
  %sum = f32[1024] add(%a, %b)
  %product = f32[1024] multiply(%a, %b)
  ROOT %both = (f32[1024], f32[1024]) tuple(%sum, %product)
}
"""
    given = """
  %a = f32[1024]{0:T(1024)S(1)} parameter(0)
  %b = f32[1024]{0:T(1024)} parameter(1)
"""
    line = (
        "ROOT %f = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}) fusion(%a, %b), kind=kLoop, "
        "calls=%fused"
    )
    assert counted(line, given, inside) == (0, 2 * 4096)


def test_a_table_is_not_read_whole_for_a_few_of_its_rows():
    given = """
  %table = bf16[32000,64] parameter(0)
  %rows = s32[16,1] parameter(1)
"""
    line = "ROOT %g = bf16[16,64] gather(%table, %rows), slice_sizes={1,64}"
    assert counted(line, given) == (0, 2 * 2 * 16 * 64 + 64)
