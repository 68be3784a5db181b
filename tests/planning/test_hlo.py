from gptjax.planning.hlo import ArrayShape, Program, parse_instruction

LOOP = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[8,128]{1,0})->bf16[8,128]{1,0}}

%fused_add (p.0: bf16[8,128]) -> bf16[8,128] {
  %p.0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %add.1 = bf16[8,128]{1,0:T(8,128)(2,1)} add(%p.0, %p.0)
}

%body (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused_add, metadata={op_name="jit(step)/while/body/add"}
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%i, %y)
}

%condition (state.1: (s32[], bf16[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  %state.1 = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (arg: bf16[8,128]) -> bf16[8,128] {
  %arg = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="batch[\\'tokens\\']"}
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%zero, %arg)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %result = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_loop_counts_as_often_as_it_turns():
    program = Program(LOOP)
    assert program.entry == "main"
    assert program.counts == {"main": 1, "body": 12, "fused_add": 12}
    assert program.fused == {"fused_add"}


def test_a_trip_count_that_the_compiler_notes_comes_first():
    noted = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert Program(noted).counts["body"] == 7


def test_a_loop_without_a_known_bound_counts_once():
    assert Program(LOOP.replace("constant(12)", "parameter(1)")).counts["body"] == 1


def test_an_instruction_is_taken_apart():
    shapes = "(f32[8,100]{1,0:T(8,128)}, bf16[3]{0:T(256)S(1)})"
    line = f"  ROOT %f.1 = {shapes} fusion(%a, /*index=1*/%b.2), kind=kLoop, calls=%c"
    instruction = parse_instruction(line)
    assert (instruction.name, instruction.opcode, instruction.is_root) == ("f.1", "fusion", True)
    assert instruction.operands == ("a", "b.2")
    assert instruction.attribute("calls") == "c"
    assert [str(shape) for shape in instruction.shapes] == ["f32[8,100]", "bf16[3]"]
    assert [shape.in_main_memory for shape in instruction.shapes] == [True, False]
    assert parse_instruction("  }") is None


def test_op_names_are_unquoted():
    assert Program(LOOP).computations["main"]["arg"].op_name == "batch['tokens']"


def test_bytes_in_memory_are_padded_to_whole_tiles():
    assert ArrayShape("f32", (3, 100), "1,0:T(8,128)").padded_bytes == 8 * 128 * 4
    assert ArrayShape("f32", (100, 3), "0,1:T(8,128)").padded_bytes == 128 * 8 * 4  # the first dimension varies fastest
    assert ArrayShape("bf16", (5, 1024, 64), "2,1,0:T(8,128)(2,1)").padded_bytes == 5 * 1024 * 128 * 2
    assert ArrayShape("f32", (3, 100), "1,0").padded_bytes == 3 * 100 * 4
    assert ArrayShape("pred", ()).padded_bytes == 1
