"""What a litmus file says, what is refused and how, and that whatever is accepted can be executed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.cpu import x86
from shadowmmu.explorer.choosers import RandomChooser
from shadowmmu.explorer.execution import execute
from shadowmmu.explorer.library import library_files
from shadowmmu.explorer.litmus import LINEAR, LitmusError, load_litmus, parse_litmus
from shadowmmu.explorer.scenario import (
    Access,
    AccessKind,
    Await,
    ChangeRegister,
    Expectation,
    HostStep,
    Instruction,
    Invlpg,
    LoadCr3,
    Locked,
    Scenario,
    SendIpi,
)
from shadowmmu.explorer.world import ScenarioError, World
from shadowmmu.protocol import messages as m
from tests.explorer.guests import ONE_PAGE

TABLES = ONE_PAGE
T, G = 16 + 3 * 8, 16 + 4 * 8
"""The frames that the names get: root, L3, L2, T, G."""
X = 9 << 12


def instruction(line: str, extra: str = "") -> Instruction:
    text = f"{extra}\n{TABLES}\n[[vcpu]]\nprogram = '{line}'"
    return parse_litmus(text, "test").programs[0][0].instruction


def host_operation(line: str, extra: str = "") -> m.HostOperation:
    return parse_litmus(f"{TABLES}\n{extra}\n[[host]]\nprogram = '{line}'", "test").hosts[0][0].operation


def refusal(text: str) -> str:
    with pytest.raises(LitmusError) as caught:
        parse_litmus(text, "test")
    return str(caught.value)


# --- what is said ----------------------------------------------------------------------------------------------------


def test_names_without_a_frame_get_frames_that_are_eight_apart() -> None:
    scenario = parse_litmus(f"[frames]\nF = 24\n{TABLES}", "test")
    assert dict(scenario.frames) == {"F": 24, "root": 16, "L3": 32, "L2": 40, "T": 48, "G": 56}


def test_an_entry_is_a_frame_and_its_flags() -> None:
    words = dict(parse_litmus(TABLES, "test").words)
    assert words[(T << 12) + 9 * 8] == (
        G << 12
        | x86.PT_PRESENT_MASK
        | x86.PT_WRITABLE_MASK
        | x86.PT_USER_MASK
        | x86.PT_ACCESSED_MASK
        | x86.PT_DIRTY_MASK
    )


@pytest.mark.parametrize(
    "flag, mask", [("l", 1 << 7), ("g", 1 << 8), ("n", 1 << 63), ("r", 1 << 51), ("w", 2), ("u", 4)]
)
def test_each_flag_is_a_bit_of_the_entry(flag: str, mask: int) -> None:
    stored = instruction(f"store x = T {flag}")
    assert isinstance(stored, Access) and stored.value == T << 12 | 1 | mask


@pytest.mark.parametrize("mode", ["64", "pae", "32"])
def test_the_linear_map_has_every_frame(mode: str) -> None:
    path = {"64": "0/0/0/9", "pae": "0/0/9", "32": "0/9"}[mode]
    text = f"""
        [machine]
        mode = "{mode}"
        vcpus = 1
        [memory]
        "G[2]" = 77
        [tables.root]
        [addresses]
        x = "{path}"
        [[vcpu]]
        program = "r0 = load @G[2]"
    """
    scenario = parse_litmus(text, "test")
    access = scenario.programs[0][0].instruction
    size = 4 if mode == "32" else 8
    assert isinstance(access, Access)
    assert access.gva == LINEAR[mode] + (dict(scenario.frames)["G"] << 12) + 2 * size
    assert execute(scenario, "fixed", RandomChooser(1)).outcome == (("v0:r0", 77),)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("load x", Access(AccessKind.LOAD, X)),
        ("r3 = load x[2]", Access(AccessKind.LOAD, X + 16)),
        ("uload x+4", Access(AccessKind.LOAD, X + 4, user=True)),
        ("fetch x", Access(AccessKind.FETCH, X)),
        ("store.2 x = 0x1234", Access(AccessKind.STORE, X, 2, 0x1234)),
        ("store @T[9] = 0", Access(AccessKind.STORE, LINEAR["64"] + (T << 12) + 72)),
        ("cmpxchg x = 1 -> G wa", Locked(m.LockedOp.CMPXCHG, X, G << 12 | 0x23, 1)),
        ("uxadd x = 1", Locked(m.LockedOp.XADD, X, 1, user=True)),
        ("await @G = 5", Await(LINEAR["64"] + (G << 12), G << 12, 5)),
        ("invlpg x", Invlpg(X)),
        ("cr3", LoadCr3()),
        ("cr3 T", LoadCr3(T << 12)),
        (
            "cr4 -pge +smep",
            ChangeRegister(m.ControlRegister.CR4, set_bits=x86.X86_CR4_SMEP, clear_bits=x86.X86_CR4_PGE),
        ),
        ("ipi v1 v0", SendIpi((1, 0))),
    ],
)
def test_instructions(line: str, expected: Instruction) -> None:
    assert instruction(line) == expected


@pytest.mark.parametrize(
    "line, expected",
    [
        ("unmap G", m.Unmap(G)),
        ("unmap_range G+1 2", m.UnmapRange(G + 1, 2)),
        ("reclaim 99", m.Reclaim(99)),
        ("reclaim_idle G, T", m.ReclaimIdle([G, T])),
        ("move G ro", m.Move(G, False)),
        ("dirty_log 0 on", m.SetDirtyLog(0, True)),
        ("set_slot 1 600 4", m.SetMemoryRegion(1, 600, 4)),
        ("set_slot 1 1024 512 huge", m.SetMemoryRegion(1, 1024, 512, True)),
        ("delete_slot 0", m.SetMemoryRegion(0, 0, 0)),
        ("migrate v1 7", m.Migrate(1, 7)),
        ("zap_all", m.ZapAll()),
        ("write G[2] = T w", m.WritePhys([((G << 12) + 16, T << 12 | 3)])),
    ],
)
def test_host_operations(line: str, expected: m.HostOperation) -> None:
    assert host_operation(line) == expected


def test_a_host_operation_begins_when_memory_has_the_value_that_it_waits_for() -> None:
    text = f"""
    setup = "v0: load @G"
    {TABLES}
    [memory]
    "G[0]" = 0
    [[vcpu]]
    program = '''
    store @G = 1
    r0 = load @G[2]
    '''
    [[host]]
    program = "write G[2] = 5 when G[0] = 1"
    """
    scenario = parse_litmus(text.replace("    ", ""), "test")
    outcomes = {execute(scenario, "fixed", RandomChooser(seed)).outcome for seed in range(20)}
    assert outcomes == {(("v0:r0", 0),), (("v0:r0", 5),)}
    never = msgspec.structs.replace(scenario, programs=((), ()))
    assert execute(never, "fixed", RandomChooser(0)).failure is None


def test_a_vcpu_without_a_program_has_an_empty_one() -> None:
    scenario = parse_litmus(f"[machine]\nvcpus = 3\n{TABLES}\n[[vcpu]]\nprogram = 'load x'", "test")
    assert [len(program) for program in scenario.programs] == [1, 0, 0]


def test_expectations_are_by_profile() -> None:
    text = f"{TABLES}\n[expect]\nfixed = 'never'\nfixed-link-before-sync = 'sometimes'"
    assert parse_litmus(text, "test").expect == (
        ("fixed", Expectation.NEVER),
        ("fixed-link-before-sync", Expectation.SOMETIMES),
    )


# --- interrupts ------------------------------------------------------------------------------------------------------

INTERRUPTED = f"""
setup = "v1: load @G"
{TABLES}
[memory]
"G[0]" = 0
[[vcpu]]
program = '''
IPIS
await @G[1] = 1
'''
[[vcpu]]
program = '''
r0 = load @G
r1 = load @G
'''
on_interrupt = '''
r2 = xadd @G = 1
store @G[1] = 1
'''
"""


def test_the_handler_runs_wherever_the_interrupt_falls() -> None:
    scenario = parse_litmus(INTERRUPTED.replace("IPIS", "ipi v1"), "test")
    seen = {
        (values["v1:r0"], values["v1:r1"])
        for seed in range(60)
        for values in [dict(execute(scenario, "fixed", RandomChooser(seed)).outcome)]
    }
    assert seen == {(0, 0), (0, 1), (1, 1)}


def test_an_interrupt_during_the_handler_is_taken_after_it() -> None:
    scenario = parse_litmus(INTERRUPTED.replace("IPIS", "ipi v1\nipi v1"), "test")
    times = {dict(execute(scenario, "fixed", RandomChooser(seed)).outcome)["v1:r2"] for seed in range(60)}
    assert times == {0, 1}  # one run of the handler, which has seen both, or two


# --- what the documentation says ---------------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[2] / "docs" / "LITMUS.md").read_text(encoding="utf-8")


def test_the_example_of_the_documentation_is_as_it_says() -> None:
    example = parse_litmus(DOCUMENT.split("```toml\n")[1].split("```")[0], "example")
    outcomes = {execute(example, "fixed", RandomChooser(seed)).outcome for seed in range(10)}
    assert outcomes == {(("v1:r0", 7), ("v1:r1", 0))}  # the second is a fault with error code 0


def test_every_key_instruction_and_operation_is_documented() -> None:
    from shadowmmu.explorer import litmus, litmus_names, litmus_program

    for word in (*litmus._KEYS, *litmus_program._ACCESSES, *litmus_program._OPERATIONS, *litmus_names._FLAGS):
        assert re.search(rf"[`\[]{word}\b", DOCUMENT), word


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
    [
        ("x = ", "test: not TOML"),
        ("colour = 1", "test.colour: unknown key; known are addresses"),
        ("machine = 3", "test.machine: must be a table"),
        ("[machine]\nvcpus = 0", "test.machine.vcpus: must be from 1 to 64"),
        ("[machine]\nvcpus = true", "test.machine.vcpus: must be a number"),
        ("[machine]\nmode = '31'", "test.machine.mode: '31' is not one of 64, pae, 32, off"),
        ("[machine]\nmemory_model = 'arm'", "test.machine.memory_model: 'arm' is not one of sc, tso"),
        ("[machine]\ntdp = 'ept2'", "test.machine.tdp: 'ept2' is not one of off"),
        ("[machine]\ncr4 = 'pge'", "test.machine.cr4: 'pge' is not + or - and one of pae, pge"),
        ("[machine]\nmmu_pages = 1", "test.machine: n_max_mmu_pages is 1"),
        ("[[machine.slots]]\npages = 2", "test.machine.slots 0.gfn: is missing"),
        ("[[machine.slots]]\ngfn = 511\npages = 2", "test.machine: memory slot 1 overlaps another"),
        ("[frames]\n'a b' = 3", "'a b' cannot be a name"),
        ("[frames]\nr1 = 20", "'r1' cannot be a name"),
        ("[frames]\nF = 'x'", "test.frames.F: must be a number"),
        ("[frames]\nF = 9", "test.frames.F: the tables of the linear map are in frame 9"),
        ("[tables]\nT = 3", "test.tables.T: must be a table"),
        ("[tables.T]\n512 = 1", "test.tables.T.512: index 512 is beyond the frame's 512 entries"),
        ("[tables.T]\nx = 1", "test.tables.T.x: 'x' is no number"),
        ("[tables.T]\n1 = 'G q'", "test.tables.T.1: unknown flag 'q'"),
        ("[tables.T]\n1 = 'G w w'", "test.tables.T.1: 'G w w' is neither a number nor an entry"),
        ("[tables.T]\n1 = -1", "test.tables.T.1: -1 is no number of 64 bits"),
        ("[tables.T]\n1 = [1]", "test.tables.T.1: [1] is neither a number nor an entry"),
        ("[tables.root]\n272 = 'T wa'", "test.tables.root: entry 272 of root is the linear map's"),
        ("[machine]\nmode = 'off'\n[tables.T]\n1 = 'G w'", "test.tables: there are no tables with paging off"),
        ("[machine]\nmode = '32'\n[tables.T]\n1 = 'G n'", "does not fit into an entry of 4 bytes"),
        ("[machine]\nframes = 20\n[tables.T]\n1 = 'G'", "no frame left for 'G'"),
        ("[frames]\nF = 5000\n[tables.F]\n1 = 1", "test.tables.F.1: frame 5000 is in no memory slot"),
        ("[memory]\n'G' = 1", "test.memory.G: 'G' is not NAME[index]"),
        ("[addresses]\nx = '0/0/9'", "test.addresses.x: 3 indices for 4 levels"),
        ("[addresses]\nx = '0/0/0/512'", "test.addresses.x: index 512 is beyond the 512 entries"),
        ("[addresses]\nx = 1.5", "test.addresses.x: must be an address or indices"),
        ("setup = 'load @root'", "test.setup: 'load @root' does not begin with `v0:`"),
        ("setup = 'v2: load @root'", "test.setup: 'v2: load @root': there are v0 to v1"),
        ("setup = 5", "test.setup: must be a string of lines"),
        ("vcpu = 5", "test.vcpu: must be an array of tables, [[vcpu]]"),
        ("[[vcpu]]\nporgram = ''", "test.vcpu 0.porgram: unknown key; known are on_interrupt, program"),
        ("[machine]\nvcpus = 1\n[[vcpu]]\n[[vcpu]]", "test.vcpu: 2 programs for 1 vCPUs"),
        ("bug = 'no-such-bug'", "test.bug: no fix has the slug 'no-such-bug'"),
        ("profile = 'linux-9'", "test.profile: unknown profile 'linux-9'"),
        ("[expect]\nfixed = 'often'", "test.expect.fixed: 'often' is not one of never, sometimes"),
        ("[expect]\nfixed-nothing = 'never'", "test.expect: unknown fix 'nothing'"),
        ("forbidden = 'v0:r0 =='", "test.forbidden: 'v0:r0 ==' is no condition"),
        ("forbidden = 'v0:r0 == 1'", "test.forbidden: no instruction of a program has its result in v0:r0"),
        ("forbidden = 'Z[0] == 1'", "test.forbidden: unknown frame 'Z'"),
        ("forbidden = 'root[512] == 1'", "test.forbidden: root[512]: a frame has 512 words of 8 bytes"),
        ("forbidden = '1 < fault'", "test.forbidden: '1 < fault': only == and != compare with a fault"),
        ("forbidden = 'root[0] + 1 == 2'", "'root[0] + 1' is no register vN:rM, word NAME[i], number or fault"),
        ("forbidden = 'root[0]'", "'root[0]' is neither a comparison nor and, or, not"),
        ("setup = 'host: zap_all when root[0] = 1'", "the lines of the set-up come one after another, without `when`"),
        ("exists = 'v1:r0 == 1'", "test.exists: no instruction of a program has its result in v1:r0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(text: str, said: str) -> None:
    assert said in refusal(text)


@pytest.mark.parametrize(
    "line, said",
    [
        ("jump x", "'jump x': not an instruction; there are load A"),
        ("r0 =", "no instruction"),
        ("r0 = invlpg x", "only accesses have a result for r0"),
        ("load", "load needs an address"),
        ("load x y", "load takes an address and nothing else"),
        ("load z", "unknown address 'z'; known are x; frames are @NAME"),
        ("load @Z", "unknown frame 'Z'"),
        ("load x[", "'x[' is no address"),
        ("load x[q]", "'q' is no number"),
        ("load.3 x", "an access has 1, 2, 4 or 8 bytes, not 3"),
        ("load. x", "'' is no number"),
        ("load x+4092", "8 bytes at 0x9ffc cross the end of the page"),
        ("load 0x1000000000000", "0x1000000000000 is no address in this mode"),
        ("load @T[512]", "'@T[512]' is not within the frame"),
        ("store x", "store needs a value: store ADDRESS = VALUE"),
        ("store x = ", "store needs a value"),
        ("store x = Z w", "unknown frame 'Z'"),
        ("store.1 x = 256", "0x100 does not fit into 1 bytes"),
        ("cmpxchg x = 1", "cmpxchg needs two values"),
        ("cmpxchg x = 1 -> ", "is neither a number nor an entry"),
        ("await x = 1", "await looks at an aligned word of 8 bytes"),
        ("await @T[1]+4 = 1", "await looks at an aligned word of 8 bytes"),
        ("cr3 Z", "unknown frame 'Z'"),
        ("cr4 *pge", "'*pge' is not + or - and one of"),
        ("ipi v2", "'v2' is no vCPU; there are v0 to v1"),
        ("uinvlpg x", "not an instruction"),
    ],
)
def test_a_wrong_instruction_is_quoted(line: str, said: str) -> None:
    told = refusal(f"{TABLES}\n[[vcpu]]\n[[vcpu]]\nprogram = '{line}'")
    assert told.startswith(f"test.vcpu 1.program: {line.strip()!r}")
    assert said in told


@pytest.mark.parametrize(
    "line, said",
    [
        ("unplug G", "not a host operation; there are age"),
        ("unmap", "wrong number of arguments: unmap FRAME"),
        ("unmap G G", "wrong number of arguments: unmap FRAME"),
        ("reclaim_idle", "wrong number of arguments: reclaim_idle FRAME..."),
        ("unmap Z", "unknown frame 'Z'"),
        ("unmap 700", "gfn 700 is in no memory slot"),
        ("unmap_range 510 4", "gfns 510 to 513 are not all in one memory slot"),
        ("move G wr", "'wr' is not rw or ro"),
        ("dirty_log 1 on", "there is no memory slot 1"),
        ("dirty_log 99 on", "99 is too much: at most 31"),
        ("migrate v2 0", "'v2' is no vCPU"),
        ("shrink -1", "-1 is no number of 64 bits"),
        ("write G = 1", "'G' is not NAME[index]"),
        ("zap_all when G", "OPERATION when NAME[index] = VALUE"),
        ("zap_all when G[512] = 1", "index 512 is beyond the frame's 512 words of 8 bytes"),
        ("write G[512] = 1", "index 512 is beyond"),
    ],
)
def test_a_wrong_host_operation_is_quoted(line: str, said: str) -> None:
    told = refusal(f"{TABLES}\n[[host]]\nprogram = '{line}'")
    assert repr(line) in told and said in told


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"title = '\xff'")
    with pytest.raises(LitmusError, match="binary: not UTF-8"):
        load_litmus(path)


# --- anything at all -------------------------------------------------------------------------------------------------

SAMPLES = [path.read_text(encoding="utf-8") for path in library_files()]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["T wua", "x", "0/0/0/9"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def paths_of(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in the nested data something stands."""
    keys: list[Any] = (
        list(data) if isinstance(data, dict) else list(range(len(data))) if isinstance(data, list) else []
    )
    return [path, *(found for key in keys for found in paths_of(data[key], (*path, key)))]


def well_formed(scenario: Scenario) -> None:
    machine = scenario.machine
    assert len(scenario.programs) == scenario.vcpus == len(machine.registers)
    assert len(scenario.handlers) in (0, scenario.vcpus)
    for gpa, value in scenario.words:
        assert gpa % 8 == 0 and 0 <= value < 1 << 64
        assert any(slot.gfn <= gpa >> 12 < slot.gfn + slot.npages for slot in machine.slots)
    for setup in scenario.setup:
        assert setup.vcpu < scenario.vcpus and (setup.vcpu < 0) is isinstance(setup.step, HostStep)


def parsed_or_refused(data: dict[str, Any]) -> Scenario | None:
    from shadowmmu.explorer.litmus import _Reader
    from shadowmmu.explorer.litmus_table import Table

    try:
        return _Reader(Table(data, "test"), "test").read()
    except LitmusError:
        return None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_file_with_something_else_in_some_place_is_well_formed_or_refused(data: st.DataObject) -> None:
    content: Any = tomllib.loads(data.draw(st.sampled_from(SAMPLES)))
    path = data.draw(st.sampled_from(paths_of(content)[1:]))
    where = content
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = data.draw(values)
    scenario = parsed_or_refused(content)
    if scenario is not None:
        well_formed(scenario)


words = st.sampled_from(
    [
        "load",
        "store",
        "fetch",
        "uload",
        "cmpxchg",
        "xadd",
        "await",
        "invlpg",
        "cr3",
        "cr4",
        "ipi",
        "r0",
        "=",
        "->",
        "x",
        "x[1]",
        "x[5]",
        "@T[9]",
        "@G",
        "@L2[0]",
        "@root[1]",
        "T",
        "G",
        "wua",
        "wuad",
        "0",
        "1",
        "0xfff",
        "-1",
        "v0",
        "v1",
        "+pge",
        "-wp",
        "unmap",
        "move",
        "rw",
        "ro",
        "reclaim",
        "age",
        "write",
        "G[2]",
        "dirty_log",
        "on",
        "off",
        "shrink",
        "migrate",
        "zap_all",
    ]
)
lines = st.lists(words, min_size=1, max_size=6).map(" ".join)


@settings(max_examples=400, deadline=None)
@given(st.lists(lines, max_size=2), st.lists(lines, max_size=1))
def test_any_words_are_a_program_or_refused(program: list[str], host: list[str]) -> None:
    content = tomllib.loads(TABLES)
    content["vcpu"] = [{"program": program}]
    content["host"] = [{"program": host}]
    scenario = parsed_or_refused(content)
    if scenario is not None:
        well_formed(scenario)


frames = st.sampled_from(["G", "T", "L2", "root", "H"])
entries = st.builds(
    lambda frame, flags: f"{frame} {flags}",
    frames,
    st.sampled_from(["a", "wa", "wua", "wuad", "uan", "wuadl", "r"]),
)
stored = st.just("0") | entries
places = st.just("x") | st.just("x[5]") | frames.map(lambda frame: f"@{frame}[9]")
instructions = st.one_of(
    places.map(lambda place: f"r0 = load {place}"),
    places.map(lambda place: f"uload {place}"),
    places.map(lambda place: f"fetch {place}"),
    st.builds(lambda place, value: f"store {place} = {value}", places, stored),
    st.builds(lambda place, value: f"r1 = xchg {place} = {value}", places, stored),
    st.builds(lambda place, value: f"r2 = cmpxchg {place} = 0 -> {value}", places, stored),
    st.sampled_from(["invlpg x", "cr3", "cr3 root", "cr3 T", "cr0 -wp", "cr4 -pge", "cr4 +smep", "efer -nxe", "ipi v0 v1"]),
)  # fmt: skip
operations = st.one_of(
    frames.map(lambda frame: f"unmap {frame}"),
    frames.map(lambda frame: f"move {frame} ro"),
    frames.map(lambda frame: f"age {frame}"),
    frames.map(lambda frame: f"write {frame}[9] = 0"),
    st.sampled_from(["unmap_range 0 64", "dirty_log 0 on", "get_dirty_log 0", "zap_all", "shrink 3", "mmu_pages 64",
                     "migrate v0 1", "delete_slot 0", "set_slot 3 700 4"]),
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["", "memory_model = 'tso'", "vpid = false", "tdp = 'ept'"]),
    st.lists(instructions, max_size=4),
    st.lists(instructions, max_size=3),
    st.lists(operations, max_size=2),
    st.integers(0, 1 << 32),
)
def test_what_is_accepted_can_be_executed(
    machine: str, first: list[str], second: list[str], host: list[str], seed: int
) -> None:
    content = tomllib.loads(f"[machine]\n{machine}\n[frames]\nH = 200\n{TABLES}")
    content["vcpu"] = [{"program": first}, {"program": second, "on_interrupt": ["r3 = load x", "invlpg x"]}]
    content["host"] = [{"program": host}]
    scenario = parsed_or_refused(content)
    assert scenario is not None
    ending = execute(scenario, "fixed", RandomChooser(seed))
    results = {step.into for program in (*scenario.programs, *scenario.handlers) for step in program}
    assert {re.sub(r"v\d:", "", name) for name, _ in ending.outcome} <= results


def test_a_setup_that_waits_for_ever_is_no_scenario() -> None:
    scenario = parse_litmus(f"setup = 'v0: await @G = 5'\n{TABLES}", "test")
    with pytest.raises(ScenarioError, match="set-up"):
        World(scenario, "fixed")
