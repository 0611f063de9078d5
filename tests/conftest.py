"""What all tests share. It needs pytest alone: tests/kernels runs where there is no more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _compiled_anew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that torch.compile has cached in another state of this project is not used: the cache's
    key does not depend on how the shapes of an operator's results are computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield
