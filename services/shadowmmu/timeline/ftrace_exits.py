"""What the kernel's kvm_exit says of an exit: the processor's name for the reason, and two words of information.

Intel's: the exit qualification, and the interruption information (SDM volume 3, 27.2 and 24.9.2). AMD's: EXITINFO1 and
EXITINFO2 (APM volume 2, appendix C). What the event stream does not have is 0. Relies on the event's names for reasons.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from shadowmmu.cpu.x86 import PFERR_FETCH_MASK, PFERR_WRITE_MASK
from shadowmmu.protocol.events import Exited
from shadowmmu.protocol.messages import Tdp

__all__ = ["ExitText", "exit_text"]

_VMX: Final = {
    "ept_misconfig": "EPT_MISCONFIG",
    "invlpg": "INVLPG",
    "send_ipi": "APIC_ACCESS",
    "halt": "HLT",
    "external_interrupt": "EXTERNAL_INTERRUPT",
}
_SVM: Final = {
    "invlpg": "invlpg",
    "send_ipi": "npf",
    "halt": "hlt",
    "external_interrupt": "interrupt",
}
_PAGE_FAULT_INFO: Final = 0x80000B0E
"""Interruption information of a page fault: valid, with an error code, a hardware exception, vector 14."""
_APIC_WRITE_ICR: Final = 0x1300
"""Exit qualification of an APIC access: a write to the interrupt command register."""


class ExitText(NamedTuple):
    """What the tracepoint prints."""

    reason: str
    info1: int = 0
    info2: int = 0


def exit_text(event: Exited, tdp: Tdp | None, register: str) -> ExitText:
    """Of an exit of a processor with these tables; `register`: the one written, "" if that is not known."""
    address = max(event.gva, 0)
    if tdp is Tdp.NPT:
        match event.reason:
            case "page_fault":
                return ExitText("npf", event.error_code, address)
            case "register_write":
                return ExitText("msr", 1) if register == "efer" else ExitText(f"write_{register or 'cr0'}")
            case _:
                return ExitText(_SVM[event.reason])
    match event.reason:
        case "page_fault" if tdp is Tdp.EPT:
            return ExitText("EPT_VIOLATION", _ept_qualification(event.error_code))
        case "page_fault":
            return ExitText("EXCEPTION_NMI", address, _PAGE_FAULT_INFO)
        case "invlpg":
            return ExitText(_VMX[event.reason], address)
        case "register_write" if register == "efer":
            return ExitText("MSR_WRITE")
        case "register_write":
            return ExitText("CR_ACCESS", int(register[2:] or 0))
        case "send_ipi":
            return ExitText(_VMX[event.reason], _APIC_WRITE_ICR)
        case _:
            return ExitText(_VMX[event.reason])


def _ept_qualification(error_code: int) -> int:
    """Exit qualification of an EPT violation: read, write or fetch, at a valid linear address."""
    if error_code & PFERR_WRITE_MASK:
        return 0x182
    return 0x184 if error_code & PFERR_FETCH_MASK else 0x181
