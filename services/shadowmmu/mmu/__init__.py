"""The MMU service: the machine behind a ZeroMQ socket, with its journal.

await serve(MmuOptions(bind="tcp://127.0.0.1:5701", vcpus=1))       # alone, for protocol clients
await serve(MmuOptions(bind=..., coordinator="tcp://...", out=...))  # a member of a run
"""

from shadowmmu.mmu.options import MmuOptions
from shadowmmu.mmu.serve import serve

__all__ = ["serve", "MmuOptions"]
