"""Random guests of the workloads as scenarios, and an execution of one as a scenario of single instructions.

A workload's program is endless and decides as it goes, so a scenario only names the configuration it is drawn from.
Once it has failed, `explicit` writes down what each vCPU executed, and that straight-line scenario, which behaves the
same under the same schedule, is what is shrunk, kept and drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shadowmmu.cpu import boot_image
from shadowmmu.explorer.actors import Actor
from shadowmmu.explorer.choosers import FollowChooser
from shadowmmu.explorer.scenario import HostStep, MachineSpec, Registers, Scenario, Slot
from shadowmmu.explorer.workload_program import WorkloadProgram
from shadowmmu.explorer.world import World
from shadowmmu.machine import HostProgram, kvm_config
from shadowmmu.protocol import messages as m

__all__ = ["explicit", "workload_scenario"]


def workload_scenario(config: m.RunConfig, vcpus: int, host_operations: int) -> Scenario:
    """The scenario that runs `config` on `vcpus` vCPUs beside `host_operations` operations of one host thread."""
    image = boot_image(config, vcpus)
    virtual_machine = kvm_config(config)
    host = HostProgram(config, vcpus)
    operations = [host.next_operation() for _ in range(host_operations)]
    return Scenario(
        name=f"{config.workload.value}-{config.seed}",
        machine=MachineSpec(
            slots=tuple(
                Slot(slot.id, slot.base_gfn, slot.npages, slot.backing.value)
                for slot in virtual_machine.memslots
            ),
            registers=tuple(Registers(r.cr0, r.cr3, r.cr4, r.efer) for r in image.registers),
            mmu_pages=config.mmu_pages,
            vpid=config.vpid,
            tdp=config.tdp,
            tso=config.memory_model is m.MemoryModel.TSO,
        ),
        words=tuple(image.words),
        setup=(),
        programs=((),) * vcpus,
        hosts=(tuple(HostStep(describe_operation(op), op) for op in operations),) if operations else (),
        title=f"workload {config.workload.value}, seed {config.seed}, {config.ops} instructions",
        profile=config.profile,
        workload=config,
    )


def describe_operation(operation: m.HostOperation) -> str:
    """A host operation as one line."""
    fields = (f"{name}={getattr(operation, name)}" for name in operation.__struct_fields__)
    return f"{m.tag_of(operation)} {' '.join(fields)}".strip()


def explicit(scenario: Scenario, profile: str, schedule: Sequence[Actor]) -> Scenario:
    """What the vCPUs of a workload scenario executed under a schedule, as a scenario without a workload."""
    if scenario.workload is None:
        return scenario
    world = World(scenario, profile)
    chooser = FollowChooser(schedule)
    for _ in schedule:
        enabled = world.enabled()
        if not enabled:
            break
        world.step(chooser.choose(enabled))
    programs = []
    for program in world.programs:
        assert isinstance(program, WorkloadProgram)
        steps = list(program.record[: program.position])
        if program.step is not None:
            steps.append(program.step)  # what was under way
        programs.append(tuple(steps))
    return msgspec.structs.replace(scenario, workload=None, programs=tuple(programs))
