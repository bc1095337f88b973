"""The command line: one module a command."""

from . import bench as bench
from . import chat as chat
from . import doctor as doctor
from . import export as export
from . import generate as generate
from . import inspect as inspect
from . import models as models
from . import perplexity as perplexity
from . import server as server
from . import tune as tune
from ._common import app as app
from ._common import main as main

# As --help lists them: what a newcomer wants comes first.
PANELS = ("Run", "Models", "Look", "Measure", "Convert")
app.registered_commands.sort(key=lambda c: PANELS.index(str(c.rich_help_panel)))
