import subprocess
import sys

import jax
import pytest

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.planning.compilation import compile_step, too_large
from gptjax.training.program import Program


@pytest.fixture
def config(tiny_config):
    tiny_config.model.update(vocab_size=128, num_heads=4)
    return config_lib.resolve(tiny_config, 128, 10.0)


def with_mesh(config, **mesh):
    changed = config.copy_and_resolve_references()
    changed.mesh.update(mesh)
    return changed


def test_the_arguments_are_the_state_and_the_batch_of_one_device(config):
    facts = compile_step(with_mesh(config, data=1, fsdp=8), jax.devices(), topology="local", available_bytes=2**30)
    state = 3 * 4 * facts.parameters / 8  # parameters and two moments; norms, which are whole, are few
    batch = 5 * 4 * config.train.batch_size * config.model.context_length / 8
    assert state + batch <= facts.memory.arguments < 1.2 * state + batch
    assert facts.memory.aliased >= state
    assert facts.fits
    assert facts.mesh == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    assert {c.kind for c in facts.collectives} & {"all-gather", "all-reduce"}


def test_more_shards_need_less_memory(config):
    whole, split = (compile_step(with_mesh(config, fsdp=n), jax.devices(), topology="local") for n in (1, 8))
    assert split.memory.arguments < 0.2 * whole.memory.arguments


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (dict(fsdp=3), "fsdp 3 .* does not fit 8"),
        (dict(data=2, fsdp=2), "uses 4 of the 8 chips"),
        (dict(fsdp=1, tensor=8), "num_heads 4 is not divisible by mesh.tensor 8"),
    ],
)
def test_a_mesh_that_does_not_divide_is_an_error(config, mesh, message):
    with pytest.raises(UserError, match=message):
        compile_step(with_mesh(config, **mesh), jax.devices(), topology="v5e:2x4")


def test_a_batch_that_the_mesh_does_not_divide_is_an_error(config):
    odd = with_mesh(config, data=8)
    odd.train.batch_size = 12
    with pytest.raises(UserError, match=r"a micro-batch of 12 rows .* not divisible"):
        compile_step(odd, jax.devices(), topology="v5e:2x4")


def test_the_abstract_batch_is_that_of_the_pipeline(config, tiny_corpus, tmp_path):
    from gptjax.data import opening
    from gptjax.parallel.mesh import make_mesh

    real = config.copy_and_resolve_references()
    real.tokenizer = "byte"
    real.data.update(source=f"text:{tiny_corpus}/*.txt", cache_dir=str(tmp_path))
    for isolate in (True, False):
        real.data.isolate_documents = isolate
        batch = opening.RunData.open(real).batches(real)[0]
        abstract = Program.of(real, make_mesh(real.mesh)).abstract_batch
        assert {name: (a.shape, a.dtype) for name, a in abstract.items()} == {
            name: (a.shape, a.dtype) for name, a in batch.items()
        }


def test_nothing_is_allocated(config):
    before = sum(a.nbytes for a in jax.live_arrays())
    compile_step(config, jax.devices(), topology="local")
    assert sum(a.nbytes for a in jax.live_arrays()) == before


def test_the_compilers_message_of_a_program_too_large():
    temporaries, there = too_large(
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (56.08G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert (temporaries, there) == (round(56.08 * 2**30), round(15.75 * 2**30))
    assert too_large("Ran out of memory in memory space hbm. Used 20.04G of 15.75G hbm.") == (
        round(20.04 * 2**30),
        round(15.75 * 2**30),
    )
    assert too_large("out of memory") == (None, None)


def test_a_plan_imports_nothing_of_the_data_room():
    """The environment of the TPU compiler has JAX and Flax, but not the packages for data."""
    code = "import sys, gptjax.planning.compilation; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert not [name for name in imported if name.startswith(("gptjax.data", "tokenizers", "grain", "pyarrow"))]
