"""The port registry: unique, overridable, never the same port for two services."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_core import ports
from sage_core.errors import ConfigError
from sage_core.ports import SagePorts


def everything_free(port: int) -> bool:
    return True


def test_the_published_defaults() -> None:
    assert SagePorts.GATEWAY_DEFAULT == 8888
    assert SagePorts.LLM_DEFAULT == 8001
    assert SagePorts.LLM_ALTERNATIVE == 8901
    assert SagePorts.EMBEDDING_DEFAULT == 8090
    assert len({int(port) for port in SagePorts}) == len(SagePorts.__members__)


def test_every_port_belongs_to_exactly_one_service() -> None:
    listed = [port for own in ports.SERVICES.values() for port in own]
    assert sorted(listed) == sorted(SagePorts)


@pytest.mark.parametrize(("service", "port"), [("gateway", 8888), ("llm", 8001), ("embedding", 8090)])
def test_default_when_free(service: str, port: int) -> None:
    assert ports.choose(service, {}, everything_free) == port


def test_llm_alternative_when_8001_is_taken() -> None:
    assert ports.choose("llm", {}, lambda port: port != 8001) == 8901


def test_llm_alternative_first_on_wsl2() -> None:
    assert ports.choose("llm", {}, everything_free, wsl2=True) == 8901
    assert ports.choose("llm", {}, lambda port: port != 8901, wsl2=True) == 8001


def test_fallback_skips_ports_of_other_services() -> None:
    taken = {8888, *range(8889, 8901)}
    assert ports.choose("gateway", {}, lambda port: port not in taken) == 8902  # 8901 is the LLM's


def test_override_is_obeyed_even_when_taken() -> None:
    assert ports.choose("gateway", {"SAGE_GATEWAY_PORT": "9000"}, lambda port: False) == 9000


@pytest.mark.parametrize("text", ["0", "65536", "-1", "http", "80.5", "٣٠٠"])
def test_override_that_is_no_port_names_the_variable(text: str) -> None:
    with pytest.raises(ConfigError, match=r"SAGE_LLM_PORT: expected a port number from 1 to 65535"):
        ports.choose("llm", {"SAGE_LLM_PORT": text}, everything_free)


def test_empty_override_is_unset() -> None:
    assert ports.choose("llm", {"SAGE_LLM_PORT": " "}, everything_free) == 8001


def test_override_may_not_take_the_port_of_another_service() -> None:
    with pytest.raises(ConfigError, match=r"SAGE_LLM_PORT=8888: that is the port of 'gateway'"):
        ports.choose("llm", {"SAGE_LLM_PORT": "8888"}, everything_free)
    moved = {"SAGE_LLM_PORT": "8888", "SAGE_GATEWAY_PORT": "9000"}
    assert ports.choose("llm", moved, everything_free) == 8888


def test_unknown_service_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown service 'studio': expected one of gateway, llm, embedding"):
        ports.choose("studio", {}, everything_free)


def test_nothing_free_says_what_was_tried() -> None:
    with pytest.raises(ConfigError, match=r"no free port for 'llm': tried 8001, 8901 and 8902-9001; .*SAGE_LLM_PORT"):
        ports.choose("llm", {}, lambda port: False)


@given(
    taken=st.sets(st.sampled_from([*range(8001, 8010), *range(8085, 8100), *range(8880, 8910)])),
    wsl2=st.booleans(),
)
def test_services_never_share_a_port(taken: set[int], wsl2: bool) -> None:
    chosen = [ports.choose(service, {}, lambda port: port not in taken, wsl2=wsl2) for service in ports.SERVICES]
    assert not taken & set(chosen)
    # Fallback ranges may meet only if a service started before holds its port; registry ports never collide.
    own = [port for port in chosen if port in list(SagePorts)]
    assert len(own) == len(set(own))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Linux version 5.15.90.1-microsoft-standard-WSL2 (oe-user@oe-host) (gcc)", True),
        ("Linux version 4.19.84-microsoft-standard (oe-user@oe-host)", True),  # early WSL2 had no suffix
        ("Linux version 4.4.0-19041-Microsoft (Microsoft@Microsoft.com)", False),  # WSL1
        ("Linux version 6.1.0-18-amd64 (debian-kernel@lists.debian.org)", False),
        ("", False),
    ],
)
def test_wsl2_is_read_from_proc_version(text: str, expected: bool) -> None:
    assert ports.is_wsl2(text) is expected
