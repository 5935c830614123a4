"""What ModelMint knows about models: recipes, artifacts, formats, the ruler, gates and provenance.

Nothing is imported here, so that child processes start small and `modelmint --help` answers at once.
"""

__version__ = "0.1.0"
