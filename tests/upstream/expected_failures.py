"""Tests of transformers that fail with our attention in the place of sdpa, and are right to.

A defect of ours has no place here; nor has a test that fails on sdpa too, which `run.py` finds out by itself. When one
of these passes, its entry is stale, and `run.py` fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

import transformers
from packaging.specifiers import SpecifierSet

__all__ = ["EXPECTED_FAILURES", "ExpectedFailure", "expected_failure"]


@dataclass(frozen=True)
class ExpectedFailure:
    """One or more tests that are known to fail.

    Args:
        test: Pattern of the test, as `run.py` prints it: "family::Class::test".
        reason: Why it fails, and why that is right.
        versions: The versions of transformers where it does.
    """

    test: str
    reason: str
    versions: str = ">=5.5"


EXPECTED_FAILURES = (
    ExpectedFailure(
        "gpt_oss::GptOssModelTest::test_sdpa_padding_matches_padding_free_with_position_ids",
        "GptOss hands its mask helpers no position_ids, so that nothing tells the sequences of a pack apart; eager "
        "attention gives the same numbers, its own version of the test is disabled, and sdpa is never asked. With the "
        "offsets of the sequences (the test's other half, with fa_kwargs) our attention passes.",
    ),
)


def expected_failure(test: str) -> ExpectedFailure | None:
    """Returns the entry of a test in the installed version of transformers, or None if the test must pass."""
    for entry in EXPECTED_FAILURES:
        versions = SpecifierSet(entry.versions, prereleases=True)
        if fnmatch(test, entry.test) and versions.contains(transformers.__version__):
            return entry
    return None
