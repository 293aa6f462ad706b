"""What of a program's arrays one loop leaves for another."""

from lineage_jax.pods import hlo
from lineage_jax.pods.memory import activations

LAYERS, ROW = 12, 1024 * 4

PROGRAM = """HloModule step, is_scheduled=true

%filled (all: f32[12,1024], one: f32[1024], n: s32[]) -> (f32[1024], f32[12,1024]) {
  %all = f32[12,1024] parameter(0)
  %one = f32[1024] parameter(1)
  %n = s32[] parameter(2)
  %zero = s32[] constant(0)
  %twice = f32[1024] add(%one, %one)
  %row = f32[1,1024] bitcast(%twice)
  %put = f32[12,1024] dynamic-update-slice(%all, %row, %n, %zero)
  ROOT %both = (f32[1024], f32[12,1024]) tuple(%twice, %put)
}

%layer (p: (s32[], f32[1024], f32[12,1024], f32[12,1024])) -> (s32[], f32[1024], f32[12,1024], \
f32[12,1024]) {
  %p = (s32[], f32[1024], f32[12,1024], f32[12,1024]) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %x = f32[1024] get-tuple-element(%p), index=1
  %saved = f32[12,1024] get-tuple-element(%p), index=2
  %weights = f32[12,1024] get-tuple-element(%p), index=3
  %step = (f32[1024], f32[12,1024]) fusion(%saved, %x, %n), kind=kLoop, calls=%filled
  %next = f32[1024] get-tuple-element(%step), index=0
  %stack = f32[12,1024] get-tuple-element(%step), index=1
  %held = f32[12,1024] copy(%stack)
  ROOT %t = (s32[], f32[1024], f32[12,1024], f32[12,1024]) tuple(%n, %next, %held, %weights)
}

%less (p: (s32[], f32[1024], f32[12,1024], f32[12,1024])) -> pred[] {
  %p = (s32[], f32[1024], f32[12,1024], f32[12,1024]) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %bound = s32[] constant(12)
  ROOT %c = pred[] compare(%n, %bound), direction=LT
}

ENTRY %main (x: f32[1024], w: f32[12,1024], b: f32[12,1024]) -> f32[12,1024] {
  %x = f32[1024] parameter(0)
  %w = f32[12,1024] parameter(1)
  %b = f32[12,1024] parameter(2)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[1024], f32[12,1024], f32[12,1024]) tuple(%zero, %x, %b, %w)
  %forward = (s32[], f32[1024], f32[12,1024], f32[12,1024]) while(%begin), condition=%less, \
body=%layer
  %last = f32[1024] get-tuple-element(%forward), index=1
  %left = f32[12,1024] get-tuple-element(%forward), index=2
  %same = f32[12,1024] get-tuple-element(%forward), index=3
  %turn = (s32[], f32[1024], f32[12,1024], f32[12,1024]) tuple(%zero, %last, %w, LEFT)
  %backward = (s32[], f32[1024], f32[12,1024], f32[12,1024]) while(%turn), condition=%less, \
body=%layer
  ROOT %grads = f32[12,1024] get-tuple-element(%backward), index=2
}
"""


def test_activations_are_what_one_loop_fills_and_a_later_one_takes():
    # The second loop fills an array of its own, of gradients, which no loop takes.
    assert activations(hlo.parse(PROGRAM.replace("LEFT", "%left"))) == LAYERS * ROW


def test_what_a_loop_passes_on_as_it_was_is_no_activation():
    assert activations(hlo.parse(PROGRAM.replace("LEFT", "%same"))) == 0
