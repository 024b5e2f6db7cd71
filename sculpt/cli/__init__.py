"""The command line: `sculpt train | search | finetune | compact | evaluate | export | report | bench | info | prune`."""

from sculpt.cli.commands import main
from sculpt.cli.options import make_parser

__all__ = ["main", "make_parser"]
