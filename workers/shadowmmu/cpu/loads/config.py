"""What can be chosen of a load. Plain data: it is part of a run's configuration."""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

__all__ = ["DEFAULT_PAGES", "Load", "LoadConfig"]


class Load(enum.Enum):
    """What one iteration is. The name in brackets is the benchmark of LMbench that does the same."""

    FORK = "fork"
    """A process forks, its child exits at once, the parent waits for it (lat_proc fork)."""
    PAGE_FAULT = "page-fault"
    """Every page of a mapped file is touched once, in random order; the mapping is made anew (lat_pagefault)."""
    PROTECTION_FAULT = "protection-fault"
    """A store to a read-only page, and the signal that it raises (lat_sig prot)."""
    MMAP = "mmap"
    """A file is mapped, a tenth of it is written to in steps of 16 KiB, it is unmapped (lat_mmap)."""
    GETPID = "getpid"
    """A system call that does nothing. With `kpti`: two CR3 writes (lat_syscall null)."""
    TOUCH = "touch"
    """As many accesses as there are pages, at random places of them."""
    CONTEXT_SWITCH = "context-switch"
    """The next process runs, and touches its pages (lat_ctx)."""
    REMAP = "remap"
    """Some entries of each of a number of tables are taken away or made read-only, and their pages are used again."""


DEFAULT_PAGES: Final = {
    Load.FORK: 40,
    Load.PAGE_FAULT: 1024,
    Load.PROTECTION_FAULT: 8,
    Load.MMAP: 2560,
    Load.GETPID: 8,
    Load.TOUCH: 1024,
    Load.CONTEXT_SWITCH: 16,
    Load.REMAP: 512,
}
"""Of `LoadConfig.pages`; docs/COST_MODELS.md says where they come from."""


class LoadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A load.

    `pages`: of each process's own memory (fork, context-switch), of the mapping (page-fault, mmap, touch, remap); 0:
    what `DEFAULT_PAGES` says. `text_pages`: mapped from files, read only. `child_reads`: pages of
    text that the child uses, `child_writes`, `parent_writes`: own pages that the child, and the parent after its
    child's end, write to (fork). `processes`: that take turns (context-switch).
    `write_share`: of the accesses (touch, context-switch). `fault_around`: pages that one read fault of a mapped file
    maps (Linux since 3.15: 16). `kpti`: page-table isolation, a CR3 write at each way into the kernel and out of it.
    `tables`: that the pages of remap are spread over; `edits`: entries that are edited in each; `protect_share`: of
    the edits, those that make read-only and do not unmap; `table_share`: of the tables, those that are edited last, so
    that they are out of sync when they are used.
    """

    load: Load = Load.FORK
    pages: Annotated[int, msgspec.Meta(ge=0, le=65536)] = 0
    text_pages: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 48
    child_reads: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 24
    child_writes: Annotated[int, msgspec.Meta(ge=0, le=65536)] = 8
    parent_writes: Annotated[int, msgspec.Meta(ge=0, le=65536)] = 12
    processes: Annotated[int, msgspec.Meta(ge=2, le=64)] = 2
    write_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.3
    fault_around: Annotated[int, msgspec.Meta(ge=1, le=512)] = 16
    kpti: bool = False
    tables: Annotated[int, msgspec.Meta(ge=1, le=512)] = 8
    table_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 1.0
    edits: Annotated[int, msgspec.Meta(ge=1, le=512)] = 8
    protect_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.5

    def __post_init__(self) -> None:
        if self.fault_around & (self.fault_around - 1):
            raise ValueError(f"fault_around is a power of two, not {self.fault_around}")
        if self.load is Load.REMAP and not self.tables <= self.size <= 512 * self.tables:
            raise ValueError(
                f"{self.size} pages cannot be spread over {self.tables} tables of 512 entries, each with one at least"
            )

    @property
    def size(self) -> int:
        """`pages`, with 0 resolved."""
        return self.pages or DEFAULT_PAGES[self.load]

    @property
    def file_pages(self) -> int:
        """Pages of the mapping that are ever used."""
        return max(1, self.size // 10) if self.load is Load.MMAP else self.size
