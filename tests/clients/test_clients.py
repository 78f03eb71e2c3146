"""The clients in other languages keep to the protocol: alone, before the conformance kit, and as workers of a run."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from shadowmmu.coordinator.proxy import Proxy
from tests.clients.conftest import C_CLIENT, END_SECONDS, NODE_CLIENT, SHADOWMMU, Command, Start

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

ANY_PORT = "tcp://127.0.0.1:*"
each_client = pytest.mark.parametrize("client", ["node", "c"], indirect=True)


def run(command: Command, directory: Path | None = None) -> str:
    """Runs a command that is to end well; what it printed."""
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=END_SECONDS, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def launch(command: Command) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.usefixtures("node_client")
def test_the_node_client_reads_and_writes_the_golden_vectors() -> None:
    assert "# fail 0" in run(["node", "--test", "--test-reporter=tap"], NODE_CLIENT)


@pytest.mark.usefixtures("c_build")
def test_the_c_client_reads_and_writes_the_golden_vectors() -> None:
    assert "0 complaints" in run([sys.executable, "check_vectors.py", "./vectors.sanitized"], C_CLIENT)


@each_client
def test_a_client_touches_pages_and_detaches(client: Command, start: Start) -> None:
    address = start("serve", "mmu", "--bind", ANY_PORT).address()
    said = run([*client, address])
    assert "attached as vCPU 0" in said
    assert "detached" in said


def test_clients_of_both_languages_share_a_machine(node_client: Command, c_build: Path, start: Start) -> None:
    address = start("serve", "mmu", "--bind", ANY_PORT, "--vcpus", "2").address()
    commands = [[*node_client, address], [str(c_build / "touch.sanitized"), address]]
    clients = [launch(command) for command in commands]
    said = [client.communicate(timeout=END_SECONDS)[0] for client in clients]
    assert [client.returncode for client in clients] == [0, 0], said
    assert {line for text in said for line in text.splitlines() if line.startswith("attached")} == {
        "attached as vCPU 0",
        "attached as vCPU 1",
    }


@each_client
async def test_a_client_whose_connection_is_cut_goes_on_in_the_same_incarnation(
    client: Command, start: Start
) -> None:
    service = start("serve", "mmu", "--bind", ANY_PORT)
    async with Proxy(int(service.address().rpartition(":")[2])) as proxy:
        process = launch([*client, f"tcp://127.0.0.1:{proxy.port}", "--rounds", "120"])
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "attached as vCPU 0\n"
        for _ in range(2):
            assert proxy.cut()
            resumed = await asyncio.to_thread(service.logged, "resumed")
            assert resumed["incarnation"] == 1
        said, _ = await asyncio.to_thread(process.communicate, timeout=END_SECONDS)
    assert process.returncode == 0, said
    assert "attached" not in said
    assert "\nresumed " in said  # once at least: an answer to Resume may have been cut off, too


@each_client
def test_a_client_passes_the_conformance_kit(client: Command) -> None:
    run([*SHADOWMMU, "protocol", "check-client", "--", *client])


@pytest.mark.parametrize("options", [["--workload=mixed"], ["--workload=sloppy", "--no-vpid"]], ids=" ".join)
def test_clients_take_part_in_a_run_beside_a_python_worker(
    options: list[str], node_client: Command, c_build: Path, start: Start, tmp_path: Path
) -> None:
    ops = 6_000
    run_options = [f"--ops={ops}", "--seed=7", *options, f"--out={tmp_path}"]
    run = start("serve", "coordinator", "--bind", ANY_PORT, "--vcpus=3", "--hosts=1", *run_options)
    here = ["--coordinator", run.address()]
    start("serve", "mmu", "--bind", ANY_PORT, *here)
    start("worker", "host", *here)
    start("worker", "vcpu", *here)
    names = ["stranger-node", "stranger-c"]
    clients = [
        launch([*command, *here, "--name", name])
        for command, name in zip([node_client, [str(c_build / "touch.sanitized")]], names, strict=True)
    ]
    said = [client.communicate(timeout=END_SECONDS)[0] for client in clients]
    assert run.status() == 0, said
    assert [client.returncode for client in clients] == [0, 0], said

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "pass", report["text"]
    assert not report["lost"]
    strangers = [member for member in report["members"] if member["name"] in names]
    assert {member["vcpu"] for member in strangers} < {0, 1, 2}
    for member in strangers:
        assert member["reported"]
        assert member["counters"]["vcpu.instructions"] >= ops // 3
        # The Python worker's kernel asked it to invalidate translations, and the run would have stopped without.
        assert member["counters"]["vcpu.interrupts"] > 0
