"""What a fix of the catalogue is: a switch of the model, and where it comes from."""

from __future__ import annotations

import enum

import msgspec

__all__ = ["Finding", "Fix", "FixStatus"]


class FixStatus(enum.Enum):
    """Which kernels have the fix."""

    LATENT = "latent"  # 3.1 has the bug: off in linux-3.1, on in fixed
    MUTANT = "mutant"  # 3.1 has the fix: on in both; without it an older bug is back
    LATER = "later"  # 3.1 has neither bug nor fix: on in both; without it a later kernel's bug is there
    ALTERNATIVE = "alternative"  # another fix of a bug that has one: off in both


class Finding(enum.Enum):
    """What a search for the bug must end with."""

    FOUND = "found"
    EQUIVALENT = "equivalent"  # without the fix nothing changes: something else masks it
    NOT_OBSERVABLE = "no observable known"  # the code differs, but no rule can see it


class Fix(msgspec.Struct, frozen=True):
    """One switch.

    `bug` is its entry in the catalogue (several switches of one entry are its variants); `commit` the upstream commit,
    or its title if the hash is unsure; `years` from the kernel that brought the bug to the one that fixed it, "?" where
    unknown; `rules` the coherence rules that the bug breaks, the first one that a run meets first. `tso`: the bug needs
    a store buffer for the host's stores. `description` says what the code does with the fix (and without, where that
    is not plain).
    """

    slug: str
    bug: str
    commit: str
    title: str
    years: str
    status: FixStatus
    rules: tuple[int, ...]
    description: str
    finding: Finding = Finding.FOUND
    tso: bool = False

    @property
    def attribute(self) -> str:
        """The name of the profile's boolean for it."""
        return self.slug.replace("-", "_")
