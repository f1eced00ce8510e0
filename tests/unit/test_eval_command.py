# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest

from sglang_diffxkv.cli import main
from sglang_diffxkv.eval.options import names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "snap"], "unknown policy 'snap'; one of: full"),
        (["--tasks", "niah"], "unknown task 'niah'; one of: niah_single"),
        (["--filler", "noise"], "the bundled model reads no noise"),
        (["--lengths", "1k"], "'1k' is not a positive number"),
        (["--samples", "0"], "'0' is not a positive number"),
        (["--target-compression", "nan"], "'nan' is not a positive number"),
        (
            ["--policies", "streaming", "--lengths", "300", "--target-compression", "6"],
            "lower the target",
        ),
        (["--model", "/nowhere"], "/nowhere"),
        (["--lengths", ","], "--lengths names nothing"),
        (["--documents", "--tasks", ""], "--tasks names nothing"),
        (["--output", "/dev/null/rows.json"], "--output /dev/null/rows.json: File exists"),
        (["--output", "rows.md"], "name the .json"),
    ],
)
def test_eval_refuses_in_one_line(options, message, capsys):
    assert main(["eval", *options]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_what_is_named_twice_is_measured_once():
    assert names("1024, 2048,1024,") == ["1024", "2048"]


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom sglang_diffxkv.cli import main\n"
        "try:\n    main([*sys.argv[1:], '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'sglang', 'transformers', 'requests'} & sys.modules.keys()"
    )
    for command in ([], ["eval"], ["calibrate"], ["demo"], ["demo-router"], ["model"]):
        subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)
