"""API keys: who gets in, who does not, and what the file and the command line do."""

from __future__ import annotations

import json
import logging
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sage_bench.cli.gateway_keys import key_app
from sage_core.errors import ConfigError, DataError
from sage_core.units import SECOND
from sage_live.gateway.keyfile import add_key, default_path, read_keys, revoke_key
from sage_live.gateway.keys import ApiKeys
from sage_live.gateway.rate import Limits


class _Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config" / "keys.json"


def _bearer(secret: str) -> bytes:
    return f"Bearer {secret}".encode()


def test_a_key_opens_and_names_its_tenant(path: Path) -> None:
    entry, secret = add_key(path, "alice", Limits(60, 9000), priority_min=1)
    _, other = add_key(path, "bob")
    keys = ApiKeys(path)
    found = keys.check(_bearer(secret))
    assert found == entry and found.tenant == "alice" and found.priority_min == 1
    assert keys.check(f"bEaReR   {other} ".encode()).tenant == "bob"  # type: ignore[union-attr]
    assert keys.limits == {"alice": Limits(60, 9000)}


@pytest.mark.parametrize(
    "scheme", ["Basic {}", "{}", "Bearer", "Bearer ", "Bearer {}x", "Bearer  x{}", "Bearer sage-{}", ""]
)
def test_anything_else_does_not(path: Path, scheme: str) -> None:
    _, secret = add_key(path, "alice")
    assert ApiKeys(path).check(scheme.format(secret).encode()) is None


def test_the_right_id_with_a_wrong_secret_does_not_open(path: Path) -> None:
    _, alice = add_key(path, "alice")
    bob_entry, bob = add_key(path, "bob")
    keys = ApiKeys(path)
    crossed = f"sage-{bob_entry.id}-{alice.split('-', 2)[2]}"
    assert keys.check(_bearer(crossed)) is None
    assert keys.check(_bearer(bob_entry.hash)) is None  # what is stored does not open
    assert keys.check(_bearer(bob)) is not None
    assert keys.check(None) is None


def test_no_header_breaks_it(path: Path) -> None:
    entry, _ = add_key(path, "alice")
    keys = ApiKeys(path)

    @given(st.binary(max_size=300))
    def check(header: bytes) -> None:
        assert keys.check(header) is None
        assert keys.check(b"Bearer " + header) is None
        assert keys.check(b"Bearer sage-" + entry.id.encode() + b"-" + header) is None

    check()


def test_only_the_hash_is_kept_and_only_the_owner_reads_it(path: Path) -> None:
    _, secret = add_key(path, "alice")
    assert secret.encode() not in path.read_bytes() and secret.split("-", 2)[2].encode() not in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    add_key(path, "bob")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["keys.json"]


def test_the_file_is_read_again_when_it_changed_at_most_once_a_second(path: Path) -> None:
    clock = _Clock()
    entry, secret = add_key(path, "alice")
    keys = ApiKeys(path, clock)
    limits = keys.limits
    bob, later = add_key(path, "bob", Limits(requests_per_minute=7))
    clock.now += SECOND - 1
    assert keys.check(_bearer(later)) is None
    clock.now += 1
    assert keys.check(_bearer(later)) is not None
    assert limits == {"bob": Limits(requests_per_minute=7)}
    revoke_key(path, entry.id)
    revoke_key(path, bob.id)
    clock.now += SECOND
    assert keys.check(_bearer(secret)) is None
    assert limits == {}


@pytest.mark.parametrize("damage", ["{", "[]", '{"keys": [{"id": "x"}]}', "\xff", None])
def test_a_file_that_broke_keeps_the_old_keys_and_is_logged_once(
    path: Path, damage: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = _Clock()
    _, secret = add_key(path, "alice")
    keys = ApiKeys(path, clock)
    path.unlink() if damage is None else path.write_bytes(damage.encode("latin-1"))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            clock.now += SECOND
            assert keys.check(_bearer(secret)) is not None
    assert len(caplog.records) == 1 and "keys.json" in caplog.text
    with pytest.raises(DataError, match=r"keys\.json"):
        ApiKeys(path)


def test_a_yaml_file_holds_the_same(path: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "keys.yaml"
    _, secret = add_key(yaml, "alice", Limits(60))
    add_key(yaml, "bob")
    assert yaml.read_text().startswith("keys:\n- id: ")
    assert ApiKeys(yaml).check(_bearer(secret)).limits == Limits(60)  # type: ignore[union-attr]


def test_limits_are_the_tenants(path: Path) -> None:
    add_key(path, "alice", Limits(60))
    assert add_key(path, "alice")[0].requests_per_minute == 60
    add_key(path, "alice", Limits(90))
    assert {key.requests_per_minute for key in read_keys(path)} == {90}
    content = json.loads(path.read_text())
    content["keys"][0]["requests_per_minute"] = 10
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="'alice' state different limits"):
        read_keys(path)
    content["keys"] = [content["keys"][1]] * 2
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="twice"):
        read_keys(path)


def test_commands_at_once_lose_no_key(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: add_key(path, f"tenant {n}"), range(24)))
    keys = ApiKeys(path)
    assert len(keys) == 24
    assert all(keys.check(_bearer(secret)) == entry for entry, secret in made)


def test_the_commands(path: Path) -> None:
    run = CliRunner()
    made = run.invoke(key_app, ["add", "alice", "--requests-per-minute", "60", "--manage", "--file", str(path)])
    assert made.exit_code == 0
    secret = made.stdout.strip()
    key = ApiKeys(path).check(_bearer(secret))
    assert key is not None and key.manage and key.requests_per_minute == 60
    listed = run.invoke(key_app, ["list", "--file", str(path)]).stdout
    assert key.id in listed and "alice" in listed and key.hash not in listed and secret not in listed
    assert run.invoke(key_app, ["revoke", key.id, "--file", str(path)]).exit_code == 0
    assert read_keys(path) == []
    again = run.invoke(key_app, ["revoke", key.id, "--file", str(path)])
    assert isinstance(again.exception, ConfigError) and "unknown id" in str(again.exception)
    bad = run.invoke(key_app, ["add", "bob", "--tokens-per-minute", "0", "--file", str(path)])
    assert isinstance(bad.exception, ConfigError)


@pytest.mark.parametrize("tenant", ["", "x" * 129, "zoë", "a\nb", "tab\t"])
def test_a_tenant_is_printable_ascii(path: Path, tenant: str) -> None:
    done = CliRunner().invoke(key_app, ["add", tenant, "--file", str(path)])
    assert isinstance(done.exception, ConfigError) and "1 to 128 printable ASCII" in str(done.exception)
    assert not path.exists()


def test_the_default_file_is_in_the_users_configuration_folder(tmp_path: Path) -> None:
    env = {"HOME": "/home/someone", "XDG_CONFIG_HOME": str(tmp_path)}
    assert default_path(env) == tmp_path / "sage-serving" / "keys.json"
