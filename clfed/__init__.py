"""clfed: machines that keep learning, learn together, and forget on request."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout or a Flower app bundle the folder strategies/ stands beside this package; a wheel
# carries it inside. Either way it is imported as clfed.strategies.
_package = Path(__file__).resolve().parent
if (
    not (_package / "strategies").is_dir()
    and (_package.parent / "strategies" / "__init__.py").is_file()
):
    __path__.append(str(_package.parent))
