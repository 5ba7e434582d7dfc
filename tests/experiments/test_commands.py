"""The command line of a study: errors are one line."""

import pytest

from experiments.commands import argument_parser


@pytest.mark.parametrize("arguments", [[], ["x", "--pick=best"], ["x", "--fulll"], ["x", "--terms=few"]])
def test_a_wrong_command_line_is_one_line(arguments, capsys):
    parser = argument_parser("A study.")
    parser.add_argument("weights")
    parser.add_argument("--pick", choices=("first", "last"))
    parser.add_argument("--terms", type=int)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(arguments)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert arguments[-1:] == [] or arguments[-1].split("=")[0] in printed
