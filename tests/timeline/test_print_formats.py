"""The parser that our lines are tested with reads a real kernel's."""

from __future__ import annotations

from tests.timeline.print_formats import DATA, Parser

WITHOUT_FORMAT = ("kvm_emulate_insn", "kvm_inj_exception", "kvm_unmap_hva_range", "kvm_userspace_exit")
"""Events of the sample whose formats are not in the file."""


def test_it_reads_what_a_real_kernel_has_printed() -> None:
    parser = Parser((DATA / "print-formats.txt").read_text())
    lines = (DATA / "kernel-6.1.txt").read_text().splitlines()
    parsed = [
        parser.parse(line)
        for line in lines
        if not line.startswith("#") and not any(f": {name}: " in line for name in WITHOUT_FORMAT)
    ]
    assert len(parsed) > 60
    first = parsed[0]
    assert (first.comm, first.pid, first.cpu, first.flags, first.event) == (
        "shmmu",
        135,
        0,
        "...1.",
        "kvm_mmu_get_page",
    )
    assert first.fields["gfn"] == "100" and first.fields["level"] == "4" and first.fields["created"] == "new"
