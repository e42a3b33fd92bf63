"""What every test may rely on: one thread, no network, the shared material, real gloo ranks, a code cache of its own."""

import atexit
import os
import shutil
import tempfile

# Exported folders bring code, which transformers copies into a cache and imports from there. The package of that cache is
# bound to one folder at its first import, in whichever test that happens: the folder must be chosen before any.
_code = tempfile.mkdtemp(prefix="megnorm-code-")
atexit.register(shutil.rmtree, _code, ignore_errors=True)
os.environ["HF_MODULES_CACHE"] = _code
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[name] = "1"

from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from megnorm.parallel import pages  # noqa: E402
from tests.distributed.awake import awake  # noqa: E402
from tests.distributed.pool import Pool, close_all, pool  # noqa: E402

# It is for the whole process, and for good: tests of what little memory serves would inherit what others have freed.
pages.keep_pages = lambda: None

PROJECT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)
settings.register_profile("megnorm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("megnorm")


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the repository."""
    return PROJECT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared material: goldens, texts, tokenizers. Tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("MEGNORM_SHARED", PROJECT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("no shared material: set MEGNORM_SHARED to the folder that holds golden/ and data/")
    return folder


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Pool]]:
    """``ranks(n).run(function, *args)`` calls function(rank, n, *args) on n gloo ranks; see distributed/pool.py."""
    with awake():
        yield pool
    close_all()
