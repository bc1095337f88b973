"""The command line: one module a command."""

from . import generate as generate
from . import inspect as inspect
from . import perplexity as perplexity
from ._common import app as app
from ._common import main as main
