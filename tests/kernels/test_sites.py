"""The page that says which kernel serves which norm of every scheme, on machines that are not there."""

from dataclasses import replace

import pytest

from megnorm.kernels import registry
from megnorm.norms import registry as schemes
from tools import kernel_sites as sites


@pytest.mark.full
def test_the_page_is_what_the_registry_says() -> None:
    text = sites.page()
    assert sites.PAGE.read_text(encoding="utf-8") == text, "run python tools/kernel_sites.py"
    assert all(f"`{name}`" in text for name in schemes.names())


def test_without_libraries_and_with_all() -> None:
    alone, every = sites.MACHINES[0], sites.MACHINES[-1]
    with sites.on(alone):
        assert sites.sites(sites.build("hybridnorm", alone))["ffn input"] == "ours (add+norm)"
    with sites.on(every):
        found = sites.sites(sites.build("hybridnorm", every))
        assert found["ffn input"] == "TE (norm+linear)" and found["attention q"] == "ours (heads)"
        assert sites.sites(sites.build("olmo2", every))["attention q"] == "ours"  # its statistics cross ranks


def test_another_choice_is_another_page(monkeypatch: pytest.MonkeyPatch) -> None:
    offers = [replace(o, priority=-9) if o.backend == "triton" else o for o in registry._offers]
    monkeypatch.setattr(registry, "_offers", offers)
    with sites.on(sites.MACHINES[0]):
        assert sites.sites(sites.build("hybridnorm", sites.MACHINES[0]))["ffn input"] == "torch"
