"""One recipe for each thing an architecture can do differently, a file for each family."""

from importlib import import_module
from pkgutil import iter_modules

from tests.models.case import Case

CASES: dict[str, Case] = {
    name: case
    for module in sorted(m.name for m in iter_modules(__path__))
    for name, case in import_module(f"{__name__}.{module}").CASES.items()
}
