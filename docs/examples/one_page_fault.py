"""Takes one page fault by hand. First: `shadowmmu serve mmu --bind tcp://127.0.0.1:5701`."""
# ruff: noqa: INP001, T201 (an example: a script that prints)

import asyncio
import sys

from shadowmmu.client import VcpuClient
from shadowmmu.protocol.messages import Instruction, PageFaultExit, Walked, WalkFault

GVA = 0xFFFF_8000_0080_0000  # the guest that the service boots maps all of its memory from 0xffff800000000000 up


async def main(address: str) -> Walked:
    """Loads from GVA until it is mapped: the service handles the fault as KVM would."""
    async with await VcpuClient.connect(address) as vcpu:
        await vcpu.enter()
        while isinstance(answer := await vcpu.walk(GVA), WalkFault):
            print(f"guest entry {vcpu.entry}: page fault, error code {answer.error_code}")
            await vcpu.exit(PageFaultExit(GVA, answer.error_code, Instruction(flags=0)))
        print(f"guest entry {vcpu.entry}: {GVA:#x} is in host frame {answer.pfn:#x}, level {answer.level}")
        return answer


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:] or ["tcp://127.0.0.1:5701"]))
