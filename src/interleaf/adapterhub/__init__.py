"""AdapterHub's files: adapters made with its library `adapters` are read and written, numerically equal.

Its formulas and names: Poth et al. 2023 (arXiv 2311.11077).
"""

from interleaf.adapterhub.disk import is_adapterhub
from interleaf.adapterhub.reading import load
from interleaf.adapterhub.writing import save

__all__ = ["is_adapterhub", "load", "save"]
