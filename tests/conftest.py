"""Shared by all tests: eight CPU devices, its own caches, annotations checked at run time, tiny inputs.

The environment is set before JAX is imported; child processes of a test inherit it.
"""

import gc
import importlib.metadata
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for modules without tests: object_store, bucket_runs

_XLA_FLAGS = (
    "--xla_backend_optimization_level=0",  # tests compile more than they compute: half the time
    # Eight virtual devices on one busy core take turns.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions have the new emitters only
    _XLA_FLAGS += ("--xla_cpu_use_fusion_emitters=false",)  # a third less time, for the same reason
_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
# Of a flag that is there twice the last one counts: the user's own, but for the number of devices.
os.environ["XLA_FLAGS"] = " ".join([*_XLA_FLAGS, os.environ.get("XLA_FLAGS", ""), _EIGHT_DEVICES])

# A shell, cron or nohup may have had them ignored, which gptjax respects, and so would what the tests start.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit what the process that started them sets here
    # What tests assume: output is not to a terminal and has no colours, and nothing but the test chooses JAX's settings
    # or says that this process is one of several.
    for _name in list(os.environ):
        if _name.startswith(("JAX_", "SLURM_STEP_")) or _name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            del os.environ[_name]
    _session_cache = Path(tempfile.mkdtemp(prefix="gptjax-tests-"))
    os.environ["GPTJAX_CACHE"] = str(_session_cache)
    # Compiled programs outlive the session, so that the next is fast; JAX keys them by program and version.
    _programs = Path(tempfile.gettempdir()) / f"gptjax-tests-xla-{os.getuid()}"
    _programs.mkdir(exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_programs)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read once; it asks for the kind of a bucket by gRPC

from jaxtyping import install_import_hook  # noqa: E402

# The tower: an int is accepted where a float is annotated (PEP 484).
install_import_hook("gptjax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from hypothesis import settings  # noqa: E402

from gptjax import config as config_lib  # noqa: E402
from gptjax.model.architecture import Architecture  # noqa: E402

# Slow machines and reruns give the same verdict.
settings.register_profile("gptjax", deadline=None, derandomize=True)
settings.load_profile("gptjax")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the files of tests/golden anew")


def pytest_sessionfinish():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(_session_cache, ignore_errors=True)


@pytest.fixture
def update_golden(request) -> bool:
    return request.config.getoption("--update-golden")


_MOST_MEMORY = 3 << 30  # bytes of a worker, after which compiled programs are forgotten; the disk still has them


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Clears JAX's caches above a limit of memory: a worker runs hundreds of programs, and JAX keeps all of them."""
    yield
    statistics = Path("/proc/self/statm")  # of Linux
    if statistics.exists() and int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _MOST_MEMORY:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of corpora and vocabularies that are too large for the checkout."""
    directory = os.environ.get("GPTJAX_SHARED_DATA")
    if not directory:
        pytest.skip("GPTJAX_SHARED_DATA is not set")
    return Path(directory)


@pytest.fixture(scope="session")
def assert_linear() -> Callable[..., None]:
    """Asserts that `work(large)` takes at most so many times the processor time of `work(small)` as large is larger.

    A factor of five is allowed for caches and memory. The time of the processor, not of the clock: other processes
    do not count.
    """

    def seconds(work: Callable[[Any], Any], argument: Any) -> float:
        start = time.process_time()
        work(argument)
        return time.process_time() - start

    def check(work: Callable[[Any], Any], small: Any, large: Any) -> None:
        base = max(min(seconds(work, small) for _ in range(3)), 0.001)
        assert seconds(work, large) < 5 * base * len(large) / len(small)

    return check


@pytest.fixture
def tiny_config() -> config_lib.Config:
    """Two layers, 16 wide, 16 tokens of context, 97 real tokens (padded to 128)."""
    config = config_lib.get_default()
    config.model.update(num_layers=2, num_heads=2, embed_dim=16, context_length=16, vocab_size=97)
    config.train.update(num_steps=10, batch_size=8)
    config.schedule.warmup = 2
    return config


@pytest.fixture
def tiny_architecture(tiny_config) -> Architecture:
    return Architecture.from_config(tiny_config.model, 0)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A directory of 120 text files whose words follow a pattern that a small model learns in a few steps."""
    directory = tmp_path_factory.mktemp("corpus")
    words = re.findall(r"\w+", "the cat sat on a mat and saw one red bird sing to the sun")
    for i in range(120):
        text = " ".join(words[(i * 7 + j * (1 + i % 3)) % len(words)] for j in range(20 + i % 30))
        (directory / f"{i:03}.txt").write_text(f"{text}.\n")
    return directory


@pytest.fixture
def store(monkeypatch):
    """A store with one bucket, which gcsfs and TensorStore are told to use."""
    gcsfs = pytest.importorskip("gcsfs")
    from bucket_runs import environment
    from object_store import ObjectStore

    from gptjax.artifacts import mirror

    server = ObjectStore("gptjax-test")
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    gcsfs.GCSFileSystem.clear_instance_cache()
    mirror._bucket_of.cache_clear()
    yield server
    server.running.set()
    server.shutdown()
