import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.planning import traffic
from gptjax.planning.hlo import Program


def compiled(function, *arguments) -> Program:
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


def on_mesh(shape, *axes) -> jax.ShapeDtypeStruct:
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("x",), axis_types=(AxisType.Auto,))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def replicate(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(like.sharding.mesh, PartitionSpec()))


def test_a_gathered_array_is_counted_in_every_turn_of_a_loop():
    weights = on_mesh((5, 64, 16), None, "x")

    def gather_each(layers):
        return jax.lax.scan(
            lambda total, w: (total + replicate(jnp.sin(w), weights), None), jnp.zeros((64, 16)), layers
        )[0]

    [found] = traffic.collectives(compiled(gather_each, weights))
    size = 64 * 16 * 4
    assert (found.kind, found.count) == ("all-gather", 5)
    assert found.payload_bytes == 5 * size
    assert found.sent_bytes == 5 * size * 7 // 8


def test_a_sum_over_devices_sends_twice():
    x = on_mesh((64, 32), "x")
    [found] = traffic.collectives(compiled(lambda rows: replicate(rows.sum(0), x), x))
    assert (found.kind, found.count, found.payload_bytes) == ("all-reduce", 1, 32 * 4)
    assert found.sent_bytes == 2 * 32 * 4 * 7 // 8


TPU = """HloModule jit_step, is_scheduled=true

%chained (p.0: bf16[8,128], p.1: f32[8,8]) -> (f32[8,8], bf16[64,128]) {
  %p.0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = f32[8,8]{1,0:T(8,128)} parameter(1)
  %work = f32[8,8]{1,0:T(8,128)} add(%p.1, %p.1)
  %all-gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=66, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}
  ROOT %t = (f32[8,8]{1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%work, %all-gather.1)
}

%chained.2 (p.0: bf16[8,128], p.1: f32[8,8]) -> (f32[8,8], bf16[64,128]) {
  %p.0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = f32[8,8]{1,0:T(8,128)} parameter(1)
  %work = f32[8,8]{1,0:T(8,128)} add(%p.1, %p.1)
  %all-gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=66, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}
  ROOT %t = (f32[8,8]{1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%work, %all-gather.1)
}

%all-reduce-scatter.4 (input: f32[64,128]) -> f32[8,128] {
  %input = f32[64,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[64,128]{1,0:T(8,128)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %offset = s32[] constant(0)
  ROOT %slice = f32[8,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.9, %offset, %offset), dynamic_slice_sizes={8,128}
}

ENTRY %main (a: bf16[8,128], b: f32[8,8], c: f32[64,128]) -> f32[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[8,8]{1,0:T(8,128)} parameter(1)
  %c = f32[64,128]{1,0:T(8,128)} parameter(2)
  %first = (f32[8,8]{1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) fusion(%a, %b), kind=kOutput, calls=%chained
  %second = (f32[8,8]{1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) fusion(%a, %b), kind=kOutput, calls=%chained.2
  %moved = f32[8,128]{1,0:T(8,128)} collective-permute(%c), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %out = f32[8,128]{1,0:T(8,128)} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.4
}
"""  # noqa: E501


def test_how_tpu_programs_write_collectives():
    """Fusions with the same channel are one collective; a reduce-scatter is an all-reduce in a fusion of that name."""
    found = {c.kind: c for c in traffic.collectives(Program(TPU))}
    assert (found["all-gather"].count, found["all-gather"].payload_bytes) == (1, 64 * 128 * 2)
    scattered = found["reduce-scatter"]
    assert (scattered.count, scattered.payload_bytes, scattered.sent_bytes) == (1, 64 * 128 * 4, 64 * 128 * 4 * 7 // 8)
    assert found["collective-permute"].sent_bytes == 8 * 128 * 4
    assert set(found) == {"all-gather", "reduce-scatter", "collective-permute"}


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 4),
        ("replica_groups=[4,2]<=[8], dimensions={0}", 2),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", 2),
        ("replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=4] {'fsdp'}, dimensions={0}", 8),
        ("replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=4] {'data','tensor'}, dimensions={0}", 8),
        ("replica_groups=mesh['axis_0'=16] {'axis_0':(1)4}, dimensions={0}", 4),
        ("source_target_pairs={{0,1},{1,0}}", 2),
        ("source_target_pairs={{0,0},{1,1}}", 1),
    ],
)
def test_group_sizes_of_every_notation(attributes, size):
    assert traffic.group_size(attributes) == size


def test_memory_traffic_of_a_product_is_its_operands_and_its_result():
    x, y = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 256), (256, 32)))
    program = compiled(lambda x, y: x @ y, x, y)
    assert traffic.memory_bytes(program) == (64 * 256 + 256 * 32 + 64 * 32) * 4


def test_a_slice_of_a_stack_is_read_and_not_the_stack():
    layers, size = 50, 64 * 64 * 4
    stack = jax.ShapeDtypeStruct((layers, 64, 64), jnp.float32)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    program = compiled(lambda x, stack: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, stack)[0], x, stack)
    assert layers * 3 * size <= traffic.memory_bytes(program) < layers * 12 * size


def test_the_largest_buffers_say_where_they_come_from():
    x = jax.ShapeDtypeStruct((8, 512), jnp.float32)
    program = compiled(lambda x: jnp.sin(x.T @ x).sum() + x.sum(), x)
    largest = traffic.largest_buffers(program)[0]
    assert (largest.shape, largest.num_bytes) == ("f32[512,512]", 512 * 512 * 4)
    assert "jit" in largest.op_name
