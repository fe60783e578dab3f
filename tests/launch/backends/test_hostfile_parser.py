"""Hostfiles: what DeepSpeed's own parser makes of a good one, and a clear line for every bad one."""

from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion
from hypothesis import given
from hypothesis import strategies as st

from mixmae.base.errors import UsageError
from mixmae.launch.backends.hostfile_parser import HostSlots, read_hostfile, select

NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,8}[a-z0-9]", fullmatch=True)
POOL = HostSlots({"node1": (0, 1, 2, 3), "node2": (0, 1)})


@given(hosts=st.dictionaries(NAMES, st.integers(1, 16), min_size=1, max_size=6), data=st.data())
def test_deepspeed_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, hosts: dict[str, int], data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "hostfile"
    file.write_text("# ours\n\n" + "".join(f"{name}  slots={count} # comment\n" for name, count in hosts.items()))
    chosen = data.draw(st.dictionaries(st.sampled_from(sorted(hosts)), st.booleans(), min_size=1))
    specs = [name if whole else f"{name}:{hosts[name] - 1}" for name, whole in chosen.items()]
    option = data.draw(st.sampled_from(["include", "exclude"]))
    include, exclude = ("@".join(specs), "") if option == "include" else ("", "@".join(specs))
    theirs = parse_inclusion_exclusion(fetch_hostfile(str(file)), include, exclude)
    if not theirs:
        with pytest.raises(UsageError, match="leaves no host"):
            select(read_hostfile(file), include, exclude)
        return
    ours = select(read_hostfile(file), include, exclude)
    assert [(name, list(slots)) for name, slots in ours.slots.items()] == list(theirs.items())
    assert ours.ranks == sum(map(len, theirs.values()))
    assert ours.first == next(iter(theirs))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; expected a file with lines such as 'node1 slots=8'"),
        ("", "names no hosts"),
        ("# nobody\n\n", "names no hosts"),
        ("node1\n", "line 1: 'node1': expected a host and its number of ranks"),
        ("node1 slots=2\nnode2 slots=two\n", "line 2: 'node2 slots=two'"),
        ("node1 slots=2 max=4\n", "expected a host and its number"),
        ("node1 slots=2\nnode1 slots=4\n", "line 2: 'node1 slots=4': node1 is on an earlier line too"),
        ("node1 slots=0\n", "0 slots; remove the line, or use --exclude node1"),
        ("node[1-4] slots=2\n", "'node[1-4]' is not a host's name; write each host on a line of its own"),
        ("node1,node2 slots=2\n", "write each host on a line of its own"),
        ("-oProxyCommand=x slots=2\n", "is not a host's name; a name has letters, digits"),
        ("user@node1 slots=2\n", "write 'node1', and 'User user' below 'Host node1' in ~/.ssh/config"),
        ("::1 slots=2\n", "pdsh takes no IPv6 addresses: name the host in /etc/hosts or DNS"),
        ("[fe80::1]:22 slots=2\n", "pdsh takes no IPv6 addresses"),
        ("node1:2222 slots=2\n", "write 'node1', and give the port of ssh with --ssh-port 2222"),
        ("node1 slots=99999999999\n", "expected as many as the host has accelerators"),
        (b"\xff\xfen\x00", "cannot be read"),
    ],
)
def test_bad_hostfiles_are_refused(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    file = tmp_path / "hosts"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as raised:
        read_hostfile(file)
    assert message in str(raised.value)
    assert str(file) in str(raised.value)


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_names(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfnode1 slots=2\r\nnode2 slots=1\r\n")
    assert read_hostfile(tmp_path / "hosts").slots == {"node1": (0, 1), "node2": (0,)}


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("node1", "node2", "cannot be given together"),
        ("node3", "", "--include node3: the hostfile has no 'node3'; it has node1, node2"),
        ("", "node1@node3:0", "--exclude node1@node3:0: the hostfile has no 'node3'"),
        ("node2:0,2", "", "node2 has no slot 2; the hostfile gives it slots 0 to 1"),
        ("node2:a", "", "'node2:a' is not of the form"),
        ("node2:", "", "'node2:' is not of the form"),
        ("node1@", "", "the hostfile has no ''"),
        ("", "node1@node2", "leaves no host"),
    ],
)
def test_bad_selections_are_refused(include: str, exclude: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        select(POOL, include, exclude)
    assert message in str(raised.value)


def test_selections() -> None:
    assert select(POOL, "", "") == POOL
    assert select(POOL, "node2@node1:1", "").slots == {"node1": (1,), "node2": (0, 1)}
    assert select(POOL, "", "node1:0,1@node2").slots == {"node1": (2, 3)}
