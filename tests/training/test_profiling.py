import jax
import jax.numpy as jnp
import pytest

from gptjax.errors import UserError
from gptjax.training import profiling
from gptjax.training.profiling import Profile


@pytest.mark.parametrize("text", ["", "5", "5:0", "5:x", "3:2", "8:3", "-1:2"])
def test_steps_that_the_run_does_not_make(tmp_path, text):
    with pytest.raises(UserError, match=f"--profile={text}: "):
        Profile.parse(text, tmp_path, start=4, num_steps=10)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """Three calls of a program that is one large matrix product and a loop around small ones: (trace, text, calls)."""

    @jax.jit
    def program(x):
        small, _ = jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x[:64, :64], None, length=100)
        return (x @ x).sum() + small.sum()

    workdir = tmp_path_factory.mktemp("run")
    profile = Profile.parse("4:3", workdir, start=0, num_steps=10)
    x = jnp.ones((600, 600))
    texts, result = [], program(x)
    for step in range(10):
        profile.before(step, lambda result=result: result.block_until_ready())
        result = program(x)
        texts.append(profile.after(step, result))
    profile.stop()
    (trace,) = workdir.glob("profile/**/*.xplane.pb")
    return trace, texts


def test_the_table_comes_after_the_last_step_of_the_trace(profile):
    _, texts = profile
    assert [step for step, text in enumerate(texts) if text] == [6]


@pytest.mark.parametrize("where", ["start_trace", "stop_trace", "ProfileData.from_file"])
def test_a_disk_that_takes_no_trace_costs_a_warning(tmp_path, monkeypatch, capsys, where):
    profile = Profile(1, 1, tmp_path / "profile")
    place = tmp_path / "profile" / "plugins" / "t" / "vm.xplane.pb"
    place.parent.mkdir(parents=True)

    def fails(*arguments, **options):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {place}; No space left on device")

    def half(*arguments, **options):
        place.write_bytes(b"half")
        return fails() if where == "stop_trace" else None

    monkeypatch.setattr(jax.profiler, "start_trace", lambda *arguments, **options: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", half)
    if where != "stop_trace":
        monkeypatch.setattr(f"jax.profiler.{where}", fails)
    for step in range(3):
        profile.before(step, lambda: None)
        assert profile.after(step, jnp.ones(())) is None
    profile.stop()
    told = f"warning: --profile=1:1: no trace: {place}; No space left on device; the run goes on\n"
    assert capsys.readouterr().err == told
    assert place.exists() == (where == "ProfileData.from_file")


def test_operations_are_counted_and_ordered_by_their_own_time(profile):
    trace, texts = profile
    found = profiling.operations(trace)
    assert sum(operation.share for operation in found) == pytest.approx(1.0)
    assert [o.seconds for o in found] == sorted((o.seconds for o in found), reverse=True)
    assert all(operation.seconds >= -1e-9 for operation in found)
    loops = [o for o in found if o.name.startswith("while")]
    assert loops and all(o.calls % 3 == 0 for o in loops)
    assert loops[0].share < 0.5, "a loop's own time is without what it runs"
    header, first = texts[6].splitlines()[:2]
    assert header.split() == ["ms/step", "share", "calls", "operation"]
    assert first.split()[-1] == found[0].name
    assert texts[6].splitlines()[-1] == f"trace: {trace.parent}"


def test_kernels_of_libraries_are_counted_by_what_they_do():
    """Kernel names from a profile of a training step on an H200."""
    names = {
        "nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_splitK_NTN": "matrix product",
        "sm90_xmma_gemm_f32f32_tf32f32_f32_nt_n_tilesize128x256x32": "matrix product",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "attention",
        "loop_add_fusion_72": "loop_add_fusion",
        "fusion.12": "fusion",
    }
    assert {name: profiling.kind(name) for name in names} == names


def test_ten_operations_at_most():
    many = [profiling.Operation(f"fusion.{i}", 1.0, 1, 0.05) for i in range(20)]
    lines = profiling.table(many, steps=2).splitlines()
    assert len(lines) == 12 and lines[-1] == "by kind: fusion 100%"
    assert lines[1].split() == ["500.00", "5.0%", "1", "fusion.0"]
