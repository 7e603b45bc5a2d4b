"""Runs transformers' own model tests with our attention in the place of sdpa.

    python tests/upstream/run.py                            # the default families, four minutes on one core
    python tests/upstream/run.py --families bert,llama
    python tests/upstream/run.py --checkout ~/transformers  # takes the checkout that is there, or else clones to there
    python tests/upstream/run.py --json result.json         # writes the numbers, and what they were measured on

The tests are those of the installed version of transformers. They are in its repository alone (the source distribution
has the common test classes, but not the tests of the models), so the tag of that version is cloned, without sources.
A checkout of another revision needs the common test classes of the installed version: `tests/test_*.py` of its source
distribution. The JSON has the commit, and the files that are not those of the commit.

pytest runs in a subprocess with the plugin `stand_in.py`: every test that asks for "sdpa", or for nothing where sdpa is
the default, gets our attention function and mask function. What fails there runs once more on sdpa itself, with the
same inputs: what fails on both is not ours. `EXPECTED_FAILURES` has the other tests that may fail, and why.

Exit status 0 means that every other test passed, that none of the expected failures did, and that the tests of each
family called our function.

Families that compute attention themselves (MPNet, DeBERTa) are not in the list: their tests never reach sdpa. Nor are
those whose tests only load checkpoints (XLM-RoBERTa), or need the `datasets` package (BEiT, Wav2Vec2).

On a machine with a GPU the tests run there, those in half precision on FlashInfer's kernels.

Needs git, and the packages pytest, parameterized, requests and timeout-decorator.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
from expected_failures import expected_failure

from hf_flashinfer_attn.tools.environment import describe_environment

REPOSITORY = "https://github.com/huggingface/transformers"
# What the tests of models import, besides each other.
DIRECTORIES = ("tests", "utils/test_module")
PACKAGES = {"parameterized": "parameterized", "requests": "requests", "timeout_decorator": "timeout-decorator"}

FAMILIES = (
    "albert", "bart", "bert", "clip", "dinov2", "distilbert", "electra", "esm", "eurobert", "gemma2", "gemma3", "gpt2",
    "gpt_oss", "hubert", "jina_embeddings_v3", "llama", "mistral", "modernbert", "nomic_bert", "qwen3", "roberta",
    "siglip", "t5", "t5gemma", "vit", "whisper",
)  # fmt: skip
# The version of transformers that brought a family to the attention interface.
SINCE = {"t5": Version("5.15")}

COLUMNS = ("passed", "through ours", "skipped", "fails on sdpa too", "failed as expected", "failed")


@dataclass(frozen=True)
class Result:
    """How one test ended.

    Args:
        node: The test, as pytest names it; a file that could not be imported.
        outcome: "passed", "skipped" or "failed".
        calls: How often our function was called.
    """

    node: str
    outcome: str
    calls: int

    @property
    def family(self) -> str:
        return Path(self.node.split("::")[0]).parent.name

    @property
    def test(self) -> str:
        """The test as "family::Class::test"."""
        return "::".join([self.family, *self.node.split("::")[1:]])


def clone(destination: Path, repository: str, revision: str) -> None:
    """Clones the tests of a revision, and of its other files only those at the top."""
    options = ["--quiet", "--depth=1", "--filter=blob:none", "--sparse", f"--branch={revision}"]
    subprocess.run(["git", "clone", *options, repository, str(destination)], check=True)
    subprocess.run(["git", "-C", str(destination), "sparse-checkout", "set", *DIRECTORIES], check=True)


def test_file(family: str) -> str:
    return f"tests/models/{family}/test_modeling_{family}.py"


def run_pytest(checkout: Path, tests: Sequence[str], scratch: Path, *extra: str) -> list[Result]:
    """Runs all tests in one process, since importing transformers takes longer than most of them.

    Raises:
        SystemExit: If pytest did not run to its end.
    """
    report, configuration = scratch / "report.jsonl", scratch / "pytest.ini"
    # In the place of the checkout's own configuration and conftest, which ask for plugins that the tests do not need.
    configuration.write_text("[pytest]\n")
    environment = {
        "OMP_NUM_THREADS": "1",  # Models this small lose more to threads than they gain.
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RUN_SLOW": "1",  # So is the comparison of generated tokens marked, tiny model or not.
    }
    # fmt: off
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "--show-capture=no", "-W", "ignore", "-p",
        "no:cacheprovider", "--noconftest", "--continue-on-collection-errors", "-c", str(configuration), "--rootdir",
        str(checkout), "-p", "stand_in", "--stand-in-report", str(report),
    ]
    # fmt: on
    status = subprocess.run([*command, *extra, *tests], cwd=checkout, env=environment).returncode
    if status not in (0, 1):
        sys.exit(f"pytest ended with status {status}")
    return read_results(report)


def read_results(report: Path) -> list[Result]:
    """Joins the lines that the plugin wrote about each test."""
    outcomes: dict[str, str] = {}
    calls: Counter[str] = Counter()
    for line in map(json.loads, report.read_text().splitlines()):
        if "outcome" in line:
            # The last one counts: a test that passed may still fail in its teardown.
            outcomes[line["test"]] = line["outcome"]
        else:
            calls[line["test"]] = line["calls"]
    return [Result(node, outcome, calls[node]) for node, outcome in outcomes.items()]


def fail_on_sdpa_too(checkout: Path, results: Sequence[Result], scratch: Path) -> set[str]:
    """Runs once more, on sdpa itself, what failed and should not have."""
    # A file that cannot be imported is a failure, whatever sdpa has to say.
    suspects = [
        result.node
        for result in results
        if result.outcome == "failed" and "::" in result.node and expected_failure(result.test) is None
    ]
    again = run_pytest(checkout, suspects, scratch, "--baseline") if suspects else []
    return {result.node for result in again if result.outcome == "failed"}


def column_of(result: Result, fail_too: set[str]) -> str:
    """The column of the table that counts a test."""
    if result.node in fail_too:
        return "fails on sdpa too"
    if result.outcome == "skipped" or expected_failure(result.test) is None:
        return result.outcome
    return "failed as expected" if result.outcome == "failed" else "passed unexpectedly"


def count(families: Sequence[str], results: Sequence[Result], fail_too: set[str]) -> dict[str, Counter[str]]:
    """Counts the tests of each family, and of "all", by column; "calls" are those of our function."""
    counts: dict[str, Counter[str]] = {}
    for name in [*families, "all"]:
        tests = [result for result in results if name in (result.family, "all")]
        counts[name] = Counter(column_of(result, fail_too) for result in tests)
        counts[name]["through ours"] = sum(result.outcome == "passed" and result.calls > 0 for result in tests)
        counts[name]["calls"] = sum(result.calls for result in tests)
    return counts


def print_table(counts: dict[str, Counter[str]]) -> None:
    rows: list[tuple[str, ...]] = [("family", *COLUMNS)]
    rows += [(name, *(str(numbers[column]) for column in COLUMNS)) for name, numbers in counts.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))


def describe_checkout(checkout: Path) -> dict[str, Any] | None:
    """Returns the commit of a checkout, its date, and the files that differ from it; None if git does not have it."""
    if not (checkout / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(checkout), *arguments], check=True, capture_output=True, text=True
        ).stdout

    commit, date = git("log", "-1", "--format=%H %cs").split()
    changed = [line[3:] for line in git("status", "--porcelain", "--untracked-files=all", "--", "tests").splitlines()]
    return {"commit": commit, "date": date, "not_of_the_commit": changed}


def summarise(
    counts: dict[str, Counter[str]],
    results: Sequence[Result],
    fail_too: set[str],
    problems: Sequence[str],
    left_out: Sequence[str],
    tests: dict[str, Any] | None,
) -> dict[str, Any]:
    """Puts everything into plain values for JSON."""
    columns = (*COLUMNS, "calls")
    numbers = {
        name: {column.replace(" ", "_"): of_family[column] for column in columns} for name, of_family in counts.items()
    }
    expected = {result.test: expected_failure(result.test) for result in results if result.outcome == "failed"}
    return {
        "passed": not problems,
        "transformers": transformers.__version__,
        "all": numbers.pop("all"),
        "problems": list(problems),
        "failed_as_expected": {test: entry.reason for test, entry in expected.items() if entry is not None},
        "fails_on_sdpa_too": [result.test for result in results if result.node in fail_too],
        "left_out": list(left_out),
        "families": numbers,
        "tests": tests,
        "environment": describe_environment(),
    }


def find_problems(families: Sequence[str], results: Sequence[Result], fail_too: set[str]) -> list[str]:
    columns = {result.test: column_of(result, fail_too) for result in results}
    problems = [f"{column}: {test}" for test, column in columns.items() if column in ("failed", "passed unexpectedly")]
    reached = {result.family for result in results if result.calls > 0}
    return problems + [f"no test called our function: {family}" for family in families if family not in reached]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="names of folders in tests/models, with commas")
    parser.add_argument("--checkout", type=Path, help="a checkout of transformers; used as it is, made if missing")
    parser.add_argument("--repository", default=REPOSITORY, help="where to clone from")
    parser.add_argument("--revision", default=f"v{transformers.__version__}", help="tag or branch to clone")
    parser.add_argument("--json", type=Path, help="a file that gets the numbers")
    arguments = parser.parse_args()
    if missing := [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]:
        parser.error(f"the tests of transformers import what is not installed: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as scratch:
        checkout: Path = arguments.checkout or Path(scratch, "transformers")
        if not checkout.exists():
            try:
                clone(checkout, arguments.repository, arguments.revision)
            except (OSError, subprocess.CalledProcessError) as error:
                parser.error(f"cannot clone {arguments.revision} of {arguments.repository}: {error}; see --checkout")
        checkout = checkout.resolve()
        families: list[str] = []
        left_out: list[str] = []
        for family in arguments.families.split(","):
            if Version(transformers.__version__) < SINCE.get(family, Version("0")):
                left_out.append(f"{family} is on the attention interface since transformers {SINCE[family]}")
                print(f"left out: {left_out[-1]}")
            elif not (checkout / test_file(family)).exists():
                parser.error(f"there is no {test_file(family)} in {checkout}; see --families")
            else:
                families.append(family)
        results = run_pytest(checkout, [test_file(family) for family in families], Path(scratch))
        fail_too = fail_on_sdpa_too(checkout, results, Path(scratch))
        tests = describe_checkout(checkout)
    print(f"\ntransformers {transformers.__version__}, our attention in the place of sdpa")
    counts = count(families, results, fail_too)
    print_table(counts)
    problems = find_problems(families, results, fail_too)
    for problem in problems:
        print(problem)
    if arguments.json is not None:
        summary = summarise(counts, results, fail_too, problems, left_out, tests)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
