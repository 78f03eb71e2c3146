"""The names of the guest's own work: what a cost model has to price in its `guest` table.

Work is what the guest's processor does by itself, with or without a hypervisor. The accesses to memory by which the
shadow MMU is exercised come on top, as instructions.
"""

from __future__ import annotations

from typing import Final

__all__ = ["WORK"]

WORK: Final[dict[str, str]] = {
    "syscall": "a system call's way in and out",
    "kpti": "one of the two CR3 writes of a way into the kernel and out of it, beside its exit",
    "fault_handler": "a page fault's way through the kernel, beside what is named here",
    "page_clear": "a page is filled with zeros",
    "page_copy": "a page is copied",
    "pte_copy": "fork copies an entry, and write-protects it",
    "pte_map": "a page is mapped: looked up or allocated, counted, its entry written",
    "pte_clear": "a page is unmapped and given back",
    "table_alloc": "a paging structure is allocated, beside clearing it",
    "table_free": "a paging structure is given back",
    "flush": "translations are flushed, beside exits: the kernel's decision how",
    "fork": "a process is made, beside its memory",
    "exit": "a process ends and is waited for, beside its memory",
    "context_switch": "the scheduler switches to another process",
    "signal": "a signal is delivered",
    "mmap": "a mapping is made",
    "munmap": "a mapping is taken away, beside its pages",
    "mprotect": "rights of a mapping are changed, beside its pages",
}
"""What each name stands for."""
